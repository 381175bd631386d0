"""Training with Exponential Torque Pruning: a regulariser for PyTorch networks. It needs torch."""

from __future__ import annotations

from etp_deploy.training.modules import (
    Group,
    Part,
    discover,
    neurons,
    packed_heads,
    separate_heads,
)
from etp_deploy.training.regularizer import (
    PAPER_STEEPNESS,
    REFERENCE_STEEPNESS,
    REFERENCE_THRESHOLD,
    GroupStatistics,
    TorqueRegularizer,
)

__all__ = [
    "PAPER_STEEPNESS",
    "REFERENCE_STEEPNESS",
    "REFERENCE_THRESHOLD",
    "Group",
    "GroupStatistics",
    "Part",
    "TorqueRegularizer",
    "discover",
    "neurons",
    "packed_heads",
    "separate_heads",
]
