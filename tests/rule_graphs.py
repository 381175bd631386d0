"""Graphs for rules that look at a node's neighbours, which an example of one node cannot show; with exact counts."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from graphs import Case, failure, shrunk, weight_elements
from rule_attention import attentions
from test_surgery_regressions import Net


def attention(*before, softmax=("Softmax", {"axis": -1}), tested="p"):
    """Return attention over constant values, its weights passed through Where(IsNaN(tested), 0, p).

    Args:
        before: operators on the scores, each with its inputs ("p" is what comes before) and attributes.
        softmax: what makes weights of the scores.
        tested: what IsNaN looks at.
    """
    net = Net(x=(1, "S", 4))
    net.node("MatMul", ["x", net.rand(4, 4)], "q")
    net.node("Transpose", ["x"], "t", perm=[0, 2, 1])
    net.node("MatMul", ["q", "t"], "scores")
    last = "scores"
    for number, (operator, inputs, attributes) in enumerate([*before, (softmax[0], ["p"], softmax[1])]):
        own = [last if isinstance(item, str) and item == "p" else item for item in inputs]
        last = f"s{number}"
        net.node(operator, own, last, **attributes)
    net.node("Log", ["scores"], "undefined")
    net.node("IsNaN", [last if tested == "p" else tested], "n")
    net.node("Where", ["n", np.zeros((), np.float32), last], "a")
    net.node("MatMul", ["x", np.zeros((4, 6), np.float32)], "v0")
    net.node("Add", ["v0", net.rand(6)], "v")
    net.node("MatMul", ["a", "v"], "o")
    net.node("MatMul", ["o", net.rand(6, 3)], "z")
    return net.case("z")


def sized(*outputs, picked=(0,)):
    """Return a convolution with two of six channels dead whose output's sizes are read while the model runs."""
    net = Net(x=("N", 3, "L"))
    net.node("Conv", ["x", net.rand(6, 3, 1, dead=(1, 4))], "y")
    net.node("Shape", ["y"], "sizes")
    net.node("Gather", ["sizes", np.array(picked)], "some")
    net.node("Cast", ["some"], "number", to=onnx.TensorProto.FLOAT)
    net.node("Conv", ["y", net.rand(2, 6, 1)], "z")
    case = net.case("z", "number")
    for name in outputs:
        case.model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT64, None))
    return case


def divided(*least):
    """Return six channels, two of them zero, divided by numbers of which an operator, if any, says the least value."""
    net = Net(x=(2, 5, 4), r=(5, 2, 1))
    net.node("MatMul", ["x", net.rand(4, 6, dead=(1, 4), axis=1)], "h")
    if least:
        net.node(least[0], ["r", *least[1:]], "n")
    net.node("Transpose", ["n" if least else "r"], "d", perm=[1, 0, 2])
    net.node("Div", ["h", "d"], "y")
    net.node("MatMul", ["y", net.rand(6, 3)], "z")
    return net.case("z")


def _scalar(value):
    return np.array(value, np.float32)


@cache
def neighbours() -> dict[str, tuple[tuple[Case, int], ...]]:
    """Return, for each function that reads a node's neighbours, graphs and how many elements stay of each."""
    guarded = (
        (attention(), 28),
        (attention(softmax=("Softmax", {"axis": 1})), 65),
        (attention(softmax=("Sigmoid", {})), 65),
        (attention(tested="undefined"), 65),
        (attention(("Add", ["p", _scalar(-1e9)], {})), 29),
        (attention(("Mul", ["p", _scalar(1)], {}), ("Add", ["p", _scalar(-np.inf)], {})), 67),
        (attention(("Clip", ["p", "", _scalar(1)], {})), 29),
        (attention(*(("Neg", ["p"], {}) for _ in range(9))), 65),
    )
    positive = (
        (divided("Max", _scalar(0.5)), 4 * 4 + 4 * 3 + 1),
        (divided("Max", _scalar(-0.5)), 4 * 6 + 6 * 3 + 1),
        (divided("Clip", _scalar(0.5)), 4 * 4 + 4 * 3 + 1),
        (divided("Clip", "", _scalar(0.5)), 4 * 6 + 6 * 3 + 1),
        (divided(), 4 * 6 + 6 * 3),
    )
    sizes = (
        (sized(), 6 * 3 - 2 * 3 + 2 * 4),
        (sized(picked=(0, 1)), 6 * 3 + 2 * 6),
        (sized("sizes"), 6 * 3 + 2 * 6),
    )
    return {
        **attentions(),
        "where": guarded,
        "_guarded_softmax": guarded,
        "may_be_infinite": guarded,
        "_axes_read": sizes,
        "divide": positive,
        "_positive": positive,
    }


def graph_failure(case: Case, stays: int) -> str | None:
    """Return what is wrong with a graph or with how much of it stays, or None."""
    wrong = failure(case)
    left = weight_elements(shrunk(case.model)) if wrong is None else 0
    return wrong or (None if left == stays else f"{left} elements stay, not {stays}")
