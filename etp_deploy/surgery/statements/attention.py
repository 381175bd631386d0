"""Attention as one operator: heads, and dimensions inside heads, of queries, keys, values and output.

`y[b, h, n, e] = sum_m softmax_m(scale * sum_d q[b, h, n, d] * k[b, g, m, d] + mask) * v[b, g, m, e]`, where the key
and value head `g` serves `h / g` query heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import axis_size, frame, has_labels, single_label
from etp_deploy.surgery.state import Cause, ConflictError, nested_fill
from etp_deploy.surgery.statements.base import Edit, SetAttribute, Statement, set_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State

HEADS, SIZE = 1, 3


class Attention(Statement):
    """The operator on tensors of (batch, heads, sequence, size).

    Args:
        node: the node; its inputs 0, 1 and 2 are queries, keys and values.
        scale: what the operator multiplies the scores by.
        may_mask_all: whether a mask may hide every key from a query, so that constant values need not come out.
    """

    def __init__(self, node: ir.Node, *, scale: float, may_mask_all: bool) -> None:
        super().__init__(node)
        self.tensors: list[ir.Value] = [value for value in node.inputs[:3] if value is not None]
        assert len(self.tensors) == 3
        self.out = node.outputs[0]
        self.scale = scale
        self.may_mask_all = may_mask_all
        self.active = False

    # structure

    def structure(self, state: State) -> None:
        """Heads and sizes are labelled where all of the tensors' are."""
        structures = [state.structure(value) for value in self.tensors]
        if self.out.shape is None or any(item is None or len(item) != 4 for item in structures):
            self._give_up(state, "shapes are not known here")
            return
        for axis in (0, 2):
            for value in self.tensors:
                state.pin(value, axis, "attention runs over this axis", self.node)
        for other in self.node.inputs[3:]:
            state.pin(other, None, "the mask of an attention", self.node)
        ok = all(
            single_label(item[axis]) or axis_size(item[axis]).static == 1
            for item in structures
            for axis in (HEADS, SIZE)
            if item is not None
        ) and not any(has_labels(item[axis]) for item in structures for axis in (0, 2) if item is not None)
        if not ok:
            self._give_up(state, "heads of queries, keys and values do not all lie open here")
            return
        query, key, values = (item for item in structures if item is not None)
        self.heads, self.groups = (axis_size(item[HEADS]).coefficient for item in (query, key))
        self.size, self.value_size = (axis_size(item[SIZE]).coefficient for item in (query, values))
        self.active = True
        state.set_structure(self.out, (query[0], query[HEADS], query[2], values[SIZE]))
        for output in self.node.outputs[1:]:
            set_plain(state, output)

    def _give_up(self, state: State, reason: str) -> None:
        for value in self.tensors:
            state.pin(value, None, reason, self.node)
        for value in self.node.outputs:
            set_plain(state, value)

    # masks of each tensor as (group, query head of the group or 1, size)

    def _view(self, array: np.ndarray, which: int) -> np.ndarray:
        heads = self.heads if which in {0, 3} else self.groups
        size = self.size if which in {0, 1} else self.value_size
        return array.reshape(self.groups, heads // self.groups, size)

    def _masks(self, state: State) -> list[np.ndarray]:
        return [self._view(state.mask(value), which) for which, value in enumerate((*self.tensors, self.out))]

    def _grow(self, state: State, which: int, mask: np.ndarray, cause: Cause) -> bool:
        value = (*self.tensors, self.out)[which]
        own = state.mask(value)
        wanted = np.broadcast_to(mask, self._view(own, which).shape)
        return state.grow(value, wanted.reshape(own.shape), cause)

    def _zero(self, state: State, which: int) -> np.ndarray:
        constant = state.constant(self.tensors[which])
        if constant is None:
            return np.zeros((1, 1, 1), bool)
        return self._view(constant.zero, which)

    # constants

    def constants(self, state: State) -> None:
        """Weights sum to one, so that constant values come out as they are; zero values in any case."""
        constant = state.constant(self.tensors[2]) if self.active else None
        if constant is None:
            return
        usable = constant.zero if self.may_mask_all else constant.known
        shape = (self.groups, self.heads // self.groups, self.value_size)
        known = np.broadcast_to(self._view(np.asarray(usable), 2), shape)
        value = np.broadcast_to(self._view(constant.value, 2), shape)
        own = frame(state.structure(self.out) or ())
        state.set_constant(self.out, known.reshape(own), value.reshape(own))

    # masks

    def spread(self, state: State) -> None:
        """A head that stays somewhere stays everywhere; sizes stay in pairs: query and key, value and output."""
        if not self.active:
            return
        query, key, value, out = self._masks(state)
        rows = out.any(axis=2, keepdims=True) | query.any(axis=2, keepdims=True)
        read = Cause("multiplied into what stays by", self.node, self.out)
        same = Cause("the same head or index as", self.node, self.out)
        self._grow(state, 0, rows & ~self._zero(state, 0) & ~self._zero(state, 1), read)
        query = self._masks(state)[0]
        self._grow(state, 1, np.asarray(query.any(axis=1, keepdims=True)), same)
        self._grow(state, 0, rows & key, same)
        self._grow(state, 2, np.asarray(out.any(axis=1, keepdims=True)), same)
        self._grow(state, 3, rows & value, same)

    def repair(self, state: State) -> bool:
        """A head that stays has at least one index in every tensor; groups keep equally many query heads."""
        if not self.active:
            return False
        masks = self._masks(state)
        rows = np.asarray(masks[0].any(axis=2) | masks[3].any(axis=2))
        kept = np.asarray(rows.any(axis=1) | masks[1].any(axis=(1, 2)) | masks[2].any(axis=(1, 2)))
        rows[kept & ~rows.any(axis=1), 0] = True
        rows = nested_fill(rows)
        cause = Cause("heads of one attention keep together at", self.node, self.out, spare=True)
        grown = False
        for which, mask in enumerate(masks):
            own = rows[:, :, None] if which in {0, 3} else kept[:, None, None]
            columns = np.asarray(mask.any(axis=(0, 1), keepdims=True))
            if not columns.any():
                columns = np.zeros_like(columns)
                columns[..., 0] = True
            missing = own & ~mask.any(axis=2, keepdims=True)
            grown |= self._grow(state, which, missing & columns, cause)
        return grown

    # layout

    def layout(self, state: State) -> None:
        """Query heads stand group by group, in the order of the keys' and values' groups."""
        if not self.active:
            super().layout(state)
            return
        heads = [self._heads(state, which) for which in range(3)]
        ratio = self.heads // self.groups
        kept = len(heads[0]) // max(len(heads[1]), 1)
        aligned = np.array_equal(heads[1], heads[2]) and np.array_equal(
            heads[0] // ratio, np.repeat(heads[1], kept)
        )
        sizes = [self._sizes(state, which) for which in range(3)]
        if not aligned or not np.array_equal(sizes[0], np.repeat(sizes[1], kept, axis=0)):
            raise ConflictError([*self.tensors, self.out])
        columns = np.repeat(sizes[2], kept, axis=0)
        flat = heads[0][:, None] * self.value_size + columns
        layout = flat.reshape(self._reduced_frame(state, flat))
        if not np.array_equal(np.sort(layout, axis=None), np.flatnonzero(state.mask(self.out))):
            raise ConflictError([*self.tensors, self.out])
        state.layouts[self.out] = layout

    def _reduced_frame(self, state: State, flat: np.ndarray) -> list[int]:
        """Return the output's frame with the kept heads and sizes in place of all."""
        own = frame(state.structure(self.out) or ())
        kept = [
            count for count, full in zip(flat.shape, (self.heads, self.value_size), strict=True) if full > 1
        ]
        return [kept.pop(0) if extent > 1 else 1 for extent in own]

    def _flat(self, state: State, which: int) -> np.ndarray:
        """Return a tensor's layout as (heads, size) of flat positions."""
        layout = state.layouts[self.tensors[which]]
        own = state.mask(self.tensors[which]).shape
        heads = self.heads if which == 0 else self.groups
        count = int(layout.size)
        rows = layout.shape[_head_dim(own, heads)] if heads > 1 else 1
        return layout.reshape(rows, count // max(rows, 1))

    def _heads(self, state: State, which: int) -> np.ndarray:
        size = self.size if which < 2 else self.value_size
        rows = self._flat(state, which) // size
        if (rows != rows[:, :1]).any():
            raise ConflictError([self.tensors[which], self.out])
        return np.asarray(rows[:, 0])

    def _sizes(self, state: State, which: int) -> np.ndarray:
        size = self.size if which < 2 else self.value_size
        return np.asarray(self._flat(state, which) % size)

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """The default scale follows the size of a head: keep the one that was meant."""
        if self.active and self._flat(state, 0).shape[1] != self.size:
            yield SetAttribute("scale", self.scale)


def _head_dim(shape: tuple[int, ...], heads: int) -> int:
    """Return the frame dimension of the heads: the first that has as many positions."""
    return next(dim for dim, extent in enumerate(shape) if extent == heads)
