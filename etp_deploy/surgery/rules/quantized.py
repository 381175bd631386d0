"""Quantised tensors: to and from them, and computing with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.quantized import (
    Dequantize,
    DynamicQuantize,
    IntegerContraction,
    PackedContraction,
    QuantizedConcat,
    QuantizedMean,
)
from etp_deploy.surgery.statements.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement
    from etp_deploy.surgery.statements.pointwise import AxisMap

MICROSOFT = "com.microsoft"
NO_BIAS = "its constant would need a bias, which is not there at"
UNKNOWN_SCALE = "its constant would be scaled while the model runs at"


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


@rule("QuantizeLinear")
@rule("QuantizeLinear", domain=MICROSOFT)
def quantize(node: ir.Node) -> Statement:
    """y[..., c, ...] = saturate(round(x[..., c, ...] / scale[c]) + zero[c])"""
    return Pointwise(node, _scaled_maps(node))


@rule("DequantizeLinear")
@rule("DequantizeLinear", domain=MICROSOFT)
def dequantize(node: ir.Node) -> Statement:
    """y[..., c, ...] = (x[..., c, ...] - zero[c]) * scale[c]"""
    return Dequantize(node, _scaled_maps(node))


@rule("DynamicQuantizeLinear")
def dynamic_quantize(node: ir.Node) -> Statement:
    """y[...], scale, zero = quantised x[...] with the scale that its largest and smallest entry and 0 ask for"""
    return DynamicQuantize(node, {0: same_axes(rank(node.inputs[0]))})


# contractions


def _one(node: ir.Node, index: int, what: str) -> float:
    """Return the one entry of an input.

    Raises:
        RefusedError: where it is computed, or has several.
    """
    array = constant_at(node, index, what)
    if array.size != 1:
        raise RefusedError(f"{what} different along an axis")
    return float(array.reshape(-1)[0].astype(np.float64))


def _whole_zero(node: ir.Node, index: int) -> None:
    """Refuse a zero point of the data that differs from row to row."""
    value = input_at(node, index)
    if value is not None and rank(value) > 0 and static(value, 0) != 1:
        raise RefusedError("the data's zero point differs from row to row")


def _by_channel(node: ir.Node, weight: Weight, *indices: int) -> tuple[int, ...]:
    """Return those of some inputs that are there, having checked that each has one entry or one a channel."""
    outputs = constant_at(node, weight.index, "the weight is").shape[weight.out]
    found = []
    for index in indices:
        if input_at(node, index) is not None:
            array = constant_at(node, index, "the weight's scale or zero point is")
            if array.size != 1 and (array.size != outputs or array.shape[-1] != outputs):
                raise RefusedError("the weight's scale or zero point is not by output channel")
            found.append(index)
    return tuple(found)


def _requantized(node: ir.Node, scales: np.ndarray, zero: int) -> Callable[[np.ndarray], np.ndarray]:
    """Return what the runtime makes of 32-bit sums: scaled in float32, rounded to even, saturated."""
    point = constant_at(node, zero, "the output's zero point is")
    if point.dtype.kind not in "iu":
        raise RefusedError("the output is no integer")
    limits = np.iinfo(point.dtype)
    offset = int(point.reshape(-1)[0])

    def finish(result: np.ndarray) -> np.ndarray:
        scaled: np.ndarray = np.rint(result.astype(np.float32) * scales) + offset
        return scaled.clip(limits.min, limits.max).astype(point.dtype)

    return finish


def _scaled(scales: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def finish(result: np.ndarray) -> np.ndarray:
        floats: np.ndarray = result.astype(np.float32) * scales
        return floats

    return finish


def _integers(result: np.ndarray) -> np.ndarray:
    return result.astype(np.int32)


def _weight_scale(node: ir.Node, index: int) -> np.ndarray:
    return constant_at(node, index, "the weight's scale is").astype(np.float32).reshape(-1)


@rule("QLinearConv")
@rule("QLinearConv", domain=MICROSOFT)
def qlinear_conv(node: ir.Node) -> Statement:
    """y[n, o, ...] = requantise(sum_i,k (x[n, i, ... + k] - zero) * (w[o, i, k] - w_zero[o]) + b[o])"""
    if attribute(node, "channels_last", 0):
        raise RefusedError("channels are last")
    weight = Weight(3, out=0, contracted=1, groups=attribute(node, "group", 1))
    _one(node, 2, "the data's zero point is")
    scale = np.float32(_one(node, 1, "the data's scale is"))
    if input_at(node, 8) is not None:
        constant_at(node, 8, "the bias is")
    out = np.float32(_one(node, 6, "the output's scale is"))
    return IntegerContraction(
        node,
        data=0,
        data_axis=1,
        out_axis=1,
        weight=weight,
        zeros=(2, 5),
        along=_by_channel(node, weight, 4, 5),
        finish=_requantized(node, scale * _weight_scale(node, 4) / out, 7),
        bias=8,
        bordered=padded(node),
    )


@rule("ConvInteger")
def conv_integer(node: ir.Node) -> Statement:
    """y[n, o, ...] = sum_i,k (x[n, i, ... + k] - zero) * (w[o, i, k] - w_zero[o])"""
    weight = Weight(1, out=0, contracted=1, groups=attribute(node, "group", 1))
    return IntegerContraction(
        node,
        data=0,
        data_axis=1,
        out_axis=1,
        weight=weight,
        zeros=(2, 3),
        along=_by_channel(node, weight, 3),
        finish=_integers,
        bordered=padded(node),
    )


@rule("QLinearMatMul")
def qlinear_matmul(node: ir.Node) -> Statement:
    """y[..., m] = requantise(sum_k (a[..., k] - zero) * (b[k, m] - b_zero[m]))"""
    axis = _matrix(node, 3)
    weight = Weight(3, out=1, contracted=0)
    scale = np.float32(_one(node, 1, "the data's scale is"))
    _one(node, 2, "the data's zero point is")
    out = np.float32(_one(node, 6, "the output's scale is"))
    return IntegerContraction(
        node,
        data=0,
        data_axis=axis,
        out_axis=axis,
        weight=weight,
        zeros=(2, 5),
        along=_by_channel(node, weight, 4, 5),
        finish=_requantized(node, scale * _weight_scale(node, 4) / out, 7),
        rigid=NO_BIAS,
    )


def _matrix(node: ir.Node, index: int) -> int:
    """Return the last axis of the data, having checked that the weight is a matrix."""
    if constant_at(node, index, "the weight is").ndim != 2:
        raise RefusedError("the weight is no matrix")
    return rank(node.inputs[0]) - 1


@rule("MatMulInteger")
def matmul_integer(node: ir.Node) -> Statement:
    """y[..., m] = sum_k (a[..., k] - zero) * (b[k, m] - b_zero[m])"""
    axis = _matrix(node, 1)
    _whole_zero(node, 2)
    weight = Weight(1, out=1, contracted=0)
    return IntegerContraction(
        node,
        data=0,
        data_axis=axis,
        out_axis=axis,
        weight=weight,
        zeros=(2, 3),
        along=_by_channel(node, weight, 3),
        finish=_integers,
    )


@rule("MatMulIntegerToFloat", domain=MICROSOFT)
def matmul_integer_to_float(node: ir.Node) -> Statement:
    """y[..., m] = sum_k (a[..., k] - zero) * (b[k, m] - b_zero[m]) * scale * b_scale[m] + bias[m]"""
    axis = _matrix(node, 1)
    _whole_zero(node, 4)
    weight = Weight(1, out=1, contracted=0)
    scale = array_of(node.inputs[2])
    if input_at(node, 6) is not None:
        constant_at(node, 6, "the bias is")
    known = scale is not None and scale.size == 1
    factor = float(scale.reshape(-1)[0]) if scale is not None and known else 0.0
    return IntegerContraction(
        node,
        data=0,
        data_axis=axis,
        out_axis=axis,
        weight=weight,
        zeros=(4, 5),
        along=_by_channel(node, weight, 3, 5),
        finish=_floats,
        rigid="" if known else UNKNOWN_SCALE,
        bias=6,
        sums="float32",
        scale=factor * _weight_scale(node, 3),
    )


def _floats(result: np.ndarray) -> np.ndarray:
    return result.astype(np.float32)


@rule("DynamicQuantizeMatMul", domain=MICROSOFT)
def dynamic_matmul(node: ir.Node) -> Statement:
    """y[..., m] = sum_k quantised(a)[..., k] * (b[k, m] - b_zero[m]) * b_scale[m] + bias[m]"""
    axis = _matrix(node, 1)
    weight = Weight(1, out=1, contracted=0)
    if input_at(node, 4) is not None:
        constant_at(node, 4, "the bias is")
    return IntegerContraction(
        node,
        data=0,
        data_axis=axis,
        out_axis=axis,
        weight=weight,
        zeros=(None, 3),
        along=_by_channel(node, weight, 2, 3),
        finish=_floats,
        rigid=UNKNOWN_SCALE,
        bias=4,
        sums="float32",
        ranged=True,
    )


@rule("QGemm", domain=MICROSOFT)
def qgemm(node: ir.Node) -> Statement:
    """y[n, m] = requantise(sum_k (a[n, k] - zero) * (b[k, m] - b_zero[m]) + c[m]), a or b transposed on request"""
    weight = (
        Weight(3, out=0, contracted=1) if attribute(node, "transB", 0) else Weight(3, out=1, contracted=0)
    )
    _matrix(node, 3)
    _one(node, 2, "the data's zero point is")
    scale = np.float32(attribute(node, "alpha", 1.0)) * np.float32(_one(node, 1, "the data's scale is"))
    if input_at(node, 6) is not None:
        bias = constant_at(node, 6, "the bias is")
        if bias.ndim == 2 and bias.shape[0] != 1:
            raise RefusedError("the bias differs from row to row")
    scales = scale * _weight_scale(node, 4)
    finish = (
        _scaled(scales)
        if input_at(node, 7) is None
        else _requantized(node, scales / np.float32(_one(node, 7, "the output's scale is")), 8)
    )
    return IntegerContraction(
        node,
        data=0,
        data_axis=0 if attribute(node, "transA", 0) else 1,
        out_axis=1,
        weight=weight,
        zeros=(2, 5),
        along=_by_channel(node, weight, 4, 5),
        finish=finish,
        bias=6,
    )


@rule("MatMulNBits", domain=MICROSOFT)
def matmul_n_bits(node: ir.Node) -> Statement:
    """y[..., m] = sum_k x[..., k] * (b[m, k] - zero[m, k // block]) * scale[m, k // block] + bias[m]"""
    packed = constant_at(node, 1, "the weight is")
    for index in (2, 3, 5):
        if input_at(node, index) is not None:
            constant_at(node, index, "the weight's scale, zero point or bias is")
    if input_at(node, 4) is not None:
        raise RefusedError("its groups are listed index by index")
    bits = int(attribute(node, "bits", 4))
    if bits not in {2, 4, 8} or packed.ndim != 3 or attribute(node, "weight_prepacked", 0):
        raise RefusedError("its weight is packed in another way")
    return PackedContraction(node, bits=bits, block=int(attribute(node, "block_size", 0)))


# elementwise and pooling


def _scalars(node: ir.Node, *indices: int) -> None:
    for index in indices:
        if input_at(node, index) is not None:
            _one(node, index, "a scale or zero point is")


@rule("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def qlinear_binary(node: ir.Node) -> Statement:
    """y[...] = requantise(f(dequantised a[...], dequantised b[...])), broadcast"""
    _scalars(node, 1, 2, 4, 5, 6, 7)
    out = rank(node.outputs[0])
    maps: dict[int, AxisMap] = {}
    for index in (0, 3):
        own = rank(node.inputs[index])
        maps[index] = tuple(range(out - own, out))
    return Pointwise(node, maps)


@rule("QLinearLeakyRelu", "QLinearSigmoid", domain=MICROSOFT)
def qlinear_unary(node: ir.Node) -> Statement:
    """y[...] = requantise(f(dequantised x[...]))"""
    _scalars(node, 1, 2, 3, 4)
    return Pointwise(node, {0: same_axes(rank(node.inputs[0]))})


@rule("QLinearGlobalAveragePool", "QLinearAveragePool", domain=MICROSOFT)
def qlinear_pool(node: ir.Node) -> Statement:
    """y[n, c, ...] = requantise(mean over windows of dequantised x[n, c, ...])"""
    if attribute(node, "channels_last", 0):
        raise RefusedError("channels are last")
    _scalars(node, 1, 2, 3, 4)
    axes = rank(node.inputs[0])
    if attribute(node, "count_include_pad", 0) and padded(node):
        return Pointwise(node, {0: (0, 1, *([None] * (axes - 2)))}, constants="none", whole="pooled over")
    return QuantizedMean(node, {0: (0, 1, *([None] * (axes - 2)))}, whole="pooled over")


@rule("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(node: ir.Node) -> Statement:
    """y[..., offset + j, ...] = requantise(dequantised x_i[..., j, ...])"""
    axis = normal_axis(int(attribute(node, "axis", 0)), rank(node.outputs[0]))
    _scalars(node, *(index for index in range(len(node.inputs)) if index < 2 or (index - 2) % 3))
    pieces = []
    for index in range(2, len(node.inputs), 3):
        value = node.inputs[index]
        size = value.shape[axis] if value is not None and value.shape is not None else None
        pieces.append((index, np.arange(size if isinstance(size, int) else 1)))
    return QuantizedConcat(node, axis, [pieces], how="concat")
