"""The fixpoint: from what each node says to what must stay.

Forward once for structures and constants; then keep masks grow from the graph's outputs backwards (and sideways,
where tensors must line up) until nothing changes, the kept positions are valid tensors, and every tensor's
channels stand in one order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.errors import PlanError
from etp_deploy.surgery.carriers import keep_carriers
from etp_deploy.surgery.rules import statement
from etp_deploy.surgery.state import Cause, ConflictError, State
from etp_deploy.surgery.statements.base import default_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

    Fill = Callable[["Analysis"], bool]

# in how many rounds, at least, tensors that lost everything are given something back
ROUNDS = 100


@dataclass(frozen=True)
class Analysis:
    """A prepared graph with all that is known of it."""

    graph: ir.Graph
    statements: dict[ir.Node, Statement]
    state: State


def read(graph: ir.Graph) -> Analysis:
    """Walk a prepared graph forward: statements, structures, constants, pins."""
    state = State()
    statements: dict[ir.Node, Statement] = {}
    for node in graph:
        says = statements[node] = statement(node)
        says.structure(state)
        says.constants(state)
        for captured in _captured(node):
            state.pin(captured, None, f"the body of {node.op_type} reads it", node)
    for value in graph.outputs:
        state.pin(value, None, "an output of the model")
    return Analysis(graph, statements, state)


def _captured(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the outer tensors that a node's bodies read."""
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type.name == "GRAPH" else []
        for graph in graphs if attribute.type.name != "GRAPHS" else attribute.value:
            inner = set(graph.inputs)
            for item in graph.all_nodes():
                inner.update(item.outputs)
                yield from (value for value in item.inputs if value is not None and value not in inner)
            yield from (value for value in graph.outputs if value not in inner)


def solve(analysis: Analysis, fill: Fill | None = None) -> None:
    """Grow the keep masks to the fixpoint and lay out what stays.

    Args:
        analysis: from `read`; its state is filled.
        fill: keeps more dead channels where the target wants it so (alignment); returns whether it did.

    Raises:
        PlanError: where channels that stay cannot be lined up; a defect of a rule.
    """
    state = analysis.state
    state.touched.extend(reversed(state.keep))  # liveness runs backwards
    state.apply_pins()
    while True:
        settle(analysis)
        repaired = [says.repair(state) for says in analysis.statements.values()]
        if any(repaired):
            continue
        # a carrier is a channel too: only what has none then is given one back
        if keep_carriers(analysis) or _keep_one(analysis) or (fill is not None and fill(analysis)):
            continue
        if _lay_out(analysis):
            return


def settle(analysis: Analysis) -> None:
    """Spread kept positions until nothing grows."""
    state = analysis.state
    while True:
        while state.touched:
            value = state.touched.popleft()
            producer = value.producer()
            if producer in analysis.statements:
                analysis.statements[producer].spread(state)
            for user, _ in value.uses():
                if user in analysis.statements:
                    analysis.statements[user].spread(state)
        state.apply_pins()
        if not state.touched:
            return


def _keep_one(analysis: Analysis) -> bool:
    """Give one position back to tensors that lost all; say whether any had.

    One tensor at a time, so that what it is linked with follows (a query keeps the key's index), and the last first:
    what it reads is then given nothing else. Where very many are empty, a share of them at a time.
    """
    state = analysis.state
    empty = [value for value, mask in state.keep.items() if mask.size and not mask.any()]
    left = -(-len(empty) // ROUNDS)
    for value in reversed(empty):
        mask = state.keep[value]
        if mask.any() or not left:
            continue
        constant = state.constant(value)
        # a known constant reads nothing, and the largest may serve as a carrier
        worth = np.zeros(mask.shape) if constant is None else constant.known * (1.0 + np.abs(constant.value))
        one = np.zeros(mask.size, bool)
        one[np.argmax(worth)] = True
        state.grow(value, one.reshape(mask.shape), Cause("a tensor keeps at least one channel", spare=True))
        settle(analysis)
        left -= 1
    return bool(empty)


def _lay_out(analysis: Analysis) -> bool:
    """Lay out all tensors; on a conflict keep more, and say that another round is needed."""
    state = analysis.state
    state.layouts.clear()
    for value in analysis.graph.inputs:
        default_layout(state, value)
    for node, says in analysis.statements.items():
        try:
            says.layout(state)
            says.check(state)
        except ConflictError as conflict:
            state.tighten(conflict.values, node)
            if not state.touched:
                raise PlanError(
                    "the channels that stay cannot be lined up",
                    where=f"{node.op_type} {node.name or ''}",
                    hint="please report the model",
                ) from conflict
            return False
    return True
