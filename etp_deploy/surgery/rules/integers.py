"""Contractions of quantised tensors with quantised weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.examples import computed, example, literal, weight
from etp_deploy.surgery.rules.common import attribute, constant_at, input_at, rank, static
from etp_deploy.surgery.rules.convolution import padded
from etp_deploy.surgery.rules.quantized import (
    BYTES,
    MICROSOFT,
    OUT,
    SCALES,
    SIGNED,
    at_scale,
    at_zero,
    one_entry,
)
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.quantized import IntegerContraction
from etp_deploy.surgery.statements.weights import Weight

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

NO_BIAS = "its constant would need a bias, which is not there at"


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


_DATA = (computed(2, 4, 5, 5, dtype=BYTES), at_scale(0.2), at_zero(1))
_BIAS = literal((5, -7, 0, 11, 2, -3), "int32")
_ROWS = (weight(6, 4, 3, 3, dtype=SIGNED), at_scale(*SCALES), at_zero(0, 0, 0, 0, 0, 0, dtype=SIGNED))
_CONV = (
    example(*_DATA, *_ROWS, *OUT, _BIAS),
    example(*_DATA, *_ROWS, *OUT, _BIAS, pads=[1, 1, 1, 1]),
    example(*_DATA, *_ROWS, *OUT, auto_pad="SAME_UPPER"),
    example(*_DATA, *_ROWS, *OUT),
    example(*_DATA, weight(6, 4, 3, 3, dtype=BYTES), at_scale(0.1), at_zero(2), *OUT, _BIAS),
    example(
        *_DATA,
        weight(6, 2, 3, 3, dtype=SIGNED),
        at_scale(0.1),
        at_zero(0, dtype=SIGNED),
        *OUT,
        _BIAS,
        group=2,
    ),
    example(*_DATA, weight(4, 1, 3, 3, dtype=SIGNED), at_scale(0.1), at_zero(0, dtype=SIGNED), *OUT, group=4),
    example(*_DATA[:2], at_zero(1, 2, 3, 1), *_ROWS, *OUT, removable=False),
    example(*_DATA, *_ROWS, *OUT, computed(6, dtype="int32"), removable=False),
)


@rule("QLinearConv", examples=_CONV)
@rule(
    "QLinearConv",
    domain=MICROSOFT,
    examples=(
        *_CONV[:1],
        example(
            computed(2, 5, 5, 4, dtype=BYTES), *_DATA[1:], *_ROWS, *OUT, channels_last=1, removable=False
        ),
    ),
)
def qlinear_conv(node: ir.Node) -> Statement:
    """y[n, o, ...] = requantise(sum_i,k (x[n, i, ... + k] - zero) * (w[o, i, k] - w_zero[o]) + b[o])"""
    if attribute(node, "channels_last", 0):
        raise RefusedError("channels are last")
    weight = Weight(3, out=0, contracted=1, groups=attribute(node, "group", 1))
    one_entry(node, 2, "the data's zero point is")
    scale = np.float32(one_entry(node, 1, "the data's scale is"))
    if input_at(node, 8) is not None:
        constant_at(node, 8, "the bias is")
    out = np.float32(one_entry(node, 6, "the output's scale is"))
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
        example(_DATA[0], weight(6, 4, 3, 3, dtype=BYTES), at_zero(1), at_zero(0)),
        example(_DATA[0], weight(6, 4, 3, 3, dtype=BYTES), at_zero(1), pads=[1, 1, 1, 1]),
        example(_DATA[0], weight(6, 4, 3, 3, dtype=BYTES)),
        example(_DATA[0], weight(6, 2, 1, 1, dtype=BYTES), at_zero(3), at_zero(1), group=2),
        example(
            _DATA[0], weight(6, 4, 3, 3, dtype=BYTES), at_zero(1), at_zero(0, 1, 2, 3, 0, 1), removable=False
        ),
        example(_DATA[0], computed(6, 4, 3, 3, dtype=BYTES), removable=False),
    ),
)
def conv_integer(node: ir.Node) -> Statement:
    """y[n, o, ...] = sum_i,k (x[n, i, ... + k] - zero) * (w[o, i, k] - w_zero[o])"""
    constant_at(node, 1, "the weight is")
    if input_at(node, 3) is not None:
        one_entry(node, 3, "the weight's zero point is")
    return IntegerContraction(
        node,
        data=0,
        data_axis=1,
        out_axis=1,
        weight=Weight(1, out=0, contracted=1, groups=attribute(node, "group", 1)),
        zeros=(2, 3),
        along=(),
        finish=_integers,
        bordered=padded(node),
    )


_SEQUENCE = computed(2, 5, 6, dtype=BYTES)
_EIGHT = tuple(0.1 * (1 + column) for column in range(8))
_BYTE_COLUMNS = (weight(6, 8, dtype=BYTES), at_scale(0.1), at_zero(2))


@rule(
    "QLinearMatMul",
    examples=(
        example(
            _SEQUENCE,
            *_DATA[1:],
            weight(6, 8, dtype=SIGNED),
            at_scale(*_EIGHT),
            at_zero(*[0] * 8, dtype=SIGNED),
            *OUT,
        ),
        example(_SEQUENCE, *_DATA[1:], *_BYTE_COLUMNS, *OUT),
        example(
            _SEQUENCE,
            *_DATA[1:],
            computed(2, 6, 8, dtype=BYTES),
            at_scale(0.1),
            at_zero(2),
            *OUT,
            removable=False,
        ),
        example(
            _SEQUENCE,
            *_DATA[1:],
            weight(2, 6, 8, dtype=BYTES),
            at_scale(0.1),
            at_zero(2),
            *OUT,
            removable=False,
        ),
        example(_SEQUENCE, at_scale(0.2), at_zero(1, 2), *_BYTE_COLUMNS, *OUT, removable=False),
        example(_SEQUENCE, *_DATA[1:], *_BYTE_COLUMNS, at_scale(0.3), literal(0, "float32"), removable=False),
    ),
)
def qlinear_matmul(node: ir.Node) -> Statement:
    """y[..., m] = requantise(sum_k (a[..., k] - zero) * (b[k, m] - b_zero[m]))"""
    axis = _matrix(node, 3)
    weight = Weight(3, out=1, contracted=0)
    scale = np.float32(one_entry(node, 1, "the data's scale is"))
    one_entry(node, 2, "the data's zero point is")
    out = np.float32(one_entry(node, 6, "the output's scale is"))
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
        example(_SEQUENCE, weight(6, 8, dtype=SIGNED), at_zero(1), at_zero(*[0, 1] * 4, dtype=SIGNED)),
        example(_SEQUENCE, weight(6, 8, dtype=BYTES), at_zero(1), at_zero(0)),
        example(_SEQUENCE, weight(6, 8, dtype=BYTES)),
        example(computed(3, 6, dtype=BYTES), weight(6, 8, dtype=BYTES), at_zero(1, 2, 3), removable=False),
        example(_SEQUENCE, weight(6, 8, dtype=BYTES), at_zero(1), at_zero(0, 1, 0, 1), removable=False),
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
            at_scale(),
            at_scale(*_EIGHT),
            at_zero(),
            at_zero(*[0] * 8, dtype=SIGNED),
        ),
        example(
            _SEQUENCE,
            weight(6, 8, dtype=BYTES),
            at_scale(),
            at_scale(0.3),
            at_zero(),
            at_zero(0),
            _FLOAT_BIAS,
        ),
        example(
            _SEQUENCE,
            weight(6, 8, dtype=BYTES),
            computed(),
            at_scale(0.3),
            at_zero(),
            at_zero(0),
            _FLOAT_BIAS,
        ),
        example(
            computed(3, 6, dtype=BYTES),
            weight(6, 8, dtype=BYTES),
            at_scale(),
            at_scale(0.3),
            at_zero(1, 2, 3),
            removable=False,
        ),
        example(
            _SEQUENCE,
            weight(6, 8, dtype=BYTES),
            at_scale(),
            at_scale(0.3),
            at_zero(),
            at_zero(0),
            computed(8),
            removable=False,
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
        scale=scale.item() * _weight_scale(node, 3) if scale is not None and scale.size == 1 else None,
    )


def _floats(result: np.ndarray) -> np.ndarray:
    return result.astype(np.float32)


@rule(
    "DynamicQuantizeMatMul",
    domain=MICROSOFT,
    examples=(
        example(
            computed(2, 5, 6), weight(6, 8, dtype=SIGNED), at_scale(*_EIGHT), at_zero(*[0] * 8, dtype=SIGNED)
        ),
        example(computed(2, 5, 6), weight(6, 8, dtype=BYTES), at_scale(0.3), at_zero(0), _FLOAT_BIAS),
        example(
            computed(2, 5, 6),
            weight(6, 8, dtype=BYTES),
            at_scale(0.3),
            at_zero(0),
            computed(8),
            removable=False,
        ),
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
        bias=4,
        ranged=True,
    )


_ROW = (computed(3, 6, dtype=BYTES), at_scale(0.2), at_zero(1))
_COLUMNS = (weight(6, 8, dtype=SIGNED), at_scale(*_EIGHT), at_zero(*[0] * 8, dtype=SIGNED))
_SUMS = literal([5, -7, 0, 11, 2, -3, 4, 1], "int32")


@rule(
    "QGemm",
    domain=MICROSOFT,
    examples=(
        example(*_ROW, *_COLUMNS, _SUMS, *OUT, alpha=0.5),
        example(*_ROW, weight(8, 6, dtype=BYTES), at_scale(0.1), at_zero(0), None, *OUT, transB=1),
        example(computed(6, 3, dtype=BYTES), *_ROW[1:], *_COLUMNS, _SUMS, *OUT, transA=1),
        example(*_ROW, *_COLUMNS, _SUMS),
        example(*_ROW, *_COLUMNS, literal(np.arange(24).reshape(3, 8), "int32"), *OUT, removable=False),
        example(*_ROW, *_COLUMNS, computed(8, dtype="int32"), *OUT, removable=False),
        example(*_ROW[:2], at_zero(1, 2, 3), *_COLUMNS, _SUMS, *OUT, removable=False),
    ),
)
def qgemm(node: ir.Node) -> Statement:
    """y[n, m] = requantise(sum_k (a[n, k] - zero) * (b[k, m] - b_zero[m]) + c[m]), a or b transposed on request"""
    weight = (
        Weight(3, out=0, contracted=1) if attribute(node, "transB", 0) else Weight(3, out=1, contracted=0)
    )
    _matrix(node, 3)
    one_entry(node, 2, "the data's zero point is")
    scale = np.float32(attribute(node, "alpha", 1.0)) * np.float32(one_entry(node, 1, "the data's scale is"))
    if input_at(node, 6) is not None:
        bias = constant_at(node, 6, "the bias is")
        if bias.ndim == 2 and bias.shape[0] != 1:
            raise RefusedError("the bias differs from row to row")
    scales = scale * _weight_scale(node, 4)
    finish = (
        _scaled(scales)
        if input_at(node, 7) is None
        else _requantized(node, scales / np.float32(one_entry(node, 7, "the output's scale is")), 8)
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
