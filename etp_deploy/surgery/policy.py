"""Alignment: which dead channels to keep because the target's kernels want round counts.

ONNX Runtime's CPU convolutions leave their blocked layout when an input channel count is no multiple of four, and
work in blocks of 8 (AVX2) or 16 (AVX-512) inside it; a network of 63 channels then runs slower than one of 64. Matrix
products show no such cliff and are left exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.errors import UsageError
from etp_deploy.surgery.statements.contraction import Contraction

if TYPE_CHECKING:
    from etp_deploy.surgery.analysis import Analysis, Fill


@dataclass(frozen=True)
class Target:
    """What the convolutions of an execution provider want, on one kind of processor.

    Attributes:
        name: as `--target` takes it.
        multiples: of which numbers channel counts are worth trying to be multiples, smallest first; 1 is exact.
        rule: the one of these to take where nothing can be measured.
    """

    name: str
    multiples: tuple[int, ...]
    rule: int


HOST = "host"
"""The target that is the machine at hand, on which candidates can be measured."""

TARGETS = {
    target.name: target
    for target in (
        Target("cpu-avx2", (1, 4, 8), 4),
        Target("cpu-avx512", (1, 4, 8, 16), 4),
        Target("arm64", (1, 4, 8), 4),
        # tensor cores take multiples of 8 in half precision
        Target("cuda", (1, 8), 8),
        Target("none", (1,), 1),
    )
}


def target_named(name: str) -> Target:
    """Return a target by its name.

    Raises:
        UsageError: where there is none.
    """
    if name not in TARGETS:
        raise UsageError("there is no such target", where=name, hint=f"one of {', '.join((HOST, *TARGETS))}")
    return TARGETS[name]


def alignment(align: str | int, target: Target) -> int:
    """Return what an `--align` value wants counts of channels to be multiples of; 1 is exact.

    Args:
        align: "off", a number, or "auto", which is the target's rule.
        target: what is planned for.

    Raises:
        UsageError: for anything else.
    """
    if align in {"off", "auto"}:
        return 1 if align == "off" else target.rule
    try:
        multiple = int(align)
    except ValueError:
        multiple = 0
    if multiple < 1:
        raise UsageError(
            "alignment is auto, off or a positive number", where=str(align), hint="try --align 16"
        )
    return multiple


def multiple_fill(multiple: int) -> Fill | None:
    """Return the policy that keeps convolutions' channel counts at multiples of a number; None for 1."""

    def fill(analysis: Analysis) -> bool:
        grown = [_fill_data(analysis, says, multiple) for says in convolutions(analysis)]
        return any(grown)

    return None if multiple == 1 else fill


def convolutions(analysis: Analysis) -> list[Contraction]:
    """Return the statements of a graph's convolutions."""
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
