"""Shapes of operators that shape inference knows in part: norms, fused products, slices, copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_shape_inference import registry

if TYPE_CHECKING:
    import numpy as np
    from onnx_shape_inference import ShapeInferenceContext


# the input of a Slice that holds its axes
AXES = 3


def _same_as_the_data(context: ShapeInferenceContext, node: ir.Node) -> None:
    data = node.inputs[0]
    if data is not None:
        context.set_shape_and_dtype(node.outputs[0], data.shape, data.dtype)


def _product(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Leave alone a product that exchanges the batch with an axis of the matrices; its shape would be a wrong one."""
    if not any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        _PRODUCT(context, node)


def _slice(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Axes that are not cut keep their sizes, wherever the others are cut."""
    data, axes = node.inputs[0], _entries(node, AXES)
    starts, ends = (_held(context, value) for value in node.inputs[1:3])
    known = starts is not None and ends is not None and all(isinstance(entry, int) for entry in starts)
    computed = axes is None and len(node.inputs) > AXES and node.inputs[AXES] is not None
    if data is None or data.shape is None or (not computed and (known or axes is None)):
        _SLICE(context, node)
        return
    # inference takes axes that are computed for the first ones
    cut = set(range(len(data.shape))) if axes is None else {int(axis) % len(data.shape) for axis in axes}
    dims = [context.new_symbolic_dim() if axis in cut else dim for axis, dim in enumerate(data.shape)]
    context.set_shape_and_dtype(node.outputs[0], ir.Shape(dims), data.dtype)


def _old_slice(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Before opset 10 bounds are attributes, which inference does not read."""
    data = node.inputs[0]
    if data is None or data.shape is None:
        return
    starts, ends = node.attributes.get_ints("starts", ()), node.attributes.get_ints("ends", ())
    dims = list(data.shape)
    for axis, start, end in zip(
        node.attributes.get_ints("axes", range(len(starts))), starts, ends, strict=True
    ):
        size = dims[axis]
        dims[axis] = len(range(size)[start:end]) if isinstance(size, int) else context.new_symbolic_dim()
    context.set_shape_and_dtype(node.outputs[0], ir.Shape(dims), data.dtype)


def _held(context: ShapeInferenceContext, value: ir.Value | None) -> list[int | ir.SymbolicDim] | None:
    if value is None:
        return None
    held: list[int | ir.SymbolicDim] | None = context.get_symbolic_value(value)
    return value.const_value.numpy().reshape(-1).tolist() if value.const_value is not None else held


def _entries(node: ir.Node, index: int) -> np.ndarray | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _expand(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Nothing, where the data's shape is not known: a target of 1 is as large as the data is there."""
    data = node.inputs[0]
    if data is not None and data.shape is None:
        context.set_shape_and_dtype(node.outputs[0], None, data.dtype)
    else:
        _EXPAND(context, node)


# ONNX Runtime writes LayerNormalization into models of any opset
registry.register("", "LayerNormalization", since_version=1)(_same_as_the_data)
registry.register("", "GroupNormalization", since_version=18)(_same_as_the_data)
registry.collect()
_PRODUCT = registry.get("com.microsoft", "FusedMatMul", 1)
registry.register("com.microsoft", "FusedMatMul", since_version=1)(_product)
_SLICE = registry.get("", "Slice", 10)
registry.register("", "Slice", since_version=1)(_old_slice)
registry.register("", "Slice", since_version=11)(_slice)
_EXPAND = registry.get("", "Expand", 8)
registry.register("", "Expand", since_version=9)(_expand)
