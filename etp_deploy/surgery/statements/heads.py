"""Where the heads of queries, keys, values and outputs stand in the tensors that an attention reads and writes.

Every role of an attention is seen as an array of (group, head of the group, index inside the head): a key and value
head is a group, the query heads that it serves are the heads of the group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import frame, frame_dims
from etp_deploy.surgery.state import ConflictError, coordinates

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.state import State

QUERY, KEY, VALUE, OUT, BIAS = range(5)


@dataclass(frozen=True)
class Heads:
    """How many there are of what.

    Attributes:
        groups: key and value heads.
        per_group: query heads of each.
        size: indices of a query and a key head.
        value_size: indices of a value and an output head.
    """

    groups: int
    per_group: int
    size: int
    value_size: int

    def shape(self, role: int) -> tuple[int, int, int]:
        """Return a role's shape as (group, head of the group, index); a bias has one entry for each head."""
        size = {QUERY: self.size, KEY: self.size, BIAS: 1}.get(role, self.value_size)
        return self.groups, 1 if role in {KEY, VALUE} else self.per_group, size


@dataclass(frozen=True)
class Tensor:
    """One tensor of an attention, by its input number.

    Attributes:
        index: the input number.
        roles: what it holds, in order.
        axes: its axes of heads, of roles (where it holds several in each head), and of indices inside heads;
            one axis alone holds role after role, and in each head after head.
    """

    index: int
    roles: tuple[int, ...]
    axes: tuple[int, ...]


