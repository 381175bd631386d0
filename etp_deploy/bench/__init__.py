"""Latency and memory of ONNX models in ONNX Runtime, measured so that the verdict can be believed.

Names load when first used: the isolated child processes that memory is measured in import this package too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etp_deploy.bench.results import BenchmarkResult as BenchmarkResult
    from etp_deploy.bench.runner import benchmark as benchmark

_HOMES = {"BenchmarkResult": "etp_deploy.bench.results", "benchmark": "etp_deploy.bench.runner"}

__all__ = ["BenchmarkResult", "benchmark"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
