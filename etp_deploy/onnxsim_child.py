"""What a child process runs for `simplify`: onnxsim from file to file. Import it in no other process."""

from __future__ import annotations

import sys
from typing import Any, cast

# onnxsim imports torch where it finds it, for quantisation that nobody asks for here, and that takes seconds
cast("dict[str, Any]", sys.modules).setdefault("torch", None)

import onnx  # noqa: E402 - after the line above
import onnxsim  # noqa: E402


def run(source: str, destination: str) -> None:
    """Simplify one model file into another."""
    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(model, destination)