class Slots:
    """Where in a tensor's frame the heads of its roles stand.

    Args:
        state: the analysis's state.
        value: the tensor.
        axes: its axes of heads, roles and indices, or the one that holds all; labelled or not.
        heads: how many there are.
        roles: what the tensor holds.
    """

    def __init__(
        self, state: State, value: ir.Value, axes: tuple[int, ...], heads: Heads, roles: tuple[int, ...]
    ) -> None:
        structure = state.structure(value) or ()
        self.value = value
        self.roles = roles
        self.frame = frame(structure)
        self.dims = [dim for axis in axes for dim in frame_dims(structure, axis)]
        self.sizes = tuple(factor.size.static or 0 for axis in axes for factor in structure[axis])
        self.interleaved = len(roles) > 1 and len(axes) > 1
        self.places: dict[int, np.ndarray] = {}
        shapes = {role: heads.shape(role) for role in roles}
        self.total = sum(math.prod(shape) for shape in shapes.values())
        if self.interleaved:
            groups, _, size = shapes[roles[0]]
            blocks = np.arange(self.total).reshape(groups, len(roles), size)
            self.places = {role: blocks[:, place][:, None] for place, role in enumerate(roles)}
            return
        start = 0
        for role, shape in shapes.items():
            self.places[role] = np.arange(start, start + math.prod(shape)).reshape(shape)
            start += math.prod(shape)

    @property
    def fits(self) -> bool:
        """Whether the axes hold as many positions as the roles have."""
        return math.prod(self.sizes) == self.total

    def read(self, array: np.ndarray, role: int, reduce: np.ufunc = np.logical_or) -> np.ndarray:
        """Return a frame array's entries of one role; along other axes they are reduced."""
        others = tuple(dim for dim in range(array.ndim) if dim not in self.dims)
        entries = np.broadcast_to(reduce.reduce(array, axis=others), self.sizes)
        return np.asarray(entries.reshape(-1)[self.places[role]])

    def write(self, mask: np.ndarray, role: int) -> np.ndarray:
        """Return a frame mask that holds a role's mask, whatever the index along other axes."""
        places = self.places[role]
        flat = np.zeros(self.total, bool)
        flat[places] = np.broadcast_to(mask, places.shape)
        whole = tuple(place for place, dim in enumerate(self.dims) if self.frame[dim] == 1)
        shape = [extent if dim in self.dims else 1 for dim, extent in enumerate(self.frame)]
        return np.asarray(flat.reshape(self.sizes).any(axis=whole, keepdims=True)).reshape(shape)

    def orders(self, state: State) -> dict[int, np.ndarray]:
        """Return for each role the entries that stay in the order in which they stand, as (head, index).

        Raises:
            ConflictError: where the tensor's entries do not stand head by head.
        """
        sequence = self.grid(state).reshape(-1)
        kept = {role: self.read(state.mask(self.value), role) for role in self.roles}
        rows = {role: int(mask.any(axis=2).sum()) for role, mask in kept.items()}
        if self.interleaved:
            parts = self._dealt(sequence, rows[self.roles[0]])
        else:
            bounds = np.cumsum([int(mask.sum()) for mask in kept.values()])
            parts = dict(zip(self.roles, np.split(sequence, bounds[:-1]), strict=True))
        return {role: self._rows(part, role, rows[role]) for role, part in parts.items()}

    def grid(self, state: State) -> np.ndarray:
        """Return the positions that stay as they stand along the axes of heads, factor by factor."""
        layout = state.layouts[self.value]
        lines = []
        for place, dim in enumerate(self.dims):
            line = np.arange(self.sizes[place]).reshape(
                [-1 if d == place else 1 for d in range(len(self.dims))]
            )
            if self.frame[dim] > 1:
                coordinate = coordinates(layout, self.frame)[dim]
                others = tuple(d for d in range(coordinate.ndim) if d not in self.dims)
                line = coordinate.min(axis=others)
                if not np.array_equal(line, coordinate.max(axis=others)):
                    raise ConflictError([self.value])
            lines.append(line)
        return np.asarray(np.ravel_multi_index(tuple(np.broadcast_arrays(*lines)), self.sizes))

    def laid(self, grid: np.ndarray) -> np.ndarray:
        """Return the layout of a tensor, labelled along axes of heads alone, whose positions stand like a grid."""
        first = tuple(slice(0, 1) if self.frame[dim] == 1 else slice(None) for dim in self.dims)
        found = coordinates(grid[first], self.sizes)
        coords = [np.zeros((), np.int64)] * len(self.frame)
        shape = [1] * len(self.frame)
        for place, dim in enumerate(self.dims):
            shape[dim] = grid[first].shape[place]
            coords[dim] = found[place] if self.frame[dim] > 1 else coords[dim]
        flat = np.ravel_multi_index(tuple(np.broadcast_arrays(*coords)), self.frame)
        return np.asarray(flat).reshape(shape)

    def _dealt(self, sequence: np.ndarray, rows: int) -> dict[int, np.ndarray]:
        if sequence.size % max(rows * len(self.roles), 1):
            raise ConflictError([self.value])
        blocks = sequence.reshape(rows, len(self.roles), -1)
        return {role: blocks[:, place].reshape(-1) for place, role in enumerate(self.roles)}

    def _rows(self, part: np.ndarray, role: int, rows: int) -> np.ndarray:
        places = self.places[role]
        inverse = np.full(self.total, -1)
        inverse[places.reshape(-1)] = np.arange(places.size)
        if part.size % max(rows, 1):
            raise ConflictError([self.value])
        entries = inverse[part].reshape(rows, -1)
        heads = entries // places.shape[2]
        if (entries < 0).any() or (heads != heads[:, :1]).any():
            raise ConflictError([self.value])
        return np.asarray(entries)


def open_heads(
    state: State, value: ir.Value | None, axes: tuple[int, ...], heads: Heads, roles: tuple[int, ...]
) -> Slots | None:
    """Return where a tensor's heads stand, or None where that is not known; its other axes are pinned."""
    structure = None if value is None else state.structure(value)
    if value is None or structure is None:
        return None
    slots = Slots(state, value, axes, heads, roles)
    if not slots.fits:
        return None
    for axis in range(len(structure)):
        if axis not in axes:
            state.pin(value, axis, "attention runs over this axis")
    return slots
