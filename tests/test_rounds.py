"""What is left after a removal has nothing more to remove: graphs in which it once had, each as small as it goes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import failure, shrunk, weight_elements
from test_surgery_bodies import COUNTED, case, loop, n, rand
from test_surgery_regressions import Net

from etp_deploy.inspection import explain, inspect
from etp_deploy.pipeline import compress
from etp_deploy.surgery import rounds


@pytest.fixture
def one_round(monkeypatch):
    """Let only one round be: what the first analysis leaves must be the floor."""
    monkeypatch.setattr(rounds, "MOST_ROUNDS", 1)


def zeros(*shape):
    """Return weights that are dead as a whole."""
    return np.zeros(shape, np.float32)


def sizes(graph):
    """Return the weight elements before, after, and after a second compression; outputs are equal."""
    assert failure(graph, floor=False) is None
    once = shrunk(graph.model)
    return tuple(weight_elements(model) for model in (graph.model, once, shrunk(once)))


def rows_of_constants():
    """Return a product with a constant from the left, of a tensor whose channels are constants that differ."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", [net.rand(4, 5), "x"], "rows")
    net.node("MatMul", ["rows", zeros(6, 8)], "h")
    net.node("Add", ["h", net.rand(8)], "held")
    net.node("MatMul", [net.rand(4, 4), "held"], "mixed")
    net.node("MatMul", ["mixed", zeros(8, 4)], "read")
    net.node("Add", ["read", net.rand(4)], "y")
    return net.case("y")


def test_what_is_given_back_may_let_more_go(monkeypatch):
    """Eight constants that differ are none to a product over rows; the one that is left is, and its rows go."""
    before, two_rounds, one_round = (
        20 + 48 + 8 + 16 + 32 + 4,
        5 + 6 + 1 + 4 + 4 + 4 + 4,
        20 + 6 + 1 + 16 + 4 + 4,
    )
    assert sizes(rows_of_constants()) == (before, two_rounds, two_rounds)
    monkeypatch.setattr(rounds, "MOST_ROUNDS", 1)
    assert sizes(rows_of_constants()) == (before, one_round, two_rounds)


def test_inspect_and_compress_count_all_rounds(tmp_path):
    """What the plan shows is what goes, however many rounds it takes; reasons are those of what is left."""
    path = tmp_path / "model.onnx"
    onnx.save(rows_of_constants().model, path)
    report = compress(path, tmp_path / "small.onnx", align="off", simplify=False)
    shown = inspect(path, align="off")
    assert shown.layers == report.layers
    assert report.after.parameters == 28
    again = compress(tmp_path / "small.onnx", tmp_path / "again.onnx", align="off", simplify=False)
    assert again.after.parameters == 28
    assert not any(again.removed.values())
    rows = {row.name: (row.total, row.constant, row.unread, row.kept, row.kept_dead) for row in shown.layers}
    assert (rows["h"], rows["rows"]) == ((8, 8, 0, 1, 1), (4, 4, 0, 1, 1))
    told = [explain(path, *place, align="off") for place in (("held", 2), ("rows",), ("mixed",))]
    assert [(item.total, item.kept) for item in told] == [(8, 1), (4, 1), (4, 4)]
    assert told[1].lines[-1] == "3 of these go in a later round, when the others are gone"


@pytest.mark.usefixtures("one_round")
def test_what_nothing_uses_goes_where_nothing_else_does():
    """A model in which nothing is dead loses the node that leads nowhere; one without such a node is left alone."""
    net = Net(x=(2, 6))
    net.node("MatMul", ["x", net.rand(6, 4)], "y")
    alone = net.case("y")
    assert shrunk(alone.model) is alone.model
    net.node("MatMul", ["x", net.rand(6, 3)], "nowhere")
    assert sizes(net.case("y")) == (24 + 18, 24, 24)


def test_a_stack_of_matrices_behind_a_dead_tensor():
    """Weights that are taken for zeros make constants, which a stack of matrices reads as such."""
    net = Net(x=(2, 3, 5))
    net.node("MatMul", ["x", net.rand(5, 12)], "h")
    net.node("MatMul", ["h", net.rand(12, 5)], "g")
    net.node("Unsqueeze", ["g", np.array([1])], "u")
    net.node("MatMul", ["u", net.rand(3, 5, 4)], "stacked")
    net.node("Conv", ["stacked", zeros(2, 3, 1, 1)], "y")
    assert sizes(net.case("y")) == (60 + 60 + 60 + 6, 5 + 1 + 4 + 2, 5 + 1 + 4 + 2)


@pytest.mark.usefixtures("one_round")
def test_stacks_of_matrices_that_nothing_reads():
    """What only keeps counts equal reads nothing: a channel of each of three matrices stays."""
    net = Net(x=(2, 3, 7, 5))
    net.node("MatMul", ["x", net.rand(3, 5, 6)], "first")
    net.node("Relu", ["first"], "bent")
    net.node("MatMul", ["bent", net.rand(3, 6, 4)], "second")
    net.node("MatMul", ["second", zeros(3, 4, 5)], "third")
    net.node("Add", ["third", "x"], "y")
    assert sizes(net.case("y")) == (3 * (30 + 24 + 20), 3 * (5 + 1 + 5), 3 * (5 + 1 + 5))


