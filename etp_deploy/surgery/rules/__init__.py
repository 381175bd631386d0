"""One rule an operator; one file a family. Importing this package registers all of them."""

from etp_deploy.surgery.rules import (
    convolution,
    elementwise,
    linear,
    movement,
    normalization,
    recurrent,
    reduction,
)
from etp_deploy.surgery.rules.registry import RefusedError, covered, rule, statement

__all__ = [
    "RefusedError",
    "convolution",
    "covered",
    "elementwise",
    "linear",
    "movement",
    "normalization",
    "recurrent",
    "reduction",
    "rule",
    "statement",
]
