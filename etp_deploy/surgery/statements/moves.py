"""Operators that move channels without computing: reshape, transpose, expand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import (
    ONE,
    Axis,
    Factor,
    Size,
    axis_size,
    frame,
    frame_dims,
    has_labels,
    is_parameter,
    labelled,
    plain,
    refine,
)
from etp_deploy.surgery.state import Cause, ConflictError, coordinates, nested_fill
from etp_deploy.surgery.statements.base import (
    Edit,
    SetShape,
    Statement,
    array_of,
    default_layout,
    new_sizes,
    new_target,
    set_plain,
    writable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.shapes import Structure
    from etp_deploy.surgery.state import State


# operators with the input that names a place for every single entry
ROUTES = {("ScatterElements", 1), ("GatherElements", 1)}


class Move(Statement):
    """One input, one output, each output position taken from one input position."""

    def __init__(self, node: ir.Node) -> None:
        super().__init__(node)
        data = node.inputs[0]
        assert data is not None
        self.data = data
        self.out = node.outputs[0]
        self.active = False

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Bring an array over the input's frame (whole or reduced) into the output's dimensions."""
        raise NotImplementedError

    def backward(self, array: np.ndarray) -> np.ndarray:
        """Bring an array over the output's frame into the input's dimensions."""
        raise NotImplementedError

    def give_up(self, state: State, reason: str) -> None:
        """Pin the input and leave the output without labels."""
        state.pin(self.data, None, reason, self.node)
        set_plain(state, self.out)

    def sums_along(self, axis: int) -> int | None:
        """Return the output axis whose entries are those along an input axis, none of them left out or repeated."""
        del axis
        return None

    def constants(self, state: State) -> None:
        """Constants move with their channels, and entries that sum to one with their axis."""
        summed = state.stochastic.get(self.data)
        place = None if summed is None else self.sums_along(summed)
        if place is not None:
            state.stochastic[self.out] = place
        constant = state.constant(self.data)
        if constant is not None and self.active:
            state.set_constant(self.out, self.forward(constant.known), self.forward(constant.value))

    def spread(self, state: State) -> None:
        """Kept positions move with their channels, both ways."""
        if self.active:
            state.grow(
                self.data,
                self.backward(state.mask(self.out)),
                Cause("moved from here by", self.node, self.out),
            )
            state.grow(
                self.out, self.forward(state.mask(self.data)), Cause("moved to here by", self.node, self.data)
            )

    def layout(self, state: State) -> None:
        """The input's order, moved."""
        if not self.active:
            default_layout(state, self.out)
            return
        shape = frame(state.structure(self.data) or ())
        origin = self.forward(np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape))
        place = np.empty(origin.size, np.int64)
        place[origin.reshape(-1)] = np.arange(origin.size)
        layout = place[self.reduced(state, state.layouts[self.data])]
        if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError([self.data, self.out])
        state.layouts[self.out] = layout

    def reduced(self, state: State, layout: np.ndarray) -> np.ndarray:
        """Bring the input's layout into the output's reduced dimensions."""
        del state
        return self.forward(layout)


