"""Attention as one operator: heads, and indices inside heads, of queries, keys, values and output.

`y[b, h, n, e] = sum_m softmax_m(scale * sum_d q[b, h, n, d] * k[b, g, m, d] + mask) * v[b, g, m, e]`, where the key
and value head `g` serves `h / g` query heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import Axis, axis_size, frame, is_parameter, labelled, plain, single_label
from etp_deploy.surgery.state import Cause, ConflictError, nested_fill
from etp_deploy.surgery.statements.base import (
    Edit,
    SetAttribute,
    SliceInput,
    Statement,
    default_layout,
    set_plain,
)
from etp_deploy.surgery.statements.heads import BIAS, KEY, OUT, QUERY, VALUE, Slots, open_heads

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State
    from etp_deploy.surgery.statements.heads import Heads, Tensor

_MATCHED = ((QUERY, KEY), (OUT, VALUE))


@dataclass(frozen=True)
class Form:
    """What distinguishes one attention operator from another.

    Attributes:
        out_axes: the output's axes of heads and of indices inside heads, or the one axis that holds both.
        scale: what the operator multiplies the scores by, where that follows from the size of a head.
        counts: the attributes that hold the number of query heads and of key and value heads.
        sums_to_one: whether every query's weights do, so that constant values come out as they are.
        shiftable: whether a number added to all scores of a query changes nothing, so that constant keys do not.
        one_size: whether query, key and value heads have to be of one size.
        whole: why indices inside heads have to stay; empty if they need not.
        cached: why keys and values have to stay; empty if they need not.
        per_head: inputs that may hold something of each query head, and the axis, counted from the end.
    """

    out_axes: tuple[int, ...]
    scale: float | None = None
    counts: tuple[str, ...] = ()
    sums_to_one: bool = True
    shiftable: bool = True
    one_size: bool = False
    whole: str = ""
    cached: str = ""
    per_head: tuple[tuple[int, int], ...] = ()


class Attention(Statement):
    """An attention whose queries, keys and values are computed.

    Args:
        node: the node.
        tensors: what holds them.
        heads: how many there are of what.
        form: the rest.
    """

    def __init__(self, node: ir.Node, tensors: tuple[Tensor, ...], heads: Heads, form: Form) -> None:
        super().__init__(node)
        self.tensors = tensors
        self.heads = heads
        self.form = form
        self.out = node.outputs[0]
        self.slots: dict[int, Slots] = {}
        self.cut: list[tuple[int, int]] = []
        self.all_heads = False

    @property
    def _values(self) -> list[ir.Value]:
        return list(dict.fromkeys([*(slots.value for slots in self.slots.values()), self.out]))

    # structure

    def structure(self, state: State) -> None:
        """The output's heads and sizes are labelled; what lies open in no tensor stays as a whole."""
        opened = [
            open_heads(state, self.node.inputs[tensor.index], tensor.axes, self.heads, tensor.roles)
            for tensor in self.tensors
        ]
        for output in self.node.outputs[1:]:
            set_plain(state, output)
        if self.out.shape is None or None in opened:
            for value in self.node.inputs:
                state.pin(value, None, "shapes are not known here", self.node)
            set_plain(state, self.out)
            return
        for slots in opened:
            self.slots |= dict.fromkeys(slots.roles, slots) if slots is not None else {}
        self._open_others(state)
        axes = list(plain(self.out.shape))
        groups, per_group, size = self.heads.shape(OUT)
        sizes = [groups * per_group, size] if len(self.form.out_axes) > 1 else [groups * per_group * size]
        for axis, extent in zip(self.form.out_axes, sizes, strict=True):
            axes[axis] = labelled(extent) if extent > 1 else plain((1,))[0]
        state.set_structure(self.out, tuple(axes))
        self.slots[OUT] = Slots(state, self.out, self.form.out_axes, self.heads, (OUT,))

    def _open_others(self, state: State) -> None:
        """Find what holds something of each query head: initializers to cut, and a tensor that loses the same heads."""
        own = {tensor.index for tensor in self.tensors}
        from_end = dict(self.form.per_head)
        for index, value in enumerate(self.node.inputs):
            if value is None or index in own:
                continue
            structure = state.structure(value)
            axis = len(structure or ()) - from_end.get(index, 0)
            if structure is not None and index in from_end and axis >= 0:
                self._open_bias(state, index, axis, structure[axis])
            if index in from_end and structure is None:
                self.all_heads = True
            if BIAS not in self.slots or self.slots[BIAS].value is not value:
                state.pin(value, None, "a mask, a cache or a table of an attention", self.node)

    def _open_bias(self, state: State, index: int, axis: int, factors: Axis) -> None:
        value, heads = self.node.inputs[index], self.heads.groups * self.heads.per_group
        assert value is not None
        if heads == 1 or axis_size(factors).static == 1:
            return
        if is_parameter(value):
            self.cut.append((index, axis))
            return
        slots = open_heads(state, value, (axis,), self.heads, (BIAS,)) if single_label(factors) else None
        if slots is None or BIAS in self.slots:
            self.all_heads = True
        else:
            self.slots[BIAS] = slots

    # masks and constants of each role, as (group, head of the group, index)

    def _mask(self, state: State, role: int) -> np.ndarray:
        slots = self.slots[role]
        return slots.read(state.mask(slots.value), role)

    def _grow(self, state: State, role: int, mask: np.ndarray, cause: Cause) -> bool:
        slots = self.slots[role]
        return state.grow(slots.value, slots.write(mask, role), cause)

    def _known(self, state: State, role: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where a role's entries are known constants, and their values."""
        slots = self.slots[role]
        constant = state.constant(slots.value)
        if constant is None:
            shape = slots.places[role].shape
            return np.zeros(shape, bool), np.zeros(shape)
        known = slots.read(constant.known, role, np.logical_and)
        low, high = (slots.read(constant.value, role, reduce) for reduce in (np.minimum, np.maximum))
        return np.asarray(known & (low == high)), low

    def _silent(self, state: State) -> np.ndarray:
        """Where a query's product with a key changes no weight: one is zero, or the key the same everywhere."""
        known, query = self._known(state, QUERY)
        silent = np.asarray(known & (query == 0))
        if self.form.cached:
            return silent
        known, key = self._known(state, KEY)
        return np.asarray(silent | (known if self.form.shiftable else known & (key == 0)))

    # constants

    def constants(self, state: State) -> None:
        """Weights sum to one, so that constant values come out as they are; zero values in any case."""
        if OUT not in self.slots or self.form.cached:
            return
        known, value = self._known(state, VALUE)
        if not self.form.sums_to_one:
            known = known & (value == 0)
        own, shape = frame(state.structure(self.out) or ()), self.heads.shape(OUT)
        known, value = np.broadcast_to(known, shape), np.broadcast_to(value, shape)
        state.set_constant(self.out, known.reshape(own), value.reshape(own))

    # masks

    def _rows(self, state: State) -> np.ndarray:
        """Return the query heads that stay, as (group, head of the group, 1)."""
        rows = self._mask(state, OUT).any(axis=2, keepdims=True) | self._mask(state, QUERY).any(
            axis=2, keepdims=True
        )
        if BIAS in self.slots:
            rows = rows | self._mask(state, BIAS)
        return np.asarray(rows | self.all_heads)

    def spread(self, state: State) -> None:
        """A head that stays somewhere stays everywhere; sizes stay in pairs: query and key, value and output."""
        if OUT not in self.slots:
            return
        read = Cause("multiplied into what stays by", self.node, self.out)
        same = Cause("the same head or index as", self.node, self.out)
        if self.form.cached:
            for role in (KEY, VALUE):
                self._grow(state, role, np.ones((1, 1, 1), bool), Cause(self.form.cached, self.node))
        rows = self._rows(state)
        self._grow(state, QUERY, rows & ~self._silent(state), read)
        if BIAS in self.slots:
            self._grow(state, BIAS, rows, same)
        for one, other in _MATCHED:
            if self.form.whole:
                cause = Cause(self.form.whole, self.node)
                for role in (one, other):
                    self._grow(
                        state, role, np.asarray(self._mask(state, role).any(axis=2, keepdims=True)), cause
                    )
            self._grow(state, other, np.asarray(self._mask(state, one).any(axis=1, keepdims=True)), same)
            self._grow(state, one, rows & self._mask(state, other), same)

    def repair(self, state: State) -> bool:
        """Groups keep equally many query heads, and heads equally many indices, at least one."""
        if OUT not in self.slots:
            return False
        rows = self._rows(state)[:, :, 0]
        joint = {pair: self._joint(state, pair) for pair in _MATCHED}
        kept = np.asarray(rows.any(axis=1) | np.any([mask.any(axis=1) for mask in joint.values()], axis=0))
        rows[kept & ~rows.any(axis=1), 0] = True
        rows = nested_fill(rows)
        counts = {pair: int(max(mask.sum(axis=1).max(initial=0), kept.any())) for pair, mask in joint.items()}
        if self.form.one_size:
            counts = dict.fromkeys(counts, max(counts.values()))
        cause = Cause("heads of one attention keep together at", self.node, self.out, spare=True)
        grown = False
        for pair, mask in joint.items():
            filled = _filled(mask, counts[pair], kept)[:, None]
            for role in pair:
                own = kept[:, None, None] if role in {KEY, VALUE} else rows[:, :, None]
                grown |= self._grow(state, role, own & filled, cause)
        if BIAS in self.slots:
            grown |= self._grow(state, BIAS, rows[:, :, None], cause)
        return grown

    def _joint(self, state: State, pair: tuple[int, int]) -> np.ndarray:
        """Return which indices a group keeps, in its query heads or its key, as (group, index)."""
        return np.asarray(self._mask(state, pair[0]).any(axis=1) | self._mask(state, pair[1]).any(axis=1))

    # layout

    def layout(self, state: State) -> None:
        """Query heads stand group by group, in the order of the keys' and values' groups."""
        for value in self.node.outputs:
            default_layout(state, value)
        if OUT not in self.slots:
            return
        orders = self._orders(state)
        queries, columns = self._split(orders[QUERY], QUERY)
        groups, key_columns = self._split(orders[KEY], KEY)
        value_groups, value_columns = self._split(orders[VALUE], VALUE)
        kept = len(queries) // max(len(groups), 1)
        aligned = (
            np.array_equal(groups, value_groups)
            and np.array_equal(queries // self.heads.per_group, np.repeat(groups, kept))
            and np.array_equal(columns, np.repeat(key_columns, kept, axis=0))
            and (BIAS not in orders or np.array_equal(orders[BIAS][:, 0], queries))
            and (not self.all_heads or np.array_equal(queries, np.arange(len(queries))))
        )
        if not aligned:
            raise ConflictError(self._values)
        flat = queries[:, None] * self.heads.value_size + np.repeat(value_columns, kept, axis=0)
        if not np.array_equal(np.sort(flat, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError(self._values)
        state.layouts[self.out] = flat.reshape(self._reduced_frame(state, flat))

    def _orders(self, state: State) -> dict[int, np.ndarray]:
        orders: dict[int, np.ndarray] = {}
        try:
            for slots in {id(slots): slots for role, slots in self.slots.items() if role != OUT}.values():
                orders |= slots.orders(state)
        except ConflictError as conflict:
            raise ConflictError(self._values) from conflict
        return orders

    def _split(self, entries: np.ndarray, role: int) -> tuple[np.ndarray, np.ndarray]:
        size = self.heads.shape(role)[2]
        return entries[:, 0] // size, entries % size

    def _reduced_frame(self, state: State, flat: np.ndarray) -> list[int]:
        """Return the output's frame with what stays in place of all."""
        own = frame(state.structure(self.out) or ())
        shape = self.heads.shape(OUT)
        if len(self.form.out_axes) == 1:
            kept = [flat.size]
        else:
            full = (shape[0] * shape[1], shape[2])
            kept = [count for count, size in zip(flat.shape, full, strict=True) if size > 1]
        return [kept.pop(0) if extent > 1 else 1 for extent in own]

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Head counts follow the heads; the default scale follows the size of a head: keep the one that was meant."""
        if OUT not in self.slots:
            return
        orders = self._orders(state)
        queries, _ = self._split(orders[QUERY], QUERY)
        full = (self.heads.groups * self.heads.per_group, self.heads.groups)
        for name, role, count in zip(self.form.counts, (QUERY, KEY), full, strict=False):
            if len(orders[role]) != count:
                yield SetAttribute(name, len(orders[role]))
        if self.form.scale is not None and orders[QUERY].shape[1] != self.heads.size:
            yield SetAttribute("scale", self.form.scale)
        if len(queries) != full[0] or (queries != np.arange(full[0])).any():
            for index, axis in self.cut:
                yield SliceInput(index, ((axis, queries),))


def _filled(mask: np.ndarray, count: int, kept: np.ndarray) -> np.ndarray:
    """Return a mask of (group, index) in which groups that stay have a number of indices, others none.

    Indices that other groups keep are taken first: a tensor that can only be cut alike for all heads has them anyway.
    """
    common = np.asarray(mask.any(axis=0))
    filled = mask.copy()
    for row in np.flatnonzero(kept):
        spare = np.flatnonzero(~mask[row])
        spare = spare[np.argsort(~common[spare], kind="stable")]
        filled[row, spare[: max(count - int(mask[row].sum()), 0)]] = True
    return np.asarray(filled & kept[:, None])
