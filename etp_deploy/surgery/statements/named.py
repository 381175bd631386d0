"""The axes of a product with a constant, told apart by names as in an equation of Einsum.

`y[p..., s..., f...] = sum_k x[p..., s..., k...] * w[s..., k..., f...]`: an axis of the weight is *shared* with data
and output (one matrix for each expert), *contracted*, or *free*, the output's alone; others *pass*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import Axis, Factor, Structure, frame, frame_dims, has_labels, labelled, plain
from etp_deploy.surgery.statements.base import Statement, array_of, set_plain
from etp_deploy.surgery.statements.weights import Reads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.state import State

Names = tuple[str | None, ...]


class Named(Statement):
    """A product with a constant whose axes have names; what is kept and cut of it is said by `Stacked`.

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


def matrix_names(node: ir.Node, turned: tuple[bool, bool] = (False, False)) -> tuple[Names, Names, Names]:
    """Return the names of the axes of a matrix product's operands and output, as numpy aligns and multiplies them.

    Args:
        node: the node; an operand of one axis is a vector, which is contracted.
        turned: which of its operands are transposed.
    """
    shapes = [() if value is None or value.shape is None else value.shape.dims for value in node.inputs]
    batch = max(len(shape[:-2]) for shape in shapes)
    names: list[Names] = []
    for which, (shape, matrix) in enumerate(zip(shapes, ("nk", "km"), strict=True)):
        places = range(batch - len(shape[:-2]), batch)
        broadcast = [
            None if size == 1 else f"batch {place}" for place, size in zip(places, shape[:-2], strict=True)
        ]
        own = matrix[::-1] if turned[which] else matrix
        names.append((*broadcast, *(own if len(shape) > 1 else "k")))
    known = {*names[0], *names[1]}
    out = tuple(name if (name := f"batch {place}") in known else None for place in range(batch))
    return names[0], names[1], (*out, *(name for name in "nm" if name in known))
