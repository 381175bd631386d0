"""Verdicts follow from sessions, on samples whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from etp_deploy.bench.latency import Race, Round, SessionSample
from etp_deploy.bench.statistics import Interval, equal, log_ratio_interval, summary, verdict

MOST = 12


def simulated(rng, truth, *, bias=0.01, noise=0.01, runs=40, sessions=MOST):
    """Rounds of a baseline, a contender and a control whose sessions each have a bias of their own."""

    def session(level):
        own = math.exp(level + rng.normal(0, bias))
        times = tuple(int(1e6 * own * math.exp(rng.normal(0, noise))) for _ in range(runs))
        return SessionSample(times, times, 2, 0, 0)

    return tuple(Round((session(0.0), session(math.log(truth))), session(0.0)) for _ in range(sessions))


def sequential_verdict(rounds):
    """The first verdict of a race that stops as soon as it has one."""
    for count in range(2, len(rounds) + 1):
        so_far = Race("cpu", rounds[:count], "")
        if so_far.verdict(1) != "undecided":
            return so_far.verdict(1)
    return "undecided"


def test_equal_models_are_rarely_called_different():
    """Looking after every session calls at most five percent of equal pairs different."""
    rng = np.random.default_rng(0)
    called = [sequential_verdict(simulated(rng, 1.0)) for _ in range(200)]
    assert sum(v != "undecided" for v in called) <= 10


def test_runs_as_units_would_err():
    """Negative control: the same samples with runs as units call far more equal pairs different."""
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        (one,) = simulated(rng, 1.0, sessions=1)
        wrong += stats.ttest_ind(one.samples[0].wall, one.samples[1].wall).pvalue < 0.05
    assert wrong > 30


@pytest.mark.parametrize(("truth", "expected"), [(1.1, "slower"), (1 / 1.1, "faster")])
def test_ten_percent_is_found_with_ten_sessions(truth, expected):
    """A true difference of ten percent is found in nine of ten trials, in the right direction."""
    rng = np.random.default_rng(1)
    called = [sequential_verdict(simulated(rng, truth, bias=0.02, sessions=10)) for _ in range(50)]
    assert called.count(expected) >= 45


def test_interval_is_students():
    """The interval is Student's t on logs, computed independently."""
    logs = [0.1, 0.12, 0.07, 0.11, 0.1]
    found = log_ratio_interval(logs, 0.95)
    low, high = stats.t.interval(0.95, 4, np.mean(logs), stats.sem(logs))
    assert [found.low, found.high] == pytest.approx(np.exp([low, high]).tolist())
    assert found.ratio == pytest.approx(math.exp(np.mean(logs)))


def test_too_few_sessions_decide_nothing():
    """Neither one session nor four, however clear they look."""
    assert math.isnan(log_ratio_interval([0.5]).low)
    assert math.isnan(log_ratio_interval([]).ratio)
    control = Interval(1.0, 0.999, 1.001, 9)
    assert verdict(log_ratio_interval([0.5]), control) == "undecided"
    assert verdict(Interval(2.0, 1.9, 2.1, 4), control) == "undecided"
    assert verdict(Interval(2.0, 1.9, 2.1, 5), control) == "slower"


def test_no_verdict_inside_the_control():
    """A clear interval counts for nothing when the model differs from itself by as much."""
    clear = Interval(0.95, 0.94, 0.96, 10)
    assert verdict(clear, Interval(1.0, 0.99, 1.01, 10)) == "faster"
    assert verdict(clear, Interval(1.0, 0.94, 1.06, 10)) == "undecided"
    assert verdict(clear, log_ratio_interval([])) == "undecided"


def test_equal_needs_a_narrow_interval():
    """Only an interval within one percent says that any difference is negligible."""
    assert equal(Interval(1.0, 0.995, 1.005, 8))
    assert not equal(Interval(1.0, 0.98, 1.02, 8))
    assert not equal(Interval(1.0, 0.999, 1.001, 3))


def test_drift_cancels():
    """A machine that slows down steadily during a round does not change the ratio."""
    # blocks of two runs in the order A B A' A' B A, time growing by one unit from block to block
    place = {"A": (0, 5), "B": (1, 4), "C": (2, 3)}
    samples = {}
    for name, (first, second) in place.items():
        times = (1000 + first, 1000 + first, 1000 + second, 1000 + second)
        samples[name] = SessionSample(times, times, 1, 0, 0)
    one = Round((samples["A"], samples["B"]), samples["C"])
    assert one.log_ratio(1, "wall") == pytest.approx(0, abs=1e-5)
    assert one.control_log_ratio("wall") == pytest.approx(0, abs=1e-5)


def test_one_disturbed_pass_is_outvoted():
    """A pass in which one model was disturbed does not move the round's ratio."""
    steady = SessionSample((1000,) * 10, (1000,) * 10, 5, 0, 0)
    disturbed = SessionSample((1000,) * 8 + (9000,) * 2, (1000,) * 10, 5, 0, 0)
    assert Round((steady, disturbed), steady).log_ratio(1, "wall") == 0


def test_percentiles():
    """Percentiles, mean, least and count of known numbers."""
    found = summary(range(1, 101))
    assert found["p50"] == pytest.approx(50.5)
    assert found["p99"] == pytest.approx(99.01)
    assert (found["mean"], found["min"], found["samples"]) == (50.5, 1, 100)
