"""Operators that compute each entry from the entries at the same place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.examples import computed, example, literal, weight
from etp_deploy.surgery.rules.common import broadcast_maps, constant_at, input_at, rank, same_axes
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of, softmax_axis
from etp_deploy.surgery.statements.pointwise import Pointwise

if TYPE_CHECKING:
    from etp_deploy.surgery.statements.base import Statement

UNARY = (
    *(
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "Ceil",
        "Celu",
        "Cos",
        "Cosh",
        "Elu",
        "Erf",
        "Exp",
    ),
    *(
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
    ),
    *(
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
    ),
    *("ThresholdedRelu", "IsInf", "IsNaN", "Shrink", "BitwiseNot"),
)
BINARY = (
    *("Add", "Sub", "Pow", "PRelu", "Max", "Min", "Mean", "Sum", "Mod", "BitShift"),
    *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor"),
    *("BitwiseAnd", "BitwiseOr", "BitwiseXor"),
)


@rule(
    *UNARY,
    examples=(
        *(
            example(computed(2, 6, 4), operator=name)
            for name in UNARY
            if name not in {"Not", "BitwiseNot", "Swish"}
        ),
        example(computed(2, 6, 4), operator="Swish", opset=24),
        example(computed(2, 6, 4, dtype="bool"), operator="Not"),
        example(computed(2, 6, 4, dtype="int32"), operator="BitwiseNot"),
    ),
)
def unary(node: ir.Node) -> Statement:
    """y[...] = f(x[...])"""
    return Pointwise(node, {0: same_axes(rank(node.inputs[0]))})


@rule(
    "Cast",
    examples=(
        example(computed(2, 6, 3), to=int(ir.DataType.DOUBLE)),
        example(computed(2, 6, 3), to=int(ir.DataType.INT32)),
        example(computed(2, 6, 3, dtype="int64"), to=int(ir.DataType.FLOAT)),
    ),
)
def cast(node: ir.Node) -> Statement:
    """y[...] = x[...] in another type; what sums to one does so in any floating-point type, to its rounding"""
    kinds = (node.inputs[0], node.outputs[0])
    floats = all(
        item is not None and item.dtype is not None and item.dtype.is_floating_point() for item in kinds
    )
    return Pointwise(node, {0: same_axes(rank(node.inputs[0]))}, same_entries=floats)


@rule(
    "Identity",
    "Dropout",
    examples=(
        example(computed(2, 6, 4)),
        example(weight(2, 6, 4), operator="Identity"),
        example(computed(2, 6, 4), literal(0.5, "float32"), literal(False, "bool"), operator="Dropout"),
        example(
            computed(2, 6, 4),
            literal(0.5, "float32"),
            literal(True, "bool"),
            operator="Dropout",
            removable=False,
        ),
        example(computed(2, 6, 4), None, computed(dtype="bool"), operator="Dropout", removable=False),
        example(computed(2, 6, 4), operator="Dropout", outputs=2, removable=False),
    ),
)
def identity(node: ir.Node) -> Statement:
    """y[...] = x[...]"""
    training = input_at(node, 2)
    if node.op_type == "Dropout" and training is not None and constant_at(node, 2, "training mode is").any():
        raise RefusedError("Dropout in training mode is random")
    axes = same_axes(rank(node.inputs[0]))
    # of an initializer (the first value of a state) every axis may have channels
    fresh = tuple(range(len(axes))) if array_of(node.inputs[0]) is not None else ()
    return Pointwise(node, {0: axes}, constants="pass", same_entries=True, fresh=fresh)


@rule(
    "Clip",
    examples=(
        example(computed(2, 6, 4), literal(-0.5, "float32"), literal(1.0, "float32")),
        example(computed(2, 6, 4), None, literal(1.0, "float32")),
        example(computed(2, 6, 4), computed()),
    ),
)
def clip(node: ir.Node) -> Statement:
    """y[...] = min(max(x[...], low), high)"""
    return Pointwise(node, {0: same_axes(rank(node.inputs[0]))})


@rule(
    *BINARY,
    examples=(
        *(
            example(computed(2, 6, 4), other, operator=name)
            for name in (
                "Add",
                "Sub",
                "Div",
                "Pow",
                "Max",
                "Min",
                "Mean",
                "Sum",
                "Equal",
                "Greater",
                "GreaterOrEqual",
                "Less",
                "LessOrEqual",
            )
            for other in (computed(2, 6, 4), weight(6, 1))
        ),
        example(computed(2, 1, 6), computed(3, 1), weight(6), operator="Max"),
        example(computed(2, 6, 4), weight(6, 1), operator="PRelu"),
        example(computed(2, 6, 4), weight(6, 1), operator="Mod", fmod=1),
        *(
            example(computed(2, 6, 4, dtype="bool"), computed(6, 1, dtype="bool"), operator=name)
            for name in ("And", "Or", "Xor")
        ),
        *(
            example(computed(2, 6, 4, dtype="int32"), computed(6, 1, dtype="int32"), operator=name)
            for name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")
        ),
        example(
            computed(2, 6, 4, dtype="uint32"),
            computed(6, 1, dtype="uint32"),
            operator="BitShift",
            direction="LEFT",
        ),
    ),
)
def binary(node: ir.Node) -> Statement:
    """y[...] = f(a[...], b[...], ...), broadcast"""
    return Pointwise(node, broadcast_maps(node))


@rule(
    "Mul",
    examples=(
        example(computed(2, 6, 4), weight(6, 1)),
        example(weight(6, 1), computed(2, 6, 4)),
        example(computed(2, 6, 4), computed(2, 6, 1)),
        example(computed(2, 6, 4), literal(0.5, "float32")),
    ),
)
def multiply(node: ir.Node) -> Statement:
    """y[...] = a[...] * b[...], broadcast; zero times anything finite is zero"""
    return Pointwise(node, broadcast_maps(node), absorbing=(0, 1))


@rule(
    "Div",
    examples=(
        example(computed(2, 6, 5), weight(6, 1)),
        example(computed(2, 6, 5), computed(2, 6, 5)),
        example(weight(6, 5), computed(2, 6, 5)),
    ),
)
def divide(node: ir.Node) -> Statement:
    """y[...] = a[...] / b[...], broadcast; zero divided by what is never zero is zero"""
    return Pointwise(node, broadcast_maps(node), absorbing=(0,) if _positive(node.inputs[1]) else ())


_MOVES = {"Reshape", "Expand", "Unsqueeze", "Squeeze", "Transpose", "Identity"}


def _positive(value: ir.Value | None, depth: int = 6) -> bool:
    """Return whether every entry of a tensor is surely above zero: a number of neighbours that is at least one."""
    if value is None:
        return False
    array = array_of(value)
    if array is not None:
        return bool((array > 0).all())
    node = value.producer()
    if node is None or depth == 0:
        return False
    if node.op_type in _MOVES:
        return _positive(node.inputs[0], depth - 1)
    if node.op_type == "Max":
        return any(_positive(item, 0) for item in node.inputs)
    return node.op_type == "Clip" and len(node.inputs) > 1 and _positive(node.inputs[1], 0)


@rule(
    "Where",
    examples=(
        example(computed(2, 6, 4, dtype="bool"), computed(2, 6, 4), weight(6, 1)),
        example(computed(2, 1, 4, dtype="bool"), literal(-1e9, "float32"), computed(2, 6, 4)),
        example(
            literal([[True], [False], [True], [True], [False], [True]], "bool"),
            computed(2, 6, 4),
            computed(2, 6, 4),
        ),
    ),
)
def where(node: ir.Node) -> Statement:
    """y[...] = a[...] if condition[...] else b[...], broadcast"""
    guarded = _guarded_softmax(node)
    return Pointwise(node, broadcast_maps(node), stochastic=guarded)


def _guarded_softmax(node: ir.Node) -> int | None:
    """Recognise `Where(IsNaN(p), 0, p)` with p a Softmax that cannot be NaN; return the axis that sums to one.

    Exporters write it for masked attention. A Softmax is NaN only where its whole row is minus infinity, which
    a finite mask value cannot make.
    """
    test, value = node.inputs[0], node.inputs[2]
    producer = None if test is None else test.producer()
    softmax = None if value is None else value.producer()
    if producer is None or producer.op_type != "IsNaN" or producer.inputs[0] is not value:
        return None
    if softmax is None or softmax.op_type != "Softmax" or may_be_infinite(softmax.inputs[0]):
        return None
    return softmax_axis(softmax, rank(value))


_FINITE_SOURCES = {"MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "Sigmoid", "Tanh"}


def may_be_infinite(value: ir.Value | None, depth: int = 8) -> bool:
    """Return whether a constant infinity can reach a tensor (inputs and activations are taken to be finite)."""
    if value is None or (value.dtype is not None and not value.dtype.is_floating_point()):
        return False
    array = array_of(value)
    if array is not None:
        return not np.isfinite(array.astype(np.float64)).all()
    node = value.producer()
    if node is None or node.op_type in _FINITE_SOURCES:
        return False
    if depth == 0:
        return True
    return any(may_be_infinite(item, depth - 1) for item in node.inputs)
