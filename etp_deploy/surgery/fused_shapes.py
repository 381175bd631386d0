"""Shapes of normalisations and fused products where shape inference knows them in part."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx_shape_inference import registry

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_shape_inference import ShapeInferenceContext


def _same_as_the_data(context: ShapeInferenceContext, node: ir.Node) -> None:
    data = node.inputs[0]
    if data is not None:
        context.set_shape_and_dtype(node.outputs[0], data.shape, data.dtype)


def _product(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Leave alone a product that exchanges the batch with an axis of the matrices; its shape would be a wrong one."""
    if not any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        _PRODUCT(context, node)


# ONNX Runtime writes LayerNormalization into models of any opset
registry.register("", "LayerNormalization", since_version=1)(_same_as_the_data)
registry.register("", "GroupNormalization", since_version=18)(_same_as_the_data)
registry.collect()
_PRODUCT = registry.get("com.microsoft", "FusedMatMul", 1)
registry.register("com.microsoft", "FusedMatMul", since_version=1)(_product)
