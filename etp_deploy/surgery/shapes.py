"""Sizes and axes as the surgery sees them.

An axis of a tensor is a product of *factors*. A factor is either **labelled**, its indices are channels that may
be removed one by one, or unlabelled, it stays whole (batch, sequence, height). Most axes are one factor; a
Reshape that merges batch and heads makes an axis of two, `(batch, heads)`, of which the second is labelled.

The *frame* of a tensor is the tuple of its factors' sizes in order, with 1 for every unlabelled one. Keep masks,
constants and index layouts of a tensor are arrays over its frame, so that a Reshape of the tensor is a reshape
of its frame and nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z_0-9.]*|\d+")
_fresh = count()


@dataclass(frozen=True)
class Size:
    """A monomial: an integer times symbols, such as `4*batch`; a plain number has no symbols."""

    coefficient: int
    symbols: tuple[str, ...] = ()

    @staticmethod
    def of(dim: object) -> Size:
        """Read an `onnx_ir` dimension; an unnamed one becomes a symbol of its own, equal to nothing else."""
        if isinstance(dim, int):
            return Size(dim)
        text = getattr(dim, "value", dim)
        if text is None:
            return Size(1, (f"?{next(_fresh)}",))
        parts = [part.strip() for part in str(text).split("*")]
        if not all(_PLAIN.fullmatch(part) for part in parts):
            return Size(1, (str(text),))  # an expression such as Min(64, seq): opaque, equal to itself
        coefficient = 1
        for part in parts:
            coefficient *= int(part) if part.isdigit() else 1
        return Size(coefficient, tuple(sorted(part for part in parts if not part.isdigit())))

    @property
    def static(self) -> int | None:
        """The number, or None where a symbol is involved."""
        return None if self.symbols else self.coefficient

    def divide(self, other: Size) -> Size | None:
        """The exact quotient, or None where there is none."""
        if other.coefficient == 0 or self.coefficient % other.coefficient:
            return None
        rest = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in rest:
                return None
            rest.remove(symbol)
        return Size(self.coefficient // other.coefficient, tuple(rest))

    def __mul__(self, other: Size) -> Size:
        return Size(self.coefficient * other.coefficient, tuple(sorted(self.symbols + other.symbols)))

    def __str__(self) -> str:
        factors = ([str(self.coefficient)] if self.coefficient != 1 or not self.symbols else []) + list(
            self.symbols
        )
        return "*".join(factors)


ONE = Size(1)


def is_parameter(value: ir.Value) -> bool:
    """Return whether a tensor is a constant of the model: an initializer that no caller can override."""
    return value.is_initializer() and not value.is_graph_input()


@dataclass(frozen=True)
class Factor:
    """One factor of an axis."""

    size: Size
    labelled: bool = False

    @property
    def extent(self) -> int:
        """How many positions the factor has in the frame."""
        return self.size.coefficient if self.labelled else 1


Axis = tuple[Factor, ...]
Structure = tuple[Axis, ...]


def plain(shape: ir.Shape | Sequence[int]) -> Structure:
    """Return the structure of a tensor of which nothing can be removed."""
    return tuple((Factor(Size.of(dim)),) for dim in shape)


def labelled(size: int) -> Axis:
    """Return an axis whose indices are channels."""
    return (Factor(Size(size), labelled=True),)


def unlabelled(axis: Axis) -> Axis:
    """Return the same axis with nothing removable."""
    return (Factor(axis_size(axis)),)


def axis_size(axis: Axis) -> Size:
    """Return the product of an axis's factors."""
    size = ONE
    for factor in axis:
        size = size * factor.size
    return size


def has_labels(axis: Axis) -> bool:
    """Return whether any of the axis's factors is labelled."""
    return any(factor.labelled for factor in axis)


def single_label(axis: Axis) -> bool:
    """Return whether the axis is exactly one labelled factor."""
    return len(axis) == 1 and axis[0].labelled


def frame(structure: Structure) -> tuple[int, ...]:
    """Return the shape of masks, constants and layouts of a tensor with this structure."""
    return tuple(factor.extent for axis in structure for factor in axis)


def frame_dims(structure: Structure, axis: int) -> range:
    """Return the frame dimensions that belong to an axis."""
    start = sum(len(other) for other in structure[:axis])
    return range(start, start + len(structure[axis]))


def normalise(axis: Sequence[Factor]) -> Axis:
    """Merge neighbouring factors of one kind, and drop unlabelled ones of size 1."""
    merged: list[Factor] = []
    for factor in axis:
        if factor.size == ONE and not factor.labelled:
            continue
        if merged and merged[-1].labelled == factor.labelled:
            merged[-1] = Factor(merged[-1].size * factor.size, factor.labelled)
        else:
            merged.append(factor)
    return tuple(merged) or (Factor(ONE),)


def refine(structure: Structure, target: Sequence[Size]) -> Structure | None:
    """Return the structure after a Reshape to `target`, or None where labelled factors would be torn apart.

    Both sides are read from the left as products and cut at their common refinement (768 = 12 * 64); where that
    fails, from the right; what then remains may be anything as long as no label is in it.
    """
    factors = [factor for axis in structure for factor in axis]
    cut = _cut(factors, list(target))
    if cut is None:
        mirrored = _cut(factors[::-1], list(target)[::-1])
        cut = None if mirrored is None else [axis[::-1] for axis in mirrored[::-1]]
    return None if cut is None else tuple(normalise(axis) for axis in cut)


def _cut(factors: list[Factor], target: list[Size]) -> list[list[Factor]] | None:
    axes: list[list[Factor]] = []
    pending = [factor for factor in factors if factor.size != ONE or factor.labelled]
    for index, size in enumerate(target):
        axis: list[Factor] = []
        need = size
        while need != ONE:
            if not pending:
                return None
            head = pending[0]
            if (quotient := need.divide(head.size)) is not None:
                axis.append(head)
                pending.pop(0)
                need = quotient
            elif (quotient := head.size.divide(need)) is not None:
                axis.append(Factor(need, head.labelled))
                pending[0] = Factor(quotient, head.labelled)
                need = ONE
            elif any(factor.labelled for factor in [*pending, *axis]):
                return None
            else:
                return [*axes, *([Factor(rest)] for rest in target[index:])]
        axes.append(axis)
    return axes if all(factor.size == ONE for factor in pending) or not _labels(pending) else None


def _labels(factors: list[Factor]) -> bool:
    return any(factor.labelled for factor in factors)
