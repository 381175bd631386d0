"""Equations of Einsum: reading them, and writing products of two computed matrices as MatMul.

`aecd,abcd->acbe`, as attention is written, is a MatMul between transpositions, which is what the runtime makes of it
too. Written so, heads and indices are followed through it as through any other.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from etp_deploy.surgery.shapes import Size, is_parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

Letters = tuple[str, ...]
_DOTS = "..."


class EquationError(Exception):
    """An equation that is not read, and why."""


def equation(node: ir.Node) -> tuple[list[Letters], Letters]:
    """Return the names of the axes of an Einsum's inputs and of its output.

    Raises:
        EquationError: where ranks are not known, or do not fit.
    """
    text = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
    if len(terms) != len(ranks) or None in ranks:
        raise EquationError("shapes are not known here")
    inputs = [_names(term, rank or 0) for term, rank in zip(terms, ranks, strict=True)]
    dots = max((names for names in map(_dotted, inputs)), key=len)
    if arrow:
        before, ellipsis, after = right.partition(_DOTS)
        return inputs, (*before, *(dots if ellipsis else ()), *after)
    counts = Counter(letter for term in terms for letter in term.replace(_DOTS, ""))
    return inputs, (*dots, *sorted(letter for letter, count in counts.items() if count == 1))


def _names(term: str, rank: int) -> Letters:
    """Name a term's axes; those under an ellipsis are counted from the last one."""
    before, ellipsis, after = term.partition(_DOTS)
    hidden = rank - len(before) - len(after)
    if hidden < 0 or (hidden and not ellipsis):
        raise EquationError("an equation that does not fit its operands")
    return (*before, *(f"{_DOTS}{place}" for place in range(hidden, 0, -1)), *after)


def _dotted(names: Letters) -> Letters:
    return tuple(name for name in names if name.startswith(_DOTS))


def spell_out(graph: ir.Graph) -> bool:
    """Write each Einsum of two computed matrices as MatMul between transpositions; say if there was any."""
    found = [_spell_out(node) for node in list(graph.all_nodes()) if node.op_type == "Einsum"]
    return any(found)


def _spell_out(node: ir.Node) -> bool:
    if node.domain not in {"", "ai.onnx"} or len(node.inputs) != 2 or not isinstance(node.graph, ir.Graph):
        return False
    first, second = node.inputs
    if first is None or second is None or is_parameter(first) or is_parameter(second):
        return False  # a contraction, or nothing that is read
    try:
        inputs, out = equation(node)
    except EquationError:
        return False
    orders = None if any(map(_dequantised, (first, second))) else _orders(inputs[0], inputs[1], out)
    if orders is None or first.dtype is None or not first.dtype.is_floating_point():
        return False
    sizes = _sizes([(inputs[0], first), (inputs[1], second), (out, node.outputs[0])])
    if sizes is None:
        return False
    operands = [_turned(node, which, inputs[which], orders[which], sizes) for which in (0, 1)]
    result = node.outputs[0]
    product = ir.node("MatMul", operands, name=node.name)
    fresh = product.outputs[0]
    fresh.name = f"{result.name}_product"
    fresh.type, fresh.shape = result.type, ir.Shape([sizes[name] for name in orders[2]])
    made = [product]
    if orders[2] != out:
        made.append(ir.node("Transpose", [fresh], {"perm": [orders[2].index(name) for name in out]}))
        fresh = made[-1].outputs[0]
        fresh.type, fresh.shape = result.type, result.shape
    replace_nodes_and_values(node.graph, node, [node], made, [result], [fresh])
    return True


def _dequantised(value: ir.Value) -> bool:
    """Return whether DequantizeLinear makes a tensor: the runtime moves that behind a Transpose, and fails at it."""
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _orders(first: Letters, second: Letters, out: Letters) -> tuple[Letters, Letters, Letters] | None:
    """Return the order of axes in which MatMul takes both operands and makes the output; None if it cannot."""
    a, b, result = set(first), set(second), set(out)
    if len(a) < len(first) or len(b) < len(second) or len(result) < len(out):
        return None
    contracted, rows, columns = (a & b) - result, a - b, b - a
    if len(contracted) != 1 or len(rows) != 1 or len(columns) != 1 or result != (a ^ b) | (a & b & result):
        return None
    batch = tuple(name for name in out if name in a and name in b)
    return (*batch, *rows, *contracted), (*batch, *contracted, *columns), (*batch, *rows, *columns)


def _sizes(operands: Sequence[tuple[Letters, ir.Value]]) -> dict[str, int | ir.SymbolicDim] | None:
    """Return each name's size; None where it is not one size, an axis of size 1 being broadcast perhaps."""
    found: dict[str, int | ir.SymbolicDim] = {}
    for names, value in operands:
        if value.shape is None:
            return None
        for name, size in zip(names, value.shape, strict=True):
            if Size.of(found.setdefault(name, size)) != Size.of(size):
                return None
    return found


def _turned(
    node: ir.Node, which: int, names: Letters, order: Letters, sizes: dict[str, int | ir.SymbolicDim]
) -> ir.Value:
    """Return an operand with its axes in an order."""
    value = node.inputs[which]
    assert value is not None
    if order == names:
        return value
    turned = ir.node("Transpose", [value], {"perm": [names.index(name) for name in order]})
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, turned)
    made = turned.outputs[0]
    made.name = f"{node.outputs[0].name}_operand_{which}"
    made.type, made.shape = value.type, ir.Shape([sizes[name] for name in order])
    return made
