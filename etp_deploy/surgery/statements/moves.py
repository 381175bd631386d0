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
    default_layout,
    new_sizes,
    set_plain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

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

    def constants(self, state: State) -> None:
        """Constants move with their channels."""
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
        if not self.active or self.target is None:
            return
        structure = state.structure(self.out)
        assert structure is not None
        if state.mask(self.out).all():
            return
        yield SetShape(self.target, new_sizes(structure, state.layouts[self.out].shape))


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
        self.active = True
        added = len(shape) - len(structure)
        padded: tuple[Axis, ...] = ((Factor(ONE),),) * added + structure
        axes = []
        for axis, base in zip(padded, plain(shape), strict=True):
            copies = axis_size(base).static
            repeated = axis_size(axis) == ONE and copies is not None and copies > 1
            axes.append(
                labelled(copies)
                if repeated and copies is not None
                else (axis if axis_size(axis) != ONE else base)
            )
        state.set_structure(self.out, tuple(axes))
        self._added = sum(len(axis) for axis in padded[:added])
        self._data_frame = frame(structure)
        self._out_frame = frame(tuple(axes))

    def _routes(self) -> bool:
        """Return whether the copies only say where entries go, one for each channel that is moved."""
        uses = list(self.out.uses())
        return (
            bool(uses)
            and not is_parameter(self.data)
            and not self.out.is_graph_output()
            and all((user.op_type, place) in ROUTES for user, place in uses)
        )

    def forward(self, array: np.ndarray) -> np.ndarray:
        """Repeat along the new dimensions."""
        return np.broadcast_to(array.reshape((1,) * self._added + array.shape), self._out_frame)

    def backward(self, array: np.ndarray) -> np.ndarray:
        """A position is kept if any of its copies is."""
        lifted = (1,) * self._added + self._data_frame
        repeated = tuple(dim for dim, extent in enumerate(lifted) if extent == 1 and array.shape[dim] > 1)
        return array.any(axis=repeated, keepdims=True).reshape(self._data_frame)

    def spread(self, state: State) -> None:
        """A copy that stays in part keeps the positions that the original keeps."""
        if not self.active:
            return
        out = state.mask(self.out)
        state.grow(self.data, self.backward(out), Cause("repeated from here by", self.node, self.out))
        lifted = (1,) * self._added + self._data_frame
        copied = tuple(
            dim for dim, extent in enumerate(lifted) if extent > 1 and self._within_copy(dim, out.shape)
        )
        rows = out.any(axis=copied, keepdims=True) if copied else out
        state.grow(
            self.out,
            rows & self.forward(state.mask(self.data)),
            Cause("repeated to here by", self.node, self.data),
        )

    def _within_copy(self, dim: int, shape: tuple[int, ...]) -> bool:
        """Whether a dimension lies inside each copy (after the repeated one)."""
        lifted = (1,) * self._added + self._data_frame
        repeated = [other for other, extent in enumerate(lifted) if extent == 1 and shape[other] > 1]
        return bool(repeated) and dim > repeated[0]

    def repair(self, state: State) -> bool:
        """Every original that stays has equally many copies, at least one."""
        if not self.active:
            return False
        out, data = state.mask(self.out), state.mask(self.data)
        cause = Cause("copies keep equal counts at", self.node, spare=True)
        lifted = data.reshape((1,) * self._added + data.shape)
        repeated = tuple(dim for dim in range(out.ndim) if lifted.shape[dim] == 1 and out.shape[dim] > 1)
        empty = lifted & ~out.any(axis=repeated, keepdims=True)
        first = np.zeros(out.shape, bool)
        first[tuple(slice(0, 1) if dim in repeated else slice(None) for dim in range(out.ndim))] = True
        wanted = out | (empty & first)
        squeezed = wanted.reshape([extent for extent in wanted.shape if extent > 1] or [1])
        return state.grow(self.out, nested_fill(squeezed).reshape(wanted.shape), cause)

    def layout(self, state: State) -> None:
        """Originals in their order, copies in theirs."""
        if not self.active:
            default_layout(state, self.out)
            return
        out = state.mask(self.out)
        data_layout = state.layouts[self.data]
        lifted = data_layout.reshape((1,) * self._added + data_layout.shape)
        counts = [
            n if self._data_extent(dim) > 1 else _counts(out)[dim] for dim, n in enumerate(lifted.shape)
        ]
        coords = coordinates(lifted, (1,) * self._added + self._data_frame)
        kept = np.flatnonzero(out)
        # The copies of an original stand in order; walk the kept positions original by original.
        key = np.stack(np.unravel_index(kept, out.shape), axis=1)
        layout = np.empty(counts, np.int64)
        for place in np.ndindex(*counts):
            source = tuple(min(i, n - 1) for i, n in zip(place, lifted.shape, strict=True))
            same = np.ones(len(kept), bool)
            for dim in range(out.ndim):
                if self._data_extent(dim) > 1:
                    same &= key[:, dim] == coords[dim][source]
            copies = kept[same]
            rank = 0
            for dim, count in enumerate(counts):
                if self._data_extent(dim) <= 1:
                    rank = rank * count + place[dim]
            if rank >= len(copies):
                raise ConflictError([self.data, self.out])
            layout[place] = copies[rank]
        if not np.array_equal(np.sort(layout, axis=None), kept):
            raise ConflictError([self.data, self.out])
        state.layouts[self.out] = layout

    def _data_extent(self, dim: int) -> int:
        return ((1,) * self._added + self._data_frame)[dim]

    def edits(self, state: State) -> Iterator[Edit]:
        """Write the new sizes into the target shape."""
        structure = state.structure(self.out)
        if self.active and structure is not None and not state.mask(self.out).all():
            yield SetShape(1, new_sizes(structure, state.layouts[self.out].shape))
