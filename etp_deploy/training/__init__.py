"""Training with Exponential Torque Pruning: a regulariser for PyTorch networks. It needs torch."""

from __future__ import annotations

from etp_deploy.training.blueprint import Blueprint, Price
from etp_deploy.training.controller import Controller
from etp_deploy.training.cost import Cost, LatencyCost, PlannedCost
from etp_deploy.training.coupling import coupled_groups, removable_share
from etp_deploy.training.dying import GroupStatistics
from etp_deploy.training.forces import PAPER_STEEPNESS, REFERENCE_STEEPNESS, steepness_for
from etp_deploy.training.importance import removal_order, sensitivity
from etp_deploy.training.modules import (
    Group,
    Part,
    discover,
    neurons,
    packed_heads,
    separate_heads,
)
from etp_deploy.training.progress import Progress
from etp_deploy.training.recording import Recorder
from etp_deploy.training.regularizer import REFERENCE_THRESHOLD, TorqueRegularizer
from etp_deploy.training.regularizers import (
    METHODS,
    GrowingRegularizer,
    SlimmingRegularizer,
    make,
)
from etp_deploy.training.schedule import Schedule
from etp_deploy.training.scheduled import Scheduled, Update

__all__ = [
    "METHODS",
    "PAPER_STEEPNESS",
    "REFERENCE_STEEPNESS",
    "REFERENCE_THRESHOLD",
    "Blueprint",
    "Controller",
    "Cost",
    "Group",
    "GroupStatistics",
    "GrowingRegularizer",
    "LatencyCost",
    "Part",
    "PlannedCost",
    "Price",
    "Progress",
    "Recorder",
    "Schedule",
    "Scheduled",
    "SlimmingRegularizer",
    "TorqueRegularizer",
    "Update",
    "coupled_groups",
    "discover",
    "make",
    "neurons",
    "packed_heads",
    "removable_share",
    "removal_order",
    "sensitivity",
    "separate_heads",
    "steepness_for",
]
