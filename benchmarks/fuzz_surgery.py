"""Random graphs with planted dead structure through the surgery, against ONNX Runtime: the nightly command.

Each graph is compressed (every fourth with an alignment), and its outputs are compared with the original's, with
the runtime's optimisations and without. The weights must not grow, and a second compression must find nothing
more. Each failure is shrunk and saved, as a model and its inputs.

    python benchmarks/fuzz_surgery.py --graphs 2000 --seed 0 --failures /tmp/failures
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from graph_steps import grown
from graphs import Case, SeededChooser, failure, reduced, shrunk, weight_elements

ALIGNMENTS = (4, 16, 3, 8)
REPORT_SECONDS = 20.0


def alignment(seed: int) -> str | int:
    """Return the alignment that a seed is tried with."""
    return ALIGNMENTS[seed // 4 % 4] if seed % 4 == 0 else "off"


def kind_of(text: str) -> str:
    """Return what sort of failure a text tells of."""
    return " ".join(text.split(":", maxsplit=1)[0].split()[:4])


def shrink(case: Case, align: str | int, kind: str) -> Case:
    """Return a smaller case that fails in the same way."""

    def fails(candidate: Case) -> bool:
        text = failure(candidate, align)
        return text is not None and kind_of(text) == kind

    return reduced(case, fails)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first graph's seed; the others count on")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="where failing models go"
    )
    parser.add_argument("--no-shrink", action="store_true", help="save failing models as they are")
    options = parser.parse_args()
    started = reported = time.monotonic()
    failures: collections.Counter[str] = collections.Counter()
    operators: collections.Counter[str] = collections.Counter()
    smaller = 0
    for number in range(options.graphs):
        seed = options.seed + number
        case = grown(SeededChooser(seed), seed)
        operators.update(node.op_type for node in case.model.graph.node)
        text = failure(case, alignment(seed))
        if text is None:
            smaller += weight_elements(shrunk(case.model)) < weight_elements(case.model)
        else:
            kind = kind_of(text)
            failures[kind] += 1
            small = case if options.no_shrink else shrink(case, alignment(seed), kind)
            options.failures.mkdir(parents=True, exist_ok=True)
            onnx.save(small.model, options.failures / f"{seed}.onnx")
            np.savez(options.failures / f"{seed}.npz", **small.feeds)
            nodes = ", ".join(node.op_type for node in small.model.graph.node)
            print(f"seed {seed}, align {alignment(seed)}: {text}\n    {nodes}", flush=True)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            rate = (number + 1) / (reported - started)
            done = f"{number + 1} of {options.graphs} graphs"
            print(
                f"{done}, {sum(failures.values())} failures, {rate:.0f} a second", file=sys.stderr, flush=True
            )
    print(f"{options.graphs} graphs of {len(operators)} operators, {sum(operators.values())} nodes")
    print(f"{smaller} became smaller, {sum(failures.values())} failed")
    for kind, count in failures.most_common():
        print(f"    {count:5d} {kind}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
