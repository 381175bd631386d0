"""How often a benchmark calls equal models different, and how often it finds a true ten percent.

The same model is measured against itself (A/A), and ten equal layers against eleven (A/B), by the sequential
mean that onnxruntime_perf_test prints (one session for A, then one for B; a difference counts when Welch's
test says so at 95 %, or when the means differ by more than 2 %) and by our interleaved sessions. Trials are
kept in the result file as they finish: stopped, the command goes on where it was.

    python benchmarks/peers/error_rates.py [-o benchmarks/results/error_rates.json]
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from etp_deploy.bench import environment
from etp_deploy.bench.latency import Entrant, Limits, race
from etp_deploy.bench.sessions import Setting, bind_host, open_session
from etp_deploy.bench.statistics import t_quantile
from etp_deploy.files import write_text
from etp_deploy.inputs import draw_inputs, input_specs

sys.path.insert(0, str(Path(__file__).parent.parent))
from pairs import equal_layers

RESULTS = Path(__file__).parent.parent / "results" / "error_rates.json"
SEQUENTIAL_SECONDS = 0.5
LEAST_DIFFERENCE = 0.02
ALLOWED_FALSE = 0.05
WANTED_FOUND = 0.90


def sequential(pair: list[Entrant]) -> dict[str, Any]:
    """One session after the other, one warm-up run, all runs' mean: what onnxruntime_perf_test does."""
    samples = []
    for entrant in pair:
        call = bind_host(open_session(entrant.path, Setting()), entrant.inputs)
        call()
        times, begin = [], time.perf_counter()
        while time.perf_counter() - begin < SEQUENTIAL_SECONDS:
            start = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - start)
        samples.append(times)
    means = [statistics.mean(times) for times in samples]
    errors = [statistics.variance(times) / len(times) for times in samples]
    degrees = sum(errors) ** 2 / sum(e**2 / (len(t) - 1) for e, t in zip(errors, samples, strict=True))
    significant = abs(means[1] - means[0]) > t_quantile(round(degrees), 0.975) * math.sqrt(sum(errors))
    ratio = means[1] / means[0]
    return {
        "ratio": ratio,
        "welch": verdict_of(ratio) if significant else "undecided",
        "threshold": verdict_of(ratio) if abs(ratio - 1) > LEAST_DIFFERENCE else "undecided",
    }


def verdict_of(ratio: float) -> str:
    """Which way the difference goes."""
    return "slower" if ratio > 1 else "faster"


def ours(pair: list[Entrant], sessions: int) -> dict[str, Any]:
    """Interleaved sessions until decided."""
    timed = race(pair, Setting(), Limits(sessions, 60.0))
    found = timed.ratio(1)
    return {
        "ratio": found.ratio,
        "wall_ratio": timed.ratio(1, "wall").ratio,
        "low": found.low,
        "high": found.high,
        "sessions": found.sessions,
        "verdict": timed.verdict(1),
    }


def summarize(trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of trials called different, for both kinds of pairs, and the range of the estimates."""
    found: dict[str, Any] = {}
    for kind, right in (("A/A", "undecided"), ("A/B", "slower")):
        own = [trial for trial in trials if trial["kind"] == kind]
        if not own:
            continue
        verdicts = {
            "ours": [trial["ours"]["verdict"] for trial in own],
            "sequential, Welch": [trial["sequential"]["welch"] for trial in own],
            "sequential, 2 %": [trial["sequential"]["threshold"] for trial in own],
        }
        estimates = {
            "ours": [trial["ours"]["ratio"] for trial in own],
            "ours, wall": [trial["ours"]["wall_ratio"] for trial in own],
            "sequential": [trial["sequential"]["ratio"] for trial in own],
        }
        found[kind] = {
            "trials": len(own),
            "right": {name: sum(v == right for v in given) / len(given) for name, given in verdicts.items()},
            "estimates": {
                name: {"min": min(v), "median": statistics.median(v), "max": max(v)}
                for name, v in estimates.items()
            },
            "sessions": statistics.mean(trial["ours"]["sessions"] for trial in own),
        }
    return found


def passed(summary: dict[str, Any]) -> bool:
    """Whether our own rates are what is promised."""
    false = 1 - summary["A/A"]["right"]["ours"]
    return bool(false <= ALLOWED_FALSE and summary["A/B"]["right"]["ours"] >= WANTED_FOUND)


def main() -> int:
    """Run the trials that are missing and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    parser.add_argument("--trials", type=int, default=200, help="of each kind")
    parser.add_argument("--sessions", type=int, default=10, help="most sessions of ours in a trial")
    options = parser.parse_args()
    trials = json.loads(options.output.read_text())["trials"] if options.output.exists() else []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        paths = {layers: equal_layers(Path(folder, f"{layers}.onnx"), layers) for layers in (10, 11)}
        entrants = {n: Entrant(path, draw_inputs(input_specs(path), seed=0)) for n, path in paths.items()}
        # the kinds alternate, so that both see the same weather
        while len(trials) < 2 * options.trials:
            kind = ("A/A", "A/B")[len(trials) % 2]
            pair = [entrants[10], entrants[10 if kind == "A/A" else 11]]
            trial = {"kind": kind, "load": environment.load_average()}
            trials.append({**trial, "ours": ours(pair, options.sessions), "sequential": sequential(pair)})
            summary = summarize(trials)
            document = {
                "schema": "etp-deploy/error-rates/1",
                "environment": environment.describe(),
                "sessions": options.sessions,
                "summary": summary,
                "trials": trials,
            }
            write_text(options.output, json.dumps(document, indent=1) + "\n")
            if len(trials) % 10 == 0:
                print(f"{len(trials)} of {2 * options.trials}", file=sys.stderr)
    summary = summarize(trials)
    for kind, found in summary.items():
        print(f"{kind}, {found['trials']} trials, {found['sessions']:.1f} sessions of ours on average")
        for name, share in found["right"].items():
            print(f"  {name:18} right in {share:6.1%}")
        for name, spread in found["estimates"].items():
            print(
                f"  {name:18} ratio {spread['min']:.3f} to {spread['max']:.3f}, median {spread['median']:.3f}"
            )
    return 0 if passed(summary) else 1


if __name__ == "__main__":
    sys.exit(main())