@pytest.mark.usefixtures("one_round")
def test_equal_cuts_stay_one():
    """A bias that was cut to what another holds is one with it, and stays that when nothing is cut any more."""
    net = Net(x=(2, 3, 6, 3))
    net.node("Conv", ["x", net.rand(6, 1, 3, 3, dead=(0, 2, 4)), zeros(6)], "c", group=3, pads=[1] * 4)
    net.node("Conv", ["c", zeros(1, 6, 3, 3)], "y", pads=[1] * 4)
    net.node("MatMul", ["x", net.rand(3, 3)], "m")
    net.node("Add", ["m", zeros(3)], "z")
    assert sizes(net.case("y", "z"))[1:] == (3 * 9 + 3 + 27 + 9, 3 * 9 + 3 + 27 + 9)


def rounds_of(units, *, prefix="", dead=()):
    """Return a Loop of an Elman cell whose state begins at zero, and its weights; some units are dead."""
    nodes = [
        n("MatMul", f"x {prefix}u", "p"),
        n("MatMul", f"h {prefix}v", "q"),
        n("Add", "p q", "s"),
        n("Tanh", "s", "h_next"),
    ]
    weights = {
        f"{prefix}u": rand(4, units, dead=dead, axis=1),
        f"{prefix}v": rand(units, units, dead=dead, axis=1),
        f"{prefix}h": zeros(2, units),
        **COUNTED,
    }
    return loop(nodes, state=f"{prefix}h", results=(f"{prefix}last",)), weights


@pytest.mark.usefixtures("one_round")
def test_equal_starts_stay_one():
    """The start of a state that was cut to what another state begins with is one with it, and stays that."""
    (whole, some), (cut, more) = rounds_of(5), rounds_of(8, prefix="o", dead=(0, 3, 7))
    weights = {**some, **more, "w": rand(8, 3)}
    nodes = [whole, cut, n("MatMul", "olast w", "y")]
    left = 2 * (4 * 5 + 5 * 5) + 2 * 5 + 5 * 3
    assert sizes(case(nodes, {"x": (2, 4)}, ["y", "last"], weights))[1:] == (left, left)


@pytest.mark.usefixtures("one_round")
def test_a_start_that_is_a_weight_too():
    """A cut that takes all of what a state begins with does not part it from the product that reads it too."""
    made, weights = rounds_of(6)
    weights = {**weights, "w": rand(6, 3)}
    nodes = [made, n("MatMul", "z h", "dead"), n("MatMul", "dead w", "y")]
    before = 4 * 6 + 6 * 6 + 2 * 6 + 6 * 3
    assert sizes(case(nodes, {"x": (2, 4), "z": (3, 2)}, ["y", "last"], weights)) == (before, before, before)


@pytest.mark.usefixtures("one_round")
def test_one_carrier_serves_the_next_convolution():
    """A stem that is dead as a whole keeps one channel, which carries constants for all that read it."""
    net = Net(x=(1, 3, 8, 8))
    net.node("Conv", ["x", zeros(8, 3, 3, 3), net.rand(8)], "stem", pads=[1] * 4)
    net.node("MaxPool", ["stem"], "pooled", kernel_shape=[2, 2], strides=[2, 2])
    net.node("Resize", ["pooled", "", np.array([1, 1, 2, 2], np.float32)], "resized", mode="nearest")
    net.node("Conv", ["resized", net.rand(8, 8, 3, 3, dead=range(1, 8)), net.rand(8)], "up", pads=[1] * 4)
    net.node("Concat", ["up", "stem"], "both", axis=1)
    net.node("Conv", ["both", net.rand(4, 16, 3, 3), net.rand(4)], "y", pads=[1] * 4)
    left = (27 + 1) + 4 + (9 + 1) + (4 * 2 * 9 + 4)
    assert sizes(net.case("y"))[1:] == (left, left)


def recurrent(operator, gates, units, *, directions=1, read=True):
    """Return a convolution, a recurrent layer, and what reads it, or seems to."""
    net = Net(x=(2, 3, 9))
    net.node("Conv", ["x", net.rand(5, 3, 3), net.rand(5)], "c")
    net.node("Transpose", ["c"], "t", perm=[2, 0, 1])
    weights = [net.rand(directions, gates * units, inner) for inner in (5, units)]
    direction = "bidirectional" if directions > 1 else "forward"
    bias = net.rand(directions, 2 * gates * units)
    net.node(operator, ["t", *weights, bias], "h", hidden_size=units, direction=direction)
    net.node("Transpose", ["h"], "turned", perm=[0, 2, 1, 3])
    net.node("Reshape", ["turned", np.array([7, 2, directions * units])], "flat")
    last = net.rand(directions * units, 3) if read else zeros(directions * units, 3)
    net.node("MatMul", ["flat", last], "y")
    return net.case("y")


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_units_that_nothing_reads(operator, gates, directions):
    """One unit of each direction stays, which reads nothing, so that all but one of its inputs go."""
    item = recurrent(operator, gates, 6, directions=directions, read=False)
    # both weights are the same zeros then
    left = (9 + 1) + directions * gates * (1 + 2) + directions * 3
    before, once, again = sizes(item)
    assert (once, again) == (left, left)
    assert before == 5 * 9 + 5 + directions * (gates * 6 * (5 + 6 + 2) + 6 * 3)


@pytest.mark.usefixtures("one_round")
@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrent_layer_of_one_unit(operator, gates):
    """A layer with nothing to lose itself reads its input all the same."""
    item = recurrent(operator, gates, 1)
    assert sizes(item) == (51 + gates * 8 + 3 - 1,) * 3
