"""Operators that compute on quantised tensors: integers of which one, the zero point, stands for zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.evaluate import evaluate
from etp_deploy.surgery.shapes import frame, is_parameter
from etp_deploy.surgery.state import Cause
from etp_deploy.surgery.statements.base import TakeEntries, array_of
from etp_deploy.surgery.statements.contraction import NO_CARRIER, Contraction
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.select import Select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from etp_deploy.surgery.state import State
    from etp_deploy.surgery.statements.base import Edit
    from etp_deploy.surgery.statements.mapped import AxisMap
    from etp_deploy.surgery.statements.weights import Weight


# how near to the middle between two integers a mean in float32 may end on either side
HALFWAY = 1e-3


class IntegerContraction(Contraction):
    """A contraction of integers, each less its zero point: the sum is exact, and so is what is folded into it.

    Args:
        node: the node.
        data: the input number of the tensor.
        data_axis: its contracted axis.
        out_axis: the output axis of the weight's output channels.
        weight: the weight.
        zeros: the input numbers of the data's and the weight's zero point, None for a zero point of 0.
        along: further inputs of which each output channel has an entry (scales, zero points), unless there is one.
        finish: what becomes of a sum with its bias.
        rigid: why constants other than zero cannot be folded; empty if they can.
        bias: as for `Contraction`.
        bordered: as for `Contraction`.
        scale: what the integers' sum is multiplied by before the bias is added, None where that is computed.
        sums: the type of the bias.
        ranged: whether the range of the data's entries sets their scale while the model runs, so that only zeros
            may go.
    """

    def __init__(
        self,
        node: ir.Node,
        *,
        data: int,
        data_axis: int,
        out_axis: int,
        weight: Weight,
        zeros: tuple[int | None, int | None],
        along: tuple[int, ...],
        finish: Callable[[np.ndarray], np.ndarray],
        rigid: str = "",
        bias: int | None = None,
        bordered: bool = False,
        scale: np.ndarray | float | None = 1.0,
        sums: str = "int32",
        ranged: bool = False,
    ) -> None:
        super().__init__(
            node,
            data=data,
            data_axis=data_axis,
            out_axis=out_axis,
            weight=weight,
            bias=bias,
            bordered=bordered,
        )
        self.scaled = scale is not None and not ranged
        self.sum_scale = np.asarray(1.0 if scale is None else scale, np.float64).reshape(1, -1)
        self.zeros = zeros
        self.along = along
        self.finish = finish
        self.rigid = rigid
        self.sums = sums
        self.ranged = ranged

    def _array(self) -> np.ndarray:
        """Return the weight less its zero point; such integers are exact in float32."""
        weight: np.ndarray = super()._array().astype(np.float32)
        zero = array_of(input_of(self.node, self.zeros[1]))
        if zero is None:
            return weight
        shape = [1] * weight.ndim
        shape[self.weight.out] = -1
        return weight - zero.astype(np.float32).reshape(shape)

    def _weighted(self, value: np.ndarray, form: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        return super()._weighted(value, form) * self.sum_scale

    def _read_rows(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Read constants less the zero point; where that is computed, only zeros are known."""
        zero = input_of(self.node, self.zeros[0])
        if zero is not None and not is_parameter(zero):
            centred = _centred(state, self.data, zero)
            known = self._by_row(np.zeros((), bool) if centred is None else centred, np.logical_and)
            return known, np.zeros(known.shape)
        known, value = super()._read_rows(state)
        point = array_of(zero)
        return known, value if point is None else np.where(known, value - float(point.reshape(-1)[0]), 0.0)

    def _finished(self, result: np.ndarray) -> np.ndarray:
        return self.finish(result)

    @property
    def _sum_type(self) -> np.dtype:
        return np.dtype(self.sums)

    def _rigid(self) -> str:
        if self.bordered:
            return NO_CARRIER
        return self.rigid if self.scaled else "its constant would be scaled while the model runs at"

    def _only_zeros(self) -> bool:
        return self.bordered or not self.scaled

    def spread(self, state: State) -> None:
        """As any contraction; where the data's range matters, all that is not zero stays too."""
        super().spread(state)
        if self.active and self.ranged:
            _keep_range(state, self.data, self.node)

    def _weight_edits(self, state: State, channels: np.ndarray, carried: np.ndarray | None) -> Iterator[Edit]:
        del carried
        yield self._entries_edit(state, channels)

    def edits(self, state: State) -> Iterator[Edit]:
        """Cut the weight and with it all that belongs to its output channels."""
        changes = list(super().edits(state))
        yield from changes
        if not changes:
            return
        channels = self._out_channels(state.layouts[self.out])
        for index in self.along:
            array = array_of(input_of(self.node, index))
            if array is not None and array.size > 1 and array.size != len(channels):
                places = np.arange(array.size).reshape(array.shape)
                yield TakeEntries(index, np.take(places, channels, axis=-1))


