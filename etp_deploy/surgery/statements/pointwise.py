"""Operators that treat each channel by itself: elementwise, normalisation by channel, pooling, softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.evaluate import evaluate
from etp_deploy.surgery.shapes import Structure, frame, frame_dims, is_parameter
from etp_deploy.surgery.state import Cause, ConflictError, agree, coordinates
from etp_deploy.surgery.statements.base import Edit, SetShape, array_of, default_layout, new_sizes
from etp_deploy.surgery.statements.mapped import Mapped
from etp_deploy.surgery.statements.slicing import take_channels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Pointwise(Mapped):
    """The output's channels are the operands' channels, index by index; arguments are those of `Mapped`."""

    # constants

    def constants(self, state: State) -> None:
        """A channel is known where every operand's is, or where a zero absorbs the others."""
        if self.stochastic is not None:
            state.stochastic[self.out] = self.stochastic
        structure = state.structure(self.out)
        if structure is None or not self.links:
            return
        if self.same_entries:
            source = self._value(next(iter(self.maps)))
            if source in state.stochastic:
                state.stochastic[self.out] = state.stochastic[source]
        constant_input = any(state.constant(self._value(index)) for index in self._live())
        if self.passing == "none" or not (constant_input or self.absorbing or self.fresh):
            return
        parts = {
            index: self.operand(state, index, structure) for index in self.maps if index not in self.routes
        }
        shape = frame(structure)
        known = np.ones(shape, bool)
        for part_known, _ in parts.values():
            known = known & part_known
        for index in self.absorbing:
            if index in parts:
                known = known | (parts[index][0] & (parts[index][1] == 0) & self._finite_others(parts, index))
        if not known.any():
            return
        self._pass(state, parts, known, structure)

    def _finite_others(self, parts: Mapping[int, tuple[np.ndarray, np.ndarray]], index: int) -> np.ndarray:
        """Where all other parameters are known; activations may be anything finite."""
        result = np.ones((), bool)
        for other, (known, _) in parts.items():
            if other != index and is_parameter(self._value(other)):
                result = result & known
        return result

    def _pass(
        self,
        state: State,
        parts: Mapping[int, tuple[np.ndarray, np.ndarray]],
        known: np.ndarray,
        structure: Structure,
    ) -> None:
        if self.passing == "evaluate":
            result = self._evaluate(parts, structure)
            if result is not None:
                state.set_constant(self.out, known, result)
            return
        values = next(iter(parts.values()))[1]
        if self.passing == "zero":
            for _, held in parts.values():
                known = known & (held == 0)
        state.set_constant(self.out, known, values)

    def operand(self, state: State, index: int, structure: Structure) -> tuple[np.ndarray, np.ndarray]:
        """Return where an operand is known and its values, in the output's dimensions."""
        value = self._value(index)
        dims = len(frame(structure))
        unknown = (np.zeros((1,) * dims, bool), np.zeros((1,) * dims, _numpy_type(value)))
        if is_parameter(value):
            array = array_of(value)
            return unknown if array is None else self._known_parameter(array, index, structure)
        constant = state.constant(value)
        if constant is None:
            return unknown
        linked = {own for own, _ in self.links[index]}
        whole = tuple(
            dim for dim, extent in enumerate(constant.known.shape) if extent > 1 and dim not in linked
        )
        if whole and self.passing == "evaluate":
            return unknown
        # what only moves entries hands on a channel that holds one constant along all that is read whole
        held = np.broadcast_to(constant.value, constant.known.shape)
        low, high = held.min(axis=whole, keepdims=True), held.max(axis=whole, keepdims=True)
        known = constant.known.all(axis=whole, keepdims=True) & (low == high)
        return self._to_out(known, index, dims, np.logical_and), self._to_out(low, index, dims, None)

    def _known_parameter(
        self, array: np.ndarray, index: int, structure: Structure
    ) -> tuple[np.ndarray, np.ndarray]:
        own = self._parameter_structure(index, structure)
        full = tuple(factor.size.coefficient for axis in own for factor in axis)
        split = array.reshape(full)
        linked = {dim for dim, _ in self.links[index]}
        others = tuple(dim for dim in range(split.ndim) if dim not in linked)
        if split.size == 0:
            return np.zeros((1,) * len(frame(structure)), bool), np.zeros(
                (1,) * len(frame(structure)), array.dtype
            )
        low, high = split.min(axis=others, keepdims=True), split.max(axis=others, keepdims=True)
        dims = len(frame(structure))
        return (
            self._to_out(low == high, index, dims, np.logical_and),
            self._to_out(low, index, dims, None),
        )

    def _evaluate(
        self, parts: Mapping[int, tuple[np.ndarray, np.ndarray]], structure: Structure
    ) -> np.ndarray | None:
        """Run the node on the constants, one where unknown (divided by), one entry for each unlabelled position."""
        arrays: list[np.ndarray | None] = []
        extents = [int(np.prod([factor.extent for factor in axis], dtype=np.int64)) for axis in structure]
        for index, value in enumerate(self.node.inputs):
            if value is None:
                arrays.append(None)
            elif index not in parts:
                arrays.append(array_of(value))
                if arrays[-1] is None:
                    return None
            else:
                known, values = parts[index]
                values = np.where(known, values, np.ones((), values.dtype)).astype(values.dtype)
                arrays.append(self._as_operand(values, index, structure, extents))
        result = evaluate(self.node, arrays)
        return None if result is None or result.shape != tuple(extents) else result.reshape(frame(structure))

    def _as_operand(
        self, values: np.ndarray, index: int, structure: Structure, extents: list[int]
    ) -> np.ndarray:
        shape = []
        for target in self.maps[index]:
            if target is None:
                shape.append(1)
                continue
            dims = frame_dims(structure, target)
            own = int(np.prod([values.shape[dim] for dim in dims], dtype=np.int64))
            shape.append(own if own in {1, extents[target]} else 1)
        return np.ascontiguousarray(values).reshape(shape)

    # masks

    def spread(self, state: State) -> None:
        """Kept positions are the same on both sides, up to broadcasting."""
        if not self.links:
            return
        out = state.mask(self.out)
        for index in self._live():
            value = self._value(index)
            state.grow(
                value,
                self._from_out(state.mask(self.out), index, state.mask(value).ndim),
                Cause("read at the same index by", self.node, self.out),
            )
            if self._covers(index, out):
                state.grow(
                    self.out,
                    self._incoming(state, index),
                    Cause("made at the same index by", self.node, value),
                )

    def _incoming(self, state: State, index: int) -> np.ndarray:
        out = state.mask(self.out)
        return self._to_out(state.mask(self._value(index)), index, out.ndim, np.logical_or)

    def _covers(self, index: int, out: np.ndarray) -> bool:
        linked = {target for _, target in self.links[index]}
        return all(extent == 1 or dim in linked for dim, extent in enumerate(out.shape))

    def repair(self, state: State) -> bool:
        """Where an operand without some of the output's axes keeps an index, so must the output, somewhere."""
        grown = False
        if not self.links:
            return grown
        for index in self._live():
            out = state.mask(self.out)
            if not self._covers(index, out):
                cause = Cause("made at the same index by", self.node, self._value(index))
                grown |= state.grow(self.out, missing_rows(self._incoming(state, index), out), cause)
        return grown

    # layout

    def layout(self, state: State) -> None:
        """The operands' orders must agree; the output takes them over."""
        for value in self.node.outputs[1:]:
            default_layout(state, value)
        structure = state.structure(self.out)
        if structure is None or not self.links:
            default_layout(state, self.out)
            return
        shape = frame(structure)
        found: list[np.ndarray | None] = [
            None if extent > 1 else np.zeros((1,) * len(shape), int) for extent in shape
        ]
        for index in self._live():
            for dim, coordinate in self._coordinates(state, index, len(shape)).items():
                known = found[dim]
                if known is None:
                    found[dim] = coordinate
                elif not agree(known, coordinate):
                    raise ConflictError([self.out, *(self._value(other) for other in self._live())])
        for dim, fixed in enumerate(found):
            if fixed is None:
                found[dim] = self._own_order(state, dim)
        full = np.broadcast_arrays(*(item for item in found if item is not None)) if found else []
        layout = np.ravel_multi_index(tuple(full), shape) if shape else np.zeros((), int)
        if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError([self.out, *(self._value(other) for other in self._live())])
        state.layouts[self.out] = layout

    def _own_order(self, state: State, dim: int) -> np.ndarray:
        """Return the coordinates along a dimension that no live operand fixes: kept ones in order."""
        mask = state.mask(self.out)
        kept = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != dim)))
        return kept.reshape([-1 if other == dim else 1 for other in range(mask.ndim)])

    def _coordinates(self, state: State, index: int, out_dims: int) -> dict[int, np.ndarray]:
        """Return the output coordinates that an operand's order fixes, in the output's dimensions."""
        value = self._value(index)
        layout = state.layouts[value]
        coords = coordinates(layout, state.mask(value).shape)
        result = {}
        for own, target in self.links[index]:
            low = self._to_out(coords[own], index, out_dims, np.minimum)
            high = self._to_out(coords[own], index, out_dims, np.maximum)
            if not np.array_equal(low, high):
                raise ConflictError([value, self.out])
            result[target] = low
        return result

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Cut the initializers among the operands along the output's order."""
        structure = state.structure(self.out)
        if structure is None:
            return
        layout = state.layouts[self.out]
        coords = coordinates(layout, frame(structure))
        if self.shape_input is not None and not state.mask(self.out).all():
            yield SetShape(self.shape_input, new_sizes(structure, layout.shape))
        for index in self.maps:
            value = self._value(index)
            if is_parameter(value) and self.links.get(index):
                own = self._parameter_structure(index, structure)
                yield from take_channels(
                    index, own, {a: coords[b] for a, b in self.links[index]}, self.links[index]
                )

    def check(self, state: State) -> None:
        """Raise a conflict where an initializer would have to hold two orders at once."""
        structure = state.structure(self.out)
        if structure is None:
            return
        coords = coordinates(state.layouts[self.out], frame(structure))
        for index in self.maps:
            linked = [target for _, target in self.links.get(index, [])]
            others = tuple(dim for dim in range(len(coords)) if dim not in linked)
            for target in linked if is_parameter(self._value(index)) else []:
                if not np.array_equal(coords[target].min(axis=others), coords[target].max(axis=others)):
                    raise ConflictError([self.out])


def missing_rows(wanted: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return positions to add so that every wanted index has one kept position, where other rows have theirs."""
    lacking = tuple(dim for dim in range(mask.ndim) if wanted.shape[dim] == 1 and mask.shape[dim] > 1)
    empty = wanted & ~mask.any(axis=lacking, keepdims=True)
    if not empty.any():
        return np.zeros_like(mask)
    present = tuple(dim for dim in range(mask.ndim) if dim not in lacking)
    pattern = mask.any(axis=present, keepdims=True)
    if not pattern.any():
        pattern = np.zeros_like(pattern)
        pattern.reshape(-1)[0] = True
    return empty & pattern


def _numpy_type(value: ir.Value) -> np.dtype:
    return np.dtype(np.float32) if value.dtype is None else value.dtype.numpy()