class Reshape(Move):
    """The same entries under another shape: Reshape, Flatten, Squeeze, Unsqueeze.

    Args:
        node: the node.
        target: the input that holds the target shape, where that must follow the channels.
    """

    def __init__(self, node: ir.Node, target: int | None = None) -> None:
        super().__init__(node)
        self.target = target

    def structure(self, state: State) -> None:
        """Cut the input's factors where the output's axes end."""
        structure, shape = state.structure(self.data), self.out.shape
        if structure is None or shape is None:
            self.give_up(state, "shapes are not known here")
            return
        if not any(has_labels(axis) for axis in structure):
            set_plain(state, self.out)
            return
        refined = refine(structure, [Size.of(dim) for dim in shape])
        if refined is None:
            self.give_up(state, "the reshape mixes channels with other axes")
            return
        self.active = True
        state.set_structure(self.out, refined)
        self._data_frame, self._out_frame = frame(structure), frame(refined)

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Frames of both sides hold the same positions in the same order."""
        return array.reshape(self._out_frame)

    def backward(self, array: np.ndarray) -> np.ndarray:
        """As `forward`."""
        return array.reshape(self._data_frame)

    def sums_along(self, axis: int) -> int | None:
        """The axis of the same size with the same axes behind it."""
        if self.data.shape is None or self.out.shape is None:
            return None
        behind = [Size.of(dim) for dim in self.data.shape][axis:]
        sizes = [Size.of(dim) for dim in self.out.shape]
        return len(sizes) - len(behind) if sizes[-len(behind) :] == behind else None

    def repair(self, state: State) -> bool:
        """An axis that is split in two keeps equally many indices of the second for each of the first."""
        if not self.active:
            return False
        mask = state.mask(self.out)
        squeezed = mask.reshape([extent for extent in mask.shape if extent > 1] or [1])
        return state.grow(
            self.out,
            nested_fill(squeezed).reshape(mask.shape),
            Cause("heads or groups keep equal counts at", self.node, spare=True),
        )

    def reduced(self, state: State, layout: np.ndarray) -> np.ndarray:
        """Read the reduced input, in its own order, under the reduced target shape."""
        mask = state.mask(self.out)
        counts = _counts(mask)
        if int(np.prod(counts, dtype=np.int64)) != layout.size:
            raise ConflictError([self.data, self.out])
        return layout.reshape(counts)

    def edits(self, state: State) -> Iterator[Edit]:
        """Write the sizes of the axes that lost channels into the target."""
        edit = self._new_shape(state)
        if edit is not None:
            yield edit

    def check(self, state: State) -> None:
        """Raise a conflict where a constant target would have to leave two sizes open."""
        edit = self._new_shape(state)
        literal = None if edit is None else array_of(self.node.inputs[edit.index])
        if edit is not None and literal is not None and new_target(literal, edit) is None:
            raise ConflictError([self.data, self.out])

    def _new_shape(self, state: State) -> SetShape | None:
        if not self.active or self.target is None or state.mask(self.out).all():
            return None
        before, behind = state.structure(self.data), state.structure(self.out)
        assert before is not None
        assert behind is not None
        given = new_sizes(before, state.layouts[self.data].shape)
        sizes = new_sizes(behind, state.layouts[self.out].shape)
        pairs = enumerate(zip(given, sizes, strict=False))
        copied = frozenset(axis for axis, ((own, _), (made, _)) in pairs if own == made)
        return SetShape(self.target, sizes, copied)


def _counts(mask: np.ndarray) -> tuple[int, ...]:
    """Return how many indices a rectangular mask keeps along each dimension, outermost first."""
    counts = []
    rest = mask.size
    for extent in mask.shape:
        rest //= max(extent, 1)
        rows = mask.reshape(-1, extent, rest)
        counts.append(int(rows.any(axis=2).sum(axis=1).max(initial=0)) if mask.size else 0)
    return tuple(counts)


class Permute(Move):
    """The same entries under other axes: Transpose.

    Args:
        node: the node.
        perm: the input axis of each output axis.
    """

    def __init__(self, node: ir.Node, perm: tuple[int, ...]) -> None:
        super().__init__(node)
        self.perm = perm

    def structure(self, state: State) -> None:
        """Axes keep their factors."""
        structure = state.structure(self.data)
        if structure is None:
            self.give_up(state, "shapes are not known here")
            return
        self.active = any(has_labels(axis) for axis in structure)
        state.set_structure(self.out, tuple(structure[axis] for axis in self.perm))
        self.order = [dim for axis in self.perm for dim in frame_dims(structure, axis)]

    def sums_along(self, axis: int) -> int | None:
        """Where the axis stands afterwards."""
        return self.perm.index(axis)

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Permute the frame's dimensions as the axes are."""
        return np.transpose(array, self.order)

    def backward(self, array: np.ndarray) -> np.ndarray:
        """Permute them back."""
        return np.transpose(array, np.argsort(self.order))


