"""Nodes of which nothing is assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.statements.base import Statement, set_plain

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.state import State


class Opaque(Statement):
    """All that the node reads stays (or the axes named), and all that it writes stays."""

    def __init__(self, node: ir.Node, reason: str, axes: tuple[int, ...] | None = None) -> None:
        super().__init__(node)
        self.reason = reason
        self.axes = axes

    def structure(self, state: State) -> None:
        """Pin every input; nothing of the outputs can be removed."""
        for value in self.node.inputs:
            for axis in (None,) if self.axes is None else self.axes:
                state.pin(value, axis, self.reason, self.node)
        for value in self.node.outputs:
            set_plain(state, value)
