"""Operators that contract an axis with a constant weight: Conv, ConvTranspose, Gemm, MatMul.

`y[..., o, ...] = sum_i x[..., i, ...] * w[o, i, ...] + b[o]`, with groups and kernels where the operator has them.
"""

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
from etp_deploy.surgery.state import Cause, ConflictError, coordinates, nested_fill
from etp_deploy.surgery.statements.base import (
    AddVector,
    Edit,
    SetAttribute,
    SetInput,
    SliceInput,
    Statement,
    TakeEntries,
    array_of,
    default_layout,
    set_plain,
)
from etp_deploy.surgery.statements.pointwise import missing_rows
from etp_deploy.surgery.statements.weights import Reads, Weight, merged_places
from etp_deploy.surgery.stored import stored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


CONVOLUTIONS = frozenset({"Conv", "ConvTranspose", "QLinearConv", "ConvInteger"})
# matrix products that may transpose their data
TRANSPOSING = frozenset({"Gemm", "QGemm"})
NO_CARRIER = (
    "its constant meets zero padding, and the weight cannot carry it in the form in which it is stored, at"
)
# what float32 sums of products may be off by, as a share of the products' magnitudes
ROUNDING = 1e-6


class Contraction(Statement):
    """A contraction of one axis of a tensor with a constant weight.

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
        sources: for each axis of the output the data's axis that it is, index by index; None where there is none.
            Left out, it follows from the operator.
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
        sources: tuple[int | None, ...] | None = None,
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

    def _held(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return which input channels are known constants, and their values, as (group, input of the group)."""
        if self._constants is None:
            self._constants = self._read_constants(state)
        return self._constants

    def _read_constants(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        shape = (self.weight.groups, self.reads.shape[2])
        constant = state.constant(self.data)
        if constant is None or (not self._data_dims and constant.known.size > 1):
            return np.zeros(shape, bool), np.zeros(shape)
        known = self._along_data(constant.known, np.logical_and)
        low = self._along_data(constant.value, np.minimum).astype(np.float64)
        high = self._along_data(constant.value, np.maximum).astype(np.float64)
        known = known & (low == high)
        if known.size == 1 and shape != (1, 1):
            known, low = np.broadcast_to(known, shape), np.broadcast_to(low, shape)
        known = known.reshape(shape)
        return known, np.where(known, low.reshape(shape), 0.0)

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

    # constants

    def constants(self, state: State) -> None:
        """An output is known if every input that it reads is; at padded borders only if these are zero."""
        if not self.active:
            return
        self._constants = None
        known, value = self._held(state)
        usable = known & (value == 0) if self._only_zeros() else known
        read_unknown = self._reading(self.reads.outputs(~usable))
        if read_unknown.all():
            return
        result = self._sums(value).reshape(-1)
        bias = array_of(self._bias_value())
        ok = ~read_unknown.reshape(-1)
        if bias is not None:
            rows = bias.reshape(-1, bias.shape[-1] if bias.ndim else 1)
            ok = ok & np.broadcast_to((rows == rows[:1]).all(axis=0), ok.shape)
            result = result + rows[0].astype(np.float64)
        shape = [1] * len(self._out_frame)
        shape[self._out_dim] = -1
        if ok.size == self._out_frame[self._out_dim]:
            state.set_constant(self.out, ok.reshape(shape), self._finished(result).reshape(shape))

    def _only_zeros(self) -> bool:
        """Whether constants other than zero make an output that is not one."""
        return self.bordered

    def _finished(self, result: np.ndarray) -> np.ndarray:
        """Return the output for a sum with its bias."""
        return (result * self.out_scale).astype(self._array().dtype)

    @property
    def _sum_type(self) -> np.dtype:
        """The type of the bias."""
        return self._array().dtype

    def silence(self, state: State) -> bool:
        """Take for zeros the weights of output channels that nothing reads; say whether there are any.

        What such a channel holds does not matter: if it stays for another reason, it need not read anything.
        """
        weight = self.node.inputs[self.weight.index]
        if (
            not self.active
            or self.weight.groups > 1
            or self._batch
            or weight is None
            or len(weight.uses()) > 1
            or stored(weight) is not None
            or self._array().dtype.kind != "f"
        ):
            return False
        constant = state.constant(self.out)
        dead = ~self._along_out(state.mask(self.out))
        if constant is not None:
            dead &= ~self._along_out(np.broadcast_to(constant.known, self._out_frame), np.logical_and)
        if not dead.any():
            return False
        self._silent = dead.reshape(self.reads.shape[:2])
        return True

    def _reading(self, outputs: np.ndarray) -> np.ndarray:
        """Leave out, of some output channels, those whose weights are taken for zeros."""
        return outputs if self._silent is None else outputs & ~self._silent

    # masks

    def rewind(self, *, read: bool = True) -> None:
        """Forget the outputs seen, the constants held, and that weights counted as zero."""
        self._seen = self._constants = self._silent = None
        if self.active:
            self.reads = self._weights if read else Reads(np.zeros(self._weights.shape, bool))

    def spread(self, state: State) -> None:
        """A kept output keeps each input that it reads and that is not a known constant."""
        if not self.active:
            return
        self._spread_batch(state)
        if self.weight.groups > 1:
            self._spread_groups(state)
        kept = self.kept_outputs(state)
        if not self._data_dims:
            read = self.reads.inputs(self._reading(kept)) & ~self._held(state)[0]
            if read.any() and not self._batch:
                state.grow(self.data, np.ones((), bool), Cause("read as a whole by", self.node, self.out))
            return
        if self._seen is None:
            self._seen = np.zeros_like(kept)
            self._needed = np.zeros(self.reads.shape[::2], bool)
        if (kept & ~self._seen).any():
            self._needed |= self.reads.inputs(self._reading(kept & ~self._seen))
        self._seen = kept.copy()
        known, value = self._held(state)
        self._grow_inputs(
            state, self._needed & ~known, Cause("read with a weight that is not zero by", self.node, self.out)
        )
        rigid = self._rigid()
        if rigid:
            cause = Cause(rigid, self.node, self.out, spare=True)
            self._grow_inputs(state, self._needed & (value != 0), cause)

    def _rigid(self) -> str:
        """Return why removed constants that are not zero could not be made up for; empty where they can."""
        if self.bordered and stored(self.node.inputs[self.weight.index]) is not None:
            return NO_CARRIER
        return ""

    def keep_inputs(self, state: State, wanted: np.ndarray, text: str) -> bool:
        """Keep dead input channels (a vector along the contracted axis) for a reason; return whether any is new."""
        return bool(wanted.any()) and self._grow_inputs(state, wanted, Cause(text, self.node, spare=True))

    def _grow_inputs(self, state: State, wanted: np.ndarray, cause: Cause) -> bool:
        if not self._data_dims:
            return False
        mask = state.mask(self.data)
        shape = [self._data_frame[dim] if dim in self._data_dims else 1 for dim in range(mask.ndim)]
        rows = mask.any(axis=tuple(self._data_dims), keepdims=True)
        if not rows.any():
            rows = np.ones_like(rows) if not self._batch else self._batch_rows(state)
        return state.grow(self.data, wanted.reshape(shape) & rows, cause)

    def _batch_rows(self, state: State) -> np.ndarray:
        """Return the indices along other labelled axes (heads) that the output keeps, in the data's dimensions."""
        out = state.mask(self.out)
        targets = [target for _, target in self._batch]
        kept = out.any(axis=tuple(dim for dim in range(out.ndim) if dim not in targets))
        shape = [1] * len(self._data_frame)
        for own, _ in self._batch:
            shape[own] = self._data_frame[own]
        return np.asarray(kept).reshape(shape)

    def _spread_batch(self, state: State) -> None:
        """Other labelled axes (heads in front of a weight that all share) keep the same indices on both sides."""
        if not self._batch:
            return
        data, out = state.mask(self.data), state.mask(self.out)
        owns = [own for own, _ in self._batch]
        if not self._data_dims:
            state.grow(
                self.data, self._batch_rows(state), Cause("read at the same index by", self.node, self.out)
            )
        rows = np.asarray(data.any(axis=tuple(dim for dim in range(data.ndim) if dim not in owns)))
        shape = [1] * len(self._out_frame)
        for _, target in self._batch:
            shape[target] = self._out_frame[target]
        columns = out.any(axis=tuple(target for _, target in self._batch), keepdims=True)
        state.grow(
            self.out, rows.reshape(shape) & columns, Cause("made at the same index by", self.node, self.data)
        )

    def _spread_groups(self, state: State) -> None:
        """A depthwise channel stays on both sides or on neither."""
        if not self._data_dims or self.reads.shape[2] != 1:
            return
        kept = np.asarray(self.kept_outputs(state).any(axis=1, keepdims=True))
        self._grow_inputs(state, kept, Cause("read by the same group of", self.node, self.out))
        inputs = self.kept_inputs(state)
        if self.reads.shape[1] == 1:
            self._grow_outputs(state, inputs, Cause("made by the same group of", self.node, self.data))

    def _grow_outputs(self, state: State, wanted: np.ndarray, cause: Cause) -> bool:
        shape = [1] * len(self._out_frame)
        shape[self._out_dim] = -1
        out = state.mask(self.out)
        others = tuple(dim for dim in range(out.ndim) if dim != self._out_dim)
        rows = out.any(axis=self._out_dim, keepdims=True) if others else np.ones((1,), bool)
        if not rows.any():
            rows = np.ones_like(rows)
        return state.grow(self.out, wanted.reshape(shape) & rows, cause)

    # repair

    def repair(self, state: State) -> bool:
        """Equal counts in groups; rows for heads."""
        if not self.active:
            return False
        grown = self._repair_batch(state)
        if self.weight.groups > 1:
            grown |= self._repair_groups(state)
        return grown | (self._block() > 1 and self._repair_blocks(state))

    def _block(self) -> int:
        """Return how many neighbouring input channels can only go together, since they share a scale."""
        form = stored(self.node.inputs[self.weight.index])
        return 1 if form is None or self.weight.groups > 1 else form.block_along(self.weight.contracted)

    def _repair_blocks(self, state: State) -> bool:
        if not self._data_dims:
            return False
        kept = self.kept_inputs(state)[0]
        blocks = np.arange(kept.size) // self._block()
        cause = Cause("a block of channels shares a scale at", self.node, spare=True)
        return self._grow_inputs(state, np.isin(blocks, blocks[kept]), cause)

    def _repair_batch(self, state: State) -> bool:
        if not self._batch or not self._data_dims:
            return False
        cause = Cause("read at the same index by", self.node, self.out)
        return state.grow(self.data, missing_rows(self._batch_rows(state), state.mask(self.data)), cause)

    def _repair_groups(self, state: State) -> bool:
        cause = Cause("groups keep equal counts at", self.node, spare=True)
        outputs = self.kept_outputs(state)
        inputs = self.kept_inputs(state) if self._data_dims else np.ones(self.reads.shape[::2], bool)
        groups = np.asarray(outputs.any(axis=1) | (inputs.any(axis=1) & bool(self._data_dims)))
        if not self._data_dims:
            groups = np.ones_like(groups)
        return self._grow_inputs(state, _equal_rows(inputs, groups), cause) | self._grow_outputs(
            state, _equal_rows(outputs, groups), cause
        )

    def carriers_needed(self, state: State) -> np.ndarray:
        """Return where removed constants meet zero padding and no kept constant can stand for them.

        The result is True for each channel of a group, as (group, input of the group), that the group could keep
        as its carrier, and all False where nothing is needed.
        """
        if not (self.active and self.bordered and self._data_dims) or self._rigid():
            return np.zeros((1, 1), bool)
        known, value = self._held(state)
        usable = known & (value != 0)
        read = self.reads.inputs(self._reading(self.kept_outputs(state)))
        kept = self.kept_inputs(state)
        lacking = (usable & read & ~kept).any(axis=1) & ~(usable & kept).any(axis=1)
        return np.asarray(usable & lacking[:, None])

    def held(self, state: State) -> np.ndarray:
        """Return the constants of the input channels, 0 where not known, as (group, input of the group)."""
        return self._held(state)[1]

    def keep_carriers(self, state: State, wanted: np.ndarray) -> bool:
        """Keep channels as carriers."""
        cause = Cause("carries the constants that meet zero padding at", self.node, spare=True)
        return self._grow_inputs(state, wanted, cause)

    # layout

    def layout(self, state: State) -> None:
        """Output channels in their own order, groups in the order in which the data's stand."""
        if not self.active:
            default_layout(state, self.out)
            return
        kept = self.kept_outputs(state)
        order = self._group_order(state)
        channels = (
            np.concatenate([np.flatnonzero(kept[group]) + group * kept.shape[1] for group in order])
            if len(order)
            else np.zeros(0, np.int64)
        )
        coords: list[np.ndarray] = []
        shape = [1] * len(self._out_frame)
        for dim, extent in enumerate(self._out_frame):
            own = next((own for own, target in self._batch if target == dim), None)
            if dim == self._out_dim:
                where = [1] * len(self._out_frame)
                where[dim] = -1
                coords.append((channels if extent > 1 else np.zeros(1, np.int64)).reshape(where))
            elif own is not None:
                coords.append(
                    self._row_coordinate(state, own).reshape(
                        [-1 if d == dim else 1 for d in range(len(shape))]
                    )
                )
            else:
                coords.append(np.zeros(shape, np.int64))
        layout = np.ravel_multi_index(tuple(np.broadcast_arrays(*coords)), self._out_frame)
        if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError([self.data, self.out])
        state.layouts[self.out] = layout

    def _row_coordinate(self, state: State, own: int) -> np.ndarray:
        # the tensor's own frame: labels that are pinned along the contracted axis are not in ours
        coordinate = coordinates(state.layouts[self.data], state.mask(self.data).shape)[own]
        others = tuple(dim for dim in range(coordinate.ndim) if dim != own)
        low, high = coordinate.min(axis=others), coordinate.max(axis=others)
        if not np.array_equal(low, high):
            raise ConflictError([self.data, self.out])
        return np.asarray(low)

    def _input_order(self, state: State) -> np.ndarray:
        """Return the contracted positions in the data's order (positions of the flattened labels)."""
        if not self._data_dims:
            return np.arange(self.reads.shape[0] * self.reads.shape[2])
        layout = state.layouts[self.data]
        coords = coordinates(layout, self._data_frame)
        lines = []
        for dim in self._data_dims:
            others = tuple(d for d in range(layout.ndim) if d not in self._data_dims)
            low, high = coords[dim].min(axis=others), coords[dim].max(axis=others)
            if not np.array_equal(low, high):
                raise ConflictError([self.data])
            lines.append(low)
        order = np.ravel_multi_index(tuple(lines), tuple(self._data_frame[dim] for dim in self._data_dims))
        return np.asarray(order).reshape(-1)

    def _group_order(self, state: State) -> np.ndarray:
        if self.weight.groups == 1:
            return np.zeros(1, np.int64)
        if not self._data_dims:
            return np.arange(self.weight.groups)
        per_group = self.reads.shape[2]
        groups = self._input_order(state) // per_group
        kept = self.kept_inputs(state)
        width = int(kept.sum(axis=1).max(initial=1))
        rows = groups.reshape(-1, width) if groups.size % width == 0 else groups[:, None]
        if (rows != rows[:, :1]).any():
            raise ConflictError([self.data, self.out])
        return np.asarray(rows[:, 0])

    def check(self, state: State) -> None:
        """Raise a conflict where channels that share a scale no longer stand together."""
        block = self._block() if self.active else 1
        if block == 1 or not self._data_dims:
            return
        order = self._input_order(state)
        if not np.array_equal(order % block, np.arange(order.size) % block):
            raise ConflictError([self.data])

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Cut the weight, fold what removed constants contributed into the bias or the carrier, fix the group."""
        if not self.active:
            return
        outputs, inputs = self.kept_outputs(state), self.kept_inputs(state)
        known, value = self._held(state)
        gone = known & ~inputs if self._data_dims else np.zeros_like(known)
        silent = np.zeros_like(outputs) if self._silent is None else outputs & self._silent
        if outputs.all() and inputs.all() and not silent.any():
            return
        folded = bool((self.reads.inputs(self._reading(outputs)) & gone & (value != 0)).any())
        order = state.layouts[self.out]
        channels = self._out_channels(order)
        yield from self._weight_edits(state, channels, gone if folded and self.bordered else None)
        yield from self._bias_edits(channels, gone, value, folded=folded and not self.bordered)
        groups = len(self._group_order(state))
        if self.weight.groups > 1 and groups != self.weight.groups:
            yield SetAttribute("group", groups)

    def _weight_edits(self, state: State, channels: np.ndarray, carried: np.ndarray | None) -> Iterator[Edit]:
        """Cut the weight, in the form in which it is stored; `carried` are removed inputs that a carrier stands for."""
        weight = self.weight
        if stored(self.node.inputs[weight.index]) is not None:
            yield self._entries_edit(state, channels)
        elif weight.groups == 1 and carried is None and self._silent is None:
            yield self._plain_cut(state, channels)
        else:
            grouped = weight.grouped(self._array())
            if self._silent is not None:
                grouped = grouped.copy()
                grouped[self._silent] = 0
            if carried is not None:
                known, value = self._held(state)
                grouped = self._with_carrier(grouped, carried, known & self.kept_inputs(state), value)
            yield SetInput(weight.index, weight.ungrouped(self._cut(state, grouped, channels)))

    def _entries_edit(self, state: State, channels: np.ndarray) -> TakeEntries:
        """Say which entries of the weight to take, whatever form it is stored in."""
        array = self._array()
        places = self.weight.grouped(np.arange(array.size).reshape(array.shape))
        return TakeEntries(self.weight.index, self.weight.ungrouped(self._cut(state, places, channels)))

    def _out_channels(self, layout: np.ndarray) -> np.ndarray:
        if self._out_frame[self._out_dim] == 1:
            return np.zeros(1, np.int64)
        coordinate = coordinates(layout, self._out_frame)[self._out_dim]
        others = tuple(dim for dim in range(coordinate.ndim) if dim != self._out_dim)
        return np.asarray(coordinate.min(axis=others))

    def _with_carrier(
        self, grouped: np.ndarray, gone: np.ndarray, present: np.ndarray, value: np.ndarray
    ) -> np.ndarray:
        """Let one kept constant channel of each group carry the removed ones: w_j += sum_i w_i c_i / c_j."""
        grouped = grouped.astype(np.float64)
        by_label = self.columns(grouped)
        for group in range(grouped.shape[0]):
            removed = np.flatnonzero(gone[group] & (value[group] != 0))
            candidates = np.flatnonzero(present[group] & (value[group] != 0))
            if removed.size == 0 or candidates.size == 0:
                continue
            carrier = candidates[np.argmax(np.abs(value[group][candidates]))]
            scale = value[group][removed] / value[group][carrier]
            by_label[group, :, carrier] += np.einsum("oi...,i->o...", by_label[group][:, removed], scale)
        return grouped.astype(self._array().dtype)

    def _plain_cut(self, state: State, channels: np.ndarray) -> SliceInput:
        """Say which outputs and inputs to take, so that the cut can be made as the weight is written."""
        takes = []
        if self._out_frame[self._out_dim] > 1 and len(channels) < self.reads.shape[1]:
            takes.append((self.weight.out, channels))
        if self._data_dims:
            takes.append((self.weight.contracted, merged_places(self._axis, self._input_order(state))))
        return SliceInput(self.weight.index, tuple(takes))

    def _cut(self, state: State, grouped: np.ndarray, channels: np.ndarray) -> np.ndarray:
        per_output, per_input = self.reads.shape[1], self.reads.shape[2]
        order = self._group_order(state)
        rows = (channels % per_output).reshape(len(order), -1)
        if self._out_frame[self._out_dim] == 1:
            rows = np.zeros((len(order), 1), np.int64) if self.weight.groups == 1 else rows
        if not self._data_dims:
            return np.asarray(grouped[order[:, None], rows])
        columns = self._input_order(state)
        if self.weight.groups == 1:
            taken = np.take(grouped[0], rows[0], axis=0) if len(rows[0]) < grouped.shape[1] else grouped[0]
            return np.take(taken, merged_places(self._axis, columns), axis=1)[None]
        inner = (columns % per_input).reshape(len(order), -1)
        return np.asarray(grouped[order[:, None, None], rows[:, :, None], inner[:, None, :]])

    def _bias_edits(
        self, channels: np.ndarray, gone: np.ndarray, value: np.ndarray, *, folded: bool
    ) -> Iterator[Edit]:
        dtype = self._sum_type
        removed = np.where(gone, value, 0.0)
        share = self._sums(removed).reshape(-1)[channels] if folded else np.zeros(0)
        bias = array_of(self._bias_value())
        if bias is not None and self.bias is not None:
            along = channels if bias.ndim and bias.shape[-1] > 1 else np.zeros(len(channels), np.int64)
            places = np.arange(bias.size).reshape(bias.shape or (1,))
            if folded:
                form = stored(self._bias_value())
                slack = None if form is None else np.abs(self._weighted(np.abs(removed), np.abs)).reshape(-1)
                allowed = None if slack is None else ROUNDING * slack[channels]
                yield TakeEntries(self.bias, np.take(places, along, axis=-1), share, allowed)
            elif bias.ndim and bias.shape[-1] > 1 and not np.array_equal(along, np.arange(bias.shape[-1])):
                yield TakeEntries(self.bias, np.take(places, along, axis=-1))
        elif folded and self.bias is not None:
            yield SetInput(self.bias, share.astype(dtype))
        elif folded:
            yield AddVector(self.out_axis, share.astype(dtype))

    def _bias_value(self) -> ir.Value | None:
        if self.bias is None or len(self.node.inputs) <= self.bias:
            return None
        return self.node.inputs[self.bias]


def _equal_rows(mask: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return a mask in which every group that stays keeps equally many, and at least one."""
    filled = mask.copy()
    filled[groups & ~mask.any(axis=1), 0] = True
    return nested_fill(filled) if mask.shape[1] > 1 else filled


def _without_labels(structure: Structure, axis: int) -> Structure:
    """Return the structure with an axis's factors unlabelled, one by one, so that frames keep their dimensions."""
    bare = tuple(Factor(factor.size) for factor in structure[axis])
    return tuple(bare if index == axis else item for index, item in enumerate(structure))
