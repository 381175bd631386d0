"""Tensors filled with one value: as many channels as whoever uses them has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import labelled, plain
from etp_deploy.surgery.statements.base import (
    Edit,
    SetShape,
    Statement,
    floating,
    new_sizes,
    set_plain,
    writable,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Fill(Statement):
    """Every entry is the same: ConstantOfShape, or Expand of a single entry.

    Args:
        node: the node.
        target: the input that holds the shape.
        value: the entry.
    """

    def __init__(self, node: ir.Node, target: int, value: np.ndarray) -> None:
        super().__init__(node)
        self.out = node.outputs[0]
        self.target = target
        self.value = value

    def structure(self, state: State) -> None:
        """Every axis of a known size is labelled, where the shape is one that can be rewritten."""
        shape = self.out.shape
        if shape is None or not writable(self.node.inputs[self.target]) or not floating(self.value.dtype):
            set_plain(state, self.out)
            return
        base = plain(shape)
        state.set_structure(
            self.out,
            tuple(
                labelled(dim) if isinstance(dim, int) and dim > 1 else axis
                for dim, axis in zip(shape, base, strict=True)
            ),
        )
        state.product.add(self.out)

    def constants(self, state: State) -> None:
        """All of it is known."""
        structure = state.structure(self.out)
        if structure is not None:
            state.set_constant(self.out, np.ones((), bool), self.value.reshape(()))

    def layout(self, state: State) -> None:
        """Kept indices in order, axis by axis."""
        mask = state.mask(self.out)
        counts = [
            int(mask.any(axis=tuple(o for o in range(mask.ndim) if o != dim)).sum())
            for dim in range(mask.ndim)
        ]
        state.layouts[self.out] = np.flatnonzero(mask).reshape(counts)

    def edits(self, state: State) -> Iterator[Edit]:
        """Write the new sizes into the shape."""
        structure = state.structure(self.out)
        if structure is not None and not state.mask(self.out).all():
            yield SetShape(self.target, new_sizes(structure, state.layouts[self.out].shape))
