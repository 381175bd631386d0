"""What came of one network, as a row of the table."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from etp_deploy.modelfile import read_model
from etp_deploy.sizes import weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from etp_deploy.pipeline import CompressionReport


def elements(path: Path) -> int:
    """Return how many elements a file's floating-point constants have, equal ones counted once.

    Single numbers are left out (an epsilon, a scale): they are one exporter's initializers and another's constants.
    """
    arrays = (tensor.numpy() for tensor in weights(read_model(path)) if tensor.size > 1)
    found = {
        (array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()): array.size for array in arrays
    }
    return sum(found.values())


def outcome(report: CompressionReport, sizes: Sequence[int], planted: dict[str, int]) -> dict[str, Any]:
    """Return the row.

    Args:
        report: of the compression.
        sizes: elements of the planted network, at the floor, and compressed.
        planted: how many units of each kind can go.
    """
    assert report.verification is not None
    kept: dict[str, int] = {}
    for layer in report.layers:
        for text, count in layer.reasons:
            name = f"{text} [{layer.kind}]"
            kept[name] = kept.get(name, 0) + count
    return {
        "outcome": "at the floor" if sizes[2] <= sizes[1] else "pinned",
        "parameters": dict(zip(("planted", "floor", "compressed"), sizes, strict=True)),
        "planted": planted,
        "removed": report.removed,
        "kept_dead": kept,
        "max_rel_error": report.verification.max_rel_error,
        "samples": report.verification.samples,
        "notes": list(report.verification.notes),
        "compress_seconds": round(sum(report.seconds.values()), 1),
    }
