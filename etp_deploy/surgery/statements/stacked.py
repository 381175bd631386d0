"""Contractions with a constant of more than two axes: a stack of matrices (experts), or Einsum's weight.

Which channels stay may differ from expert to expert, as long as all keep equally many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.state import Cause, ConflictError, coordinates, nested_fill
from etp_deploy.surgery.statements.base import Affine, Edit, GatherInput, SetInput, default_layout
from etp_deploy.surgery.statements.named import Named, matrix_names
from etp_deploy.surgery.statements.rows import distinct, shared

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Stacked(Named):
    """A contraction of named axes with a constant; arguments are those of `Named`."""

    # constants

    def _known(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return which inputs are known constants in all rows, and their values, as (shared, contracted)."""
        if self._held is None:
            self._held = shared(*self._read_rows(state))
        return self._held

    def _read_rows(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return what is known of each row that passes: where, and the values, as (row, shared, contracted)."""
        constant = state.constant(self.data)
        if constant is None:
            shape = (1, *self._reads.shape[::2])
            return np.zeros(shape, bool), np.zeros(shape)
        known = self._data_rows(constant.known, np.logical_and)
        low = self._data_rows(constant.value, np.minimum).astype(np.float64)
        high = self._data_rows(constant.value, np.maximum).astype(np.float64)
        known = known & (low == high)
        return known, np.where(known, low, 0.0)

    def _sums(self, value: np.ndarray) -> np.ndarray:
        """Return what constants (shared, contracted) add to the output, as (shared, free)."""
        weight = self._grouped()
        rows = [weight[row].astype(np.float64) @ value[row] for row in range(len(weight))]
        return self._reading(np.stack(rows) * self.scale)

    def constants(self, state: State) -> None:
        """An output is known if every input that it reads is."""
        if not self.active:
            return
        self._held = None
        known, value = self._read_rows(state)
        first, which = distinct(known, value)
        held = np.stack([~self._reading(self._reads.outputs(~known[row])) for row in first])
        if not held.any():
            return
        shape = [self._out_frame[dim] for dim in self._out_dims]
        if len(known) == 1:
            shape[: len(self._passing)] = [1] * len(self._passing)
        back = np.argsort(self._out_dims)
        result = np.stack([self._sums(value[row]) for row in first]).astype(self._array().dtype)
        state.set_constant(
            self.out,
            np.transpose(held[which].reshape(shape), back),
            np.transpose(result[which].reshape(shape), back),
        )

    def silence(self, state: State) -> bool:
        """Take for zeros the weights of channels that nothing reads; say whether there are any."""
        weight = self.node.inputs[self.weight]
        if not self.active or weight is None or len(weight.uses()) > 1 or self._array().dtype.kind != "f":
            return False
        dead = ~np.asarray(self._out_rows(state.mask(self.out)).any(axis=0))
        constant = state.constant(self.out)
        if constant is not None:
            dead &= ~self._out_rows(np.broadcast_to(constant.known, self._out_frame)).all(axis=0)
        if not dead.any():
            return False
        self._silent = dead
        return True

    def _reading(self, rows: np.ndarray) -> np.ndarray:
        """Leave out of something for each (shared, free) what is taken for zeros."""
        return rows if self._silent is None else np.where(self._silent, 0, rows).astype(rows.dtype)

    # masks

    def rewind(self, *, read: bool = True) -> None:
        """Forget the constants held, and that weights counted as zero."""
        del read
        self._held = self._silent = None

    def spread(self, state: State) -> None:
        """A kept output keeps each input that it reads and that is not a known constant."""
        if not self.active:
            return
        out = self._out_rows(state.mask(self.out))
        wanted = self._reads.inputs(self._reading(np.asarray(out.any(axis=0)))) & ~self._known(state)[0]
        cause = Cause("read with a weight that is not zero by", self.node, self.out)
        state.grow(self.data, self._lower(wanted & out.any(axis=2, keepdims=True)), cause)

    def repair(self, state: State) -> bool:
        """Data and output keep the same rows, and in all of them equally many channels."""
        if not self.active:
            return False
        out, data = self._out_rows(state.mask(self.out)), self._data_rows(state.mask(self.data))
        rows = np.asarray(out.any(axis=2))
        if any(dim is not None for dim in self._data_dims[: -len(self._contracted) or None]):
            rows |= data.any(axis=2)
        shape = (*self._passing, *self._shape(self._shared))
        without = tuple(place for place, dim in enumerate(self._data_dims[: len(shape)]) if dim is None)
        rows = np.broadcast_to(rows.reshape(shape).any(axis=without, keepdims=True), shape).reshape(
            rows.shape
        )
        cause = Cause("all of a stack keep equally many channels at", self.node, spare=True)
        own = self._view(state.mask(self.data), np.logical_or)
        inner = own.shape[len(shape) :]
        own = np.broadcast_to(own, (*shape, *inner)).reshape(rows.size, *inner)
        kept = _equal(own, rows.reshape(-1)).reshape((*shape, *inner))
        kept = np.broadcast_to(kept, (*shape, *self._shape(self._contracted)))
        grown = state.grow(self.data, self._lower(kept), cause)
        filled = _equal(out.reshape(rows.size, *self._shape(self._free)), rows.reshape(-1))
        return state.grow(self.out, self._lower_out(filled), cause) or grown

    # layout

    def layout(self, state: State) -> None:
        """Rows stand as the data's do, and each row's channels in their own order."""
        if not self.active:
            default_layout(state, self.out)
            return
        lines = self._lines(state)
        free = self._shape(self._free)
        mask = self._out_rows(state.mask(self.out)).reshape(*self._passing, *self._shape(self._shared), -1)
        rows = mask[np.ix_(*lines, np.arange(mask.shape[-1]))].reshape(-1, mask.shape[-1])
        counts = rows.sum(axis=1)
        if not rows.size or (counts != counts[0]).any():
            raise ConflictError([self.data, self.out])
        channels = np.nonzero(rows)[1].reshape(len(rows), -1)
        inner = _nested_counts(rows[0].reshape(free))
        outer = [len(line) for line in lines]
        if int(np.prod(inner)) != counts[0]:
            raise ConflictError([self.data, self.out])
        row = np.ravel_multi_index(np.ix_(*lines), mask.shape[:-1]) if lines else np.zeros((), np.int64)
        flat = row.reshape(-1, 1) * mask.shape[-1] + channels
        # the rest of the output's dimensions have one index each
        rest = [1] * (len(self._out_dims) - len(outer) - len(inner))
        places = np.transpose(
            np.arange(int(np.prod(self._out_frame))).reshape(self._out_frame), self._out_dims
        )
        layout = places.reshape(-1)[flat].reshape((*outer, *inner, *rest))
        state.layouts[self.out] = np.transpose(layout, np.argsort(self._out_dims))
        if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError([self.data, self.out])

    def _lines(self, state: State) -> list[np.ndarray]:
        """Return the order in which passing and shared indices stand, one vector each."""
        sizes = (*self._passing, *self._shape(self._shared))
        coords = coordinates(state.layouts[self.data], self._whole)
        lines = []
        for size, dim in zip(sizes, self._data_dims, strict=False):
            if dim is None:
                lines.append(np.arange(size))
                continue
            others = tuple(other for other in range(len(self._whole)) if other != dim)
            low, high = coords[dim].min(axis=others), coords[dim].max(axis=others)
            if not np.array_equal(low, high):
                raise ConflictError([self.data, self.out])
            lines.append(low)
        return lines

    def check(self, state: State) -> None:
        """Raise a conflict where the weight would have to be another one for each index that passes."""
        if self.active:
            self._indices(state)

    def _indices(self, state: State) -> dict[str, np.ndarray]:
        """Return for each axis of the weight which index to take, over (shared..., contracted..., free...)."""
        lines = self._lines(state)[len(self._passing) :]
        ranks = len(self._shared), len(self._contracted), len(self._free)
        found = {}
        for place, (name, line) in enumerate(zip(self._shared, lines, strict=True)):
            found[name] = line.reshape([-1 if at == place else 1 for at in range(sum(ranks))])
        own = coordinates(state.layouts[self.data], self._whole)
        for place, name in enumerate(self._contracted, len(self._passing) + ranks[0]):
            dim = self._data_dims[place]
            if dim is None:
                at = place - len(self._passing)
                found[name] = np.arange(self._sizes[name]).reshape(
                    [-1 if other == at else 1 for other in range(sum(ranks))]
                )
                continue
            low = self._view(own[dim], np.minimum)
            if not np.array_equal(low, self._view(own[dim], np.maximum)):
                raise ConflictError([self.data, self.out])
            low = self._same(low)
            found[name] = low.reshape((*low.shape, *[1] * ranks[2]))
        out = coordinates(state.layouts[self.out], self._out_frame)
        for place, name in enumerate(self._free, len(self._passing) + ranks[0]):
            turned = np.transpose(out[self._out_dims[place]], self._out_dims)
            turned = self._same(turned.reshape(turned.shape[: len(self._passing) + ranks[0] + ranks[2]]))
            found[name] = turned.reshape(
                *turned.shape[: ranks[0]], *[1] * ranks[1], *turned.shape[ranks[0] :]
            )
        return found

    def _same(self, array: np.ndarray) -> np.ndarray:
        """Drop the dimensions that pass, along which all must be equal."""
        passing = tuple(range(len(self._passing)))
        low, high = array.min(axis=passing), array.max(axis=passing)
        if not np.array_equal(low, high):
            raise ConflictError([self.data, self.out])
        return np.asarray(low)

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Cut each matrix of the stack, and add what removed constants contributed."""
        if not self.active:
            return
        kept = self._out_rows(state.mask(self.out))
        silent = self._silent is not None and bool((kept & self._silent).any())
        if state.mask(self.data).all() and kept.all() and not silent:
            return
        indices, weight = self._indices(state), self.names[1]
        order = [*self._shared, *self._contracted, *self._free]
        turn = [order.index(name) for name in weight if name is not None]
        taken = []
        for name in weight:
            if name is None:
                taken.append(np.zeros((1,) * len(weight), np.int64))
                continue
            index = np.transpose(indices[name], turn)
            extents = iter(index.shape)
            taken.append(index.reshape([1 if other is None else next(extents) for other in weight]))
        extents = iter(np.broadcast_shapes(*(index.shape for index in taken)))
        merged = tuple(
            int(np.prod([next(extents) for _ in self._splits.get(name, (1,))])) for name in self._own
        )
        if silent:
            yield SetInput(self.weight, self._silenced()[tuple(taken)].reshape(merged))
        else:
            yield GatherInput(self.weight, self._array().shape, tuple(taken), merged)
        yield from self._folded(state, indices)

    def _silenced(self) -> np.ndarray:
        """Return the weight with zeros where it is taken for them."""
        assert self._silent is not None
        order = [*self._shared, *self._free]
        silent = self._silent.reshape(self._shape(order))
        named = [name for name in self.names[1] if name in order]
        silent = np.transpose(silent, [order.index(name) for name in named])
        extents = iter(silent.shape)
        shape = [next(extents) if name in order else 1 for name in self.names[1]]
        return np.where(silent.reshape(shape), 0, self._array()).astype(self._array().dtype)

    def _folded(self, state: State, indices: dict[str, np.ndarray]) -> Iterator[Edit]:
        known, value = self._known(state)
        gone = known & ~self._data_rows(state.mask(self.data)).any(axis=0)
        if not (gone & (value != 0)).any():
            return
        sums = self._sums(np.where(gone, value, 0.0))
        if not sums.any():
            return
        drop = tuple(len(self._shared) + place for place in range(len(self._contracted)))
        shaped = sums.reshape((*self._shape(self._shared), *self._shape(self._free)))
        order = [*self._shared, *self._free]
        share = shaped[tuple(indices[name].min(axis=drop) for name in order)]
        named = self.names[2]
        by_axis = sorted(order, key=named.index)
        share = np.transpose(share, [order.index(name) for name in by_axis])
        extents = iter(share.shape)
        yield Affine(1.0, share.reshape([next(extents) if name in order else 1 for name in named]))


def stack(
    node: ir.Node, data: int, turned: tuple[bool, bool] = (False, False), scale: float = 1.0
) -> Stacked:
    """Return the statement of a product with a constant vector, matrix or stack of matrices.

    Args:
        node: the node.
        data: which of the two is computed.
        turned: which of them are transposed.
        scale: what the product is multiplied by.
    """
    first, second, out = matrix_names(node, turned)
    ours, weight = (second, first) if data else (first, second)
    return Stacked(node, data=data, names=(ours, weight, out), scale=scale)


def _equal(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return a mask (row, channel...) in which each of some rows keeps equally many channels, and at least one.

    Rows are filled with the channels that most others keep, which is what may have to line up.
    """
    filled = mask.copy()
    flat = filled.reshape(len(mask), -1)
    flat[rows & ~flat.any(axis=1), np.argmax(flat.sum(axis=0))] = True
    lines = filled.reshape(-1, mask.shape[-1])
    order = np.argsort(-lines.sum(axis=0), kind="stable")
    wanted = int(lines.sum(axis=1).max(initial=0))
    for line in np.flatnonzero(lines.any(axis=1)):
        lacking = order[~lines[line, order]]
        lines[line, lacking[: wanted - int(lines[line].sum())]] = True
    return nested_fill(filled)


def _nested_counts(mask: np.ndarray) -> list[int]:
    """Return how many slices of a mask stay along each dimension, within each that stays before it."""
    counts, before = [], 1
    for depth in range(1, mask.ndim + 1):
        slices = int(mask.reshape(*mask.shape[:depth], -1).any(axis=-1).sum())
        counts.append(slices // max(before, 1))
        before = slices
    return counts
