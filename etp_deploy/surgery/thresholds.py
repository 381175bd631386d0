"""Weights that are nearly zero: `--zero-below`.

Quantised weights are left alone, stored behind DequantizeLinear or read by operators on integers: on their grid
whatever is below half a step is zero already, and the next one is a step that training or calibration chose.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.tensors import deferred, unshared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# where each operator keeps its weight, and the weight's axis of output channels
_WEIGHTS = {"Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, 1), "MatMul": (1, 1)}


def _weights(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol, int]]:
    """Yield each weight of the graph, its bodies and functions once: its value, its tensor, its output axis."""
    seen: set[ir.Value] = set()
    for node in chain(model.graph.all_nodes(), *(item.all_nodes() for item in model.functions.values())):
        index, axis = _WEIGHTS.get(node.op_type, (None, 0))
        if index is None or node.domain != "":
            continue
        value = node.inputs[index]
        tensor = None if value is None else _constant(value)
        if value is None or tensor is None or value in seen:
            continue
        seen.add(value)
        if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != 0:
            axis = 0
        if tensor.dtype.is_floating_point() and len(tensor.shape) >= 2:
            yield value, tensor, axis


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor of an initializer or of a Constant node."""
    if is_parameter(value):
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return None
    return node.attributes["value"].as_tensor()


def with_zeros(model: ir.Model, share: float) -> ir.Model:
    """Return a model in which weights below a share of their layer's largest are zero; the given one stays."""
    model = model.clone()
    for value, source, axis in _weights(model):
        bound = share * _largest(source, axis).max(initial=0)
        array = unshared(source).numpy()
        if np.count_nonzero(np.abs(array) < bound) <= array.size - np.count_nonzero(array):
            continue
        cleared = deferred(_cleared(source, bound), source.dtype, source.shape, value.name)
        node = value.producer()
        if node is None:
            value.const_value = cleared
        else:
            node.attributes["value"] = ir.AttrTensor("value", cleared)
    return model


def _cleared(source: ir.TensorProtocol, bound: float) -> Callable[[], np.ndarray]:
    def clear() -> np.ndarray:
        array = unshared(source).numpy()
        return np.where(np.abs(array) < bound, np.zeros((), array.dtype), array)

    return clear


def _largest(tensor: ir.TensorProtocol, axis: int) -> np.ndarray:
    """Return the largest magnitude of each output channel, without another array of the weight's size."""
    array = unshared(tensor).numpy()
    others = tuple(other for other in range(array.ndim) if other != axis)
    return np.asarray(np.maximum(array.max(axis=others, initial=0), -array.min(axis=others, initial=0)))


def newly_dead(model: ir.Model, share: float) -> int:
    """Return how many output channels are not zero but would be with this threshold."""
    count = 0
    for _, tensor, axis in _weights(model):
        largest = _largest(tensor, axis)
        count += int(((largest < share * largest.max(initial=0)) & (largest > 0)).sum())
    return count
