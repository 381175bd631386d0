"""Random torch networks with planted dead structure, exported, through the surgery, against ONNX Runtime.

Each network is exported (every fourth by dynamo, the others by way of TorchScript) and compressed (every fourth of
the others with an alignment). The outputs must be equal, the weights must not grow, and a second compression must
find nothing more. Each failure is one line, and its model is saved. A seed is a network, whatever came before it.

    python benchmarks/fuzz_networks.py --networks 400 --seed 0 --failures /tmp/failures
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import torch
from graphs import Case, SeededChooser, failure, shrunk, weight_elements
from random_networks import FAMILIES, network

from etp_deploy.errors import ExportError
from etp_deploy.exporting import export

ALIGNMENTS = (4, 16, 3, 8)
REPORT_SECONDS = 20.0


def exporter(seed: int) -> str:
    """Return which exporter a seed is exported by."""
    return "dynamo" if seed % 4 == 3 else "torchscript"


def alignment(seed: int) -> str | int:
    """Return the alignment that a seed is tried with."""
    return ALIGNMENTS[seed // 4 % 4] if seed % 4 == 0 else "off"


def exported(family: str, seed: int, path: Path) -> Case:
    """Return a seed's network as ONNX, with inputs."""
    net, example = network(family, SeededChooser(seed), seed)
    dynamic = ("x.0=batch",) if seed % 3 == 0 else ()
    how = exporter(seed)
    opset = 20 if how == "dynamo" else 17
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(net, example, path, dynamic=dynamic, exporter=how, opset=opset, check=False)
    return Case(onnx.load(path), {name: tensor.numpy() for name, tensor in example.items()})


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="the first network's seed; the others count on")
    parser.add_argument("--only", choices=FAMILIES, help="one family instead of all in turn")
    parser.add_argument(
        "--failures", type=Path, default=Path("fuzz-failures"), help="where failing models go"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    families = list(FAMILIES)
    started = reported = time.monotonic()
    failed = smaller = refused = 0
    for number in range(options.networks):
        seed = options.seed + number
        family = options.only or families[seed // 4 % len(families)]
        with tempfile.TemporaryDirectory() as folder:
            try:
                case = exported(family, seed, Path(folder) / "model.onnx")
            except ExportError as error:
                refused += 1
                print(f"seed {seed}, {family}, {exporter(seed)}: not exported: {error.message}", flush=True)
                continue
        text = failure(case, alignment(seed))
        if text is None:
            smaller += weight_elements(shrunk(case.model)) < weight_elements(case.model)
        else:
            failed += 1
            options.failures.mkdir(parents=True, exist_ok=True)
            onnx.save(case.model, options.failures / f"{seed}.onnx")
            np.savez(options.failures / f"{seed}.npz", **case.feeds)
            print(f"seed {seed}, {family}, {exporter(seed)}, align {alignment(seed)}: {text}", flush=True)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            rate = (number + 1) / (reported - started)
            done = f"{number + 1} of {options.networks} networks"
            print(f"{done}, {failed} failures, {rate:.1f} a second", file=sys.stderr, flush=True)
    print(f"{options.networks} networks, {refused} not exported, {smaller} became smaller, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
