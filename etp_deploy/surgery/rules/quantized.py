"""Quantised tensors: to and from them, and computing with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.examples import Operand, computed, example, literal, weight
from etp_deploy.surgery.rules.common import (
    attribute,
    constant_at,
    input_at,
    normal_axis,
    rank,
    same_axes,
    static,
)
from etp_deploy.surgery.rules.convolution import padded
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.quantized import (
    Dequantize,
    DynamicQuantize,
    QuantizedConcat,
    QuantizedMean,
)

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement
    from etp_deploy.surgery.statements.mapped import AxisMap

MICROSOFT = "com.microsoft"


BYTES, SIGNED = "uint8", "int8"


def at_scale(*entries: float) -> Operand:
    """Return an example's scale, one for each entry."""
    return literal(entries if len(entries) > 1 else (*entries, 0.1)[0], "float32")


def at_zero(*entries: int, dtype: str = BYTES) -> Operand:
    """Return an example's zero point, one for each entry."""
    return literal(entries if len(entries) > 1 else (*entries, 2)[0], dtype)


SCALES, _POINTS = (0.5, 0.1, 0.2, 0.3, 1.0, 0.7), (3, 0, 1, 2, 3, 1)
_QUANTIZE = (
    example(computed(2, 6, 3), at_scale(), at_zero()),
    example(computed(2, 6, 3), at_scale(*SCALES), at_zero(*_POINTS), axis=1),
    example(computed(2, 5, 6), at_scale(*SCALES), at_zero(*_POINTS), axis=-1),
    example(computed(2, 6, 3), at_scale(0.2), at_zero(1), axis=1),
)
_DEQUANTIZE = (
    example(computed(2, 6, 3, dtype=BYTES), at_scale(), at_zero()),
    example(computed(2, 6, 3, dtype=SIGNED), at_scale(*SCALES), at_zero(*_POINTS, dtype=SIGNED), axis=1),
    example(computed(2, 5, 6, dtype=BYTES), at_scale(*SCALES), at_zero(*_POINTS), axis=-1),
    example(computed(2, 6, 3, dtype=BYTES), at_scale(0.2), axis=1),
)
_BLOCKED = example(
    computed(2, 6, dtype=SIGNED),
    literal([[0.5, 0.1], [0.2, 0.3]], "float32"),
    axis=1,
    block_size=3,
    removable=False,
)


def one_entry(node: ir.Node, index: int, what: str) -> float:
    """Return the one entry of an input.

    Raises:
        RefusedError: where it is computed, or has several.
    """
    array = constant_at(node, index, what)
    if array.size != 1:
        raise RefusedError(f"{what} different along an axis")
    return float(array.reshape(-1)[0].astype(np.float64))


# to and from quantised tensors


def _scaled_maps(node: ir.Node) -> dict[int, AxisMap]:
    """Map the data axis by axis, and scale and zero point where each index of an axis has its own."""
    axes = rank(node.inputs[0])
    if attribute(node, "block_size", 0):
        raise RefusedError("blocks of channels share a scale")
    axis = normal_axis(int(attribute(node, "axis", 1)), axes)
    maps: dict[int, AxisMap] = {0: same_axes(axes)}
    for index in (1, 2):
        value = input_at(node, index)
        if value is not None:
            maps[index] = (axis,) if rank(value) == 1 and static(value, 0) > 1 else (None,) * rank(value)
    return maps


@rule("QuantizeLinear", examples=_QUANTIZE)
@rule("QuantizeLinear", domain=MICROSOFT, examples=_QUANTIZE)
def quantize(node: ir.Node) -> Statement:
    """y[..., c, ...] = saturate(round(x[..., c, ...] / scale[c]) + zero[c])"""
    return Pointwise(node, _scaled_maps(node))


@rule("DequantizeLinear", examples=(*_DEQUANTIZE, _BLOCKED))
@rule("DequantizeLinear", domain=MICROSOFT, examples=_DEQUANTIZE)
def dequantize(node: ir.Node) -> Statement:
    """y[..., c, ...] = (x[..., c, ...] - zero[c]) * scale[c]"""
    return Dequantize(node, _scaled_maps(node))


@rule(
    "DynamicQuantizeLinear",
    examples=(example(computed(2, 6, 3), outputs=3), example(computed(2, 6), outputs=3)),
)
def dynamic_quantize(node: ir.Node) -> Statement:
    """y[...], scale, zero = quantised x[...] with the scale that its largest and smallest entry and 0 ask for"""
    return DynamicQuantize(node, {0: same_axes(rank(node.inputs[0]))})


# elementwise and pooling


def _scalars(node: ir.Node, *indices: int) -> None:
    for index in indices:
        if input_at(node, index) is not None:
            one_entry(node, index, "a scale or zero point is")


