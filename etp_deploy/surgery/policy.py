"""Alignment: which dead channels to keep because the target's kernels want round counts.

ONNX Runtime's CPU convolutions leave their blocked layout when an input channel count is no multiple of four; a
network of 63 channels then runs slower than one of 64. Matrix products show no such cliff and are left exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.errors import UsageError
from etp_deploy.surgery.statements.contraction import Contraction

if TYPE_CHECKING:
    from etp_deploy.surgery.analysis import Analysis, Fill

AUTO_MULTIPLE = 4


def alignment(align: str | int) -> int:
    """Return what an `--align` value ("off", "auto" or a number) wants counts of channels to be multiples of.

    Raises:
        UsageError: for anything else.
    """
    if align in {"off", "auto"}:
        return 1 if align == "off" else AUTO_MULTIPLE
    try:
        multiple = int(align)
    except ValueError:
        multiple = 0
    if multiple < 1:
        raise UsageError(
            "alignment is auto, off or a positive number", where=str(align), hint="try --align 16"
        )
    return multiple


def alignment_fill(align: str | int) -> Fill | None:
    """Return the policy for an `--align` value.

    Raises:
        UsageError: for anything that is none.
    """
    multiple = alignment(align)
    if multiple == 1:
        return None

    def fill(analysis: Analysis) -> bool:
        grown = [_fill_data(analysis, says, multiple) for says in _convolutions(analysis)]
        return any(grown)

    return fill


def _convolutions(analysis: Analysis) -> list[Contraction]:
    return [
        says
        for says in analysis.statements.values()
        if isinstance(says, Contraction) and says.active and says.windowed
    ]


def _fill_data(analysis: Analysis, says: Contraction, multiple: int) -> bool:
    """Keep dead input channels of a convolution up to the next multiple (of each group's, where there are groups)."""
    kept = says.kept_inputs(analysis.state)
    if kept.shape[1] == 1:  # depthwise: the groups are the channels
        kept = kept.reshape(1, -1)
    wanted = np.zeros_like(kept)
    for group, row in enumerate(kept):
        count = int(row.sum())
        target = min(-(-count // multiple) * multiple, row.size)
        if count < target:
            wanted[group, np.flatnonzero(~row)[: target - count]] = True
    return says.keep_inputs(analysis.state, wanted.reshape(-1), f"rounded up to a multiple of {multiple} for")
