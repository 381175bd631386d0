"""What a contraction reads: the axes of its data, its weight, and the constants that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import (
    Axis,
    Factor,
    Structure,
    frame,
    frame_dims,
    has_labels,
    labelled,
    plain,
)
from etp_deploy.surgery.statements.base import (
    Statement,
    array_of,
    set_plain,
)
from etp_deploy.surgery.statements.rows import shared
from etp_deploy.surgery.statements.weights import Reads, Weight
from etp_deploy.surgery.stored import stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "QLinearConv", "ConvInteger"})
# matrix products that may transpose their data
TRANSPOSING = frozenset({"Gemm", "QGemm"})


class Contracted(Statement):
    """An axis of a tensor, contracted with a constant weight; what is kept and cut of it is said by `Contraction`.

    Args:
        node: the node.
        data: the input number of the tensor.
        data_axis: its contracted axis.
        out_axis: the output axis of the weight's output channels.
        weight: the weight.
        bias: the input number of the bias, whose last axis is the output channel; None if the operator has none.
        bordered: why a constant channel does not give a constant output (zero padding); empty if it does.
        bias_scale: what a sum over channels is multiplied by before it may be added to the bias (Gemm).
        out_scale: what their sum is multiplied by (Gemm).
        sources: for each axis of the output the data's axis that it is, index by index; that of `out_axis` is not
            looked at. Left out, it follows from the operator.
    """

    def __init__(
        self,
        node: ir.Node,
        *,
        data: int,
        data_axis: int,
        out_axis: int,
        weight: Weight,
        bias: int | None,
        bordered: bool = False,
        bias_scale: float = 1.0,
        out_scale: float = 1.0,
        sources: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(node)
        value = node.inputs[data]
        assert value is not None
        self.data = value
        self.out = node.outputs[0]
        self.data_axis = data_axis
        self.out_axis = out_axis
        self.weight = weight
        self.bias = bias
        self.bordered = bordered
        self.bias_scale = bias_scale
        self.out_scale = out_scale
        self.sources = sources
        self.active = False
        self._seen: np.ndarray | None = None
        self._constants: tuple[np.ndarray, np.ndarray] | None = None
        # output channels whose weights are taken for zeros, as (group, output of the group)
        self._silent: np.ndarray | None = None

    @property
    def windowed(self) -> bool:
        """Whether the operator slides a window over space, a convolution."""
        return self.node.op_type in CONVOLUTIONS

    # structure

    def structure(self, state: State) -> None:
        """The output channels are labelled anew; other axes pass where they do not mix (batch, sequence, heads)."""
        structure, shape = state.structure(self.data), self.out.shape
        if structure is None or shape is None:
            state.pin(self.data, None, "shapes are not known here", self.node)
            set_plain(state, self.out)
            return
        for axis, factors in enumerate(structure):
            if has_labels(factors) and axis != self.data_axis and not self._passes(axis):
                state.pin(self.data, axis, "the operator mixes positions along this axis", self.node)
        labels = sum(factor.labelled for factor in structure[self.data_axis])
        merged = labels and len(structure[self.data_axis]) > 1
        if labels > 1 or (merged and (self.weight.groups > 1 or self._unsized(structure[self.data_axis]))):
            state.pin(self.data, self.data_axis, "several axes are merged here", self.node)
            structure = _without_labels(structure, self.data_axis)
        if self._block() > 1 and not all(factor.labelled for factor in structure[self.data_axis]):
            state.pin(
                self.data, self.data_axis, "channels that share a scale are merged with others", self.node
            )
            structure = _without_labels(structure, self.data_axis)
        out = list(plain(shape))
        for axis in range(len(out)):
            source = self._source_axis(axis)
            if source is not None and self._passes(source):
                out[axis] = structure[source]
        self._axis: Axis = structure[self.data_axis]
        flat = self._flat()
        self._weights = self.reads = Reads(
            flat[..., 0] != 0 if flat.shape[3] == 1 else (flat != 0).any(axis=3)
        )
        outputs = self.reads.shape[0] * self.reads.shape[1]
        out[self.out_axis] = labelled(outputs) if outputs > 1 else plain((1,))[0]
        self.active = True
        state.set_structure(self.out, tuple(out))
        self._frames(frame(state.structure(self.data) or structure), structure, tuple(out))
        if len(self._batch) and len(self._data_dims):
            state.product.add(self.data)
        if len(self._batch):
            state.product.add(self.out)

    def _unsized(self, axis: Axis) -> bool:
        """Whether channels are merged with an axis that is longer than 1, by how much only the weight says."""
        labels = int(np.prod([factor.extent for factor in axis]))
        dynamic = any(factor.size.static is None for factor in axis)
        return dynamic and labels != self._array().shape[self.weight.contracted]

    def _passes(self, axis: int) -> bool:
        """Whether an axis of the data is an axis of the output, index by index (all but Conv's space)."""
        if self.sources is not None:
            return axis in self.sources
        return axis != self.data_axis and (not self.windowed or axis == 0)

    def _source_axis(self, out_axis: int) -> int | None:
        """Return the data's axis that an output axis comes from; MatMul and Gemm exchange one, Conv keeps all."""
        if out_axis == self.out_axis:
            return None
        if self.sources is not None:
            return self.sources[out_axis]
        if self.node.op_type in TRANSPOSING and self.data_axis == 0:
            return 1
        return out_axis

    def _frames(self, whole: tuple[int, ...], structure: Structure, out: Structure) -> None:
        """Set the frames' dimensions; the data's frame is whole, though a pinned axis counts as one index."""
        self._data_frame, self._out_frame = whole, frame(out)
        dims = frame_dims(structure, self.data_axis)
        self._data_dims = [dim for dim in dims if frame(structure)[dim] > 1]
        self._out_dim = frame_dims(out, self.out_axis)[0]
        self._batch: list[tuple[int, int]] = []
        for axis in range(len(out)):
            source = self._source_axis(axis)
            if source is None or not self._passes(source):
                continue
            pairs = zip(frame_dims(structure, source), frame_dims(out, axis), strict=True)
            self._batch += [pair for pair in pairs if self._data_frame[pair[0]] > 1]

    def _block(self) -> int:
        """Return how many neighbouring input channels can only go together, since they share a scale."""
        form = stored(self.node.inputs[self.weight.index])
        return 1 if form is None or self.weight.groups > 1 else form.block_along(self.weight.contracted)

    # the weight

    def _sums(self, value: np.ndarray) -> np.ndarray:
        """Return sum_i w[o, i] * value[i] over groups and kernels, as it may be added to the bias."""
        return self._weighted(value, np.asarray)

    def _weighted(self, value: np.ndarray, form: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """As `_sums`, of the weight in another form."""
        result = np.zeros(self.reads.shape[:2])
        if not value.any():
            return result
        flat = self._flat()
        for group in range(self.reads.shape[0]):
            columns = np.flatnonzero(value[group])
            if columns.size:
                weights = form(flat[group][:, columns]).sum(axis=2, dtype=np.float64)
                result[group] = weights @ value[group][columns]
        if self._silent is not None:
            result[self._silent] = 0
        return result * self.bias_scale

    def _flat(self) -> np.ndarray:
        """Return the weight as (group, output, labelled input position, all the rest), for the moment.

        A view wherever the layout allows, and never held on to: weights may be memory-mapped.
        """
        return self.weight.flattened(self._array(), self._axis)

    def columns(self, grouped: np.ndarray) -> np.ndarray:
        """View a grouped weight by input channel: (group, output, channel, all the rest in its own axes)."""
        return self.weight.by_label(grouped, self._axis)

    def _array(self) -> np.ndarray:
        array = array_of(self.node.inputs[self.weight.index])
        assert array is not None
        return array

    def _bias_value(self) -> ir.Value | None:
        if self.bias is None or len(self.node.inputs) <= self.bias:
            return None
        return self.node.inputs[self.bias]

    # one-dimensional views of the masks along the contracted and the output axis

    def _along_data(self, array: np.ndarray, reduce: np.ufunc = np.logical_or) -> np.ndarray:
        others = tuple(dim for dim in range(array.ndim) if dim not in self._data_dims)
        return reduce.reduce(array, axis=others).reshape(-1) if array.ndim else array.reshape(1)

    def _along_out(self, array: np.ndarray, reduce: np.ufunc = np.logical_or) -> np.ndarray:
        others = tuple(dim for dim in range(array.ndim) if dim != self._out_dim)
        return np.asarray(reduce.reduce(array, axis=others)).reshape(-1)

    def _by_group(self, array: np.ndarray) -> np.ndarray:
        """View a vector along the contracted axis as (group, input of the group)."""
        return array.reshape(self.weight.groups, -1)

    def kept_inputs(self, state: State) -> np.ndarray:
        """Return which input channels stay, as (group, input of the group)."""
        mask = state.mask(self.data)
        if not self._data_dims:
            return np.ones(self.reads.shape[::2], bool)
        return self._by_group(self._along_data(mask))

    def kept_outputs(self, state: State) -> np.ndarray:
        """Return which output channels stay, as (group, output of the group)."""
        return self._along_out(state.mask(self.out)).reshape(self.reads.shape[:2])

    # constants that are read

    def _held(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return which inputs are known constants in all rows, and their values, as (group, input of the group)."""
        if self._constants is None:
            self._constants = shared(*self._read_rows(state))
        return self._constants

    def _read_rows(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return what is known of each row of the axes that pass: where, and the values, as (row, group, input)."""
        constant = state.constant(self.data)
        if constant is None:
            shape = (1, self.weight.groups, self.reads.shape[2])
            return np.zeros(shape, bool), np.zeros(shape)
        known = self._by_row(constant.known, np.logical_and)
        low = self._by_row(constant.value, np.minimum).astype(np.float64)
        high = self._by_row(constant.value, np.maximum).astype(np.float64)
        known = known & (low == high)
        return known, np.where(known, low, 0.0)

    def _by_row(self, array: np.ndarray, reduce: np.ufunc) -> np.ndarray:
        """Bring an array of the data's frame into (row of the axes that pass, group, input of the group)."""
        dims = [own for own, _ in self._batch] + self._data_dims
        array = np.broadcast_to(array, self._data_frame)
        others = tuple(dim for dim in range(array.ndim) if dim not in dims)
        array = np.transpose(reduce.reduce(array, axis=others), np.argsort(np.argsort(dims)))
        rows = int(np.prod(array.shape[: len(self._batch)], dtype=np.int64))
        inputs = self.weight.groups * self.reads.shape[2]
        return np.broadcast_to(array.reshape(rows, -1), (rows, inputs)).reshape(rows, self.weight.groups, -1)

    def held(self, state: State) -> np.ndarray:
        """Return the constants of the input channels, 0 where not known, as (group, input of the group)."""
        return self._held(state)[1]

    def _reading(self, outputs: np.ndarray) -> np.ndarray:
        """Leave out, of some output channels, those whose weights are taken for zeros."""
        return outputs if self._silent is None else outputs & ~self._silent

    # words: bits that say in which rounds a position went, see `lines`

    def words_out(self, codes: Mapping[ir.Value, np.ndarray]) -> np.ndarray | None:
        """Return the words of the output channels, in the weight's order; None where they cannot go."""
        words = codes.get(self.out)
        if words is None or self._out_frame[self._out_dim] == 1:
            return None
        return self._along_out(words, np.bitwise_and)

    def words_in(self, codes: Mapping[ir.Value, np.ndarray]) -> np.ndarray | None:
        """Return the words of the contracted axis, space that is merged with it included; None where none can go."""
        words = codes.get(self.data)
        if words is None or not self._data_dims:
            return None
        line = self._along_data(words, np.bitwise_and)
        sizes = [factor.size.static or 1 for factor in self._axis]
        shape = [size if factor.labelled else 1 for size, factor in zip(sizes, self._axis, strict=True)]
        return np.broadcast_to(line.reshape(shape), sizes).reshape(-1)


def _without_labels(structure: Structure, axis: int) -> Structure:
    """Return the structure with an axis's factors unlabelled, one by one, so that frames keep their dimensions."""
    bare = tuple(Factor(factor.size) for factor in structure[axis])
    return tuple(bare if index == axis else item for index, item in enumerate(structure))