class Expand(Move):
    """Repeat an axis of size 1: Expand. Copies are channels of their own (grouped-query attention repeats heads)."""

    def structure(self, state: State) -> None:
        """Axes that are repeated a known number of times become labelled; all others keep their factors."""
        structure, shape = state.structure(self.data), self.out.shape
        if structure is None or shape is None or len(shape) < len(structure):
            self.give_up(state, "shapes are not known here")
            return
        if not any(has_labels(axis) for axis in structure) and not self._routes():
            set_plain(state, self.out)
            return
        if not writable(self.node.inputs[1]):
            self.give_up(state, "its target shape is computed while the model runs")
            return
        added = len(shape) - len(structure)
        axes: list[Axis] = []
        sources: list[int | None] = []
        for place, base in enumerate(plain(shape)):
            own = place - added
            single = own < 0 or axis_size(structure[own]) == ONE
            axes.append(_copies(base) if single else structure[own])
            sources += [None] * len(axes[-1]) if single else frame_dims(structure, own)
        self._become(state, structure, tuple(axes), sources)

    def _become(
        self, state: State, structure: Structure, axes: Structure, sources: Sequence[int | None]
    ) -> None:
        """Set the output's structure; each dimension of its frame comes from the data's, or is new."""
        self.active = True
        state.set_structure(self.out, axes)
        self._sources = sources
        self._data_frame, self._out_frame = frame(structure), frame(axes)
        self._repeated = tuple(
            dim for dim, source in enumerate(sources) if source is None and self._out_frame[dim] > 1
        )

    def _routes(self) -> bool:
        """Return whether the copies only say where entries go, one for each channel that is moved."""
        uses = list(self.out.uses())
        return (
            bool(uses)
            and not is_parameter(self.data)
            and not self.out.is_graph_output()
            and all((user.op_type, place) in ROUTES for user, place in uses)
        )

    def _lift(self, array: np.ndarray) -> np.ndarray:
        """Bring an array over the data's frame, whole or reduced, into the output's dimensions, new ones being 1."""
        return array.reshape([1 if source is None else array.shape[source] for source in self._sources])

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Repeat along the new dimensions."""
        return np.broadcast_to(self._lift(array), self._out_frame)

    def backward(self, array: np.ndarray) -> np.ndarray:
        """A position is kept if any of its copies is."""
        return np.asarray(array.any(axis=self._repeated, keepdims=True).reshape(self._data_frame))

    def spread(self, state: State) -> None:
        """A copy that stays in part keeps the positions that the original keeps."""
        if not self.active or not self._repeated:
            super().spread(state)
            return
        out = state.mask(self.out)
        state.grow(self.data, self.backward(out), Cause("repeated from here by", self.node, self.out))
        # dimensions inside each copy, after the repeated one
        copied = tuple(
            dim
            for dim in range(self._repeated[0], out.ndim)
            if self._sources[dim] is not None and out.shape[dim] > 1
        )
        rows = out.any(axis=copied, keepdims=True) if copied else out
        state.grow(
            self.out,
            rows & self.forward(state.mask(self.data)),
            Cause("repeated to here by", self.node, self.data),
        )

    def repair(self, state: State) -> bool:
        """Every original that stays has equally many copies, at least one."""
        if not self.active or not self._repeated:
            return False
        out, lifted = state.mask(self.out), self._lift(state.mask(self.data))
        cause = Cause("copies keep equal counts at", self.node, spare=True)
        empty = lifted & ~out.any(axis=self._repeated, keepdims=True)
        first = np.zeros(out.shape, bool)
        first[tuple(slice(0, 1) if dim in self._repeated else slice(None) for dim in range(out.ndim))] = True
        wanted = out | (empty & first)
        squeezed = wanted.reshape([extent for extent in wanted.shape if extent > 1] or [1])
        return state.grow(self.out, nested_fill(squeezed).reshape(wanted.shape), cause)

    def reduced(self, state: State, layout: np.ndarray) -> np.ndarray:
        """Nothing is repeated but what is no channel: the input's order."""
        del state
        return self._lift(layout)

    def layout(self, state: State) -> None:
        """Originals in their order, copies in theirs."""
        if not self.active or not self._repeated:
            super().layout(state)
            return
        out = state.mask(self.out)
        whole = self._lift(np.empty(self._data_frame, bool)).shape
        lifted = self._lift(state.layouts[self.data])
        counts = [n if whole[dim] > 1 else _counts(out)[dim] for dim, n in enumerate(lifted.shape)]
        coords = coordinates(lifted, whole)
        kept = np.flatnonzero(out)
        # The copies of an original stand in order; walk the kept positions original by original.
        key = np.stack(np.unravel_index(kept, out.shape), axis=1)
        layout = np.empty(counts, np.int64)
        for place in np.ndindex(*counts):
            source = tuple(min(i, n - 1) for i, n in zip(place, lifted.shape, strict=True))
            same = np.ones(len(kept), bool)
            for dim in range(out.ndim):
                if whole[dim] > 1:
                    same &= key[:, dim] == coords[dim][source]
            copies = kept[same]
            rank = 0
            for dim, count in enumerate(counts):
                if whole[dim] <= 1:
                    rank = rank * count + place[dim]
            if rank >= len(copies):
                raise ConflictError([self.data, self.out])
            layout[place] = copies[rank]
        if not np.array_equal(np.sort(layout, axis=None), kept):
            raise ConflictError([self.data, self.out])
        state.layouts[self.out] = layout

    def edits(self, state: State) -> Iterator[Edit]:
        """Write the new sizes into the target shape."""
        structure = state.structure(self.out)
        if self.active and structure is not None and not state.mask(self.out).all():
            yield SetShape(1, new_sizes(structure, state.layouts[self.out].shape))


