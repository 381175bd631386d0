"""What is read only up to a shift: a softmax is the same when one number is added to all entries of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.statements.base import array_of, softmax_axis

if TYPE_CHECKING:
    import onnx_ir as ir


def shifts_vanish(value: ir.Value) -> bool:
    """Return whether numbers added to a tensor, one for all entries along the last axis, change nothing after it."""
    uses = list(value.uses())
    if not uses or value.is_graph_output():
        return False
    return all(_vanish(node, place, value) for node, place in uses)


def _vanish(node: ir.Node, place: int, value: ir.Value) -> bool:
    if node.domain not in {"", "ai.onnx"} or value.shape is None:
        return False
    rank = len(value.shape)
    match node.op_type:
        case "Softmax" | "LogSoftmax":
            return softmax_axis(node, rank) == rank - 1
        case "Add" | "Sub" | "Identity" | "Cast":
            passes = True
        case "Mul" | "Div":
            passes = _one_along_last(node.inputs[1 - place]) and (node.op_type == "Mul" or place == 0)
        case "Where":
            other = array_of(node.inputs[3 - place]) if place else None
            passes = other is not None and bool(np.isneginf(other).all())
        case _:
            passes = False
    out = node.outputs[0]
    floats = out.dtype is not None and out.dtype.is_floating_point()
    return passes and floats and out.shape is not None and shifts_vanish(out)


def _one_along_last(value: ir.Value | None) -> bool:
    """Return whether a tensor has one entry for each row."""
    shape = None if value is None else value.shape
    return shape is not None and (len(shape) == 0 or shape[-1] == 1)
