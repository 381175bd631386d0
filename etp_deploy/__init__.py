"""etp-deploy: Exponential Torque Pruning, deployed.

Train with the ETP regulariser (arXiv 2506.22015), export to ONNX, remove every dead channel, head and neuron
exactly, verify, benchmark in ONNX Runtime, and bundle for the edge. Names load when first used, so that
importing the package costs nothing and the runtime part needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etp_deploy.bench import benchmark as benchmark
    from etp_deploy.bundling import bundle as bundle
    from etp_deploy.exporting import export as export
    from etp_deploy.inspection import inspect as inspect
    from etp_deploy.pipeline import compress as compress
    from etp_deploy.training import TorqueRegularizer as TorqueRegularizer
    from etp_deploy.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "TorqueRegularizer": "etp_deploy.training",
    "benchmark": "etp_deploy.bench",
    "bundle": "etp_deploy.bundling",
    "compress": "etp_deploy.pipeline",
    "export": "etp_deploy.exporting",
    "inspect": "etp_deploy.inspection",
    "verify": "etp_deploy.verification",
}

__all__ = [
    "TorqueRegularizer",
    "__version__",
    "benchmark",
    "bundle",
    "compress",
    "export",
    "inspect",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # No submodule may carry one of these names: importing it would shadow the function.
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
