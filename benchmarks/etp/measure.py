"""A trained network as a file: exported, compressed, compared with PyTorch example by example, and timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import training

from etp_deploy.bench import benchmark
from etp_deploy.bench.sessions import Setting, open_session
from etp_deploy.exporting import export
from etp_deploy.pipeline import compress

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from data import Split
    from tasks import Kind
    from torch import nn

#: Values agree when they are this close, relative to their largest.
AGREEMENT = 1e-4
BENCH_SECONDS = 2.0


@dataclass(frozen=True)
class Files:
    """A network's file as exported, and compressed."""

    exported: Path
    compressed: Path


def write(network: nn.Module, split: Split, files: Files) -> dict[str, Any]:
    """Export a network of full size and compress it; return the sizes before and after.

    Args:
        network: in evaluation mode.
        split: examples of its inputs.
        files: where to.
    """
    names = input_names(network, split)
    example = {name: tensor[:2] for name, tensor in zip(names, split.inputs, strict=True)}
    dynamic = [f"{name}.0=batch" for name in names]
    report = export(network, example, files.exported, dynamic=dynamic, samples=1)
    done = compress(files.exported, files.compressed, align="off", simplify=False)
    before, after = done.before, done.after
    return {
        "parameters": {"exported": before.parameters, "compressed": after.parameters},
        "macs": {"exported": before.macs, "compressed": after.macs},
        "bytes": {"exported": before.bytes, "compressed": after.bytes},
        "removed": done.removed,
        "export_error": report.max_rel_error,
    }


def input_names(network: nn.Module, split: Split) -> list[str]:
    """Return the names of the arguments that the inputs are for."""
    count = network.forward.__code__.co_argcount
    return list(network.forward.__code__.co_varnames[1:count])[: len(split.inputs)]


def equality(network: nn.Module, path: Path, split: Split, kind: Kind) -> dict[str, Any]:
    """Compare a file's answers with PyTorch's for every example.

    Classes and labels are equal or not; values count as equal when they are within `AGREEMENT` of the largest.
    """
    wanted = training.outputs(network, split).numpy()
    session = open_session(path, Setting())
    names = input_names(network, split)
    parts = []
    for start in range(0, len(split), 100):
        part = split.take(slice(start, start + 100))
        feeds = {name: tensor.numpy() for name, tensor in zip(names, part.inputs, strict=True)}
        parts.append(session.run(None, feeds)[0])
    found = np.concatenate(parts)
    error = np.abs(found - wanted).reshape(len(wanted), -1).max(1) / np.abs(wanted).max()
    said = kind.answers(torch.from_numpy(found)).numpy()
    meant = kind.answers(torch.from_numpy(wanted)).numpy()
    same = error <= AGREEMENT if meant.dtype.kind == "f" else (said == meant).reshape(len(meant), -1).all(1)
    return {"examples": len(wanted), "equal": int(same.sum()), "largest_error": float(error.max())}


def timing(dense: Path, small: Path, network: nn.Module, split: Split, seconds: float) -> dict[str, Any]:
    """Time a compressed file against the dense one in the same run: one example, one thread, CPU."""
    names = input_names(network, split)
    inputs = {name: tensor[:1].numpy() for name, tensor in zip(names, split.inputs, strict=True)}
    result = benchmark(
        [dense, small], batch=1, inputs=inputs, max_seconds=seconds, memory_repeats=1, dead_channels=False
    )
    comparison = result.comparisons[0]
    before, after = result.measurements
    return {
        "ratio": comparison.interval.ratio,
        "low": comparison.interval.low,
        "high": comparison.interval.high,
        "verdict": comparison.verdict,
        "median_ms": {"dense": before.latency_ms["p50"], "compressed": after.latency_ms["p50"]},
        "memory": {"dense": _memory(before.memory), "compressed": _memory(after.memory)},
        "cautions": sorted({caution.name for caution in result.warnings}),
    }


def _memory(used: Mapping[str, Any] | None) -> dict[str, Any]:
    names = ("weights_bytes", "activation_peak_bytes", "peak_above_idle_bytes")
    return {} if used is None else {name: used[name] for name in names}
