"""Is the median that the benchmark reports that of a bare loop?

In one session, blocks of the benchmark's own timing loop alternate with blocks of a bare loop around the same
call, in mirrored order, and the medians of neighbouring blocks are compared; the ratio given is the middling
one, with a 95 % interval by bootstrap. Done for calls from tens of microseconds to milliseconds, or for the
models given.

    python benchmarks/peers/overhead.py [-o benchmarks/results/overhead.json] [MODEL.onnx ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etp_deploy.bench import environment
from etp_deploy.bench.latency import BLOCK_RUNS, BLOCK_SECONDS, runs_on_cpu_clock, time_runs
from etp_deploy.bench.sessions import Setting, bind_host, open_session
from etp_deploy.files import write_text
from etp_deploy.inputs import draw_inputs, input_specs

sys.path.insert(0, str(Path(__file__).parent.parent))
from pairs import equal_layers

if TYPE_CHECKING:
    from collections.abc import Callable

ALLOWED = 0.01
# layers, channels, image size: from a call of tens of microseconds up
OWN_MODELS = ((1, 4, 6), (2, 8, 12), (10, 16, 24), (10, 32, 32))


def bare(call: Callable[[], object], count: int) -> list[int]:
    """Time each call, and do nothing else."""
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return times


def compare(model: Path, blocks: int) -> dict[str, Any]:
    """Run both loops on one model, as the benchmark would choose its blocks."""
    call = bind_host(open_session(model, Setting()), draw_inputs(input_specs(model), seed=0))
    typical = statistics.median(bare(call, 200)) / 1e9
    # five at least: the median of one long run is whatever disturbed it
    wanted = min(max(round(BLOCK_SECONDS / typical), 5), BLOCK_RUNS[1])
    cpu_runs = runs_on_cpu_clock(typical, wanted)
    runs = wanted - wanted % cpu_runs
    ratios, medians = [], []
    loops = {
        "ours": lambda: statistics.median(time_runs(call, runs, cpu_runs=cpu_runs)[0]),
        "bare": lambda: statistics.median(bare(call, runs)),
    }
    for block in range(blocks):
        first, second = ("ours", "bare") if block % 2 else ("bare", "ours")
        seen: dict[str, list[float]] = {"ours": [], "bare": []}
        for name in (first, second, second, first):
            seen[name].append(loops[name]())
        ratios.append(sum(seen["ours"]) / sum(seen["bare"]))
        medians += seen["bare"]
    again = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    low, high = np.percentile(np.median(again, axis=1), (2.5, 97.5))
    return {
        "model": model.name,
        "bare_median_us": statistics.median(medians) / 1e3,
        "ratio": statistics.median(ratios),
        "low": float(low),
        "high": float(high),
        "blocks": blocks,
        "runs_per_block": runs,
        "runs_per_cpu_clock": cpu_runs,
    }


def main() -> int:
    """Compare the two loops and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="*", help="default: chains of convolutions")
    parser.add_argument("--blocks", type=int, default=200, help="mirrored, for each model")
    parser.add_argument("-o", "--output", type=Path, help="also write the JSON document to a file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or [
            equal_layers(Path(folder, f"{layers}x{channels}.onnx"), layers, channels=channels, size=size)
            for layers, channels, size in OWN_MODELS
        ]
        seen = [compare(model, options.blocks) for model in models]
    passed = all(abs(found["ratio"] - 1) <= ALLOWED for found in seen)
    document = {
        "schema": "etp-deploy/overhead/2",
        "environment": environment.describe(),
        "allowed": ALLOWED,
        "passed": passed,
        "models": seen,
    }
    for found in seen:
        print(
            f"{found['model']:12} bare loop {found['bare_median_us']:8.1f} us, ours / bare "
            f"{found['ratio']:.4f} ({found['low']:.4f} to {found['high']:.4f})"
        )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps(document, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
