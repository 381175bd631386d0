"""Random graphs with planted dead structure: the compressed graph computes the same, and is no larger."""

from __future__ import annotations

import numpy as np
import pytest
from graph_steps import graphs, grown
from graphs import SeededChooser, difference, failure, rounding, run, shrunk, weight_elements
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SEEDED = 100
DRAWN = 100
QUIET = tuple(HealthCheck)


@settings(max_examples=DRAWN, derandomize=True, deadline=None, suppress_health_check=QUIET, database=None)
@given(graphs(), st.sampled_from(["off", "off", 4, 16]))
def test_compressed_graphs_compute_the_same(case, align):
    """Hypothesis's graphs come out equal and not larger."""
    assert failure(case, align, floor=False) is None


@pytest.mark.parametrize("first", range(0, SEEDED, 20))
def test_seeded_graphs_compute_the_same(first):
    """The nightly command's first graphs, which are larger than hypothesis's."""
    wrong = {
        seed: text
        for seed in range(first, first + 20)
        if (text := failure(grown(SeededChooser(seed), seed), 4 if seed % 4 == 0 else "off", floor=False))
    }
    assert wrong == {}


def test_a_second_compression_gains_nothing():
    """Without alignment one compression reaches the floor."""
    cases = [grown(SeededChooser(seed), seed) for seed in range(SEEDED)]
    results = [shrunk(case.model) for case in cases]
    again = [shrunk(result) for result in results]
    changed = [
        seed
        for seed, (one, two) in enumerate(zip(results, again, strict=True))
        if weight_elements(one) != weight_elements(two)
    ]
    assert changed == []


def test_many_graphs_become_smaller():
    """The planted structure is there to be removed: most graphs with weights lose some."""
    cases = [grown(SeededChooser(seed), seed) for seed in range(60)]
    smaller = sum(weight_elements(shrunk(case.model)) < weight_elements(case.model) for case in cases)
    assert smaller >= 25


def test_a_wrong_result_is_told_apart():
    """Negative control: a small change of one weight of a graph counts as a difference."""
    told = 0
    for seed in range(12):
        case = grown(SeededChooser(seed), seed)
        expected = run(case.model, case.feeds)
        slack = rounding(case.model, case.feeds, expected)
        changed = type(case.model).FromString(case.model.SerializeToString())
        for tensor in changed.graph.initializer:
            if tensor.name.startswith(("w", "b")):
                array = np.frombuffer(tensor.raw_data, np.float32) * np.float32(1.01)
                tensor.raw_data = array.tobytes()
        told += difference(expected, run(changed, case.feeds), slack) is not None
    assert told >= 8
