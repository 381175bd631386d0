"""Weights that are nearly zero: `--zero-below`.

Quantised weights are left alone, stored behind DequantizeLinear or read by operators on integers: on their grid
whatever is below half a step is zero already, and the next one is a step that training or calibration chose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.shapes import is_parameter

if TYPE_CHECKING:
    from collections.abc import Iterator

# where each operator keeps its weight, and the weight's axis of output channels
_WEIGHTS = {"Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, 1), "MatMul": (1, 1)}


def _weights(graph: ir.Graph) -> Iterator[tuple[ir.Value, int]]:
    """Yield each weight once, with its axis of output channels."""
    seen: set[ir.Value] = set()
    for node in graph.all_nodes():
        index, axis = _WEIGHTS.get(node.op_type, (None, 0))
        if index is None or node.domain != "":
            continue
        value = node.inputs[index]
        if value is None or not is_parameter(value) or value.const_value is None or value in seen:
            continue
        seen.add(value)
        if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
            axis = 0
        array = value.const_value
        if array.dtype.is_floating_point() and len(array.shape) >= 2:
            yield value, axis


def with_zeros(model: ir.Model, share: float) -> ir.Model:
    """Return a model in which weights below a share of their layer's largest are zero; the given one stays."""
    model = model.clone()
    for value, _ in _weights(model.graph):
        assert value.const_value is not None
        array = value.const_value.numpy()
        small = np.abs(array) < share * np.abs(array).max(initial=0)
        if (small & (array != 0)).any():
            value.const_value = ir.Tensor(np.where(small, np.zeros((), array.dtype), array), name=value.name)
    return model


def newly_dead(model: ir.Model, share: float) -> int:
    """Return how many output channels are not zero but would be with this threshold."""
    count = 0
    for value, axis in _weights(model.graph):
        assert value.const_value is not None
        array = value.const_value.numpy()
        largest = np.abs(array).max(
            axis=tuple(other for other in range(array.ndim) if other != axis), initial=0
        )
        count += int(((largest < share * largest.max(initial=0)) & (largest > 0)).sum())
    return count
