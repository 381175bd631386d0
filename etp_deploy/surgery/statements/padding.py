"""Padding: entries put in front of a tensor and behind it, axis by axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import Axis, frame, frame_dims, has_labels, labelled, plain, single_label
from etp_deploy.surgery.state import Cause, ConflictError, coordinates
from etp_deploy.surgery.statements.base import (
    Edit,
    SetAttribute,
    SetInput,
    Statement,
    array_of,
    default_layout,
    set_plain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Padded(Statement):
    """A tensor with more entries around it; along channels these are constant channels of the output's own.

    Args:
        node: the node.
        pads: for each axis that may be padded, how many indices come in front and behind; fewer where negative.
        value: what the new entries hold; None where they repeat the tensor's own.
        entries: for each axis, where its two numbers stand among the pads that the node is given.
    """

    def __init__(
        self,
        node: ir.Node,
        pads: Mapping[int, tuple[int, int]],
        *,
        value: np.ndarray | None,
        entries: Mapping[int, tuple[int, int]],
    ) -> None:
        super().__init__(node)
        data = node.inputs[0]
        assert data is not None
        self.data, self.out = data, node.outputs[0]
        self.pads = {axis: amounts for axis, amounts in pads.items() if any(amounts)}
        self.value, self.entries = value, entries
        self.active = False

    # structure

    def structure(self, state: State) -> None:
        """Axes that are not padded pass; along one that is padded by a constant, each index stays or goes."""
        structure, shape = state.structure(self.data), self.out.shape
        if structure is None or shape is None:
            state.pin(self.data, None, "shapes are not known here", self.node)
            set_plain(state, self.out)
            return
        axes: list[Axis] = []
        passing: list[int] = []
        for axis, (factors, base) in enumerate(zip(structure, plain(shape), strict=True)):
            before, behind = self.pads.get(axis, (0, 0))
            if axis not in self.pads:
                axes.append(factors)
            elif single_label(factors) and self.value is not None and min(before, behind) >= 0:
                axes.append(labelled(before + factors[0].extent + behind))
            else:
                if has_labels(factors):
                    state.pin(self.data, axis, "padded along", self.node)
                axes.append(base)
                continue
            passing.append(axis)
        out = tuple(axes)
        state.set_structure(self.out, out)
        self.active = True
        self._own, self._frame = frame(structure), frame(out)
        self._pairs = [
            pair
            for axis in passing
            for pair in zip(frame_dims(structure, axis), frame_dims(out, axis), strict=True)
        ]
        self._widened = {axis: frame_dims(out, axis)[0] for axis in passing if axis in self.pads}
        if self._widened:
            state.product |= {self.data, self.out}

    @property
    def _box(self) -> tuple[slice, ...]:
        """Where the data stand in the output's frame."""
        starts = {dim: self.pads[axis][0] for axis, dim in self._widened.items()}
        extents = {target: self._own[own] for own, target in self._pairs}
        return tuple(
            slice(starts.get(dim, 0), starts.get(dim, 0) + extents.get(dim, 1))
            for dim in range(len(self._frame))
        )

    def _to_out(self, array: np.ndarray, reduce: np.ufunc) -> np.ndarray:
        """Bring an array in the data's dimensions into the output's, those that are not passed reduced."""
        others = tuple(dim for dim in range(array.ndim) if dim not in [own for own, _ in self._pairs])
        reduced = np.asarray(reduce.reduce(array, axis=others))
        shape = [1] * len(self._frame)
        for (_, target), extent in zip(self._pairs, reduced.shape, strict=True):
            shape[target] = extent
        return reduced.reshape(shape)

    # constants

    def constants(self, state: State) -> None:
        """New channels hold the value; others are constant if the entries beside them are the same."""
        if not self.active or (self.value is None and state.constant(self.data) is None):
            return
        constant = state.constant(self.data)
        dtype = np.float32 if self.out.dtype is None else self.out.dtype.numpy()
        known = np.full(self._frame, bool(self._widened))
        value = np.full(self._frame, 0 if self.value is None else self.value, dtype)
        known[self._box] = False
        if constant is not None:
            low, high = self._to_out(constant.value, np.minimum), self._to_out(constant.value, np.maximum)
            held = self._to_out(constant.known, np.logical_and) & (low == high)
            if self.value is not None and len(self._widened) < len(self.pads):
                held &= low == self.value
            known[self._box], value[self._box] = held, low
        state.set_constant(self.out, known, value)

    # masks

    def spread(self, state: State) -> None:
        """Kept positions are the same on both sides, moved by what comes in front."""
        if not self.active:
            return
        inside = state.mask(self.out)[self._box]
        shape = [1] * len(self._own)
        for own, _ in self._pairs:
            shape[own] = self._own[own]
        state.grow(self.data, inside.reshape(shape), Cause("read at the same index by", self.node, self.out))
        grown = np.zeros(self._frame, bool)
        grown[self._box] = self._to_out(state.mask(self.data), np.logical_or)
        state.grow(self.out, grown, Cause("made at the same index by", self.node, self.data))

    # layout

    def layout(self, state: State) -> None:
        """The data in their order, the new channels in front and behind."""
        if not self.active:
            default_layout(state, self.out)
            return
        coords = coordinates(state.layouts[self.data], self._own)
        found = [np.zeros((1,) * len(self._frame), np.int64) for _ in self._frame]
        for own, target in self._pairs:
            found[target] = self._same(
                self._to_out(coords[own], np.minimum), self._to_out(coords[own], np.maximum)
            )
        for axis, dim in self._widened.items():
            # along new channels the other axes stand as they do along the data's
            others = [place for place in range(len(found)) if place != dim]
            for place in others:
                low, high = (reduce(found[place], axis=dim, keepdims=True) for reduce in (np.min, np.max))
                found[place] = self._same(low, high)
            line = self._same(found[dim].min(axis=tuple(others)), found[dim].max(axis=tuple(others)))
            front, behind = self._new(state, axis)
            start = self.pads[axis][0]
            line = np.concatenate([front, line + start, behind])
            found[dim] = line.reshape([-1 if place == dim else 1 for place in range(len(found))])
        layout = np.ravel_multi_index(tuple(np.broadcast_arrays(*found)), self._frame)
        self._same(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out)))
        state.layouts[self.out] = layout

    def _same(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if not np.array_equal(one, other):
            raise ConflictError([self.data, self.out])
        return one

    def _new(self, state: State, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Return which new channels along an axis stay, in front and behind."""
        dim, mask = self._widened[axis], state.mask(self.out)
        kept = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != dim)))
        box = self._box[dim]
        return kept[kept < box.start], kept[kept >= box.stop]

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Count the new channels that stay."""
        if not self.active or not self._widened or state.mask(self.out).all():
            return
        given = array_of(self.node.inputs[1]) if "pads" not in self.node.attributes else None
        pads = np.array(self.node.attributes.get_ints("pads", ()) if given is None else given)
        for axis in self._widened:
            for place, stays in zip(self.entries[axis], self._new(state, axis), strict=True):
                pads[place] = len(stays)
        if given is None:
            yield SetAttribute("pads", tuple(int(pad) for pad in pads))
        else:
            yield SetInput(1, pads)
