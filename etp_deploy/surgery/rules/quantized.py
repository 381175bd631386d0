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


BYTES, SIGNED = "uint8", "int8"


def _scale(*entries: float) -> Operand:
    return literal(entries if len(entries) > 1 else (*entries, 0.1)[0], "float32")


def _zero(*entries: int, dtype: str = BYTES) -> Operand:
    return literal(entries if len(entries) > 1 else (*entries, 2)[0], dtype)


_SCALES, _POINTS = (0.5, 0.1, 0.2, 0.3, 1.0, 0.7), (3, 0, 1, 2, 3, 1)
_QUANTIZE = (
    example(computed(2, 6, 3), _scale(), _zero()),
    example(computed(2, 6, 3), _scale(*_SCALES), _zero(*_POINTS), axis=1),
    example(computed(2, 5, 6), _scale(*_SCALES), _zero(*_POINTS), axis=-1),
    example(computed(2, 6, 3), _scale(0.2), _zero(1), axis=1),
)
_DEQUANTIZE = (
    example(computed(2, 6, 3, dtype=BYTES), _scale(), _zero()),
    example(computed(2, 6, 3, dtype=SIGNED), _scale(*_SCALES), _zero(*_POINTS, dtype=SIGNED), axis=1),
    example(computed(2, 5, 6, dtype=BYTES), _scale(*_SCALES), _zero(*_POINTS), axis=-1),
    example(computed(2, 6, 3, dtype=BYTES), _scale(0.2), axis=1),
)
_BLOCKED = example(
    computed(2, 6, dtype=SIGNED),
    literal([[0.5, 0.1], [0.2, 0.3]], "float32"),
    axis=1,
    block_size=3,
    removable=False,
)


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


_DATA = (computed(2, 4, 5, 5, dtype=BYTES), _scale(0.2), _zero(1))
_OUT = (_scale(0.3), _zero(3))
_BIAS = literal((5, -7, 0, 11, 2, -3), "int32")
_ROWS = (weight(6, 4, 3, 3, dtype=SIGNED), _scale(*_SCALES), _zero(0, 0, 0, 0, 0, 0, dtype=SIGNED))
_CONV = (
    example(*_DATA, *_ROWS, *_OUT, _BIAS),
    example(*_DATA, *_ROWS, *_OUT, _BIAS, pads=[1, 1, 1, 1]),
    example(*_DATA, *_ROWS, *_OUT, auto_pad="SAME_UPPER"),
    example(*_DATA, *_ROWS, *_OUT),
    example(*_DATA, weight(6, 4, 3, 3, dtype=BYTES), _scale(0.1), _zero(2), *_OUT, _BIAS),
    example(
        *_DATA, weight(6, 2, 3, 3, dtype=SIGNED), _scale(0.1), _zero(0, dtype=SIGNED), *_OUT, _BIAS, group=2
    ),
    example(*_DATA, weight(4, 1, 3, 3, dtype=SIGNED), _scale(0.1), _zero(0, dtype=SIGNED), *_OUT, group=4),
)


@rule("QLinearConv", examples=_CONV)
@rule(
    "QLinearConv",
    domain=MICROSOFT,
    examples=(
        *_CONV[:1],
        example(
            computed(2, 5, 5, 4, dtype=BYTES), *_DATA[1:], *_ROWS, *_OUT, channels_last=1, removable=False
        ),
    ),
)
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


@rule(
    "ConvInteger",
    examples=(
        example(_DATA[0], weight(6, 4, 3, 3, dtype=BYTES), _zero(1), _zero(0)),
        example(_DATA[0], weight(6, 4, 3, 3, dtype=BYTES), _zero(1), pads=[1, 1, 1, 1]),
        example(_DATA[0], weight(6, 4, 3, 3, dtype=BYTES)),
        example(_DATA[0], weight(6, 2, 1, 1, dtype=BYTES), _zero(3), _zero(1), group=2),
    ),
)
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


_SEQUENCE = computed(2, 5, 6, dtype=BYTES)
_EIGHT = tuple(0.1 * (1 + column) for column in range(8))


