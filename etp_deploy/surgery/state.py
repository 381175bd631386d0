"""What the analysis knows about each tensor, and how it grows.

Keep masks start all False and only grow, so the fixpoint ends whatever order the statements are visited in.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import Structure, frame, frame_dims, has_labels, is_parameter, plain

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir


@dataclass(frozen=True)
class Constant:
    """What is known of a tensor's channels: `value` holds where `known` is True, at every unlabelled position.

    Both arrays have the tensor's frame.
    """

    known: np.ndarray
    value: np.ndarray

    @property
    def zero(self) -> np.ndarray:
        """Where the channel is known to be exactly zero."""
        return np.asarray(self.known & (self.value == 0))


@dataclass(frozen=True)
class Cause:
    """Why positions of a tensor must stay: a text, the node that says so, and the tensor it read it from.

    `spare` marks what stays for a reason other than being read: equal counts, alignment, carriers.
    """

    text: str
    node: ir.Node | None = None
    source: ir.Value | None = None
    spare: bool = False


class ConflictError(Exception):
    """Two tensors that must line up were given different orders of channels."""

    def __init__(self, values: Iterable[ir.Value]) -> None:
        super().__init__()
        self.values = tuple(values)


@dataclass
class State:
    """The analysis's working state; `analysis.analyse` fills it, the plan is read from it."""

    structures: dict[ir.Value, Structure | None] = field(default_factory=dict)
    constants: dict[ir.Value, Constant] = field(default_factory=dict)
    proved: dict[ir.Value, Constant] | None = None
    """What was known before weights that do not matter were taken for zeros (`silence.py`)."""
    given_back: bool = False
    """Whether anything stays that nothing reads, so that tensors are valid: what is left may lose more."""
    stochastic: dict[ir.Value, int] = field(default_factory=dict)
    """Tensors whose entries along an axis sum to one, with that axis."""
    centred: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    """Where quantised tensors hold their zero point, whatever that is computed to be."""
    keep: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    layouts: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    pins: dict[ir.Value, dict[int, Cause]] = field(default_factory=dict)
    product: set[ir.Value] = field(default_factory=set)
    """Tensors whose kept positions must be a product of kept indices, axis by axis."""
    causes: list[Cause] = field(default_factory=lambda: [Cause("")])
    why: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    """For each position of a tensor's frame the index in `causes` of what kept it first."""
    touched: deque[ir.Value] = field(default_factory=deque)

    def structure(self, value: ir.Value) -> Structure | None:
        """Return a tensor's structure; None where not even its rank is known."""
        if value in self.structures:
            return self.structures[value]
        return None if value.shape is None else plain(value.shape)

    def set_structure(self, value: ir.Value, structure: Structure | None) -> None:
        """Set a tensor's structure; its keep mask starts empty where something in it can be removed."""
        self.structures[value] = structure
        self.keep.pop(value, None)
        if structure is not None:
            shape = frame(structure)
            self.keep[value] = np.full(shape, not any(has_labels(axis) for axis in structure))
            self.why[value] = np.zeros(shape, np.int32)

    def mask(self, value: ir.Value) -> np.ndarray:
        """Return a tensor's keep mask over its frame (initializers and unknown tensors are all kept)."""
        if value not in self.keep:
            structure = self.structure(value)
            return np.ones(frame(structure) if structure is not None else (), bool)
        return self.keep[value]

    def constant(self, value: ir.Value) -> Constant | None:
        """Return what is known of a computed tensor's channels, or None where nothing is."""
        return self.constants.get(value)

    def set_constant(self, value: ir.Value, known: np.ndarray, array: np.ndarray) -> None:
        """Record known channels; NaN and infinities count as unknown."""
        structure = self.structure(value)
        if structure is None:
            return
        shape = frame(structure)
        array = np.broadcast_to(array, shape)
        with np.errstate(invalid="ignore"):
            known = np.broadcast_to(known, shape) & np.isfinite(array.astype(np.float64))
        if known.any():
            self.constants[value] = Constant(known, array)

    def pin(self, value: ir.Value | None, axis: int | None, text: str, node: ir.Node | None = None) -> None:
        """Keep an axis of a tensor (None: every axis) as it is, for a reason the user can read."""
        if value is None or is_parameter(value):
            return
        structure = self.structure(value)
        if structure is None:
            return
        for index in range(len(structure)) if axis is None else [axis]:
            if has_labels(structure[index]):
                self.pins.setdefault(value, {}).setdefault(index, Cause(text, node))

    def forget(self, nodes: set[ir.Node]) -> None:
        """Forget what some nodes said, before they are read again."""
        for node in nodes:
            for value in node.outputs:
                self.constants.pop(value, None)
                self.stochastic.pop(value, None)
                self.product.discard(value)
        for axes in self.pins.values():
            for axis in [axis for axis, cause in axes.items() if cause.node in nodes]:
                del axes[axis]

    def apply_pins(self) -> None:
        """Turn the recorded pins into kept positions."""
        for value, axes in self.pins.items():
            structure = self.structure(value)
            mask = self.mask(value)
            if structure is None:
                continue
            pinned = {dim for axis in axes for dim in frame_dims(structure, axis)}
            others = tuple(dim for dim in range(mask.ndim) if dim not in pinned and mask.shape[dim] > 1)
            for axis, cause in axes.items():
                # Along pinned axes all stays, for whatever of the tensor's other axes stays.
                dims = tuple(frame_dims(structure, axis))
                rows = (
                    mask.any(axis=dims, keepdims=True)
                    if others
                    else np.ones_like(mask, shape=(1,) * mask.ndim)
                )
                self.grow(value, np.broadcast_to(rows, mask.shape), cause)

    def grow(self, value: ir.Value | None, mask: np.ndarray, cause: Cause) -> bool:
        """Keep more positions of a tensor; return whether any of them is new."""
        if value is None or value not in self.keep:
            return False
        current = self.keep[value]
        new = np.broadcast_to(mask, current.shape) & ~current
        if not new.any():
            return False
        self.causes.append(cause)
        self.why[value][new] = len(self.causes) - 1
        current |= new
        if value in self.product:
            current |= closure(current)
        self.touched.append(value)
        return True

    def tighten(self, values: Iterable[ir.Value], node: ir.Node) -> None:
        """React to a conflict: kept positions become products of kept indices; if they are, all stay."""
        cause = Cause("heads or groups must keep the same positions here", node, spare=True)
        grown = False
        for value in values:
            if value in self.keep and value not in self.product:
                self.product.add(value)
                grown |= self.grow(value, closure(self.keep[value]), cause)
        if grown:
            return
        for value in values:
            if value in self.keep:
                cause = Cause("the channels that stay do not line up here", node, spare=True)
                self.grow(value, np.ones_like(self.keep[value]), cause)


