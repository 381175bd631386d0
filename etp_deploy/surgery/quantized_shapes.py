"""Shapes and types of quantised operators that shape inference does not know, or takes for something else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_shape_inference import registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from onnx_shape_inference import ShapeInferenceContext

    Inference = Callable[[ShapeInferenceContext, ir.Node], None]

# the operator that computes the same in floating point, with the opset whose attributes it shares
_PLAIN = {
    "QLinearAveragePool": ("AveragePool", 11),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", 1),
    "QLinearReduceMean": ("ReduceMean", 13),
}


def _as(operator: str, version: int) -> Inference:
    def infer(context: ShapeInferenceContext, node: ir.Node) -> None:
        plain = registry.get("", operator, version=version)
        if plain is not None and node.attributes.get_int("channels_last", 0) == 0:
            plain(context, node)

    return infer


def _matrix_product(context: ShapeInferenceContext, node: ir.Node) -> None:
    """The data's shape with the weight's columns last, in floating point."""
    data, weight = node.inputs[0], node.inputs[1]
    if data is not None and weight is not None and data.shape is not None and weight.shape is not None:
        shape = ir.Shape([*list(data.shape)[:-1], weight.shape[-1]]) if len(weight.shape) == 2 else None
        context.set_shape_and_dtype(node.outputs[0], shape, ir.DataType.FLOAT)


def _gemm(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Rows of the data, columns of the weight; quantised where the output has a scale."""
    sides = [(node.inputs[0], "transA", 0), (node.inputs[3], "transB", 1)]
    dims = []
    for value, transposed, axis in sides:
        if value is None or value.shape is None or len(value.shape) != 2:
            return
        dims.append(value.shape[1 - axis if node.attributes.get_int(transposed, 0) else axis])
    context.set_shape_and_dtype(node.outputs[0], ir.Shape(dims), _type_of(node, 8, ir.DataType.FLOAT))


def _quantized(context: ShapeInferenceContext, node: ir.Node) -> None:
    data = node.inputs[0]
    if data is not None:
        context.set_shape_and_dtype(node.outputs[0], data.shape, _type_of(node, 2, ir.DataType.UINT8))


def _dequantized(context: ShapeInferenceContext, node: ir.Node) -> None:
    data = node.inputs[0]
    if data is not None:
        context.set_shape_and_dtype(node.outputs[0], data.shape, _type_of(node, 1, ir.DataType.FLOAT))


def _type_of(node: ir.Node, index: int, default: ir.DataType) -> ir.DataType:
    value = node.inputs[index] if index < len(node.inputs) else None
    return default if value is None or value.dtype is None else value.dtype


_OWN: dict[str, Inference] = {
    "MatMulIntegerToFloat": _matrix_product,
    "DynamicQuantizeMatMul": _matrix_product,
    "QGemm": _gemm,
    "QuantizeLinear": _quantized,
    "DequantizeLinear": _dequantized,
    **{operator: _as(*plain) for operator, plain in _PLAIN.items()},
}
registry.collect()  # what comes later takes precedence
for _operator, _infer in _OWN.items():
    registry.register("com.microsoft", _operator, since_version=1)(_infer)
