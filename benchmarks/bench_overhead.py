"""Is the median that the benchmark reports that of a bare loop?

In one session, blocks of the benchmark's own timing loop alternate with blocks of a bare loop around the same
call, and their medians are compared: each block of one beside a block of the other, in mirrored order.

    python benchmarks/bench_overhead.py [MODEL.onnx]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from etp_deploy.bench.latency import time_runs
from etp_deploy.bench.sessions import Setting, bind_host, open_session
from etp_deploy.inputs import draw_inputs, input_specs

sys.path.insert(0, str(Path(__file__).parent))
from pairs import equal_layers

if TYPE_CHECKING:
    from collections.abc import Callable

ALLOWED = 0.01
BLOCK_RUNS = 20


def bare(call: Callable[[], object], count: int) -> list[int]:
    """Time each call, and do nothing else."""
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return times


def main() -> int:
    """Compare the two loops and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="default: ten small convolutions")
    parser.add_argument("--blocks", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or equal_layers(Path(folder, "model.onnx"), 10)
        call = bind_host(open_session(model, Setting()), draw_inputs(input_specs(model), seed=0))
        bare(call, 50)
        pairs = []
        for block in range(options.blocks):
            ours_first = block % 2 == 0
            first = time_runs(call, BLOCK_RUNS)[0] if ours_first else bare(call, BLOCK_RUNS)
            second = bare(call, BLOCK_RUNS) if ours_first else time_runs(call, BLOCK_RUNS)[0]
            pairs.append((first, second) if ours_first else (second, first))
    ours, plain = ([t for pair in pairs for t in pair[side]] for side in (0, 1))
    ratio = statistics.median(ours) / statistics.median(plain)
    print(
        json.dumps(
            {"schema": "etp-deploy/overhead/1", "ratio": ratio, "median_us": statistics.median(plain) / 1e3}
        )
    )
    return 0 if abs(ratio - 1) <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
