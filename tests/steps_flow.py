"""Steps with bodies: If, Loop and Scan around layers whose channels are partly dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import helper, numpy_helper

if TYPE_CHECKING:
    from graphs import Builder

FLOAT, INT, BOOL = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL
FUNCTIONS = ("Relu", "Tanh", "Sigmoid", "Identity", "Neg")


class _Body:
    """A body that grows; weights are its own initializers, Constant nodes, or the main graph's."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []

    def hold(self, outer: str) -> str:
        """Hold what an initializer of the main graph holds, in one of the ways in which exporters do."""
        kind = self.b.choose.one_of(("own", "constant", "outer"))
        if kind == "outer":
            return outer
        name = self.b.name("v")
        tensor = numpy_helper.from_array(self.b.initializers[outer], name)
        if kind == "own":
            self.held.append(tensor)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def vector(self, size: int) -> str:
        """Hold a vector."""
        return self.hold(self.b.initializer(self.b.vector(size), "p"))

    def emit(self, operator: str, inputs: list[str], count: int = 1, **attributes: object) -> str:
        """Add a node and return its first output."""
        names = [self.b.name("u") for _ in range(count)]
        self.nodes.append(helper.make_node(operator, inputs, names, **attributes))
        return names[0]

    def dense(self, x: str, inside: int, out: int) -> str:
        """A linear map with dead rows and columns, a bias, a function: each of them now and then."""
        y = self.emit("MatMul", [x, self.hold(self.b.weight((inside, out), inside, out=1, column=0))])
        if self.b.choose.chance(0.5):
            y = self.emit("Add", [y, self.vector(out)])
        return self.emit(self.b.choose.one_of(FUNCTIONS), [y]) if self.b.choose.chance(0.6) else y

    def graph(
        self, name: str, outputs: list[str], inputs: list[tuple[str, int]] | None = None
    ) -> onnx.GraphProto:
        """Return the body."""
        return helper.make_graph(
            self.nodes,
            name,
            [
                helper.make_tensor_value_info(key, kind, [] if kind != FLOAT else None)
                for key, kind in inputs or []
            ],
            [helper.make_tensor_value_info(key, FLOAT, None) for key in outputs],
            self.held,
        )


def branching(b: Builder) -> bool:
    """An If whose branches are layers, another If, or constants."""
    x = b.pick(2, 3)
    if x is None:
        return False
    return b.add(b.emit("If", [_flag(b)], **_branches(b, x, b.choose.one_of((4, 6, 8)), 1)))


def _flag(b: Builder) -> str:
    return b.initializer(np.array(b.choose.chance(0.5)), "c")


def _branches(b: Builder, x: str, width: int, deeper: int) -> dict[str, onnx.GraphProto]:
    return {key: _branch(b, key, x, width, deeper) for key in ("then_branch", "else_branch")}


def _branch(b: Builder, key: str, x: str, width: int, deeper: int) -> onnx.GraphProto:
    body = _Body(b)
    size = b.shape(x)[-1]
    kind = b.choose.one_of(("layer", "layer", "two", "constant", "nested"))
    if kind == "constant" and not b.dynamic:
        shape = (*b.shape(x)[:-1], width)
        array = np.broadcast_to(b.vector(width), shape)
        name = body.hold(b.initializer(np.ascontiguousarray(array), "p"))
        y = name if name not in b.initializers else body.emit("Identity", [name])
    elif kind == "nested" and deeper:
        inner = _branches(b, x, width, deeper - 1)
        y = body.emit("If", [_flag(b)], **inner)
    elif kind == "two":
        y = body.dense(body.dense(x, size, 6), 6, width)
    else:
        y = body.dense(x, size, width)
    return body.graph(key, [y])


def scanning(b: Builder) -> bool:
    """A recurrent cell written out as a Scan along an axis of a sequence."""
    x = b.pick(3)
    if x is None or b.dynamic:
        return False
    axis = b.choose.integer(0, 1)
    width = b.choose.one_of((4, 6))
    rows = b.shape(x)[1 - axis]
    body = _Body(b)
    state, piece = b.name("s"), b.name("x")
    after = _cell(body, state, piece, b.shape(x)[2], width)
    written = after if b.choose.chance(0.5) else body.dense(after, width, 5)
    graph = body.graph("cell", [after, body.emit("Identity", [written])], [(state, FLOAT), (piece, FLOAT)])
    last = b.emit(
        "Scan",
        [_first(b, rows, width), x],
        2,
        body=graph,
        num_scan_inputs=1,
        scan_input_axes=[axis],
        scan_output_axes=[b.choose.integer(0, 2)],
    )
    return _added(b, last)


def looping(b: Builder) -> bool:
    """A Loop of a few rounds with a state and, now and then, what it was in each round."""
    x = b.pick(2)
    if x is None or b.dynamic:
        return False
    width = b.choose.one_of((4, 6))
    body = _Body(b)
    names = [b.name(prefix) for prefix in ("i", "c", "s")]
    after = _cell(body, names[2], x, b.shape(x)[1], width)
    outputs = [body.emit("Identity", [names[1]]), after]
    both = b.choose.chance(0.5)
    if both:
        outputs.append(
            body.emit("Identity", [after if b.choose.chance(0.5) else body.dense(after, width, 5)])
        )
    graph = body.graph("rounds", outputs, list(zip(names, (INT, BOOL, FLOAT), strict=True)))
    graph.output[0].CopyFrom(helper.make_tensor_value_info(outputs[0], BOOL, []))
    rounds = b.initializer(np.array(b.choose.integer(0, 3) or 1), "k")
    inputs = [rounds, b.initializer(np.array(True), "c"), _first(b, b.shape(x)[0], width)]
    return _added(b, b.emit("Loop", inputs, 1 + both, body=graph))


def _cell(body: _Body, state: str, piece: str, size: int, width: int) -> str:
    """Return the next state: from the last one and a piece of the sequence."""
    b = body.b
    kind = b.choose.one_of(("dense", "dense", "decay", "same"))
    new = body.dense(piece, size, width)
    if kind == "dense":
        old = body.dense(state, width, width)
    else:
        old = body.emit("Mul", [state, body.vector(width)]) if kind == "decay" else state
    joined = body.emit("Add", [new, old])
    return body.emit("Tanh", [joined]) if b.choose.chance(0.6) else joined


def _first(b: Builder, rows: int, width: int) -> str:
    kind = b.choose.one_of(("zero", "rows", "random"))
    array = np.zeros((rows, width), np.float32)
    if kind == "rows":
        array = np.ascontiguousarray(np.broadcast_to(b.vector(width), (rows, width)))
    elif kind == "random":
        array = b.vector(rows * width, 0).reshape(rows, width)
    return b.initializer(array)


def _added(b: Builder, first: str | None) -> bool:
    if first is None:
        return False
    names = list(b.nodes[-1].output)
    return b.add(*(names if b.choose.chance(0.6) else names[-1:]))


STEPS = (*(branching,) * 3, *(scanning,) * 2, *(looping,) * 2)
