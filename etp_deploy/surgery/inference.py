"""Shapes: symbolic inference, and operators that it does not know in every version that is in use."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from onnx_shape_inference import ShapeInferenceError, infer_symbolic_shapes, registry

from etp_deploy.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_shape_inference import ShapeInferenceContext


def infer_shapes(model: ir.Model) -> None:
    """Infer all shapes in place, symbolic where dynamic.

    Raises:
        ModelError: where shapes contradict each other.
    """
    logger = logging.getLogger("onnx_shape_inference")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # names that outputs declare for sizes tell nothing that removing channels needs, and cost most of the time
        infer_symbolic_shapes(model, warn_on_missing=False, adopt_declared_symbols=False)
    except ShapeInferenceError as error:
        raise ModelError(
            f"its shapes contradict each other: {str(error).splitlines()[0]}", hint="check the model"
        ) from error
    finally:
        logger.setLevel(level)


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
