"""Reductions over channels: sums, means and norms lose the channels that are known, and what these gave is added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from etp_deploy.surgery.shapes import ONE, axis_size, frame, frame_dims, has_labels, single_label
from etp_deploy.surgery.state import Cause, ConflictError
from etp_deploy.surgery.statements.base import Affine, Edit
from etp_deploy.surgery.statements.pointwise import Pointwise, missing_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.shapes import Structure
    from etp_deploy.surgery.state import State
    from etp_deploy.surgery.statements.mapped import AxisMap, Constants

Kind = Literal["sum", "mean", "norm"]
"""A norm loses only what is known to be zero."""


class Reduction(Pointwise):
    """`y[...] = sum, mean or norm over some axes of x[...]`.

    Args:
        node: the node.
        axis_map: for each input axis the output axis, None where it is reduced.
        kind: what is computed.
    """

    def __init__(self, node: ir.Node, axis_map: AxisMap, kind: Kind) -> None:
        constants: Constants = "pass" if kind == "mean" else "zero"
        whole = f"{node.op_type} reads this axis as a whole"
        super().__init__(node, {0: axis_map}, constants=constants, whole=whole)
        self.kind = kind
        self.reduced: list[int] = []

    def _link(
        self, state: State, index: int, axis_map: AxisMap, structure: Structure, axes: Structure
    ) -> list[tuple[int, int]]:
        """Reduced axes with channels need not stay whole; remember their dimensions."""
        self._plain_count = 1
        for own, target in enumerate(axis_map):
            if target is not None:
                continue
            if single_label(structure[own]):
                self.reduced += list(frame_dims(structure, own))
            elif has_labels(structure[own]):
                state.pin(self._value(index), own, self.whole, self.node)
            else:
                self._plain_count *= axis_size(structure[own]).static or 0
        labelled_reduced = [
            own for own, target in enumerate(axis_map) if target is None and single_label(structure[own])
        ]
        kept = tuple(-1 if own in labelled_reduced else target for own, target in enumerate(axis_map))
        plain_map = tuple(None if target == -1 else target for target in kept)
        linked = [own for own, target in enumerate(plain_map) if target is not None]
        partial = super()._link(
            state,
            index,
            tuple(plain_map[own] for own in linked),
            tuple(structure[own] for own in linked),
            axes,
        )
        starts = {place: frame_dims(structure, own)[0] for place, own in enumerate(linked)}
        lengths = [len(structure[own]) for own in linked]
        dims = [starts[place] + step for place, length in enumerate(lengths) for step in range(length)]
        return [(dims[own], target) for own, target in partial]

    # constants

    def constants(self, state: State) -> None:
        """Known where all that is reduced is known; zero where all of it is zero."""
        constant = state.constant(self._value(0))
        structure = state.structure(self.out)
        if not self.reduced or constant is None or structure is None:
            super().constants(state)
            return
        ok = constant.zero if self.kind == "norm" or self._plain_count == 0 else constant.known
        dims = len(frame(structure))
        known = self._to_out(np.asarray(ok), 0, dims, np.logical_and)
        held = np.where(ok, constant.value, 0).astype(np.float64)
        total = self._to_out(held, 0, dims, np.add)
        count = np.prod([constant.known.shape[dim] for dim in self.reduced])
        total = total / count if self.kind == "mean" else total * max(self._plain_count, 1)
        state.set_constant(self.out, known, total.astype(constant.value.dtype))

    def _gone_allowed(self, state: State) -> np.ndarray:
        """Return which positions of the data may go although the result stays."""
        value = self._value(0)
        constant = state.constant(value)
        if constant is None or not self.reduced:
            return np.zeros(state.mask(value).shape, bool)
        zero_only = self.kind == "norm" or (self.kind == "sum" and self._plain_count == 0)
        return np.asarray(constant.zero if zero_only else constant.known)

    # masks

    def spread(self, state: State) -> None:
        """A kept result keeps all that it reduces and that is not known."""
        if not self.reduced:
            super().spread(state)
            return
        value = self._value(0)
        wanted = self._from_out(state.mask(self.out), 0, state.mask(value).ndim) & ~self._gone_allowed(state)
        state.grow(value, wanted, Cause("summed over by", self.node, self.out))
        incoming = self._incoming(state, 0)
        state.grow(self.out, incoming, Cause("made at the same index by", self.node, value))

    def repair(self, state: State) -> bool:
        """A kept result reduces at least one position."""
        if not self.reduced:
            return super().repair(state)
        value = self._value(0)
        mask = state.mask(value)
        missing = missing_rows(self._from_out(state.mask(self.out), 0, mask.ndim), mask)
        return state.grow(value, missing, Cause("summed over by", self.node, self.out, spare=True))

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """A mean over fewer channels is scaled back; what removed constants gave is added."""
        value = self._value(0)
        mask = state.mask(value)
        if not self.reduced or mask.all():
            return
        layout = state.layouts[value]
        scale = 1.0
        if self.kind == "mean":
            kept = np.prod([layout.shape[dim] for dim in self.reduced])
            scale = float(kept / np.prod([mask.shape[dim] for dim in self.reduced]))
        offset = self._offset(state)
        if scale != 1.0 or offset.any():
            yield Affine(scale, offset.reshape(self._axes_shape(state, offset)) if offset.any() else None)

    def check(self, state: State) -> None:
        """Raise a conflict where what removed constants gave differs along an axis that has no fixed length."""
        super().check(state)
        value = self._value(0)
        if not self.reduced or state.mask(value).all():
            return
        offset = self._offset(state)
        if any(offset.shape[dim] > 1 for dim in self._open_dims(state)):
            raise ConflictError([value, self.out])

    def _offset(self, state: State) -> np.ndarray:
        """Return what removed constants gave, place by place of the result; 1 long where it is the same all along."""
        value = self._value(0)
        mask, constant = state.mask(value), state.constant(value)
        held = (
            np.zeros(mask.shape) if constant is None else np.where(constant.known & ~mask, constant.value, 0)
        )
        total = self._to_out(held.astype(np.float64), 0, state.mask(self.out).ndim, np.add)
        if self.kind == "mean":
            total = total / np.prod([mask.shape[dim] for dim in self.reduced])
        elif self.kind == "norm":
            total = np.zeros_like(total)
        else:
            total = total * max(self._plain_count, 1)
        offset = np.broadcast_to(total, state.mask(self.out).shape).reshape(-1)[state.layouts[self.out]]
        for dim in self._open_dims(state):
            first = np.take(offset, [0], axis=dim)
            offset = first if bool((offset == first).all()) else offset
        return np.asarray(offset)

    def _open_dims(self, state: State) -> tuple[int, ...]:
        """Return the result's dimensions that lie within an axis of no fixed length (channels times batch)."""
        structure = state.structure(self.out) or ()
        return tuple(
            dim
            for axis, factors in enumerate(structure)
            if any(not factor.labelled and factor.size != ONE for factor in factors)
            for dim in frame_dims(structure, axis)
        )

    def _axes_shape(self, state: State, offset: np.ndarray) -> list[int]:
        """Return an offset's shape with one extent for each axis of the output."""
        structure = state.structure(self.out) or ()
        return [
            int(np.prod([offset.shape[dim] for dim in frame_dims(structure, axis)], dtype=np.int64))
            for axis in range(len(structure))
        ]