def _copies(base: Axis) -> Axis:
    """Return the axis that repeats one entry: as many channels as is known, whatever else it is repeated for around."""
    size = axis_size(base)
    if size.coefficient <= 1:
        return base
    return (*((Factor(Size(1, size.symbols)),) if size.symbols else ()), *labelled(size.coefficient))


class Tile(Expand):
    """Repeat a tensor along its axes, whole: Tile. Copies of an axis of size 1 are channels of their own."""

    def structure(self, state: State) -> None:
        """Axes keep their factors, inside those that count the copies."""
        structure, shape = state.structure(self.data), self.out.shape
        if structure is None or shape is None or len(shape) != len(structure):
            self.give_up(state, "shapes are not known here")
            return
        if not any(has_labels(axis) for axis in structure):
            set_plain(state, self.out)
            return
        axes: list[Axis] = []
        sources: list[int | None] = []
        for own, (axis, base) in enumerate(zip(structure, plain(shape), strict=True)):
            dims: list[int | None] = list(frame_dims(structure, own))
            copies = axis_size(base).divide(axis_size(axis))
            if not has_labels(axis):
                single = axis_size(axis) == ONE and writable(self.node.inputs[1])
                axes.append(_copies(base) if single else base)
                dims = [None] * len(axes[-1])
            elif copies is None or copies.coefficient == 0:
                self.give_up(state, "how often it is repeated is not known before the model runs")
                return
            elif axis[0].labelled and copies != ONE:
                axes.append((Factor(copies), *axis))
                dims = [None, *dims]
            else:
                axes.append((Factor(copies * axis[0].size, axis[0].labelled), *axis[1:]))
            sources += dims
        self._become(state, structure, tuple(axes), sources)

    def edits(self, state: State) -> Iterator[Edit]:
        """Write how often an axis of size 1 is repeated now."""
        structure, single = state.structure(self.out), state.structure(self.data)
        if not self.active or not self._repeated or structure is None or single is None:
            return
        if not state.mask(self.out).all():
            sizes = new_sizes(structure, state.layouts[self.out].shape)
            yield SetShape(
                1,
                tuple(
                    pair if axis_size(axis) == ONE else (ONE, ONE)
                    for axis, pair in zip(single, sizes, strict=True)
                ),
            )
