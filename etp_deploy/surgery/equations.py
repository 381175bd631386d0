"""Equations of Einsum: reading them, and writing products of two computed matrices as MatMul.

`aecd,abcd->acbe`, as attention is written, is a MatMul between transpositions, which is what the runtime makes of it
too. Written so, heads and indices are followed through it as through any other.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from etp_deploy.surgery.resolve import constant
from etp_deploy.surgery.shapes import ONE, Size, is_parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

Letters = tuple[str, ...]
Sizes = dict[str, "int | ir.SymbolicDim"]
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
    """Write each Einsum of two computed tensors as MatMul between transpositions; say if there was any.

    Several letters that are contracted, or that only one operand has, are merged into one axis by Reshape.
    """
    found = [_spell_out(graph, node) for node in list(graph.all_nodes()) if node.op_type == "Einsum"]
    return any(found)


@dataclass(frozen=True)
class _Groups:
    """The letters of a product: those of both operands that stay, the first's own, the contracted, the second's own."""

    batch: Letters
    rows: Letters
    contracted: Letters
    columns: Letters

    @property
    def terms(self) -> tuple[tuple[Letters, Letters], ...]:
        """Return, for both operands and the product, the two groups of letters behind the batch."""
        return (self.rows, self.contracted), (self.contracted, self.columns), (self.rows, self.columns)


def _spell_out(graph: ir.Graph, node: ir.Node) -> bool:
    if node.domain not in {"", "ai.onnx"} or len(node.inputs) != 2 or not isinstance(node.graph, ir.Graph):
        return False
    first, second = node.inputs
    if first is None or second is None or is_parameter(first) or is_parameter(second):
        return False  # a contraction, or nothing that is read
    try:
        inputs, out = equation(node)
    except EquationError:
        return False
    groups = None if any(map(_dequantised, (first, second))) else _grouped(inputs[0], inputs[1], out)
    if groups is None or first.dtype is None or not first.dtype.is_floating_point():
        return False
    sizes = _sizes([(inputs[0], first), (inputs[1], second), (out, node.outputs[0])])
    targets = None if sizes is None else _targets(groups, sizes)
    if sizes is None or targets is None:
        return False
    writer = _Writer(graph, node, sizes)
    operands = [
        writer.merged(which, groups.batch, groups.terms[which], targets[which], names=inputs[which])
        for which in (0, 1)
    ]
    made = writer.split(writer.product(groups, operands), groups, targets[2], out)
    result = node.outputs[0]
    made.type, made.shape = result.type, result.shape
    replace_nodes_and_values(node.graph, node, [node], writer.made, [result], [made])
    return True


def _dequantised(value: ir.Value) -> bool:
    """Return whether DequantizeLinear makes a tensor: the runtime moves that behind a Transpose, and fails at it."""
    node = value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _grouped(first: Letters, second: Letters, out: Letters) -> _Groups | None:
    """Return the letters in groups, each in the order in which they stand; None where it is no product."""
    a, b, result = set(first), set(second), set(out)
    if len(a) < len(first) or len(b) < len(second) or len(result) < len(out):
        return None
    contracted = tuple(name for name in first if name in b - result)
    if not contracted or result != (a ^ b) | (a & b & result):
        return None
    rows, columns = (tuple(name for name in out if name in own) for own in (a - b, b - a))
    return _Groups(tuple(name for name in out if name in a and name in b), rows, contracted, columns)


def _targets(groups: _Groups, sizes: Sizes) -> list[np.ndarray | None] | None:
    """Return what both operands and the product are reshaped to, None where they need not be.

    The whole is None where more than one size would be left open, which no Reshape can say.
    """
    found: list[np.ndarray | None] = []
    for which, term in enumerate(groups.terms):
        if all(len(group) == 1 for group in term):
            found.append(None)
            continue
        behind = [(name,) for group in term for name in group] if which == 2 else list(term)
        static = [_size(group, sizes).static for group in behind]
        if sum(size is None for size in static) > 1:
            return None
        # a batch of an open size is copied, a zero, since it stands at the same place on both sides
        batch = [_size((name,), sizes).static or 0 for name in groups.batch]
        found.append(np.array([*batch, *(-1 if size is None else size for size in static)], np.int64))
    return found


def _size(group: Letters, sizes: Sizes) -> Size:
    size = ONE
    for name in group:
        size = size * Size.of(sizes[name])
    return size


def _sizes(operands: Sequence[tuple[Letters, ir.Value]]) -> Sizes | None:
    """Return each name's size; None where it is not one size, an axis of size 1 being broadcast perhaps."""
    found: Sizes = {}
    for names, value in operands:
        if value.shape is None:
            return None
        for name, size in zip(names, value.shape, strict=True):
            if Size.of(found.setdefault(name, size)) != Size.of(size):
                return None
    return found


class _Writer:
    """Writes the nodes that stand for one Einsum.

    Args:
        graph: the main graph, which holds all initializers.
        node: the Einsum.
        sizes: the size of each letter.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node, sizes: Sizes) -> None:
        self.graph, self.sizes = graph, sizes
        self.operands = [value for value in node.inputs if value is not None]
        self.name, self.type = node.outputs[0].name, node.outputs[0].type
        self.node_name = node.name
        self.made: list[ir.Node] = []

    def merged(
        self,
        which: int,
        batch: Letters,
        groups: tuple[Letters, Letters],
        target: np.ndarray | None,
        *,
        names: Letters,
    ) -> ir.Value:
        """Return an operand with its letters in order, each group one axis."""
        order = (*batch, *groups[0], *groups[1])
        value = self._turned(self.operands[which], names, order, f"operand_{which}")
        if target is None:
            return value
        dims = [*((name,) for name in batch), *groups]
        return self._reshaped(value, target, dims, f"operand_{which}_merged")

    def product(self, groups: _Groups, operands: list[ir.Value]) -> ir.Value:
        """Return the operands' product."""
        dims = [*((name,) for name in groups.batch), *groups.terms[2]]
        product = ir.node("MatMul", operands, name=self.node_name)
        return self._add(product, dims, "product")

    def split(self, value: ir.Value, groups: _Groups, target: np.ndarray | None, out: Letters) -> ir.Value:
        """Return the product with an axis for each letter, in the output's order."""
        order = (*groups.batch, *groups.rows, *groups.columns)
        if target is not None:
            value = self._reshaped(value, target, [(name,) for name in order], "product_split")
        return self._turned(value, order, out, "product_turned")

    def _turned(self, value: ir.Value, names: Letters, order: Letters, suffix: str) -> ir.Value:
        if order == names:
            return value
        turned = ir.node("Transpose", [value], {"perm": [names.index(name) for name in order]})
        return self._add(turned, [(name,) for name in order], suffix)

    def _reshaped(
        self, value: ir.Value, target: np.ndarray, dims: Sequence[Letters], suffix: str
    ) -> ir.Value:
        shape = constant(self.graph, target, f"{self.name}_{suffix}_shape")
        return self._add(ir.node("Reshape", [value, shape]), dims, suffix)

    def _add(self, node: ir.Node, dims: Sequence[Letters], suffix: str) -> ir.Value:
        self.made.append(node)
        value = node.outputs[0]
        value.name, value.type = f"{self.name}_{suffix}", self.type
        sizes = [_size(group, self.sizes) for group in dims]
        value.shape = ir.Shape(
            [
                self.sizes[group[0]] if len(group) == 1 else size.static or str(size)
                for group, size in zip(dims, sizes, strict=True)
            ]
        )
        return value