OUT = (at_scale(0.3), at_zero(3))
_IMAGE = (computed(2, 6, 4, 4, dtype=BYTES), at_scale(0.2), at_zero(1))


@rule(
    "QLinearAdd",
    "QLinearMul",
    domain=MICROSOFT,
    examples=(
        example(*_IMAGE, computed(2, 6, 4, 4, dtype=BYTES), at_scale(0.3), at_zero(3), *OUT),
        example(*_IMAGE, weight(6, 1, 1, dtype=BYTES), at_scale(0.3), at_zero(3), *OUT),
        example(
            _IMAGE[0],
            at_scale(*SCALES),
            at_zero(1),
            _IMAGE[0],
            at_scale(0.3),
            at_zero(3),
            *OUT,
            removable=False,
        ),
    ),
)
def qlinear_binary(node: ir.Node) -> Statement:
    """y[...] = requantise(f(dequantised a[...], dequantised b[...])), broadcast"""
    _scalars(node, 1, 2, 4, 5, 6, 7)
    out = rank(node.outputs[0])
    maps: dict[int, AxisMap] = {}
    for index in (0, 3):
        own = rank(node.inputs[index])
        maps[index] = tuple(range(out - own, out))
    return Pointwise(node, maps)


@rule(
    "QLinearLeakyRelu",
    "QLinearSigmoid",
    domain=MICROSOFT,
    examples=(
        example(*_IMAGE, at_scale(0.3), at_zero(3)),
        example(*_IMAGE[:2], None, *OUT),
        example(*_IMAGE, at_scale(0.3), at_zero(*_POINTS), removable=False),
    ),
)
def qlinear_unary(node: ir.Node) -> Statement:
    """y[...] = requantise(f(dequantised x[...]))"""
    _scalars(node, 1, 2, 3, 4)
    return Pointwise(node, {0: same_axes(rank(node.inputs[0]))})


@rule(
    "QLinearGlobalAveragePool",
    "QLinearAveragePool",
    domain=MICROSOFT,
    examples=(
        example(*_IMAGE, at_scale(0.3), at_zero(3), operator="QLinearGlobalAveragePool"),
        example(*_IMAGE, at_scale(0.4), at_zero(3), operator="QLinearGlobalAveragePool"),
        example(
            *_IMAGE,
            at_scale(0.3),
            at_zero(3),
            operator="QLinearGlobalAveragePool",
            channels_last=1,
            removable=False,
        ),
        example(
            _IMAGE[0],
            at_scale(*SCALES),
            at_zero(1),
            at_scale(0.3),
            at_zero(3),
            operator="QLinearGlobalAveragePool",
            removable=False,
        ),
        example(
            *_IMAGE,
            at_scale(0.3),
            at_zero(3),
            operator="QLinearAveragePool",
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
        ),
        example(
            *_IMAGE,
            at_scale(0.3),
            at_zero(3),
            operator="QLinearAveragePool",
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
            count_include_pad=1,
        ),
    ),
)
def qlinear_pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = requantise(mean over windows of dequantised x[n, c, ...])"""
    if attribute(node, "channels_last", 0):
        raise RefusedError("channels are last")
    _scalars(node, 1, 2, 3, 4)
    axes = rank(node.inputs[0])
    maps = {0: same_axes(axes, *range(2, axes))}
    if attribute(node, "count_include_pad", 0) and padded(node):
        return Pointwise(node, maps, constants="none", whole="pooled over")
    return QuantizedMean(node, maps, whole="pooled over")


@rule(
    "QLinearConcat",
    domain=MICROSOFT,
    examples=(
        example(*OUT, *_IMAGE, computed(2, 6, 4, 4, dtype=BYTES), at_scale(0.3), at_zero(3), axis=1),
        example(*OUT, *_IMAGE, computed(2, 6, 2, 4, dtype=BYTES), at_scale(0.1), at_zero(3), axis=2),
        example(*OUT, *_IMAGE, _IMAGE[0], at_scale(*SCALES), at_zero(3), axis=1, removable=False),
    ),
)
def qlinear_concat(node: ir.Node) -> Statement:
    """y[..., offset + j, ...] = requantise(dequantised x_i[..., j, ...])"""
    axis = normal_axis(int(attribute(node, "axis", 0)), rank(node.outputs[0]))
    _scalars(node, *(index for index in range(len(node.inputs)) if index < 2 or (index - 2) % 3))
    pieces = []
    for index in range(2, len(node.inputs), 3):
        value = node.inputs[index]
        size = value.shape[axis] if value is not None and value.shape is not None else None
        pieces.append((index, np.arange(size if isinstance(size, int) else 1)))
    return QuantizedConcat(node, axis, [pieces])
