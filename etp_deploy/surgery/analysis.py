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
from etp_deploy.surgery.rules import statement, unknown
from etp_deploy.surgery.silence import silence
from etp_deploy.surgery.state import Cause, ConflictError, State, coordinates
from etp_deploy.surgery.statements.base import default_layout
from etp_deploy.surgery.statements.body import bodies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

    Fill = Callable[["Analysis"], bool]

# in how many rounds, at least, tensors that lost everything are given something back
ROUNDS = 100
# how often, in all, bodies are read again because an assumption about a state does not hold; nested loops
# could multiply without a bound
REPEATS = 1000


@dataclass(frozen=True)
class Analysis:
    """A prepared graph with all that is known of it.

    Attributes:
        graph: the main graph.
        statements: of the nodes of all graphs, in the order in which data flows: bodies before the nodes that
            hold them.
        boundaries: for each input and output of a body, the statements of the nodes that hold it.
        state: what is known of each tensor.
    """

    graph: ir.Graph
    statements: dict[ir.Node, Statement]
    boundaries: dict[ir.Value, list[ir.Node]]
    state: State

    def related(self, value: ir.Value) -> Iterator[Statement]:
        """Yield what is said of a tensor: by the node that makes it, by those that read it, at a boundary."""
        producer = value.producer()
        nodes = [] if producer is None else [producer]
        for node in (*nodes, *(user for user, _ in value.uses()), *self.boundaries.get(value, ())):
            if node in self.statements:
                yield self.statements[node]

    def spread(self) -> None:
        """Carry kept positions across nodes until nothing grows by that."""
        while self.state.touched:
            for says in self.related(self.state.touched.popleft()):
                says.spread(self.state)


def read(graph: ir.Graph) -> Analysis:
    """Walk a prepared graph forward, its bodies included: statements, structures, constants, pins."""
    analysis = Analysis(graph, {}, {}, State())
    _Reader(analysis).walk(graph)
    for value in graph.outputs:
        analysis.state.pin(value, None, "an output of the model")
    return analysis


class _Reader:
    """Walks through graphs; a body is walked again where what was assumed of its inputs does not hold."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.state = analysis.state
        self.again = REPEATS

    def walk(self, graph: ir.Graph, foreign: str = "") -> None:
        """Read all nodes of a graph.

        Args:
            graph: the graph.
            foreign: why nothing is assumed of its nodes.
        """
        for node in graph:
            says = unknown(node, foreign) if foreign else statement(node)
            if bodies(node):
                self._enter(node, says, foreign)
            self.analysis.statements[node] = says
            says.structure(self.state)
            says.constants(self.state)

    def _enter(self, node: ir.Node, says: Statement, foreign: str) -> None:
        graphs = bodies(node)
        for value in {value for graph in graphs for value in (*graph.inputs, *graph.outputs)}:
            self.analysis.boundaries.setdefault(value, []).append(node)
        if node.domain not in {"", "ai.onnx"}:
            foreign = foreign or f"in a body that is run by {node.domain}.{node.op_type}"
        while True:
            says.enter(self.state)
            for graph in graphs:
                self.walk(graph, foreign)
            if says.holds(self.state):
                return
            self.again -= 1
            if self.again < 0:
                foreign = foreign or "in bodies that would have to be read too often"
            for graph in graphs:
                self._forget(graph)

    def _forget(self, graph: ir.Graph) -> None:
        nodes = set(graph.all_nodes())
        self.state.forget(nodes)
        for at in self.analysis.boundaries.values():
            at[:] = [node for node in at if node not in nodes]


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
        if silence(analysis):
            continue
        repaired = [says.repair(state) for says in analysis.statements.values()]
        if any(repaired):
            state.given_back = True
            continue
        # a carrier is a channel too: only what has none then is given one back
        if keep_carriers(analysis) or _keep_one(analysis) or (fill is not None and fill(analysis)):
            continue
        if _lay_out(analysis):
            return
        state.given_back = True


def settle(analysis: Analysis) -> None:
    """Spread kept positions until nothing grows."""
    state = analysis.state
    while True:
        analysis.spread()
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
    state.given_back |= bool(empty)
    left = -(-len(empty) // ROUNDS)
    for value in reversed(empty):
        mask = state.keep[value]
        if mask.any() or not left:
            continue
        constant = state.constant(value)
        # a known constant reads nothing, and the largest may serve as a carrier
        worth = (
            np.zeros(mask.shape)
            if constant is None
            else np.where(constant.known, 1.0 + np.abs(constant.value), 0.0)
        )
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
    try:
        _lay_out_nodes(analysis, analysis.graph)
    except _NotLinedUpError as refused:
        state.tighten(refused.conflict.values, refused.node)
        if not state.touched:
            raise PlanError(
                "the channels that stay cannot be lined up",
                where=f"{refused.node.op_type} {refused.node.name or ''}",
                hint="please report the model",
            ) from refused.conflict
        return False
    return True


class _NotLinedUpError(Exception):
    def __init__(self, node: ir.Node, conflict: ConflictError) -> None:
        super().__init__()
        self.node = node
        self.conflict = conflict


def _lay_out_nodes(analysis: Analysis, graph: ir.Graph) -> None:
    state = analysis.state
    for node in graph:
        says = analysis.statements[node]
        try:
            says.enter_layout(state)
            for body in bodies(node):
                _lay_out_nodes(analysis, body)
            says.layout(state)
            _check_order(state, node)
            says.check(state)
        except ConflictError as conflict:
            raise _NotLinedUpError(node, conflict) from conflict


def _check_order(state: State, node: ir.Node) -> None:
    """Raise a conflict where an axis of which all stays would change its order: nobody expects that.

    Raises:
        ConflictError: with the node's tensors.
    """
    for value in node.outputs:
        layout, shape = state.layouts[value], state.mask(value).shape
        for dim, coordinate in enumerate(coordinates(layout, shape)):
            if layout.shape[dim] < shape[dim] or shape[dim] <= 1:
                continue
            if not (np.moveaxis(coordinate, dim, -1) == np.arange(shape[dim])).all():
                raise ConflictError([value for value in (*node.inputs, *node.outputs) if value is not None])
