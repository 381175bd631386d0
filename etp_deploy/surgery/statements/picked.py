"""Gather with constant indices: each output index is one of the input's, which may be taken more than once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import frame
from etp_deploy.surgery.state import ConflictError, coordinates
from etp_deploy.surgery.statements.base import Bypass, Edit, SetInput, array_of, default_layout
from etp_deploy.surgery.statements.selected import Piece, Selected

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Picked(Selected):
    """Indices along one axis, of which those stay that something reads.

    An input index stays if any of its copies does; a copy that nothing reads goes, though others stay.

    Args:
        node: the node.
        axis: the input axis.
        indices: which of its indices are taken, in order; one without an axis drops it.
    """

    def __init__(self, node: ir.Node, axis: int, indices: np.ndarray) -> None:
        super().__init__(node, axis, [[(0, indices.reshape(-1))]], drop=indices.ndim == 0)
        self.out = node.outputs[0]

    @property
    def data(self) -> ir.Value:
        """The tensor that is read."""
        return self._inputs()[0]

    # masks

    def _back(self, mask: np.ndarray, out: np.ndarray, piece: Piece) -> np.ndarray:
        if self.drop or not self.along:
            return super()._back(mask, out, piece)
        index, indices, _ = piece
        dim = self._dim(index)
        grown = np.zeros_like(mask)
        np.logical_or.at(np.moveaxis(grown, dim, 0), indices, np.moveaxis(out, dim, 0))
        return grown

    def _forth(self, mask: np.ndarray, out: np.ndarray, piece: Piece) -> np.ndarray:
        grown = super()._forth(mask, out, piece)
        if self.drop or not self.along:
            return grown
        dim = self._dim(piece[0])
        others = tuple(other for other in range(out.ndim) if other != dim)
        return grown & np.asarray(out.any(axis=others, keepdims=True))

    # layout

    def _places(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the taken indices stay, and at which place along the input's axis each stands now."""
        indices, dim = self.parts[0][0][1], self._dim(0)
        coordinate = coordinates(state.layouts[self.data], state.mask(self.data).shape)[dim]
        others = tuple(other for other in range(coordinate.ndim) if other != dim)
        low, high = coordinate.min(axis=others), coordinate.max(axis=others)
        at = {
            int(one): place for place, (one, other) in enumerate(zip(low, high, strict=True)) if one == other
        }
        kept = np.flatnonzero(self.drop or state.mask(self.out).any(axis=others))
        if not all(int(index) in at for index in indices[kept]):
            raise ConflictError([self.data, self.out])
        return kept, np.array([at[int(index)] for index in indices[kept]], np.int64)

    def layout(self, state: State) -> None:
        """Taken indices in their order; other axes as the input's stand there."""
        if not self.active:
            default_layout(state, self.out)
            return
        coords = coordinates(state.layouts[self.data], state.mask(self.data).shape)
        dim, shape = self._dim(0), frame(state.structure(self.out) or ())
        if self.along:
            kept, places = self._places(state)
            coords = [np.take(coordinate, places, axis=dim) for coordinate in coords]
            coords[dim] = np.broadcast_to(
                kept.reshape([-1 if other == dim else 1 for other in range(len(coords))]), coords[dim].shape
            )
        if self.drop:
            coords = [np.squeeze(coordinate, dim) for at, coordinate in enumerate(coords) if at != dim]
        layout = np.ravel_multi_index(tuple(coords), shape) if coords else np.zeros((), np.int64)
        if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError([self.data, self.out])
        state.layouts[self.out] = np.asarray(layout)

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Take what stays, from where it stands now; nothing is left to do where that is all, in order."""
        masks = [state.mask(self.data), state.mask(self.out)]
        if not (self.active and self.along) or all(mask.all() for mask in masks):
            return
        _, places = self._places(state)
        old = array_of(self.node.inputs[1])
        assert old is not None
        shape = () if self.drop else (-1, *old.shape[1:])
        yield SetInput(1, places.reshape(shape).astype(old.dtype))
        count = state.layouts[self.data].shape[self._dim(0)]
        if not self.drop and np.array_equal(places, np.arange(count)):
            yield Bypass()
