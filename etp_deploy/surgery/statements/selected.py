"""Channels taken by index along one axis: which stand for which, what is known of them, and which stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import (
    Axis,
    Factor,
    Size,
    Structure,
    axis_size,
    frame,
    frame_dims,
    has_labels,
    is_parameter,
    labelled,
)
from etp_deploy.surgery.state import Cause
from etp_deploy.surgery.statements.base import (
    Statement,
    array_of,
    set_plain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


Piece = tuple[int, np.ndarray, slice]
"""An input's number, its indices along the axis, and where they stand in the output."""


class Selected(Statement):
    """Output indices along one axis taken from given input indices: Concat, Split, Slice, Gather with constants.

    Args:
        node: the node.
        axis: the input axis.
        parts: for each output, the pieces that it is made of, in order: input number and its indices.
        drop: whether the output loses the axis (Gather with a scalar).
        how: what the rewrite has to change: nothing, the split sizes, or the slice's bounds.
    """

    def __init__(
        self,
        node: ir.Node,
        axis: int,
        parts: list[list[tuple[int, np.ndarray]]],
        *,
        drop: bool = False,
        how: str = "concat",
    ) -> None:
        super().__init__(node)
        self.axis = axis
        self.parts = parts
        self.drop = drop
        self.how = how
        self.active = False
        self.along = False
        self.own: dict[int, Structure] = {}

    def _inputs(self) -> dict[int, ir.Value]:
        found = {}
        for pieces in self.parts:
            for index, _ in pieces:
                value = self.node.inputs[index]
                assert value is not None
                found[index] = value
        return found

    def _live(self) -> list[ir.Value]:
        return [value for value in self._inputs().values() if not is_parameter(value)]

    # structure

    def structure(self, state: State) -> None:
        """Other axes must be the same everywhere; along the axis all is labelled, or nothing is."""
        inputs = self._inputs()
        structures = {index: state.structure(value) for index, value in inputs.items()}
        live = {index: s for index, s in structures.items() if not is_parameter(inputs[index])}
        if any(s is None for s in structures.values()) or any(v.shape is None for v in self.node.outputs):
            self._give_up(state, "shapes are not known here")
            return
        if not any(has_labels(axis) for s in live.values() for axis in s or ()):
            for value in self.node.outputs:
                set_plain(state, value)
            return
        axes = self._other_axes(state, live)
        if axes is None:
            self._give_up(state, "the tensors joined here are labelled differently")
            return
        along = self._labels_along(live)
        if along is None:
            self._give_up(state, "channels are joined with something else here")
            return
        self.along = along
        self.active = True
        for index, s in structures.items():
            assert s is not None
            mine = list(axes)
            if is_parameter(inputs[index]):
                # a size that is not known before the model runs is the constant's own here
                mine = [a if has_labels(a) or len(a) > 1 else b for a, b in zip(axes, s, strict=True)]
            mine[self.axis] = s[self.axis]
            if is_parameter(inputs[index]) and self.along:
                size = axis_size(s[self.axis]).static
                mine[self.axis] = labelled(size) if size is not None else s[self.axis]
            self.own[index] = tuple(mine)
        for number, value in enumerate(self.node.outputs):
            state.set_structure(value, self._out_structure(number, axes, value))

    def _give_up(self, state: State, reason: str) -> None:
        for value in self._inputs().values():
            state.pin(value, None, reason, self.node)
        for value in self.node.outputs:
            set_plain(state, value)

    def _other_axes(self, state: State, live: dict[int, Structure | None]) -> tuple[Axis, ...] | None:
        first = next(iter(live.values()))
        assert first is not None
        axes: list[Axis] = []
        for position in range(len(first)):
            found = {s[position] for s in live.values() if s is not None}
            if position == self.axis or len(found) == 1:
                axes.append(first[position])
                continue
            for index, s in live.items():
                if s is not None:
                    state.pin(
                        self.node.inputs[index],
                        position,
                        "it is joined with an axis that must stay",
                        self.node,
                    )
            return None
        return tuple(axes)

    def _labels_along(self, live: dict[int, Structure | None]) -> bool | None:
        """Return whether indices along the axis can go; None where they are tied to something else."""
        axes = [s[self.axis] for s in live.values() if s is not None]
        if not any(has_labels(axis) for axis in axes):
            return False
        return True if all(len(axis) == 1 and axis_size(axis).static is not None for axis in axes) else None

    def _out_structure(self, number: int, axes: tuple[Axis, ...], value: ir.Value) -> Structure:
        assert value.shape is not None
        size = sum(len(indices) for _, indices in self.parts[number])
        own = list(axes)
        if self.drop:
            del own[self.axis]
        elif self.along:
            own[self.axis] = labelled(size)
        else:
            own[self.axis] = (Factor(Size.of(value.shape[self.axis])),)
        return tuple(own)

    # frames

    def _dim(self, index: int) -> int:
        """Return the frame dimension of the axis."""
        return frame_dims(self.own[index], self.axis)[0]

    def _pieces(self, number: int) -> Iterator[Piece]:
        """Yield the input, its indices and where they stand in the output."""
        start = 0
        for index, indices in self.parts[number]:
            yield index, indices, slice(start, start + len(indices))
            start += len(indices)

    def _labelled_here(self, index: int) -> bool:
        """Whether an input is labelled along the axis (one that is not holds its one frame position for all)."""
        return self.own[index][self.axis][0].labelled

    def _get(self, array: np.ndarray, indices: np.ndarray, dim: int, labelled_here: bool) -> np.ndarray:
        if not self.along:
            return array
        if not labelled_here:
            shape = list(array.shape)
            shape[dim] = len(indices)
            return np.broadcast_to(array, shape)
        return np.take(array, indices, axis=dim)

    # constants

    def constants(self, state: State) -> None:
        """Constants move with their channels; a piece that is not known stays unknown."""
        if not self.active:
            return
        for number, value in enumerate(self.node.outputs):
            known, values = [], []
            for index, indices, _ in self._pieces(number):
                array = array_of(self._inputs()[index])
                if not self.along and array is not None and not array.size:
                    continue  # rows of which there are none are not other ones
                piece = self._constant_piece(state, index)
                dim = self._dim(index)
                known.append(self._get(piece[0], indices, dim, self._labelled_here(index)))
                values.append(self._get(piece[1], indices, dim, self._labelled_here(index)))
            dim = self._dim(self.parts[number][0][0])
            if self.along:
                joined, held = np.concatenate(known, axis=dim), np.concatenate(values, axis=dim)
            else:
                same = np.logical_and.reduce([item == values[0] for item in values])
                joined, held = np.logical_and.reduce(known) & same, values[0]
            if self.drop:
                joined, held = np.squeeze(joined, dim), np.squeeze(held, dim)
            state.set_constant(value, joined, held)

    def _constant_piece(self, state: State, index: int) -> tuple[np.ndarray, np.ndarray]:
        value = self._inputs()[index]
        shape = frame(self.own[index])
        array = array_of(value)
        if array is not None:
            split = array.reshape([f.size.coefficient for axis in self.own[index] for f in axis])
            others = tuple(dim for dim, extent in enumerate(shape) if split.shape[dim] != extent)
            if not split.size:
                return np.ones(shape, bool), np.zeros(shape, array.dtype)
            low, high = split.min(axis=others, keepdims=True), split.max(axis=others, keepdims=True)
            return low == high, low
        constant = state.constant(value)
        if constant is None:
            dtype = np.float32 if value.dtype is None else value.dtype.numpy()
            return np.zeros(shape, bool), np.zeros(shape, dtype)
        return constant.known, constant.value

    # masks

    def spread(self, state: State) -> None:
        """Kept positions move with their channels, both ways."""
        if not self.active:
            return
        inputs = self._inputs()
        for number, out in enumerate(self.node.outputs):
            for piece in self._pieces(number):
                value = inputs[piece[0]]
                if is_parameter(value):
                    continue
                mask = state.mask(value)
                back = Cause("taken from here by", self.node, out)
                forth = Cause("taken to here by", self.node, value)
                state.grow(value, self._back(mask, state.mask(out), piece), back)
                state.grow(out, self._forth(mask, state.mask(out), piece), forth)

    def _back(self, mask: np.ndarray, out: np.ndarray, piece: Piece) -> np.ndarray:
        """Bring the output's kept positions back to an input."""
        index, indices, where = piece
        dim = self._dim(index)
        if self.drop:
            out = np.expand_dims(out, dim)
        if not self.along:
            return np.broadcast_to(out, mask.shape)
        taken = out[(slice(None),) * dim + (where,)]
        if not self._labelled_here(index):
            return np.asarray(taken.any(axis=dim, keepdims=True))
        grown = np.zeros_like(mask)
        grown[(slice(None),) * dim + (indices,)] = taken  # indices are unique
        return grown

    def _forth(self, mask: np.ndarray, out: np.ndarray, piece: Piece) -> np.ndarray:
        """Bring an input's kept positions to the output."""
        index, indices, where = piece
        dim = self._dim(index)
        incoming = self._get(mask, indices, dim, self._labelled_here(index))
        if self.drop:
            return np.squeeze(incoming, dim)
        if not self.along:
            return incoming
        grown = np.zeros_like(out)
        grown[(slice(None),) * dim + (where,)] = incoming
        return grown