@rule(
    "QLinearMatMul",
    examples=(
        example(
            _SEQUENCE,
            *_DATA[1:],
            weight(6, 8, dtype=SIGNED),
            _scale(*_EIGHT),
            _zero(*[0] * 8, dtype=SIGNED),
            *_OUT,
        ),
        example(_SEQUENCE, *_DATA[1:], weight(6, 8, dtype=BYTES), _scale(0.1), _zero(2), *_OUT),
        example(
            _SEQUENCE,
            *_DATA[1:],
            computed(2, 6, 8, dtype=BYTES),
            _scale(0.1),
            _zero(2),
            *_OUT,
            removable=False,
        ),
        example(
            _SEQUENCE, *_DATA[1:], weight(2, 6, 8, dtype=BYTES), _scale(0.1), _zero(2), *_OUT, removable=False
        ),
    ),
)
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


@rule(
    "MatMulInteger",
    examples=(
        example(_SEQUENCE, weight(6, 8, dtype=SIGNED), _zero(1), _zero(*[0, 1] * 4, dtype=SIGNED)),
        example(_SEQUENCE, weight(6, 8, dtype=BYTES), _zero(1), _zero(0)),
        example(_SEQUENCE, weight(6, 8, dtype=BYTES)),
        example(computed(3, 6, dtype=BYTES), weight(6, 8, dtype=BYTES), _zero(1, 2, 3), removable=False),
        example(_SEQUENCE, weight(6, 8, dtype=BYTES), computed(dtype=BYTES)),
    ),
)
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


_FLOAT_BIAS = literal([0.5, -1.0, 0.0, 2.0, 0.25, -0.75, 1.0, 3.0], "float32")


@rule(
    "MatMulIntegerToFloat",
    domain=MICROSOFT,
    examples=(
        example(
            _SEQUENCE,
            weight(6, 8, dtype=SIGNED),
            _scale(),
            _scale(*_EIGHT),
            _zero(),
            _zero(*[0] * 8, dtype=SIGNED),
        ),
        example(_SEQUENCE, weight(6, 8, dtype=BYTES), _scale(), _scale(0.3), _zero(), _zero(0), _FLOAT_BIAS),
        example(
            _SEQUENCE, weight(6, 8, dtype=BYTES), computed(), _scale(0.3), _zero(), _zero(0), _FLOAT_BIAS
        ),
    ),
)
def matmul_integer_to_float(node: ir.Node) -> Statement:
    """y[..., m] = sum_k (a[..., k] - zero) * (b[k, m] - b_zero[m]) * scale * b_scale[m] + bias[m]"""
    axis = _matrix(node, 1)
    _whole_zero(node, 4)
    weight = Weight(1, out=1, contracted=0)
    scale = array_of(node.inputs[2])
    if input_at(node, 6) is not None:
        constant_at(node, 6, "the bias is")
    return IntegerContraction(
        node,
        data=0,
        data_axis=axis,
        out_axis=axis,
        weight=weight,
        zeros=(4, 5),
        along=_by_channel(node, weight, 3, 5),
        finish=_floats,
        bias=6,
        sums="float32",
        scale=float(scale.reshape(-1)[0]) * _weight_scale(node, 3)
        if scale is not None and scale.size == 1
        else None,
    )


def _floats(result: np.ndarray) -> np.ndarray:
    return result.astype(np.float32)


@rule(
    "DynamicQuantizeMatMul",
    domain=MICROSOFT,
    examples=(
        example(
            computed(2, 5, 6), weight(6, 8, dtype=SIGNED), _scale(*_EIGHT), _zero(*[0] * 8, dtype=SIGNED)
        ),
        example(computed(2, 5, 6), weight(6, 8, dtype=BYTES), _scale(0.3), _zero(0), _FLOAT_BIAS),
    ),
)
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
        scale=None,
        bias=4,
        sums="float32",
        ranged=True,
    )


