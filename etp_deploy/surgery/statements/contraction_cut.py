"""How a contraction is cut: the order of its channels, its weight, and what removed constants leave in the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.state import ConflictError, coordinates
from etp_deploy.surgery.statements.base import (
    AddVector,
    Edit,
    SetAttribute,
    SetInput,
    SliceInput,
    TakeEntries,
    array_of,
    default_layout,
)
from etp_deploy.surgery.statements.contracted import Contracted
from etp_deploy.surgery.statements.weights import merged_places
from etp_deploy.surgery.stored import stored

if TYPE_CHECKING:
    from collections.abc import Iterator

    from etp_deploy.surgery.state import State


# what float32 sums of products may be off by, as a share of the products' magnitudes
ROUNDING = 1e-6


class CutContraction(Contracted):
    """A contraction whose output channels stand in their own order, groups in the order in which the data's stand."""

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
            yield from self._plain_cut(state, channels)
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

    def _plain_cut(self, state: State, channels: np.ndarray) -> Iterator[Edit]:
        """Say which outputs and inputs to take, so that the cut can be made as the weight is written.

        An axis of which all stays is not named: two cuts of a shared weight are the same if what they leave is.
        """
        takes = []
        if self._out_frame[self._out_dim] > 1 and len(channels) < self.reads.shape[1]:
            takes.append((self.weight.out, channels))
        if self._data_dims:
            places = merged_places(self._axis, self._input_order(state))
            if not np.array_equal(places, np.arange(self._array().shape[self.weight.contracted])):
                takes.append((self.weight.contracted, places))
        if takes:
            yield SliceInput(self.weight.index, tuple(takes))

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

    @property
    def _sum_type(self) -> np.dtype:
        """The type of the bias."""
        return self._array().dtype
