"""What alignment gains: zoo networks at odd widths, dense against native, exact, multiples of 4, 8, 16 and auto.

    python benchmarks/alignment.py                       # all networks and keep ratios; resumes where it stopped
    python benchmarks/alignment.py --networks vgg resnet --keep 0.5

Each network is built at eight times the test suite's widths and planted so that an odd number of channels, heads or
neurons stays of every width. Dense, native (built small, at the exact widths) and each compressed model are timed in
one interleaved run on one thread of the CPU provider; every ratio is against dense. Results go to
`benchmarks/results/alignment.json` and a table in `alignment.md` beside it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from zoo.export import export
from zoo.networks import ZOO, Network
from zoo.planting import Planting, plant

from etp_deploy.bench.environment import describe
from etp_deploy.bench.runner import benchmark
from etp_deploy.pipeline import compress

RESULTS = Path(__file__).parent / "results" / "alignment.json"
WIDEN = 8
KEEP = (0.9, 0.75, 0.5, 0.3)
FIXED = ("off", "4", "8", "16")
# widths that are head counts or channels of a group stay as they are
NARROW = ("heads", "kv", "per")
# auto may be this much slower than the better of the fixed alignments
SLACK = 1.03
NETWORKS = (
    *("vgg", "vgg-pool", "resnet", "resnet-bottleneck", "mobilenetv2", "resnext", "densenet", "shufflenetv2"),
    *("unet", "mobilenetv3", "conv1d", "conv3d", "vit", "bert-eager", "gpt2", "swin", "lstm"),
)


def widened(network: Network) -> Network:
    """Return a network at the widths of real ones."""
    widths = {
        key: width if key.startswith(NARROW) else width * WIDEN for key, width in network.widths.items()
    }
    return replace(network, widths=widths)


def files(name: str, keep: float, folder: Path) -> dict[str, Path]:
    """Write the dense, the native and the compressed models of one network."""
    network = widened(ZOO[name])
    made = {key: folder / f"{key}.onnx" for key in ("dense", "native", *FIXED, "auto")}
    net = network.build()
    zeros = "weights" if network.constants else "all"
    planted = plant(net, Planting(share=1 - keep, zeros=zeros, odd=True))
    export(net, network, made["dense"], exporter=network.quickest)
    export(network.build(planted.live), network, made["native"], exporter=network.quickest)
    for align in (*FIXED, "auto"):
        compress(made["dense"], made[align], align=align, verify=False, simplify=False)
    return made


def measure(name: str, keep: float, sessions: int, seconds: float) -> dict[str, Any]:
    """Return each model's time against the dense one's, with its interval."""
    with tempfile.TemporaryDirectory() as folder:
        made = files(name, keep, Path(folder))
        result = benchmark(
            list(made.values()), sessions=sessions, max_seconds=seconds, memory=False, dead_channels=False
        )
        bytes_of = {key: path.stat().st_size for key, path in made.items()}
    clock = result.measurements[0].cpu_time_ms or result.measurements[0].latency_ms
    return {
        "dense_us": clock["p50"] * 1000,
        "ratio": {
            key: {"time": item.interval.ratio, "low": item.interval.low, "high": item.interval.high}
            for key, item in zip(list(made)[1:], result.comparisons, strict=True)
        },
        "bytes": bytes_of,
    }


def table(cells: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table with what holds of all rows below it."""
    columns = ("native", *FIXED, "auto")
    lines = [
        f"| network | keep | dense | {' | '.join(columns)} | auto / best fixed | auto / native |",
        "|---|---:|" + "---:|" * (len(columns) + 3),
    ]
    to_best, to_native = [], []
    for key, cell in cells.items():
        name, keep = key.split("@")
        ratio = {column: cell["ratio"][column]["time"] for column in columns}
        best = ratio["auto"] / min(ratio[column] for column in FIXED)
        native = ratio["auto"] / ratio["native"]
        to_best.append(best)
        to_native.append(native)
        times = " | ".join(f"{ratio[column]:.3f}" for column in columns)
        lines.append(f"| {name} | {keep} | {cell['dense_us']:.0f} us | {times} | {best:.3f} | {native:.3f} |")
    within = sum(value <= SLACK for value in to_best)
    slower = sum(cell["ratio"]["auto"]["time"] > 1 for cell in cells.values())
    mean = math.exp(sum(map(math.log, to_native)) / len(to_native))
    lines += [
        "",
        (
            f"auto within {SLACK - 1:.0%} of the best fixed alignment: {within} of {len(to_best)}; "
            f"geometric mean {math.exp(sum(map(math.log, to_best)) / len(to_best)):.3f}."
        ),
        f"auto slower than dense: {slower}. auto against native, geometric mean: {mean:.3f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what has not been measured yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--keep", nargs="+", type=float, default=KEEP)
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="measure also what is in the results already")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    document = json.loads(options.output.read_text()) if options.output.exists() else {"cells": {}}
    for name in options.networks:
        for keep in options.keep:
            key = f"{name}@{keep:g}"
            if key in document["cells"] and not options.again:
                continue
            print(key, file=sys.stderr, flush=True)
            document["cells"][key] = measure(name, keep, options.sessions, options.seconds)
            document["environment"] = describe()
            options.output.write_text(json.dumps(document, indent=1) + "\n")
    text = table(document["cells"])
    options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
