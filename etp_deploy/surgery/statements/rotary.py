"""Rotary position embeddings: `y[h, i] = x[h, i] * cos[i] - x[h, j] * sin[i]` for the pairs (i, j) of a head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import plain
from etp_deploy.surgery.state import Cause, ConflictError
from etp_deploy.surgery.statements.base import Edit, SetAttribute, Statement, default_layout, set_plain
from etp_deploy.surgery.statements.heads import QUERY, Heads, Slots, open_heads

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Rotary(Statement):
    """Whole heads pass; all heads share the tables of angles, so that a head keeps all of its indices.

    Args:
        node: the node.
        axes: the axes of heads and of indices inside heads, or the one axis that holds both.
        heads: how many heads there are.
        partner: for each index of a head the one that it is rotated with, itself where it is not rotated.
    """

    def __init__(self, node: ir.Node, axes: tuple[int, ...], heads: int, partner: np.ndarray) -> None:
        super().__init__(node)
        value = node.inputs[0]
        assert value is not None
        self.data = value
        self.out = node.outputs[0]
        self.axes = axes
        self.heads = Heads(heads, 1, len(partner), len(partner))
        self.partner = partner
        self.slots: tuple[Slots, ...] = ()

    def structure(self, state: State) -> None:
        """The output's heads are the input's."""
        for value in self.node.inputs[1:]:
            state.pin(value, None, "a table of a rotary embedding", self.node)
        opened = open_heads(state, self.data, self.axes, self.heads, (QUERY,))
        if opened is None or self.out.shape is None:
            state.pin(self.data, None, "shapes are not known here", self.node)
            set_plain(state, self.out)
            return
        axes = list(plain(self.out.shape))
        for axis in self.axes:
            axes[axis] = (state.structure(self.data) or ())[axis]
        state.set_structure(self.out, tuple(axes))
        self.slots = (opened, Slots(state, self.out, self.axes, self.heads, (QUERY,)))

    def constants(self, state: State) -> None:
        """A pair of zeros stays one, and what is not rotated stays what it is."""
        constant = state.constant(self.data)
        if not self.slots or constant is None:
            return
        data, out = self.slots
        known = data.read(constant.known, QUERY, np.logical_and)
        low, high = (data.read(constant.value, QUERY, reduce) for reduce in (np.minimum, np.maximum))
        known, still = known & (low == high), self.partner == np.arange(len(self.partner))
        zero = known & (low == 0)
        known = (zero & zero[..., self.partner]) | (known & still)
        if all(out.frame[dim] == size for dim, size in zip(out.dims, out.sizes, strict=True)):
            state.set_constant(self.out, known.reshape(out.frame), low.reshape(out.frame))

    def spread(self, state: State) -> None:
        """A head stays on both sides, and as a whole."""
        for source in self.slots:
            heads = np.asarray(source.read(state.mask(source.value), QUERY).any(axis=2, keepdims=True))
            for target in self.slots:
                cause = Cause("the same head as", self.node, source.value)
                state.grow(target.value, target.write(heads, QUERY), cause)

    def layout(self, state: State) -> None:
        """Heads stand as in the input, indices inside heads in their own order."""
        default_layout(state, self.out)
        if not self.slots:
            return
        data, out = self.slots
        entries = data.orders(state)[QUERY]
        if (entries % len(self.partner) != np.arange(len(self.partner))).any():
            raise ConflictError([self.data, self.out])
        state.layouts[self.out] = out.laid(data.grid(state))

    def edits(self, state: State) -> Iterator[Edit]:
        """The number of heads follows, where the node has it."""
        given = self.node.attributes.get("num_heads")
        if not self.slots or given is None or not given.value:
            return
        kept = len(self.slots[0].orders(state)[QUERY])
        if kept != self.heads.groups:
            yield SetAttribute("num_heads", kept)