_ROW = (computed(3, 6, dtype=BYTES), _scale(0.2), _zero(1))
_COLUMNS = (weight(6, 8, dtype=SIGNED), _scale(*_EIGHT), _zero(*[0] * 8, dtype=SIGNED))
_SUMS = literal([5, -7, 0, 11, 2, -3, 4, 1], "int32")


@rule(
    "QGemm",
    domain=MICROSOFT,
    examples=(
        example(*_ROW, *_COLUMNS, _SUMS, *_OUT, alpha=0.5),
        example(*_ROW, weight(8, 6, dtype=BYTES), _scale(0.1), _zero(0), None, *_OUT, transB=1),
        example(computed(6, 3, dtype=BYTES), *_ROW[1:], *_COLUMNS, _SUMS, *_OUT, transA=1),
        example(*_ROW, *_COLUMNS, _SUMS),
        example(*_ROW, *_COLUMNS, literal(np.arange(24).reshape(3, 8), "int32"), *_OUT, removable=False),
    ),
)
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


_PACKED = (
    literal((np.arange(8 * 2 * 8) * 37 % 251).reshape(8, 2, 8), BYTES),
    literal(np.linspace(0.1, 0.2, 16), "float32"),
)


@rule(
    "MatMulNBits",
    domain=MICROSOFT,
    examples=(
        example(computed(2, 3, 32), *_PACKED, K=32, N=8, bits=4, block_size=16),
        example(
            computed(2, 3, 32),
            *_PACKED,
            literal([0x21, 0x83, 0x65, 0x87, 0x78, 0x56, 0x34, 0x12], BYTES),
            None,
            _FLOAT_BIAS,
            K=32,
            N=8,
            bits=4,
            block_size=16,
        ),
        example(
            computed(2, 3, 26),
            *_PACKED,
            literal(np.linspace(5, 9, 16), "float32"),
            K=26,
            N=8,
            bits=4,
            block_size=16,
        ),
        example(
            computed(2, 3, 32),
            *_PACKED,
            None,
            literal([0] * 16 + [1] * 16, "int32"),
            K=32,
            N=8,
            bits=4,
            block_size=16,
            removable=False,
        ),
    ),
)
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


_IMAGE = (computed(2, 6, 4, 4, dtype=BYTES), _scale(0.2), _zero(1))


@rule(
    "QLinearAdd",
    "QLinearMul",
    domain=MICROSOFT,
    examples=(
        example(*_IMAGE, computed(2, 6, 4, 4, dtype=BYTES), _scale(0.3), _zero(3), *_OUT),
        example(*_IMAGE, weight(6, 1, 1, dtype=BYTES), _scale(0.3), _zero(3), *_OUT),
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
    examples=(example(*_IMAGE, _scale(0.3), _zero(3)),),
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
        example(*_IMAGE, _scale(0.3), _zero(3), operator="QLinearGlobalAveragePool"),
        example(*_IMAGE, _scale(0.4), _zero(3), operator="QLinearGlobalAveragePool"),
        example(
            *_IMAGE,
            _scale(0.3),
            _zero(3),
            operator="QLinearGlobalAveragePool",
            channels_last=1,
            removable=False,
        ),
        example(
            *_IMAGE,
            _scale(0.3),
            _zero(3),
            operator="QLinearAveragePool",
            kernel_shape=[3, 3],
            pads=[1, 1, 1, 1],
        ),
        example(
            *_IMAGE,
            _scale(0.3),
            _zero(3),
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
    if attribute(node, "count_include_pad", 0) and padded(node):
        return Pointwise(node, {0: (0, 1, *([None] * (axes - 2)))}, constants="none", whole="pooled over")
    return QuantizedMean(node, {0: (0, 1, *([None] * (axes - 2)))}, whole="pooled over")


@rule(
    "QLinearConcat",
    domain=MICROSOFT,
    examples=(
        example(*_OUT, *_IMAGE, computed(2, 6, 4, 4, dtype=BYTES), _scale(0.3), _zero(3), axis=1),
        example(*_OUT, *_IMAGE, computed(2, 6, 2, 4, dtype=BYTES), _scale(0.1), _zero(3), axis=2),
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
    return QuantizedConcat(node, axis, [pieces], how="concat")
