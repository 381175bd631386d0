"""Initializers that the surgery adds to a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import numpy as np


def constant(graph: ir.Graph, array: np.ndarray, name: str) -> ir.Value:
    """Add an initializer with a name that is not taken yet."""
    unique, suffix = name, 0
    while unique in graph.initializers:
        suffix += 1
        unique = f"{name}_{suffix}"
    value = ir.Value(
        name=unique,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.Tensor(array, name=unique),
    )
    graph.register_initializer(value)
    return value
