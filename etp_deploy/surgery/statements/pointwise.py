"""Operators that treat each channel by itself: elementwise, normalisation by channel, pooling, softmax.

An output index along a mapped axis is the same index of every operand; axes that are not mapped are read whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from etp_deploy.surgery.evaluate import evaluate
from etp_deploy.surgery.shapes import (
    ONE,
    Axis,
    Structure,
    axis_size,
    frame,
    frame_dims,
    has_labels,
    is_parameter,
    labelled,
    plain,
)
from etp_deploy.surgery.state import Cause, ConflictError, agree, coordinates
from etp_deploy.surgery.statements.base import (
    Edit,
    SetShape,
    Statement,
    array_of,
    default_layout,
    floating,
    new_sizes,
    set_plain,
)
from etp_deploy.surgery.statements.slicing import take_channels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.state import State

AxisMap = tuple[int | None, ...]
Constants = Literal["evaluate", "pass", "zero", "none"]
"""How constant channels pass: computed by the operator itself, unchanged, only where zero, or not at all."""


class Pointwise(Statement):
    """The output's channels are the operands' channels, index by index, with broadcasting.

    Args:
        node: the node.
        maps: for each input that is an operand, the output axis of each of its axes (None: read whole).
        constants: how constant channels pass.
        absorbing: inputs of which a zero makes the output what it is for a zero (Mul; BatchNormalization's scale).
        whole: why an axis that is not mapped must stay.
        stochastic: the output axis along which the entries sum to one (Softmax).
        shape_input: the input that holds the output's sizes (Resize), to be rewritten with the channels.
        same_entries: whether the output's entries are the input's (Identity), so that sums stay what they are.
        routes: inputs that say which entry goes where, not what it is: constants do not hang on them.
        fresh: output axes whose indices are channels of a constant operand (the columns of an embedding table).
    """

    alone = True
    """Whether further outputs, where they are used, depend on all channels."""

    def __init__(
        self,
        node: ir.Node,
        maps: Mapping[int, AxisMap],
        *,
        constants: Constants = "evaluate",
        absorbing: tuple[int, ...] = (),
        whole: str = "the operator reads this axis as a whole",
        stochastic: int | None = None,
        routes: tuple[int, ...] = (),
        fresh: tuple[int, ...] = (),
        shape_input: int | None = None,
        same_entries: bool = False,
    ) -> None:
        super().__init__(node)
        self.out = node.outputs[0]
        self.maps = {index: axes for index, axes in maps.items() if node.inputs[index] is not None}
        self.passing = constants
        self.absorbing = absorbing
        self.whole = whole
        self.stochastic = stochastic
        self.routes = routes
        self.fresh = fresh
        self.shape_input = shape_input
        self.same_entries = same_entries
        self.links: dict[int, list[tuple[int, int]]] = {}

    def _value(self, index: int) -> ir.Value:
        value = self.node.inputs[index]
        assert value is not None
        return value

    def _live(self) -> list[int]:
        return [index for index in self.maps if not is_parameter(self._value(index))]

    # structure

    def structure(self, state: State) -> None:
        """Each output axis is labelled as the operands' axes are; operands that differ there are pinned."""
        for value in self.node.outputs[1:]:
            set_plain(state, value)
            if self.alone and (value.uses() or value.is_graph_output()):
                self.maps_pinned(state, "a second output of the node is used")
        shape = self.out.shape
        structures = {index: state.structure(self._value(index)) for index in self._live()}
        if shape is None or any(item is None for item in structures.values()):
            self.maps_pinned(state, "shapes are not known here")
            set_plain(state, self.out)
            return
        axes = tuple(self._out_axis(state, structures, axis, base) for axis, base in enumerate(plain(shape)))
        state.set_structure(self.out, axes)
        for index, axis_map in self.maps.items():
            structure = structures.get(index)
            if structure is None:
                structure = self._parameter_structure(index, axes)
            self.links[index] = self._link(state, index, axis_map, structure, axes)

    def maps_pinned(self, state: State, reason: str) -> None:
        """Pin all operands."""
        for index in self._live():
            state.pin(self._value(index), None, reason, self.node)

    def _out_axis(
        self, state: State, structures: Mapping[int, Structure | None], axis: int, base: Axis
    ) -> Axis:
        found: list[tuple[int, int, Axis]] = []
        for index, structure in structures.items():
            for own, target in enumerate(self.maps[index]):
                if target == axis and structure is not None and axis_size(structure[own]) != ONE:
                    found.append((index, own, structure[own]))
        size = axis_size(base).static
        if (
            (axis in self.fresh or not found)
            and size is not None
            and size > 1
            and self._parameter_along(axis)
        ):
            return labelled(size)
        labels = [item for _, _, item in found if has_labels(item)]
        if not labels:
            return base
        if any(item != labels[0] for _, _, item in found):
            for index, own, _ in found:
                state.pin(
                    self._value(index), own, "it meets an axis of which nothing can be removed", self.node
                )
            return base
        return labels[0]

    def _parameter_along(self, axis: int) -> bool:
        """Return whether an output axis is a float constant's, all else being broadcast: its own channels."""
        for index, axis_map in self.maps.items():
            value = self._value(index)
            array = array_of(value)
            floats = array is not None and floating(array.dtype)
            if array is not None and floats and axis in axis_map and array.shape[axis_map.index(axis)] > 1:
                return True
        return False

    def _parameter_structure(self, index: int, axes: Structure) -> Structure:
        """Give an initializer operand the output's structure along the axes that it shares."""
        value = self._value(index)
        assert value.shape is not None
        own = plain(value.shape)
        return tuple(
            axes[target]
            if target is not None and axis_size(axes[target]) == axis_size(axis) and has_labels(axes[target])
            else axis
            for axis, target in zip(own, self.maps[index], strict=True)
        )

    def _link(
        self, state: State, index: int, axis_map: AxisMap, structure: Structure, axes: Structure
    ) -> list[tuple[int, int]]:
        links: list[tuple[int, int]] = []
        for own, target in enumerate(axis_map):
            if not has_labels(structure[own]):
                continue
            if target is None:
                state.pin(self._value(index), own, self.whole, self.node)
            elif structure[own] == axes[target]:
                pairs = zip(frame_dims(structure, own), frame_dims(axes, target), strict=True)
                links += [(a, b) for a, b in pairs if frame(structure)[a] > 1 or frame(axes)[b] > 1]
        return links

    # frames

    def _to_out(self, array: np.ndarray, index: int, out_dims: int, reduce: np.ufunc | None) -> np.ndarray:
        """Bring an operand's frame array into the output's dimensions."""
        links = self.links[index]
        linked = [own for own, _ in links]
        others = tuple(dim for dim in range(array.ndim) if dim not in linked)
        array = array.max(axis=others) if reduce is None else reduce.reduce(array, axis=others)
        shape = [1] * out_dims
        order = np.argsort([target for _, target in sorted(links)])
        for (_, target), extent in zip(sorted(links), array.shape, strict=True):
            shape[target] = extent
        return np.transpose(array, order).reshape(shape) if links else array.reshape(shape)

    def _from_out(self, mask: np.ndarray, index: int, own_dims: int) -> np.ndarray:
        """Bring the output's mask into an operand's dimensions (1 where they are not linked)."""
        links = self.links[index]
        others = tuple(dim for dim in range(mask.ndim) if dim not in [target for _, target in links])
        mask = np.asarray(mask.any(axis=others))
        by_target = sorted(links, key=lambda link: link[1])
        shape = [1] * own_dims
        for (own, _), extent in zip(by_target, mask.shape, strict=True):
            shape[own] = extent
        order = np.argsort([own for own, _ in by_target])
        return np.transpose(mask, order).reshape(shape) if links else mask.reshape(shape)

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