class QuantizedMean(Pointwise):
    """Means over windows, scaled anew: constants are known but where the number of terms could round them either way.

    Args:
        node: the node.
        maps: as for `Pointwise`.
        whole: as for `Pointwise`.
    """

    def __init__(self, node: ir.Node, maps: Mapping[int, AxisMap], *, whole: str) -> None:
        super().__init__(node, maps, constants="none", whole=whole)

    def constants(self, state: State) -> None:
        """(c - zero) * scale / new scale, which is not halfway between two integers."""
        structure = state.structure(self.out)
        data = self.node.inputs[0]
        if structure is None or not self.links or data is None or state.constant(data) is None:
            return
        known, values = self.operand(state, 0, structure)
        scale, zero, new_scale, new_zero = (array_of(input_of(self.node, index)) for index in (1, 2, 3, 4))
        if scale is None or new_scale is None:
            return
        from_zero, to_zero = (0 if item is None else int(item.reshape(-1)[0]) for item in (zero, new_zero))
        ratio = float(scale.reshape(-1)[0]) / float(new_scale.reshape(-1)[0])
        scaled = (values.astype(np.float64) - from_zero) * ratio
        limits = np.iinfo(values.dtype)
        clear = np.abs(scaled - np.floor(scaled) - 0.5) > HALFWAY
        result = np.clip(np.rint(scaled) + to_zero, limits.min, limits.max).astype(values.dtype)
        state.set_constant(self.out, known & clear, result)


class DynamicQuantize(Pointwise):
    """Quantisation by the range of the tensor itself, zero included: zeros become the zero point, and may go.

    A channel that is not zero may hold the largest entry, by which all others are scaled.
    """

    alone = False

    def constants(self, state: State) -> None:
        """Zeros become the zero point, whatever that is."""
        data = self.node.inputs[0]
        constant = None if data is None else state.constant(data)
        structure = state.structure(self.out)
        if constant is not None and structure is not None and constant.zero.any():
            state.centred[self.out] = np.broadcast_to(constant.zero, frame(structure))

    def spread(self, state: State) -> None:
        """Same positions on both sides; all that is not zero stays."""
        super().spread(state)
        data = self.node.inputs[0]
        if data is not None and self.links:
            _keep_range(state, data, self.node)


def _centred(state: State, data: ir.Value, zero: ir.Value) -> np.ndarray | None:
    """Return where a tensor holds a computed zero point, if that is the one that was computed with it."""
    return state.centred.get(data) if data.producer() is zero.producer() else None


def _keep_range(state: State, data: ir.Value, node: ir.Node) -> None:
    """Keep all that is not zero of a tensor whose range sets its scale; zero is in every range."""
    constant = state.constant(data)
    wanted = np.ones((), bool) if constant is None else ~constant.zero
    state.grow(
        data, wanted, Cause("it may set the range by which its tensor is quantised at", node, spare=True)
    )


class Dequantize(Pointwise):
    """The zero point becomes zero, whatever it is computed to be."""

    def constants(self, state: State) -> None:
        """Evaluated; where scale and zero point are computed, only zeros are known."""
        data, zero = self.node.inputs[0], input_of(self.node, 2)
        structure = state.structure(self.out)
        if data is None or zero is None or is_parameter(zero) or structure is None:
            super().constants(state)
            return
        centred = _centred(state, data, zero)
        if centred is not None:
            dtype = np.dtype(np.float32) if self.out.dtype is None else self.out.dtype.numpy()
            state.set_constant(self.out, centred, np.zeros((), dtype))


class QuantizedConcat(Select):
    """Concatenation of quantised tensors, each brought to the output's scale."""

    def _constant_piece(self, state: State, index: int) -> tuple[np.ndarray, np.ndarray]:
        known, values = super()._constant_piece(state, index)
        inputs = (0, 1, index, index + 1, index + 2)
        arrays = [array_of(self.node.inputs[place]) for place in inputs]
        arrays[2] = np.ascontiguousarray(values).reshape(-1)
        attributes = [ir.AttrInt64("axis", 0)]
        one = ir.Node(
            self.node.domain, self.node.op_type, [self.node.inputs[place] for place in inputs], attributes
        )
        imports = {} if self.node.graph is None else dict(self.node.graph.opset_imports)
        result = evaluate(one, arrays, imports)
        for place in range(len(inputs)):
            one.replace_input_with(place, None)
        if result is None:
            return np.zeros(known.shape, bool), values
        return known, result.reshape(values.shape)


def input_of(node: ir.Node, index: int | None) -> ir.Value | None:
    """Return an input, or None where the node has fewer, omits it or is said to have none."""
    return None if index is None or index >= len(node.inputs) else node.inputs[index]