def closure(mask: np.ndarray) -> np.ndarray:
    """Return the smallest product of index sets that holds a mask's positions."""
    result = np.ones_like(mask)
    for dim in range(mask.ndim):
        others = tuple(other for other in range(mask.ndim) if other != dim)
        result &= mask.any(axis=others, keepdims=True)
    return result


def coordinates(layout: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return a layout's coordinate along each dimension of the frame, each with the layout's shape."""
    # flat: numpy 2.4 is wrong on large arrays whose last dimensions are 1
    lines = np.unravel_index(layout.reshape(-1), shape) if shape else ()
    return [line.reshape(layout.shape) for line in lines]


def agree(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two coordinates are the same wherever both say something; never where they cannot be broadcast."""
    try:
        return bool(np.all(one == other))
    except ValueError:
        return False


def nested_fill(mask: np.ndarray) -> np.ndarray:
    """Return the positions to add so that every kept slice of a mask has the same number of kept slices inside.

    The first dimension is the outermost. A Reshape that splits an axis (768 = 12 heads x 64) needs this: heads go
    as a whole, and the heads that stay keep equally many positions, wherever these are.
    """
    if mask.ndim <= 1 or not mask.any():
        return mask.copy()
    filled = mask.copy()
    for depth in range(1, mask.ndim):
        rows = filled.reshape(*filled.shape[: depth + 1], -1).any(axis=-1).reshape(-1, filled.shape[depth])
        kept = rows.any(axis=1)
        wanted = rows[kept].sum(axis=1).max(initial=0)
        flat = filled.reshape(rows.shape[0], filled.shape[depth], -1)
        for row in np.flatnonzero(kept):
            missing = wanted - rows[row].sum()
            for column in np.flatnonzero(~rows[row])[:missing]:
                flat[row, column, 0] = True
    return filled
