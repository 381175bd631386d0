"""Operators that contract an axis with a constant weight: Conv, ConvTranspose, Gemm, MatMul.

`y[..., o, ...] = sum_i x[..., i, ...] * w[o, i, ...] + b[o]`, with groups and kernels where the operator has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.state import Cause, nested_fill
from etp_deploy.surgery.statements.base import (
    array_of,
)
from etp_deploy.surgery.statements.contraction_cut import CutContraction
from etp_deploy.surgery.statements.pointwise import missing_rows
from etp_deploy.surgery.statements.rows import distinct
from etp_deploy.surgery.statements.weights import Reads
from etp_deploy.surgery.stored import stored

if TYPE_CHECKING:
    from etp_deploy.surgery.state import State


NO_CARRIER = (
    "its constant meets zero padding, and the weight cannot carry it in the form in which it is stored, at"
)


class Contraction(CutContraction):
    """A contraction of one axis of a tensor with a constant weight; arguments are those of `Contracted`."""

    # constants

    def constants(self, state: State) -> None:
        """An output is known if every input that it reads is; at padded borders only if these are zero."""
        if not self.active:
            return
        self._constants = None
        known, value = self._read_rows(state)
        first, which = distinct(known, value)
        read = [self._read_from(known[row], value[row]) for row in first]
        held = np.stack([line for line, _ in read])[which]
        if not held.any():
            return
        result = self._finished(np.stack([line for _, line in read]))[which]
        state.set_constant(self.out, self._in_out_frame(held), self._in_out_frame(result))

    def _in_out_frame(self, array: np.ndarray) -> np.ndarray:
        """Bring an array (row of the axes that pass, or one row for all; output channel) into the output's frame."""
        passing = [target for _, target in self._batch]
        shape = [1] * len(self._out_frame)
        for dim in (*(passing if len(array) > 1 else ()), self._out_dim):
            shape[dim] = self._out_frame[dim]
        places = [*passing, self._out_dim]
        return np.transpose(array.reshape([shape[dim] for dim in places]), np.argsort(places)).reshape(shape)

    def _read_from(self, known: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which outputs are constant where these inputs are, as (group, input), and their sums with the bias."""
        usable = known & (value == 0) if self._only_zeros() else known
        ok = ~self._reading(self.reads.outputs(~usable)).reshape(-1)
        result = self._sums(value).reshape(-1) if ok.any() else np.zeros(ok.size)
        bias = array_of(self._bias_value())
        if bias is None:
            return ok, result
        rows = bias.reshape(-1, bias.shape[-1] if bias.ndim else 1)
        ok = ok & np.broadcast_to((rows == rows[:1]).all(axis=0), ok.shape)
        return ok, result + rows[0].astype(np.float64)

    def _only_zeros(self) -> bool:
        """Whether constants other than zero make an output that is not one."""
        return self.bordered

    def _finished(self, result: np.ndarray) -> np.ndarray:
        """Return the output for a sum with its bias."""
        return (result * self.out_scale).astype(self._array().dtype)

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

    # carriers

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

    def keep_carriers(self, state: State, wanted: np.ndarray) -> bool:
        """Keep channels as carriers."""
        cause = Cause("carries the constants that meet zero padding at", self.node, spare=True)
        return self._grow_inputs(state, wanted, cause)


def _equal_rows(mask: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return a mask in which every group that stays keeps equally many, and at least one."""
    filled = mask.copy()
    filled[groups & ~mask.any(axis=1), 0] = True
    return nested_fill(filled) if mask.shape[1] > 1 else filled
