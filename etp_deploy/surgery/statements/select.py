"""Operators that take channels by index along one axis: Concat, Split, Slice, Gather."""

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
from etp_deploy.surgery.state import Cause, ConflictError, coordinates
from etp_deploy.surgery.statements.base import (
    Bypass,
    Edit,
    SetAttribute,
    SetInput,
    SetSlice,
    Statement,
    array_of,
    default_layout,
    opset_of,
    set_plain,
)
from etp_deploy.surgery.statements.slicing import take_channels

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


SPLIT_INPUT_OPSET = 13
Piece = tuple[int, np.ndarray, slice]
"""An input's number, its indices along the axis, and where they stand in the output."""


class Select(Statement):
    """Output indices along one axis taken from given input indices: Concat, Split, Slice, Gather with constants.

    Args:
        node: the node.
        axis: the input axis.
        parts: for each output, the pieces that it is made of, in order: input number and its indices.
        drop: whether the output loses the axis (Gather with a scalar).
        how: what the rewrite has to change: nothing, the split sizes, the slice's bounds, or the indices.
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

    # layout

    def layout(self, state: State) -> None:
        """Pieces in their inputs' order, one after the other."""
        for number, out in enumerate(self.node.outputs):
            if not self.active:
                default_layout(state, out)
                continue
            pieces = [self._piece_layout(state, number, *piece) for piece in self._pieces(number)]
            dim = self._dim(self.parts[number][0][0])
            live = [piece for piece in pieces if piece is not None]
            if not self.along:
                if any(not np.array_equal(piece, live[0]) for piece in live):
                    raise ConflictError([out, *self._live()])
                layout = live[0]
            else:
                layout = self._join(state, number, pieces, dim)
            if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(out))):
                raise ConflictError([out, *self._live()])
            state.layouts[out] = np.squeeze(layout, dim) if self.drop else layout

    def _live(self) -> list[ir.Value]:
        return [value for value in self._inputs().values() if not is_parameter(value)]

    def _columns(self, state: State, index: int, indices: np.ndarray) -> np.ndarray:
        """Return which places along the reduced axis hold the wanted indices; the same in every row."""
        value = self._inputs()[index]
        dim = self._dim(index)
        coordinate = coordinates(state.layouts[value], state.mask(value).shape)[dim]
        chosen = np.isin(coordinate, indices)
        others = tuple(other for other in range(chosen.ndim) if other != dim)
        low, high = chosen.all(axis=others), chosen.any(axis=others)
        if not np.array_equal(low, high):
            raise ConflictError([value, *self.node.outputs])
        columns = np.flatnonzero(low)
        if self.how == "gather":
            order = np.take(coordinate, columns, axis=dim)
            first = order[tuple(0 if other != dim else slice(None) for other in range(order.ndim))]
            rank = {int(position): place for place, position in enumerate(indices)}
            columns = columns[np.argsort([rank[int(position)] for position in first])]
        return columns

    def _piece_layout(
        self, state: State, number: int, index: int, indices: np.ndarray, where: slice
    ) -> np.ndarray | None:
        """Return a piece's layout in the output's positions, or None for an initializer."""
        value = self._inputs()[index]
        out_frame = frame(state.structure(self.node.outputs[number]) or ())
        if is_parameter(value):
            return None
        dim = self._dim(index)
        layout = state.layouts[value]
        coords = coordinates(layout, state.mask(value).shape)
        if self.along and self._labelled_here(index):
            columns = self._columns(state, index, indices)
            coords = [np.take(coordinate, columns, axis=dim) for coordinate in coords]
            rank = np.full(int(state.mask(value).shape[dim]), -1, np.int64)
            rank[indices] = np.arange(len(indices))
            coords[dim] = where.start + rank[coords[dim]]
        elif self.along:
            # nothing can be removed here: one frame position stands for all indices
            counts = list(layout.shape)
            counts[dim] = len(indices)
            coords = [np.broadcast_to(coordinate, counts) for coordinate in coords]
            steps = np.arange(len(indices)).reshape([-1 if d == dim else 1 for d in range(len(counts))])
            coords[dim] = np.broadcast_to(where.start + steps, counts)
        if self.drop:
            coords = [np.squeeze(c, dim) for d, c in enumerate(coords) if d != dim]
            flat = np.ravel_multi_index(tuple(coords), out_frame) if coords else np.zeros((), np.int64)
            return np.expand_dims(flat, dim)
        return np.ravel_multi_index(tuple(coords), out_frame)

    def _join(self, state: State, number: int, pieces: list[np.ndarray | None], dim: int) -> np.ndarray:
        """Concatenate pieces; an initializer's piece follows the order of the others' other axes."""
        out = self.node.outputs[number]
        shape = frame(state.structure(out) or ())
        live = [piece for piece in pieces if piece is not None]
        if not live:
            raise ConflictError([out])
        model = coordinates(np.take(live[0], [0], axis=dim) if live[0].shape[dim] else live[0], shape)
        joined = []
        for piece, (_, _, where) in zip(pieces, self._pieces(number), strict=True):
            if piece is not None:
                joined.append(piece)
                continue
            mask = state.mask(out)[(slice(None),) * dim + (where,)] if not self.drop else state.mask(out)
            others = tuple(other for other in range(mask.ndim) if other != dim)
            columns = np.flatnonzero(mask.any(axis=others))
            counts = list(live[0].shape)
            counts[dim] = len(columns)
            coords = [np.broadcast_to(coordinate, counts) for coordinate in model]
            steps = columns.reshape([-1 if d == dim else 1 for d in range(len(counts))])
            coords[dim] = np.broadcast_to(where.start + steps, counts)
            joined.append(np.ravel_multi_index(tuple(coords), shape))
        try:
            return np.concatenate(joined, axis=dim)
        except ValueError as error:
            raise ConflictError([out, *self._live()]) from error

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Bring sizes, bounds, indices and joined initializers in line with what stays."""
        if not self.active:
            return
        yield from self._parameter_edits(state)
        if not self.along or all(state.mask(value).all() for value in self._live()):
            return
        if self.how == "split":
            yield from self._split_edits([self._count(state, number) for number in range(len(self.parts))])
        elif self.how == "gather":
            edit = self._gather_edit(state)
            yield edit
            if self._is_all(state, edit.array):
                yield Bypass()
        elif self.how == "slice":
            yield from self._slice_edits(state)

    def _split_edits(self, counts: list[int]) -> Iterator[Edit]:
        if opset_of(self.node) < SPLIT_INPUT_OPSET:
            yield SetAttribute("split", tuple(counts))
            return
        yield SetAttribute("num_outputs", None)
        yield SetInput(1, np.array(counts, np.int64))

    def _count(self, state: State, number: int) -> int:
        out = self.node.outputs[number]
        return int(state.layouts[out].shape[self._dim(self.parts[number][0][0])])

    def _is_all(self, state: State, indices: np.ndarray) -> bool:
        """Return whether indices are all that is left along the axis, in order."""
        index, _ = self.parts[0][0]
        count = state.layouts[self._inputs()[index]].shape[self._dim(index)]
        return np.array_equal(indices, np.arange(count))

    def _gather_edit(self, state: State) -> SetInput:
        index, indices = self.parts[0][0]
        columns = self._columns(state, index, indices)
        old = array_of(self.node.inputs[1])
        assert old is not None
        return SetInput(1, columns.reshape(() if self.drop else (-1,)).astype(old.dtype))

    def _slice_edits(self, state: State) -> Iterator[Edit]:
        index, indices = self.parts[0][0]
        columns = self._columns(state, index, indices)
        step = int(columns[1] - columns[0]) if len(columns) > 1 else 1
        stop = int(columns[-1]) + step
        yield SetSlice(self.axis, int(columns[0]), stop, step)

    def check(self, state: State) -> None:
        """Raise a conflict where the places to read are not what the operator can express."""
        if not (self.active and self.along) or self.how not in {"slice", "split"}:
            return
        start = 0
        for number in range(len(self.parts)):
            index, indices = self.parts[number][0]
            columns = self._columns(state, index, indices)
            steps = np.diff(columns)
            if self.how == "split":
                good = len(columns) > 0 and columns[0] == start and bool((steps == 1).all())
                start += len(columns)
            else:
                good = len(columns) > 0 and bool((steps == steps[0]).all() if len(steps) else True)
            if not good:
                raise ConflictError([*self._live(), *self.node.outputs])

    def _parameter_edits(self, state: State) -> Iterator[Edit]:
        for number, out in enumerate(self.node.outputs):
            shape = frame(state.structure(out) or ())
            coords = coordinates(state.layouts[out], shape)
            start = 0
            for index, indices in self.parts[number]:
                if is_parameter(self._inputs()[index]):
                    yield from self._cut(index, coords, start, len(indices))
                start += len(indices)

    def _cut(self, index: int, coords: list[np.ndarray], start: int, length: int) -> Iterator[Edit]:
        """Cut a joined initializer along each labelled axis."""
        structure = self.own[index]
        if self.along:
            dim = self._dim(index)
            others = tuple(other for other in range(coords[dim].ndim) if other != dim)
            line = coords[dim].min(axis=others)
            columns = np.flatnonzero((line >= start) & (line < start + length))
            if not columns.size:
                yield SetInput(index, self._nothing(index, coords[dim].shape))
                return
            coords = [np.take(coordinate, columns, axis=dim) for coordinate in coords]
            coords[dim] = coords[dim] - start
        dims = [dim for dim, extent in enumerate(frame(structure)) if extent > 1]
        if dims:
            yield from take_channels(index, structure, {d: coords[d] for d in dims}, [(d, d) for d in dims])

    def _nothing(self, index: int, reduced: tuple[int, ...]) -> np.ndarray:
        """Return what is left of a joined initializer none of whose indices stay: its other axes, cut."""
        structure = self.own[index]
        shape = [
            int(
                np.prod(
                    [
                        reduced[dim] if factor.labelled else factor.size.coefficient
                        for factor, dim in zip(factors, frame_dims(structure, axis), strict=True)
                    ]
                )
            )
            for axis, factors in enumerate(structure)
        ]
        shape[self.axis] = 0
        array = array_of(self.node.inputs[index])
        assert array is not None
        return np.zeros(shape, array.dtype)
