"""What a graph's constants lose in rounds of removal: a code word for each of their entries.

Bit r of an entry's word says that it went in round r. A word depends on an entry's index along some axes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.statements.base import GatherInput, SliceInput, array_of
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.recurrent import Recurrent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis

    Lines = dict[tuple[ir.Value, tuple[int, ...], ir.Node], "Line"]


@dataclass
class Line:
    """The words of a constant's entries.

    Attributes:
        value: the constant.
        axes: the axes that words depend on.
        words: an array over these axes.
        role: what the entries do: "writer" makes channels, "reader" reads them, "follower" goes along with them
            (a bias, a gain, a state).
        node: the node that reads the constant.
    """

    value: ir.Value
    axes: tuple[int, ...]
    words: np.ndarray
    role: str
    node: ir.Node


def code_edits(analysis: Analysis, number: int, lines: Lines) -> None:
    """Note what a round's fixpoint cuts from constants that are followers or tables.

    Args:
        analysis: solved.
        number: the round.
        lines: what earlier rounds noted, added to.
    """
    for node, says in analysis.statements.items():
        if isinstance(says, Contraction | Recurrent):
            continue
        for edit in says.edits(analysis.state):
            if not isinstance(edit, SliceInput | GatherInput):
                continue
            value = node.inputs[edit.index]
            array = array_of(value)
            if value is None or array is None or array.dtype.kind != "f":
                continue
            for axes, kept in _kept(edit, array.shape):
                line = lines.setdefault(
                    (value, axes, node), Line(value, axes, np.zeros(kept.shape, np.uint64), _role(node), node)
                )
                line.words |= (~kept).astype(np.uint64) << np.uint64(number)


def _kept(
    edit: SliceInput | GatherInput, shape: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yield axes and which of their indices an edit keeps."""
    if isinstance(edit, SliceInput):
        for axis, line in edit.takes:
            kept = np.zeros(shape[axis], bool)
            kept[line] = True
            yield (axis,), kept
        return
    inside = np.zeros(edit.split, bool)
    inside[edit.indices] = True
    yield tuple(range(len(shape))), inside.reshape(shape)


def _role(node: ir.Node) -> str:
    return "writer" if node.op_type in {"Gather", "GatherND"} else "follower"


def contraction_lines(analysis: Analysis, codes: Mapping[ir.Value, np.ndarray]) -> Iterator[Line]:
    """Yield the lines of contractions' and recurrences' weights, from the words of the tensors at both ends.

    Args:
        analysis: read.
        codes: for each tensor, over its frame, in which rounds a position went.
    """
    for says in analysis.statements.values():
        if isinstance(says, Contraction) and says.active:
            yield from _contraction(says, codes)
        elif isinstance(says, Recurrent) and says.active:
            yield from _recurrent(says, codes)


def _contraction(says: Contraction, codes: Mapping[ir.Value, np.ndarray]) -> Iterator[Line]:
    node, weight = says.node, says.weight
    groups, outputs, inputs = says.nonzero.shape
    constant = node.inputs[weight.index]
    assert constant is not None
    made, read = says.words_out(codes), says.words_in(codes)
    # a side that cannot go is a line too: the weight may serve elsewhere
    made = np.zeros(groups * outputs, np.uint64) if made is None else made
    if weight.transposed and groups > 1:
        by_group = np.repeat(made.reshape(groups, 1, outputs), inputs, axis=1).reshape(-1, outputs)
        yield Line(constant, (0, 1), by_group, "writer", node)
    else:
        yield Line(constant, (1 if weight.transposed else weight.out,), made, "writer", node)
    bias = node.inputs[says.bias] if says.bias is not None and says.bias < len(node.inputs) else None
    array = array_of(bias)
    if bias is not None and array is not None and array.ndim and array.shape[-1] == made.size:
        yield Line(bias, (array.ndim - 1,), made, "follower", node)
    shape = constant.const_value.shape.numpy() if constant.const_value is not None else ()
    contracted = 0 if weight.transposed else weight.contracted
    if read is None:
        yield Line(constant, (contracted,), np.zeros(shape[contracted], np.uint64), "reader", node)
    elif groups == 1 or weight.transposed:
        yield Line(constant, (contracted,), read, "reader", node)
    else:
        by_group = np.repeat(read.reshape(groups, 1, -1), outputs, axis=1).reshape(groups * outputs, -1)
        yield Line(constant, (weight.out, contracted), by_group, "reader", node)


def _recurrent(says: Recurrent, codes: Mapping[ir.Value, np.ndarray]) -> Iterator[Line]:
    node = says.node
    units = says.words_out(codes)
    weight, recurrent, bias = (
        node.inputs[index] if index < len(node.inputs) else None for index in (1, 2, 3)
    )
    assert weight is not None
    assert recurrent is not None
    gated = np.tile(units, (1, says.gates))
    yield Line(weight, (0, 1), gated, "writer", node)
    yield Line(recurrent, (0, 1), gated, "writer", node)
    yield Line(recurrent, (0, 2), units, "reader", node)
    if bias is not None and is_parameter(bias):
        yield Line(bias, (0, 1), np.tile(gated, (1, 2)), "writer", node)
    read = says.words_in(codes)
    inputs = 0 if weight.const_value is None else weight.const_value.shape.numpy()[2]
    yield Line(weight, (2,), np.zeros(inputs, np.uint64) if read is None else read, "reader", node)
