"""Operators that take channels by index along one axis: Concat, Split, Slice, Gather."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import (
    frame,
    frame_dims,
    is_parameter,
)
from etp_deploy.surgery.state import ConflictError, coordinates
from etp_deploy.surgery.statements.base import (
    Edit,
    SetAttribute,
    SetInput,
    SetSlice,
    array_of,
    default_layout,
    opset_of,
)
from etp_deploy.surgery.statements.selected import Selected
from etp_deploy.surgery.statements.slicing import take_channels

if TYPE_CHECKING:
    from collections.abc import Iterator

    from etp_deploy.surgery.state import State


SPLIT_INPUT_OPSET = 13
# the input of a Slice that holds its steps
STEPS = 4


class Select(Selected):
    """Channels taken by index along one axis, cut with their order; arguments are those of `Selected`."""

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
            state.layouts[out] = layout

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
        if self.how == "slice" and len(indices) > 1 and indices[1] < indices[0]:
            return columns[::-1]
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
            mask = state.mask(out)[(slice(None),) * dim + (where,)]
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

    def check(self, state: State) -> None:
        """Raise a conflict where the places to read are not what the operator can express."""
        if not (self.active and self.along) or self.how not in {"slice", "split"}:
            return
        start = 0
        for number in range(len(self.parts)):
            index, indices = self.parts[number][0]
            columns = self._columns(state, index, indices)
            steps = np.diff(columns)
            if not len(indices):
                good = True  # nothing was taken, and nothing is
            elif self.how == "split":
                good = len(columns) > 0 and columns[0] == start and bool((steps == 1).all())
                start += len(columns)
            else:
                good = len(columns) > 0 and bool((steps == steps[0]).all() if len(steps) else True)
                good &= "starts" not in self.node.attributes or not (steps != 1).any()
            if not good:
                raise ConflictError([*self._live(), *self.node.outputs])

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

    def _slice_edits(self, state: State) -> Iterator[Edit]:
        index, indices = self.parts[0][0]
        columns = self._columns(state, index, indices)
        if not len(columns):
            return  # what is empty stays that, however few indices are left
        step = int(columns[1] - columns[0]) if len(columns) > 1 else 1
        start, stop = int(columns[0]), int(columns[-1]) + step
        if stop < 0:
            # -1 would be the last index
            stop = np.iinfo(np.int32).min
        if "starts" in self.node.attributes:
            yield from self._attribute_edits(start, stop)
            return
        if step != 1 and (len(self.node.inputs) <= STEPS or self.node.inputs[STEPS] is None):
            starts = array_of(self.node.inputs[1])
            assert starts is not None
            yield SetInput(STEPS, np.ones_like(starts))
        yield SetSlice(self.axis, start, stop, step)

    def _attribute_edits(self, start: int, stop: int) -> Iterator[Edit]:
        """Set the bounds along the axis where they are attributes, before opset 10."""
        given = self.node.attributes
        starts, ends = list(given.get_ints("starts", ())), list(given.get_ints("ends", ()))
        axes = given.get_ints("axes", range(len(starts)))
        place = next(place for place, axis in enumerate(axes) if axis % len(self.own[0]) == self.axis)
        starts[place], ends[place] = start, stop
        yield SetAttribute("starts", tuple(starts))
        yield SetAttribute("ends", tuple(ends))

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
