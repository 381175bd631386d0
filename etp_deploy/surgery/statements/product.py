"""Products of two computed tensors: MatMul between activations, as in attention.

`y[..., n, m] = sum_k a[..., n, k] * b[..., k, m]`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np

from etp_deploy.surgery.shapes import (
    ONE,
    Axis,
    Factor,
    Structure,
    axis_size,
    frame,
    frame_dims,
    has_labels,
    is_parameter,
    plain,
    unlabelled,
)
from etp_deploy.surgery.state import Cause, ConflictError, agree, coordinates
from etp_deploy.surgery.statements.base import Edit, Statement, array_of, default_layout, set_plain
from etp_deploy.surgery.statements.invariance import shifts_vanish
from etp_deploy.surgery.statements.pointwise import missing_rows
from etp_deploy.surgery.statements.slicing import take_channels

Item = TypeVar("Item")

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Product(Statement):
    """A matrix product whose operands are computed, or which are constants with axes of their own for each head.

    All frames are brought into one common frame of the axes (batch..., n, k, m).

    Args:
        node: the node.
        transposed: whether each operand is read with its last two axes exchanged.
        scale: what the product is multiplied by.
    """

    def __init__(
        self, node: ir.Node, *, transposed: tuple[bool, bool] = (False, False), scale: float = 1.0
    ) -> None:
        super().__init__(node)
        first, second = node.inputs[0], node.inputs[1]
        assert first is not None
        assert second is not None
        self.operands = (first, second)
        self.transposed = (*transposed, False)
        self.scale = scale
        self.out = node.outputs[0]
        self.shiftable = shifts_vanish(self.out)
        self.active = False

    # structure

    def structure(self, state: State) -> None:
        """Batch axes (heads) and the contracted axis are common; n and m pass to the output."""
        structures = [state.structure(value) for value in self.operands]
        shape = self.out.shape
        if shape is None or any(s is None for s in structures):
            for value in self.operands:
                state.pin(value, None, "shapes are not known here", self.node)
            set_plain(state, self.out)
            return
        first, second = (self._exchanged(item or (), which) for which, item in enumerate(structures))
        rank = max(2, len(first), len(second))
        # common axes: batch 0 .. rank-3, then n, k, m; of a vector k alone
        roles = (
            (*range(rank - len(first), rank - 2), rank - 2, rank - 1)[-len(first) :],
            (*range(rank - len(second), rank - 2), rank - 1, rank)[: len(second)],
        )
        self.common: Structure = tuple(
            self._common_axis(state, axis, (first, second), roles) for axis in range(rank + 1)
        )
        made = [role for role in (rank - 2, rank) if role in (*roles[0], *roles[1][-1:])]
        self.roles = (*roles, (*range(rank - 2), *made))
        base = plain(shape)
        out = tuple(
            self.common[role] if has_labels(self.common[role]) else base[axis]
            for axis, role in enumerate(self.roles[2])
        )
        state.set_structure(self.out, out)
        self.active = any(has_labels(axis) for axis in self.common)
        self.structures = tuple(
            self._adapted(s, role, whole=value is not self.out and is_parameter(value))
            for value, s, role in zip(
                (*self.operands, self.out), (first, second, out), self.roles, strict=True
            )
        )

    def _common_axis(
        self,
        state: State,
        axis: int,
        structures: tuple[Structure, Structure],
        roles: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> Axis:
        found: list[tuple[ir.Value, int, Axis]] = []
        for which, (structure, role) in enumerate(zip(structures, roles, strict=True)):
            if axis in role:
                place = role.index(axis)
                if axis_size(structure[place]) != ONE:
                    own = self._exchanged(tuple(range(len(structure))), which)[place]
                    found.append((self.operands[which], own, structure[place]))
        live = [item for item in found if not is_parameter(item[0])]
        labels = {factors for _, _, factors in live if has_labels(factors)}
        if not labels:
            return unlabelled(found[0][2]) if found else plain((1,))[0]
        if len(labels) == 1 and all(factors in labels for _, _, factors in live):
            return next(iter(labels))
        for value, own, _ in live:
            state.pin(value, own, "it meets an axis of which nothing can be removed", self.node)
        return unlabelled(live[0][2])

    def _exchanged(self, axes: tuple[Item, ...], which: int) -> tuple[Item, ...]:
        """Return what belongs to an operand's axes, in the order in which it is read."""
        return (*axes[:-2], axes[-1], axes[-2]) if self.transposed[which] else axes

    def _turn(self, which: int) -> list[int]:
        """Return the dimensions of a tensor's own frame in the order in which it is read."""
        own = self._exchanged(self.structures[which], which)
        axes = self._exchanged(tuple(range(len(own))), which)
        return [dim for axis in axes for dim in frame_dims(own, axis)]

    def _adapted(self, structure: Structure, role: tuple[int, ...], *, whole: bool) -> Structure:
        """Give an operand the common structure where it has the axis at full size, factor by factor.

        Args:
            structure: the operand's.
            role: the common axis of each of its axes.
            whole: whether its axes are not cut into factors yet (a constant's).
        """
        adapted: list[Axis] = []
        for axis, place in zip(structure, role, strict=True):
            common = self.common[place]
            if axis_size(axis) == ONE:
                adapted.append(axis)
            elif axis_size(axis) == axis_size(common) and (whole or len(axis) == len(common)):
                adapted.append(common)
            else:
                adapted.append(tuple(Factor(factor.size) for factor in axis))
        return tuple(adapted)

    # frames

    def _lift(self, array: np.ndarray, which: int, reduce: np.ufunc = np.logical_or) -> np.ndarray:
        """Bring an operand's (0, 1) or the output's (2) frame array into the common frame."""
        return self._place(np.transpose(array, self._turn(which)), which, reduce)

    def _place(self, array: np.ndarray, which: int, reduce: np.ufunc) -> np.ndarray:
        """Bring an array whose dimensions stand as they are read into the common frame."""
        own, role = self.structures[which], self.roles[which]
        shape = [1] * len(frame(self.common))
        expected = frame(own)
        drop = tuple(dim for dim, extent in enumerate(expected) if extent == 1 and array.shape[dim] > 1)
        if drop:
            array = reduce.reduce(array, axis=drop, keepdims=True)
        for axis, common in enumerate(role):
            dims, targets = frame_dims(own, axis), frame_dims(self.common, common)
            if len(dims) == len(targets):
                for dim, target in zip(dims, targets, strict=True):
                    shape[target] = array.shape[dim]
        return array.reshape(shape)

    def _lower(self, array: np.ndarray, which: int, reduce: np.ufunc = np.logical_or) -> np.ndarray:
        """Bring a common frame array into an operand's dimensions; axes that it lacks are reduced."""
        own, role = self.structures[which], self.roles[which]
        keep: list[int] = []
        shape: list[int] = []
        for axis, common in enumerate(role):
            dims, targets = frame_dims(own, axis), frame_dims(self.common, common)
            for position, dim in enumerate(dims):
                matched = len(dims) == len(targets) and frame(own)[dim] > 1
                if matched:
                    keep.append(targets[position])
                shape.append(array.shape[targets[position]] if matched else 1)
        others = tuple(dim for dim in range(array.ndim) if dim not in keep)
        read = np.asarray(reduce.reduce(array, axis=others)).reshape(shape)
        return np.transpose(read, np.argsort(self._turn(which)))

    def _dims(self, axis: int) -> tuple[int, ...]:
        return tuple(frame_dims(self.common, axis))

    @property
    def _contracted(self) -> int:
        return len(self.common) - 2

    # constants

    def constants(self, state: State) -> None:
        """Zero times anything finite is zero; rows that sum to one give back a constant."""
        if not self.active:
            return
        zero = self._zero(state, 0) | self._zero(state, 1)
        known = np.logical_and.reduce(zero, axis=self._dims(self._contracted), keepdims=True)
        known = np.broadcast_to(known, self._common_out())
        value = np.zeros(known.shape)
        second = state.constant(self.operands[1])
        rank = len(self.roles[0])
        if (
            state.stochastic.get(self.operands[0]) == rank - 1 - self.transposed[0]
            and second is not None
            and not self._dims_labelled()
        ):
            low, high = self._lift(second.value, 1, np.minimum), self._lift(second.value, 1, np.maximum)
            held = np.broadcast_to(self._lift(second.known, 1, np.logical_and) & (low == high), known.shape)
            value = np.where(held, np.broadcast_to(low * self.scale, known.shape), value)
            known = known | held
        dtype = np.float32 if self.out.dtype is None else self.out.dtype.numpy()
        state.set_constant(
            self.out,
            self._lower(known, 2),
            self._lower(value.astype(np.float64), 2, np.maximum).astype(dtype),
        )

    def _dims_labelled(self) -> bool:
        return has_labels(self.common[self._contracted])

    def _common_out(self) -> tuple[int, ...]:
        contracted = self._dims(self._contracted)
        return tuple(1 if dim in contracted else extent for dim, extent in enumerate(frame(self.common)))

    def _zero(self, state: State, which: int) -> np.ndarray:
        value = self.operands[which]
        array = array_of(value)
        if array is not None:
            own = self.structures[which]
            array = np.transpose(array, self._exchanged(tuple(range(array.ndim)), which))
            split = (array == 0).reshape([f.size.coefficient for axis in own for f in axis])
            others = tuple(dim for dim, extent in enumerate(frame(own)) if split.shape[dim] != extent)
            return self._place(split.all(axis=others, keepdims=True), which, np.logical_and)
        constant = state.constant(value)
        if constant is None:
            return np.zeros((1,) * len(frame(self.common)), bool)
        return self._lift(constant.zero, which, np.logical_and)

    def _silent(self, state: State) -> np.ndarray:
        """Where a product of two entries is zero, or adds the same to a whole row that is read up to such shifts."""
        silent = np.asarray(self._zero(state, 0) | self._zero(state, 1))
        constant = state.constant(self.operands[1])
        if constant is None or not self.shiftable:
            return silent
        row = self._dims(self._contracted + 1)
        low = self._lift(constant.value, 1, np.minimum).min(axis=row, keepdims=True)
        high = self._lift(constant.value, 1, np.maximum).max(axis=row, keepdims=True)
        known = self._lift(constant.known, 1, np.logical_and).all(axis=row, keepdims=True)
        return np.asarray(silent | (known & (low == high)))

    # masks

    def spread(self, state: State) -> None:
        """Kept outputs keep what they read; operands and output keep the same heads."""
        if not self.active:
            return
        first, second = self.operands
        out = self._lift(state.mask(self.out), 2)
        full = frame(self.common)
        if self._dims_labelled():
            wanted = np.broadcast_to(out & ~self._silent(state), full)
            for which, value in enumerate(self.operands):
                cause = Cause("multiplied into what stays by", self.node, self.out)
                state.grow(value, self._lower(wanted, which), cause)
            self._link(state, (first, 0), (second, 1))
        else:
            self._link(state, (first, 0), (second, 1))
        self._link(state, (first, 0), (self.out, 2))
        self._link(state, (second, 1), (self.out, 2))

    def _link(self, state: State, one: tuple[ir.Value, int], other: tuple[ir.Value, int]) -> None:
        """Keep the same indices along the axes that two tensors share, where a tensor has no others to choose."""
        for (source, a), (target, b) in ((one, other), (other, one)):
            if is_parameter(target) or is_parameter(source):
                continue
            wanted, mask = self._shared(state, source, a, target, b)
            if all(m in {w, 1} for w, m in zip(wanted.shape, mask.shape, strict=True)):
                cause = Cause("the same head or index as", self.node, source)
                state.grow(
                    target,
                    self._lower(np.broadcast_to(wanted, np.broadcast_shapes(wanted.shape, mask.shape)), b),
                    cause,
                )

    def _shared(
        self, state: State, source: ir.Value, a: int, target: ir.Value, b: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the source's kept indices along the axes shared with the target, and the target's mask."""
        wanted, mask = self._lift(state.mask(source), a), self._lift(state.mask(target), b)
        extra = tuple(dim for dim in range(mask.ndim) if mask.shape[dim] == 1 and wanted.shape[dim] > 1)
        return np.asarray(wanted.any(axis=extra, keepdims=True)) if extra else wanted, mask

    def repair(self, state: State) -> bool:
        """A head that one tensor keeps has at least one index in the others."""
        grown = False
        if not self.active:
            return grown
        tensors = ((self.operands[0], 0), (self.operands[1], 1), (self.out, 2))
        for source, a in tensors:
            for target, b in tensors:
                if source is target or is_parameter(source) or is_parameter(target):
                    continue
                wanted, mask = self._shared(state, source, a, target, b)
                missing = missing_rows(wanted, mask)
                cause = Cause("the same head or index as", self.node, source)
                grown |= state.grow(target, self._lower(missing, b), cause)
        return grown

    # layout

    def layout(self, state: State) -> None:
        """Both operands and the output keep heads, and the operands the contracted axis, in one order."""
        if not self.active:
            default_layout(state, self.out)
            return
        full = frame(self.common)
        found: list[np.ndarray | None] = [
            None if extent > 1 else np.zeros((1,) * len(full), int) for extent in full
        ]
        for which, value in enumerate(self.operands):
            if is_parameter(value):
                continue
            coords = coordinates(state.layouts[value], state.mask(value).shape)
            self._collect(value, which, coords, found)
        out_dims = [dim for dim, extent in enumerate(self._common_out()) if extent > 1]
        if any(found[dim] is None for dim in out_dims):
            raise ConflictError([self.out, *self.operands])
        layout = self._out_layout(state, found)
        if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError([self.out, *self.operands])
        state.layouts[self.out] = layout

    def _collect(
        self, value: ir.Value, which: int, coords: list[np.ndarray], found: list[np.ndarray | None]
    ) -> None:
        own, role, turn = self.structures[which], self.roles[which], self._turn(which)
        for axis, common in enumerate(role):
            dims, targets = frame_dims(own, axis), frame_dims(self.common, common)
            if len(dims) != len(targets):
                continue
            for dim, target in zip(dims, targets, strict=True):
                if frame(own)[dim] <= 1:
                    continue
                lifted = self._lift(coords[turn[dim]], which, np.minimum)
                known = found[target]
                if known is None:
                    found[target] = lifted
                elif not agree(known, lifted):
                    raise ConflictError([self.out, *self.operands, value])

    def _out_layout(self, state: State, found: list[np.ndarray | None]) -> np.ndarray:
        structure = state.structure(self.out) or ()
        shape = frame(structure)
        coords = []
        for axis, common in enumerate(self.roles[2]):
            dims, targets = frame_dims(structure, axis), frame_dims(self.common, common)
            for position, dim in enumerate(dims):
                coordinate = found[targets[position]] if shape[dim] > 1 else None
                lowered = (
                    self._project(coordinate) if coordinate is not None else np.zeros((1,) * len(shape), int)
                )
                coords.append(lowered)
        if not coords:
            return np.zeros((), np.int64)
        return np.ravel_multi_index(tuple(np.broadcast_arrays(*coords)), shape)

    def _project(self, coordinate: np.ndarray) -> np.ndarray:
        contracted = self._dims(self._contracted)
        low, high = (
            coordinate.min(axis=contracted, keepdims=True),
            coordinate.max(axis=contracted, keepdims=True),
        )
        if not np.array_equal(low, high):
            raise ConflictError([self.out, *self.operands])
        order = [dim for common in self.roles[2] for dim in self._dims(common)]
        moved = np.transpose(low, [*order, *(dim for dim in range(low.ndim) if dim not in order)])
        return moved.reshape(moved.shape[: len(order)])

    def _cuts(self, state: State, which: int) -> tuple[dict[int, np.ndarray], list[tuple[int, int]]]:
        """Return, for each labelled dimension of a constant operand, which indices stay and its common dimension."""
        other = 1 - which
        live = self.operands[other]
        coords = coordinates(state.layouts[live], state.mask(live).shape)
        wanted: dict[int, np.ndarray] = {}
        links: list[tuple[int, int]] = []
        found: list[np.ndarray | None] = [None] * len(frame(self.common))
        self._collect(live, other, coords, found)
        own, role, turn = self.structures[which], self.roles[which], self._turn(which)
        for axis, common in enumerate(role):
            for dim, target in zip(frame_dims(own, axis), frame_dims(self.common, common), strict=False):
                coordinate = found[target]
                if frame(own)[dim] > 1 and coordinate is not None:
                    wanted[turn[dim]] = coordinate
                    links.append((turn[dim], target))
        return wanted, links

    def _constant_operands(self) -> list[int]:
        return [which for which in (0, 1) if self.active and is_parameter(self.operands[which])]

    def check(self, state: State) -> None:
        """Raise a conflict where a constant operand would have to be another one for each index of an axis it lacks."""
        for which in self._constant_operands():
            wanted, links = self._cuts(state, which)
            targets = {target for _, target in links}
            for coordinate in wanted.values():
                others = tuple(dim for dim in range(coordinate.ndim) if dim not in targets)
                if not np.array_equal(coordinate.min(axis=others), coordinate.max(axis=others)):
                    raise ConflictError([self.out, *self.operands])

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Cut a constant operand along the heads and the contracted axis."""
        for which in self._constant_operands():
            wanted, links = self._cuts(state, which)
            if wanted:
                own = self._exchanged(self.structures[which], which)
                yield from take_channels(which, own, wanted, links)
