"""Convolutions and pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.rules.common import attribute, constant_at, input_at, rank, static
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.weights import Weight

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement


def padded(node: ir.Node) -> bool:
    """Return whether an operator reads outside its input."""
    if attribute(node, "auto_pad", "NOTSET") in {"SAME_UPPER", "SAME_LOWER"}:
        return True
    return any(pad != 0 for pad in attribute(node, "pads", ()))


def _static_parameters(node: ir.Node) -> None:
    constant_at(node, 1, "the weight is")
    if input_at(node, 2) is not None:
        constant_at(node, 2, "the bias is")


@rule("Conv")
def conv(node: ir.Node) -> Statement:
    """y[n, g*o, ...] = sum_i,k x[n, g*i, ... + k] * w[g*o, i, k] + b[g*o]"""
    _static_parameters(node)
    weight = Weight(1, out=0, contracted=1, groups=attribute(node, "group", 1))
    return Contraction(node, data=0, data_axis=1, out_axis=1, weight=weight, bias=2, bordered=padded(node))


@rule("ConvTranspose")
def conv_transpose(node: ir.Node) -> Statement:
    """y[n, g*o, ...] = sum_i,k x[n, g*i, ... - k] * w[g*i, o, k] + b[g*o]; which taps meet depends on the place"""
    _static_parameters(node)
    weight = Weight(1, out=1, contracted=0, groups=attribute(node, "group", 1), transposed=True)
    return Contraction(node, data=0, data_axis=1, out_axis=1, weight=weight, bias=2, bordered=True)


def _channelwise(node: ir.Node) -> dict[int, tuple[int | None, ...]]:
    axes = rank(node.inputs[0])
    return {0: (0, 1, *([None] * (axes - 2)))}


@rule("MaxPool", "GlobalAveragePool", "GlobalMaxPool")
def pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = max or mean over windows of x[n, c, ...]; a constant stays itself"""
    return Pointwise(node, _channelwise(node), constants="pass", whole="pooled over")


@rule("AveragePool")
def average_pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = mean over windows of x[n, c, ...]; padding that counts makes borders differ unless zero"""
    counted = bool(attribute(node, "count_include_pad", 0)) and padded(node)
    return Pointwise(node, _channelwise(node), constants="zero" if counted else "pass", whole="pooled over")


@rule("LpPool", "GlobalLpPool", "LRN")
def norm_pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = norm over windows of x[n, c, ...]; LRN reads neighbouring channels"""
    if node.op_type == "LRN":
        raise RefusedError("LRN reads neighbouring channels")
    return Pointwise(node, _channelwise(node), constants="zero", whole="pooled over")


@rule("Resize", "Upsample")
def resize(node: ir.Node) -> Statement:
    """y[n, c, ...] = x[n, c, ...] at another resolution; a constant stays itself"""
    axes = rank(node.inputs[0])
    resized = [int(axis) % axes for axis in attribute(node, "axes", range(axes))]
    sizes, scales = _resize_inputs(node)
    if scales is not None:
        spatial = constant_at(node, scales, "its scales are")
        if any(float(scale) != 1.0 for axis, scale in zip(resized, spatial, strict=False) if axis < 2):
            raise RefusedError("it resizes channels")
    elif sizes is None:
        raise RefusedError("its scales are attributes of an old opset")
    elif resized != list(range(axes)) and min(resized) < 2:
        raise RefusedError("it resizes channels by size")
    elif static(node.outputs[0], 1) != static(node.inputs[0], 1):
        raise RefusedError("it resizes channels")
    extrapolates = attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    return Pointwise(
        node,
        _channelwise(node),
        constants="none" if extrapolates else "pass",
        whole="resized along",
        shape_input=sizes if resized == list(range(axes)) else None,
    )


def _resize_inputs(node: ir.Node) -> tuple[int | None, int | None]:
    """Return which input holds the target sizes and which the scales, None where it is absent or empty."""
    if node.op_type == "Upsample" or len(node.inputs) == 2:
        return None, 1 if len(node.inputs) > 1 else None
    given = [index for index in (2, 3) if not _absent(input_at(node, index))]
    return (3 if 3 in given else None), (2 if given == [2] else None)


def _absent(value: ir.Value | None) -> bool:
    array = array_of(value)
    return value is None or (array is not None and array.size == 0)
