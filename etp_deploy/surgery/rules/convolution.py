"""Convolutions and pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, literal, weight
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


@rule(
    "Conv",
    examples=(
        example(computed(2, 6, 5, 5), weight(4, 6, 3, 3), weight(4), pads=[1, 1, 1, 1]),
        example(computed(2, 6, 5), weight(4, 6, 3), auto_pad="SAME_UPPER"),
        example(computed(2, 6, 4, 4), weight(4, 6, 1, 1), pads=[0, 0, 0, 0]),
        example(computed(2, 6, 5, 5), weight(6, 1, 3, 3), weight(6), group=6, pads=[1, 1, 1, 1]),
        example(computed(2, 6, 5, 5), weight(12, 1, 3, 3), group=6, auto_pad="VALID"),
        example(computed(2, 6, 5, 5), weight(4, 3, 3, 3), weight(4), group=2, pads=[1, 1, 1, 1]),
        example(computed(2, 6, 5, 5), weight(6, 2, 3, 3), weight(6), group=3, pads=[1, 1, 1, 1]),
        example(computed(2, 6, 4, 4), computed(4, 6, 1, 1), removable=False),
        example(computed(2, 6, 4, 4), weight(4, 6, 1, 1), computed(4), removable=False),
    ),
)
def conv(node: ir.Node) -> Statement:
    """y[n, g*o, ...] = sum_i,k x[n, g*i, ... + k] * w[g*o, i, k] + b[g*o]"""
    _static_parameters(node)
    weight = Weight(1, out=0, contracted=1, groups=attribute(node, "group", 1))
    return Contraction(node, data=0, data_axis=1, out_axis=1, weight=weight, bias=2, bordered=padded(node))


@rule(
    "ConvTranspose",
    examples=(
        example(computed(2, 6, 4, 4), weight(6, 4, 3, 3), weight(4)),
        example(computed(2, 6, 4), weight(6, 3, 2), group=2, strides=[2]),
        example(computed(2, 6, 4, 4), computed(6, 4, 1, 1), removable=False),
        example(computed(2, 6, 4, 4), weight(6, 4, 1, 1), computed(4), removable=False),
    ),
)
def conv_transpose(node: ir.Node) -> Statement:
    """y[n, g*o, ...] = sum_i,k x[n, g*i, ... - k] * w[g*i, o, k] + b[g*o]; which taps meet depends on the place"""
    _static_parameters(node)
    weight = Weight(1, out=1, contracted=0, groups=attribute(node, "group", 1), transposed=True)
    return Contraction(node, data=0, data_axis=1, out_axis=1, weight=weight, bias=2, bordered=True)


def _channelwise(node: ir.Node) -> dict[int, tuple[int | None, ...]]:
    axes = rank(node.inputs[0])
    return {0: (0, 1, *([None] * (axes - 2)))}


@rule(
    "MaxPool",
    "GlobalAveragePool",
    "GlobalMaxPool",
    examples=(
        example(computed(2, 6, 5, 5), operator="MaxPool", kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        example(computed(2, 6, 5), operator="MaxPool", kernel_shape=[3]),
        example(computed(2, 6, 5), operator="GlobalAveragePool"),
        example(computed(2, 6, 4, 4), operator="GlobalMaxPool"),
    ),
)
def pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = max or mean over windows of x[n, c, ...]; a constant stays itself"""
    return Pointwise(node, _channelwise(node), constants="pass", whole="pooled over")


@rule(
    "AveragePool",
    examples=(
        example(computed(2, 6, 5, 5), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        example(computed(2, 6, 5, 5), kernel_shape=[3, 3], auto_pad="SAME_UPPER", count_include_pad=1),
        example(computed(2, 6, 5), kernel_shape=[3], pads=[1, 1]),
        example(computed(2, 6, 5), kernel_shape=[3], count_include_pad=1),
    ),
)
def average_pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = mean over windows of x[n, c, ...]; padding that counts makes borders differ unless zero"""
    counted = bool(attribute(node, "count_include_pad", 0)) and padded(node)
    return Pointwise(node, _channelwise(node), constants="zero" if counted else "pass", whole="pooled over")


@rule(
    "LpPool",
    "GlobalLpPool",
    "LRN",
    examples=(
        example(computed(2, 6, 5, 5), operator="LpPool", kernel_shape=[3, 3]),
        example(computed(2, 6, 5), operator="GlobalLpPool", opset=18),
        example(computed(2, 6, 4, 4), operator="LRN", size=3, removable=False),
    ),
)
def norm_pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = norm over windows of x[n, c, ...]; LRN reads neighbouring channels"""
    if node.op_type == "LRN":
        raise RefusedError("LRN reads neighbouring channels")
    return Pointwise(node, _channelwise(node), constants="zero", whole="pooled over")


@rule(
    "Resize",
    "Upsample",
    examples=(
        example(computed(2, 6, 4, 4), None, literal([1, 1, 2, 1.5], "float32"), operator="Resize"),
        example(computed(2, 6, 4, 4), None, None, literal([2, 6, 8, 8]), operator="Resize", mode="linear"),
        example(computed(2, 6, 4, 4), None, None, literal([8, 8]), operator="Resize", axes=[2, 3]),
        example(computed(2, 6, 4, 4), None, literal([2, 2], "float32"), operator="Resize", axes=[-2, -1]),
        example(
            computed(2, 6, 4, 4),
            literal([], "float32"),
            literal([], "float32"),
            literal([2, 6, 2, 2]),
            operator="Resize",
        ),
        example(
            computed(2, 6, 4, 4),
            literal([0, 0, -0.5, -0.5, 1, 1, 1.5, 1.5], "float32"),
            literal([1, 1, 2, 2], "float32"),
            operator="Resize",
            mode="linear",
            coordinate_transformation_mode="tf_crop_and_resize",
            extrapolation_value=9.0,
        ),
        example(computed(2, 6, 4, 4), literal([1, 1, 2, 2], "float32"), operator="Resize", opset=10),
        example(computed(2, 6, 4), None, literal([1, 2, 1], "float32"), operator="Resize", removable=False),
        example(computed(2, 6, 4), None, None, literal([2, 12, 4]), operator="Resize", removable=False),
        example(
            computed(2, 6, 4), None, None, literal([6, 8]), operator="Resize", axes=[1, 2], removable=False
        ),
        example(computed(2, 6, 4, 4), None, computed(4), operator="Resize", removable=False),
        example(computed(2, 6, 4, 4), literal([1, 1, 2, 2], "float32"), operator="Upsample", opset=9),
        example(
            computed(2, 6, 4, 4), operator="Upsample", opset=7, scales=[1.0, 1.0, 2.0, 2.0], removable=False
        ),
    ),
)
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
