"""The two ends of a rule's trial: operands as producers make them, with planted constants, and what is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import Axis, Factor, Size, frame, has_labels, labelled, plain
from etp_deploy.surgery.state import Cause, nested_fill
from etp_deploy.surgery.statements.base import Statement

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.examples import Example, Operand
    from etp_deploy.surgery.shapes import Structure
    from etp_deploy.surgery.state import State

MODES = ("all", "channel", "last", "heads", "sizes", "split", "independent", "heads")
ORDERS = ("product", "nested", "permuted")
# from this seed on, axes without channels are of sizes that are known only when the model runs
FIRST_DYNAMIC = 2 * len(MODES)


@dataclass(frozen=True)
class Tensor:
    """A computed operand of a trial.

    Attributes:
        name: its name in the graph.
        operand: what the example says of it.
        structure: which of its axes are labelled.
        known: which positions of its frame hold a planted constant.
        value: the constants.
        stochastic: whether its last axis sums to one.
        positive: whether its entries are drawn positive.
    """

    name: str
    operand: Operand
    structure: Structure
    known: np.ndarray
    value: np.ndarray
    stochastic: bool
    positive: bool

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return random entries with the planted constants in place."""
        array = drawn(self.operand, rng, positive=self.positive)
        if self.stochastic:
            weights = np.exp(array.astype(np.float64))
            array = (weights / weights.sum(axis=-1, keepdims=True)).astype(array.dtype)
        split = array.reshape(factor_sizes(self.structure, array.shape))
        known = np.broadcast_to(self.known, split.shape)
        return np.where(known, np.broadcast_to(self.value, split.shape), split).reshape(array.shape)


# drawing


def drawn(operand: Operand, rng: np.random.Generator, *, positive: bool = False) -> np.ndarray:
    """Return random entries of an operand's type."""
    if operand.role == "literal":
        return np.array(operand.array, operand.dtype).reshape(operand.shape)
    if operand.role == "indices":
        return rng.integers(0, operand.below, operand.shape).astype(operand.dtype)
    if operand.dtype == "bool":
        return np.asarray(rng.random(operand.shape) < 0.5)
    if not operand.dtype.startswith("float"):
        return rng.integers(0, 5, operand.shape).astype(operand.dtype)
    array = rng.standard_normal(operand.shape)
    return (np.abs(array) + 0.5 if positive else array).astype(operand.dtype)


def planted_weight(operand: Operand, rng: np.random.Generator) -> np.ndarray:
    """Return a random initializer with zeros along whole indices of its axes and here and there."""
    array = drawn(operand, rng)
    if operand.role != "weight":
        return array
    for axis, size in enumerate(array.shape):
        if size > 1 and rng.random() < 0.7:
            array[(slice(None),) * axis + (rng.random(size) < 0.4,)] = 0
    array[rng.random(array.shape) < 0.1] = 0
    return array


