"""Contractions with a constant of more than two axes: a stack of matrices (experts), or Einsum's weight.

`y[p..., s..., f...] = sum_k x[p..., s..., k...] * w[s..., k..., f...]`: an axis of the weight is *shared* with data
and output (one matrix for each expert), *contracted*, or *free*, the output's alone; others *pass*. Which channels
stay may differ from expert to expert, as long as all keep equally many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import Axis, Factor, Structure, frame, frame_dims, has_labels, labelled, plain
from etp_deploy.surgery.state import Cause, ConflictError, coordinates, nested_fill
from etp_deploy.surgery.statements.base import (
    Affine,
    Edit,
    GatherInput,
    SetInput,
    Statement,
    array_of,
    default_layout,
    set_plain,
)
from etp_deploy.surgery.statements.weights import Reads

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.state import State

Names = tuple[str | None, ...]


class Stacked(Statement):
    """A contraction whose axes are told apart by names, as in an equation of Einsum.

    Masks and constants are brought into the order (passing, shared, contracted or free) and counted as
    (rows that pass, shared index, channel); the weight as (shared index, free, contracted).

    Args:
        node: the node.
        data: the input number of the computed tensor; the other of the two is the weight.
        names: the names of the axes of data, weight and output; None for one of size 1 that broadcasts.
        scale: what the sums are multiplied by.
    """

    def __init__(
        self, node: ir.Node, *, data: int, names: tuple[Names, Names, Names], scale: float = 1.0
    ) -> None:
        super().__init__(node)
        value = node.inputs[data]
        assert value is not None
        self.data = value
        self.out = node.outputs[0]
        self.weight = 1 - data
        self.names = names
        # the weight's axes as the operator has them, and the sizes that those which are taken apart fall into
        self._own = names[1]
        self._splits: dict[str | None, tuple[int, ...]] = {}
        self.scale = scale
        self.active = False
        self._held: tuple[np.ndarray, np.ndarray] | None = None
        # channels whose weights are taken for zeros, as (shared, free)
        self._silent: np.ndarray | None = None

    @property
    def made(self) -> tuple[int, ...]:
        """The dimensions of the output's frame along which the weight makes channels."""
        return tuple(self._out_dims[len(self._passing) : len(self._passing) + len(self._shared + self._free)])

    # structure

    def structure(self, state: State) -> None:
        """Shared and free axes of the output are labelled; what the weight does not have passes."""
        structure, shape = state.structure(self.data), self.out.shape
        if structure is None or shape is None:
            state.pin(self.data, None, "shapes are not known here", self.node)
            set_plain(state, self.out)
            return
        seen = self._seen(state, structure)
        ours, weight, named = self.names
        self._sizes = dict(zip(weight, self._array().shape, strict=True))
        out = tuple(
            (labelled(self._sizes[name]) if self._sizes[name] > 1 else plain((1,))[0])
            if name in self._sizes
            else (seen[ours.index(name)] if name in ours else base)
            for name, base in zip(named, plain(shape), strict=True)
        )
        self.active = True
        state.set_structure(self.out, out)
        self._arrange(frame(structure), seen, out)
        rows = [size for size in (*self._passing, *self._shape(self._shared)) if size > 1]
        if self._passing or len(rows) > 1:
            # the weight is the same for all that pass
            state.product |= {self.data, self.out}

    def _seen(self, state: State, structure: Structure) -> Structure:
        """Return the data's structure with a name for each axis: merged axes are taken apart where all are summed over.

        Those that would be torn apart lose their labels.
        """
        ours, weight, named = self.names
        seen: list[Axis] = []
        names: list[str | None] = []
        parts: dict[str | None, tuple[str, ...]] = {}
        for axis, (name, factors) in enumerate(zip(ours, structure, strict=True)):
            merged = name in weight and len(factors) > 1 and has_labels(factors)
            if merged and name not in named and all(factor.size.static is not None for factor in factors):
                parts[name] = tuple(f"{name} {place}" for place in range(len(factors)))
                self._splits[name] = tuple(factor.size.coefficient for factor in factors)
                names += parts[name]
                seen += [(factor,) for factor in factors]
                continue
            if merged:
                state.pin(self.data, axis, "several axes are merged here", self.node)
                factors = tuple(Factor(factor.size) for factor in factors)  # noqa: PLW2901 - as seen from here
            names.append(name)
            seen.append(factors)
        inner = tuple(part for name in weight for part in parts.get(name, (name,)))
        self.names = (tuple(names), inner, named)
        return tuple(seen)

    def _arrange(self, whole: tuple[int, ...], seen: Structure, out: Structure) -> None:
        """Note which dimension of either frame is which."""
        ours, weight, named = self.names
        self._shared = [name for name in weight if name is not None and name in ours and name in named]
        self._contracted = [
            name for name in weight if name is not None and name in ours and name not in named
        ]
        self._free = [name for name in weight if name is not None and name not in ours]
        self._whole, self._out_frame = whole, frame(out)
        pairs = [
            pair
            for axis, name in enumerate(named)
            if name is not None and name in ours and name not in weight
            for pair in zip(frame_dims(seen, ours.index(name)), frame_dims(out, axis), strict=True)
            if whole[pair[0]] > 1
        ]
        self._passing = [whole[own] for own, _ in pairs]
        labels = {name: frame_dims(seen, axis)[0] for axis, name in enumerate(ours) if has_labels(seen[axis])}
        # the data's dimension for each place of the common order, None where it has no labels
        self._data_dims: list[int | None] = [own for own, _ in pairs]
        self._data_dims += [labels.get(name) for name in (*self._shared, *self._contracted)]
        places = {name: frame_dims(out, axis)[0] for axis, name in enumerate(named) if name in weight}
        first = [target for _, target in pairs] + [places[name] for name in (*self._shared, *self._free)]
        self._out_dims = first + [dim for dim in range(len(self._out_frame)) if dim not in first]
        self._reads = Reads(self._grouped() != 0)

    def _array(self) -> np.ndarray:
        """Return the weight, its axes taken apart as the data's are."""
        array = array_of(self.node.inputs[self.weight])
        assert array is not None
        return array.reshape(
            [
                size
                for name, whole in zip(self._own, array.shape, strict=True)
                for size in self._splits.get(name, (whole,))
            ]
        )

    def _shape(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(self._sizes[name] for name in names)

    def _grouped(self) -> np.ndarray:
        """Return the weight as (shared, free, contracted)."""
        order = [*self._shared, *self._free, *self._contracted]
        weight = self.names[1]
        rest = [axis for axis, name in enumerate(weight) if name is None]
        array = np.transpose(self._array(), [*(weight.index(name) for name in order), *rest])
        counts = [int(np.prod(self._shape(names))) for names in (self._shared, self._free, self._contracted)]
        return array.reshape(counts)

    # masks and constants in the common order

    def _view(self, array: np.ndarray, reduce: np.ufunc) -> np.ndarray:
        """Bring an array of the data's frame into the common order, 1 along what has no labels."""
        dims = [dim for dim in self._data_dims if dim is not None]
        others = tuple(dim for dim in range(array.ndim) if dim not in dims)
        array = np.asarray(reduce.reduce(array, axis=others)) if others else array
        array = np.transpose(array, np.argsort(np.argsort(dims)))
        extents = iter(array.shape)
        return array.reshape([1 if dim is None else next(extents) for dim in self._data_dims])

    def _data_rows(self, array: np.ndarray, reduce: np.ufunc = np.logical_or) -> np.ndarray:
        """Bring an array of the data's frame into (passing, shared, contracted)."""
        full = (*self._passing, *self._shape(self._shared), *self._shape(self._contracted))
        rows = (int(np.prod(self._passing)), *self._reads.shape[::2])
        return np.broadcast_to(self._view(array, reduce), full).reshape(rows)

    def _lower(self, mask: np.ndarray) -> np.ndarray:
        """Bring a mask (passing, shared, contracted) into the data's frame, 1 along what has no labels."""
        full = (*self._passing, *self._shape(self._shared), *self._shape(self._contracted))
        mask = mask.reshape(full)
        mask = np.asarray(mask.any(axis=tuple(p for p, dim in enumerate(self._data_dims) if dim is None)))
        dims = [dim for dim in self._data_dims if dim is not None]
        shape = [1] * len(self._whole)
        for dim in dims:
            shape[dim] = self._whole[dim]
        return np.transpose(mask, np.argsort(dims)).reshape(shape)

    def _out_rows(self, array: np.ndarray) -> np.ndarray:
        """Bring an array of the output's frame into (passing, shared, free)."""
        shared, free, _ = self._reads.shape
        return np.transpose(array, self._out_dims).reshape(int(np.prod(self._passing)), shared, free)

    def _lower_out(self, mask: np.ndarray) -> np.ndarray:
        shape = [self._out_frame[dim] for dim in self._out_dims]
        return np.transpose(mask.reshape(shape), np.argsort(self._out_dims))

    def _known(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return which inputs are known constants, and their values, as (shared, contracted)."""
        if self._held is None:
            constant = state.constant(self.data)
            shape = self._reads.shape[::2]
            if constant is None:
                self._held = np.zeros(shape, bool), np.zeros(shape)
            else:
                known = self._data_rows(constant.known, np.logical_and).all(axis=0)
                low = self._data_rows(constant.value, np.minimum).min(axis=0).astype(np.float64)
                high = self._data_rows(constant.value, np.maximum).max(axis=0).astype(np.float64)
                known = known & (low == high)
                self._held = known, np.where(known, low, 0.0)
        return self._held

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
        known, value = self._known(state)
        held = ~self._reading(self._reads.outputs(~known))
        if held.any():
            shape = [self._out_frame[dim] for dim in self._out_dims]
            shape[: len(self._passing)] = [1] * len(self._passing)
            back = np.argsort(self._out_dims)
            result = self._sums(value).astype(self._array().dtype)
            state.set_constant(
                self.out,
                np.transpose(held.reshape(shape), back),
                np.transpose(result.reshape(shape), back),
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
    """Return the statement of a product with a constant stack of matrices.

    Args:
        node: the node.
        data: which of the two is computed.
        turned: which of them are transposed.
        scale: what the product is multiplied by.
    """
    sizes = [() if value is None or value.shape is None else value.shape.dims[:-2] for value in node.inputs]
    batch = max(map(len, sizes))
    names: list[tuple[str | None, ...]] = []
    for which, matrix in enumerate(("nk", "km")):
        own = sizes[which]
        places = range(batch - len(own), batch)
        broadcast = [None if size == 1 else f"batch {place}" for place, size in zip(places, own, strict=True)]
        names.append((*broadcast, *(reversed(matrix) if turned[which] else matrix)))
    known = {*names[0], *names[1]}
    out = tuple(name if (name := f"batch {place}") in known else None for place in range(batch))
    return Stacked(node, data=data, names=(names[data], names[1 - data], (*out, "n", "m")), scale=scale)


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
