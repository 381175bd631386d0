"""Operators that treat each channel by itself: which axes of their operands are which of their output.

An output index along a mapped axis is the same index of every operand; axes that are not mapped are read whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

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
from etp_deploy.surgery.statements.base import Statement, array_of, floating, set_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.state import State

AxisMap = tuple[int | None, ...]
Constants = Literal["evaluate", "pass", "zero", "none"]
"""How constant channels pass: computed by the operator itself, unchanged, only where zero, or not at all."""


class Mapped(Statement):
    """A node whose axes are mapped to its output's; what is kept and cut of it is said by `Pointwise`.

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
        for index, operand in enumerate(self.node.inputs):
            if index not in self.maps:
                state.pin(operand, None, "the operator reads it as a whole", self.node)
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