def labelling(operands: Sequence[Operand], mode: str, rng: np.random.Generator) -> list[Structure]:
    """Return which axes of the operands are labelled; axes of one size are treated alike where the mode says so."""
    sizes = sorted({size for operand in operands for size in operand.shape if size > 1})
    chosen = {size for size in sizes if rng.random() < 0.6} or set(sizes)
    inner_first = {size: bool(rng.random() < 0.5) for size in sizes}

    def axis_of(operand: Operand, axis: int) -> Axis:
        size = operand.shape[axis]
        wanted = {
            "all": True,
            "channel": axis == 1,
            "last": axis == len(operand.shape) - 1,
            "heads": axis in {1, len(operand.shape) - 1},
            "sizes": size in chosen,
            "split": size in chosen,
            "independent": rng.random() < 0.5,
        }[mode]
        if size <= 1 or not wanted:
            return plain((size,))[0]
        part = next((part for part in (2, 3) if size % part == 0 and size > part), None)
        if mode != "split" or part is None:
            return labelled(size)
        factors = (Factor(Size(part)), Factor(Size(size // part), labelled=True))
        return factors if inner_first[size] else factors[::-1]

    return [
        plain(operand.shape)
        if operand.role == "indices" and not operand.copied
        else tuple(axis_of(operand, axis) for axis in range(len(operand.shape)))
        for operand in operands
    ]


def planted_constants(
    operand: Operand, structure: Structure, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return which positions of a frame are known, and their values: along one dimension, scattered, or none."""
    shape = frame(structure)
    dims = [dim for dim, extent in enumerate(shape) if extent > 1]
    kind = rng.choice(["line", "line", "scattered", "none"])
    if not dims or kind == "none" or operand.role == "indices":
        return np.zeros((1,) * len(shape), bool), np.zeros((1,) * len(shape), operand.dtype)
    own = shape
    if kind == "line":
        dim = int(rng.choice(dims))
        own = tuple(extent if place == dim else 1 for place, extent in enumerate(shape))
    known = np.asarray(rng.random(own) < 0.5)
    value = rng.choice([-1, 1], own) * rng.uniform(0.5, 2, own)
    if not operand.dtype.startswith("float"):
        value = rng.integers(0, 2 if operand.dtype == "bool" else 4, own)
    if rng.random() < 0.3:
        value = np.full_like(value, value.reshape(-1)[0])
    value = np.where(rng.random(own) < 0.4, 0, value).astype(operand.dtype)
    return np.broadcast_to(known, shape), np.broadcast_to(value, shape)


def tensors(example: Example, seed: int) -> list[Tensor]:
    """Return the computed operands of a trial."""
    rng = np.random.default_rng([seed, 1])
    operands = {
        f"x{index}": operand
        for index, operand in enumerate(example.operands)
        if operand is not None and operand.role in {"computed", "indices"}
    }
    mode = MODES[seed % len(MODES)]
    structures = labelling(list(operands.values()), mode, rng)
    positive, dynamic = bool(rng.random() < 0.5), seed >= FIRST_DYNAMIC
    result = []
    for (name, operand), given in zip(operands.items(), structures, strict=True):
        sums = mode in {"channel", "sizes", "independent"} and rng.random() < 0.3
        sums = sums and operand.dtype.startswith("float") and len(operand.shape) > 1
        structure = (*given[:-1], plain(operand.shape[-1:])[0]) if sums else given
        known, value = planted_constants(operand, structure, rng)
        if sums:
            known = np.zeros_like(known)
        if dynamic:
            structure = tuple(_dynamic(axis) for axis in structure)
        result.append(Tensor(name, operand, structure, known, value, sums, positive))
    return result


def _dynamic(axis: Axis) -> Axis:
    """Give an axis without channels a size that is known only when the model runs."""
    size = axis[0].size
    if has_labels(axis) or size.coefficient <= 1:
        return axis
    return (Factor(Size(1, (f"n{size.coefficient}",))),)


# frames and arrays


def factor_sizes(structure: Structure, shape: Sequence[int]) -> list[int]:
    """Return an array's sizes factor by factor; one unknown factor of an axis is what the others leave."""
    sizes: list[int] = []
    for axis, length in zip(structure, shape, strict=True):
        known = int(np.prod([f.size.static for f in axis if f.size.static is not None], dtype=np.int64))
        sizes += [length // known if f.size.static is None else f.size.static for f in axis]
    return sizes


def kept_slice(array: np.ndarray, structure: Structure | None, layout: np.ndarray) -> np.ndarray:
    """Return the part of an array that a layout keeps, in its order."""
    if structure is None:
        return array
    full, shape = factor_sizes(structure, array.shape), frame(structure)
    places = list(np.unravel_index(layout, shape)) if shape else []
    factors = [factor for axis in structure for factor in axis]
    for dim, factor in enumerate(factors):
        if not factor.labelled:
            places[dim] = np.arange(full[dim]).reshape([-1 if d == dim else 1 for d in range(len(full))])
    taken = array.reshape(full)[tuple(places)] if places else array
    merged, start = [], 0
    for axis in structure:
        merged.append(int(np.prod(taken.shape[start : start + len(axis)], dtype=np.int64)))
        start += len(axis)
    return taken.reshape(merged)


# the two ends


class Source(Statement):
    """A producer: its channels are what the trial says, and stand in one of the orders that producers make."""

    def __init__(self, node: ir.Node, tensor: Tensor, order: str, seed: int) -> None:
        super().__init__(node)
        self.out, self.tensor, self.order, self.seed = node.outputs[0], tensor, order, seed

    def structure(self, state: State) -> None:
        """Label what the trial labels."""
        state.set_structure(self.out, self.tensor.structure)
        if self.order != "nested":
            state.product.add(self.out)
        if self.tensor.stochastic:
            state.stochastic[self.out] = len(self.tensor.structure) - 1

    def constants(self, state: State) -> None:
        """Know what the trial plants."""
        state.set_constant(self.out, self.tensor.known, self.tensor.value)

    def repair(self, state: State) -> bool:
        """Keep equal counts, as behind a Reshape that splits an axis."""
        if self.order != "nested":
            return False
        return state.grow(
            self.out, nested_fill(state.mask(self.out)), Cause("equal counts", self.node, spare=True)
        )

    def layout(self, state: State) -> None:
        """Kept positions in order, or each axis in an order of its own while something of it is gone."""
        mask = state.mask(self.out)
        if self.order == "nested":
            counts, rest = [], 1
            for dim in range(mask.ndim):
                rows = mask.reshape(*mask.shape[: dim + 1], -1).any(axis=-1).sum()
                counts.append(int(rows) // max(rest, 1))
                rest = int(rows)
            state.layouts[self.out] = np.flatnonzero(mask).reshape(counts)
            return
        lines = [self._line(mask, dim) for dim in range(mask.ndim)]
        state.layouts[self.out] = (
            np.ravel_multi_index(np.ix_(*lines), mask.shape) if lines else np.zeros((), int)
        )

    def _line(self, mask: np.ndarray, dim: int) -> np.ndarray:
        kept = mask.any(axis=tuple(other for other in range(mask.ndim) if other != dim))
        order = np.arange(kept.size)
        if self.order == "permuted" and not kept.all():
            order = np.random.default_rng([self.seed, kept.size]).permutation(kept.size)
        return order[kept[order]]


class Sink(Statement):
    """A consumer that asks for some channels of every output."""

    def __init__(self, node: ir.Node, seed: int) -> None:
        super().__init__(node)
        self.seed = seed

    def structure(self, state: State) -> None:
        """Ask for a product of random indices, for scattered positions, for nothing or for everything."""
        for index, value in enumerate(self.node.inputs):
            rng = np.random.default_rng([self.seed, 2, index])
            kind = rng.choice(["product", "product", "product", "scattered", "nothing", "everything"])
            shape = state.mask(value).shape
            asked = np.full(shape, kind != "nothing")
            if kind == "scattered":
                asked = np.asarray(rng.random(shape) < 0.2)
            for dim, extent in enumerate(shape if kind == "product" else ()):
                line = (rng.random(extent) < 0.5) if extent > 1 else np.ones(1, bool)
                asked = asked & line.reshape([-1 if d == dim else 1 for d in range(len(shape))])
            state.grow(value, asked, Cause("asked for", self.node))
