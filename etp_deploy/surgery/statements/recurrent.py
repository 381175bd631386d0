"""Recurrent layers: LSTM, GRU and RNN lose hidden units, direction by direction.

A unit is dead when its candidate (the gate that feeds the state) is zero, so that a state that starts at zero stays
there, or when neither a consumer nor another unit that stays reads it. Each direction keeps equally many.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import frame, frame_dims, has_labels, labelled, plain, single_label
from etp_deploy.surgery.state import Cause, ConflictError, coordinates, nested_fill
from etp_deploy.surgery.statements.base import Edit, SetAttribute, SetInput, Statement, array_of, set_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.state import State

WEIGHT, RECURRENT, BIAS, INITIAL_H, INITIAL_C, PEEPHOLE = 1, 2, 3, 5, 6, 7


class Recurrent(Statement):
    """A recurrent layer.

    Args:
        node: the node.
        gates: how many gates each unit has (LSTM 4, GRU 3, RNN 1).
        candidate: which of them feeds the state.
    """

    def __init__(self, node: ir.Node, gates: int, candidate: int) -> None:
        super().__init__(node)
        data = node.inputs[0]
        assert data is not None
        self.data = data
        self.gates = gates
        self.candidate = candidate
        self.active = False
        self._reading = True
        # units whose weights are taken for zeros, as (direction, unit)
        self._silent: np.ndarray | None = None

    # structure

    def structure(self, state: State) -> None:
        """Hidden units are labelled anew, jointly with the direction."""
        structure = state.structure(self.data)
        shapes = [value.shape for value in self.node.outputs if _used(value)]
        if structure is None or any(shape is None for shape in shapes):
            state.pin(self.data, None, "shapes are not known here", self.node)
            for value in self.node.outputs:
                set_plain(state, value)
            return
        for axis in (0, 1):
            state.pin(self.data, axis, "the operator runs over this axis", self.node)
        if has_labels(structure[2]) and not single_label(structure[2]):
            state.pin(self.data, 2, "channels are joined with something else here", self.node)
        self._data_dim = frame_dims(structure, 2)[0] if single_label(structure[2]) else None
        weight, recurrent = self._array(WEIGHT), self._array(RECURRENT)
        self.directions, self.units = recurrent.shape[0], recurrent.shape[2]
        split = (self.directions, self.gates, self.units, -1)
        self._reads_data = (weight.reshape(split) != 0).any(axis=1)
        self._reads_units = (recurrent.reshape(split) != 0).any(axis=1)
        self.active = True
        for number, value in enumerate(self.node.outputs):
            if value.shape is None:
                set_plain(state, value)
                continue
            axes = list(plain(value.shape))
            if self.units > 1:
                axes[-1] = labelled(self.units)
            if self.directions > 1:
                axes[1 if number == 0 else 0] = labelled(self.directions)
            state.set_structure(value, tuple(axes))

    def _array(self, index: int) -> np.ndarray:
        array = array_of(self.node.inputs[index])
        assert array is not None
        return array

    def _optional(self, index: int) -> np.ndarray | None:
        return array_of(self.node.inputs[index]) if index < len(self.node.inputs) else None

    def _outputs(self) -> list[ir.Value]:
        return [value for value in self.node.outputs if _used(value) and value.shape is not None]

    # constants

    def constants(self, state: State) -> None:
        """A unit whose candidate is zero, from a state that starts at zero, stays at zero."""
        if not self.active:
            return
        dead = self._zero_units()
        for value in self._outputs():
            shape = frame(state.structure(value) or ())
            known = dead.reshape(shape)
            state.set_constant(value, known, np.zeros(shape, self._array(WEIGHT).dtype))

    def _zero_units(self) -> np.ndarray:
        """Return which units are zero at every step, as (direction, unit)."""
        split = (self.directions, self.gates, self.units, -1)
        weight = (self._array(WEIGHT).reshape(split)[:, self.candidate] == 0).all(axis=-1)
        recurrent = (self._array(RECURRENT).reshape(split)[:, self.candidate] == 0).all(axis=-1)
        dead = weight & recurrent
        bias = self._optional(BIAS)
        if bias is not None:
            parts = bias.reshape(self.directions, 2, self.gates, self.units)[:, :, self.candidate]
            dead = dead & (parts == 0).all(axis=1)
        for index in (INITIAL_H, INITIAL_C):
            initial = self._optional(index)
            if initial is not None:
                dead = dead & (initial == 0).all(axis=1)
        return np.asarray(dead if self._silent is None else dead | self._silent)

    def _zero_outputs(self, state: State) -> np.ndarray:
        """Return which units are known to be zero at every step, as (direction, unit)."""
        zero = np.zeros((self.directions, self.units), bool)
        for value in self._outputs():
            constant = state.constant(value)
            if constant is not None:
                zero |= constant.zero.reshape(zero.shape)
        return zero

    # words: bits that say in which rounds a position went, see `lines`

    def words_out(self, codes: Mapping[ir.Value, np.ndarray]) -> np.ndarray:
        """Return the words of the units, as (direction, unit)."""
        words = np.full((self.directions, self.units), ~np.uint64(0))
        for value in self._outputs():
            words &= codes[value].reshape(words.shape) if value in codes else np.uint64(0)
        return words

    def words_in(self, codes: Mapping[ir.Value, np.ndarray]) -> np.ndarray | None:
        """Return the words of the inputs; None where none can go."""
        words = codes.get(self.data)
        return None if words is None or self._data_dim is None else words.reshape(-1)

    # masks

    def rewind(self, *, read: bool = True) -> None:
        """Let units read inputs and each other, or let them read nothing."""
        self._reading, self._silent = read, None

    def silence(self, state: State) -> bool:
        """Take for zeros the weights, biases and states of units that nothing reads; say whether there are any."""
        if (
            not self.active
            or self.units == 1
            or any(len(value.uses()) > 1 for value in self._held_by_units())
        ):
            return False
        dead = ~self._kept(state) & ~self._zero_units()
        if not dead.any():
            return False
        self._silent = dead
        return True

    def _held_by_units(self) -> Iterator[ir.Value]:
        """Yield the initializers that hold something of each unit."""
        for index in (WEIGHT, RECURRENT, BIAS, INITIAL_H, INITIAL_C, PEEPHOLE):
            value = self.node.inputs[index] if index < len(self.node.inputs) else None
            if value is not None:
                yield value

    def _kept(self, state: State) -> np.ndarray:
        kept = np.zeros((self.directions, self.units), bool)
        for value in self._outputs():
            kept |= state.mask(value).reshape(self.directions, self.units)
        return kept

    def _keep(self, state: State, kept: np.ndarray, cause: Cause) -> bool:
        grown = False
        for value in self._outputs():
            grown |= state.grow(value, kept.reshape(state.mask(value).shape), cause)
        return grown

    def spread(self, state: State) -> None:
        """A kept unit keeps, through its gates, the units and the inputs that it reads."""
        if not self.active:
            return
        kept = self._kept(state)
        live = ~self._zero_outputs(state)
        # what gates make of anything does not matter to a unit that stays at zero
        for _ in range(self.units):
            read = (self._reads_units & (kept & live)[:, :, None]).any(axis=1) & live & self._reading
            if not (read & ~kept).any():
                break
            kept = kept | read
        self._keep(state, kept, Cause("a hidden unit that stays reads it in", self.node))
        if self._data_dim is not None:
            wanted = (self._reads_data & (kept & live)[:, :, None]).any(axis=(0, 1)) & ~self._held(state)[0]
            wanted = wanted & self._reading
            shape = [1] * state.mask(self.data).ndim
            shape[self._data_dim] = -1
            cause = Cause("read with a weight that is not zero by", self.node, self.node.outputs[0])
            state.grow(self.data, wanted.reshape(shape), cause)

    def repair(self, state: State) -> bool:
        """Every direction keeps equally many units, at least one where any stays."""
        if not self.active:
            return False
        kept = self._kept(state)
        if not kept.any():
            return False
        kept[~kept.any(axis=1), 0] = True
        cause = Cause("directions keep equal counts at", self.node, spare=True)
        return self._keep(state, nested_fill(kept) if self.directions > 1 else kept, cause)

    def _held(self, state: State) -> tuple[np.ndarray, np.ndarray]:
        """Return which input channels are known constants, and their values."""
        size = self._array(WEIGHT).shape[2]
        constant = state.constant(self.data)
        if constant is None or self._data_dim is None:
            return np.zeros(size, bool), np.zeros(size)
        others = tuple(dim for dim in range(constant.known.ndim) if dim != self._data_dim)
        low, high = constant.value.min(axis=others), constant.value.max(axis=others)
        known = np.asarray(constant.known.all(axis=others) & (low == high))
        return known, np.where(known, low.astype(np.float64), 0.0)

    # layout

    def layout(self, state: State) -> None:
        """Units in their own order, direction by direction."""
        for value in self.node.outputs:
            if value not in self._outputs() or not self.active:
                state.layouts[value] = np.arange(state.mask(value).size).reshape(state.mask(value).shape)
                continue
            kept = state.mask(value).reshape(self.directions, self.units)
            counts = kept.sum(axis=1)
            if (counts != counts[0]).any():
                raise ConflictError([value])
            shape = list(state.mask(value).shape)
            shape[-1] = int(counts[0])
            state.layouts[value] = np.flatnonzero(kept).reshape(shape)

    def _columns(self, state: State) -> np.ndarray:
        if self._data_dim is None:
            return np.arange(self._array(WEIGHT).shape[2])
        coordinate = coordinates(state.layouts[self.data], state.mask(self.data).shape)[self._data_dim]
        others = tuple(dim for dim in range(coordinate.ndim) if dim != self._data_dim)
        low, high = coordinate.min(axis=others), coordinate.max(axis=others)
        if not np.array_equal(low, high):
            raise ConflictError([self.data])
        return np.asarray(low)

    def check(self, state: State) -> None:
        """Raise a conflict where input channels differ from step to step."""
        if self.active:
            self._columns(state)

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Cut weights, biases and states along units and inputs; fold removed constant inputs into the bias."""
        if not self.active:
            return
        kept = self._kept(state)
        columns = self._columns(state)
        silent = False if self._silent is None else (kept & self._silent).any()
        if kept.all() and len(columns) == self._array(WEIGHT).shape[2] and not silent:
            return
        units = [np.flatnonzero(row) for row in kept]
        known, value = self._held(state)
        gone = known.copy()
        gone[columns] = False
        weight = self._per_gate(self._silenced(WEIGHT), units)
        yield SetInput(WEIGHT, np.ascontiguousarray(weight[:, :, columns]))
        recurrent = self._per_gate(self._silenced(RECURRENT), units)
        yield SetInput(
            RECURRENT, np.stack([rows[:, mine] for rows, mine in zip(recurrent, units, strict=True)])
        )
        yield from self._bias_edits(units, weight, np.where(gone, value, 0.0))
        for index in (INITIAL_H, INITIAL_C, PEEPHOLE):
            if self._optional(index) is not None:
                yield SetInput(index, self._per_unit(index, units))
        yield SetAttribute("hidden_size", len(units[0]))

    def _silenced(self, index: int) -> np.ndarray:
        """Return an input with zeros for the units whose weights are taken for zeros."""
        array = self._array(index)
        if self._silent is None:
            return array
        after = () if index not in (WEIGHT, RECURRENT) else (array.shape[2],)
        split = array.reshape(self.directions, -1, self.units, *after).copy()
        np.moveaxis(split, 2, 1)[self._silent] = 0
        return split.reshape(array.shape)

    def _per_unit(self, index: int, units: list[np.ndarray]) -> np.ndarray:
        """Take the units of an input that has one entry for each, and so many rows of them, in each direction."""
        array = self._silenced(index)
        split = array.reshape(self.directions, -1, self.units)
        cut = np.stack([rows[:, mine] for rows, mine in zip(split, units, strict=True)])
        return cut.reshape(*array.shape[:-1], -1)

    def _per_gate(self, array: np.ndarray, units: list[np.ndarray]) -> np.ndarray:
        """Take the units of every gate, direction by direction, from (direction, gate * unit, n)."""
        split = array.reshape(self.directions, self.gates, self.units, -1)
        return np.stack(
            [rows[:, mine].reshape(-1, split.shape[-1]) for rows, mine in zip(split, units, strict=True)]
        )

    def _bias_edits(self, units: list[np.ndarray], weight: np.ndarray, value: np.ndarray) -> Iterator[Edit]:
        bias = self._optional(BIAS)
        share = np.einsum("dri,i->dr", weight.astype(np.float64), value)
        if bias is None and not share.any():
            return
        rows = self.gates * len(units[0])
        cut = np.zeros((self.directions, 2 * rows)) if bias is None else self._per_unit(BIAS, units)
        cut = cut.astype(np.float64)
        cut[:, :rows] += share
        yield SetInput(BIAS, cut.astype(self._array(WEIGHT).dtype))


def _used(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
