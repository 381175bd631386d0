"""Matrix products with a vector, constant or computed, with exact counts."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained


def hidden(**inputs):
    """Return a net with h of eight channels, of which 1 and 4 are dead and hold a constant other than zero."""
    net = Net(**(inputs or {"x": (2, 3, 4)}))
    net.node("MatMul", ["x", net.rand(4, 8, dead=(1, 4), axis=1)], "y")
    net.node("Add", ["y", net.rand(8)], "h")
    return net


@pytest.mark.parametrize(("zeros", "folded"), [((), 1), ((1, 4, 6), 0)], ids=["constants", "unread"])
def test_a_constant_vector_behind(zeros, folded):
    """Dead entries leave the vector and the matrix before, their constant one number; unread entries leave nothing."""
    net = hidden()
    net.node("MatMul", ["h", net.rand(8, dead=zeros)], "z")
    kept = 8 - len({1, 4, *zeros})
    assert gained(net.case("z")) == (48, 4 * kept + kept + kept + folded)


def test_a_constant_vector_in_front():
    """The axis before the last is contracted; that of the columns passes."""
    net = hidden()
    net.node("Transpose", ["h"], "t", perm=[0, 2, 1])
    net.node("MatMul", [net.rand(8), "t"], "z")
    assert gained(net.case("z")) == (48, 4 * 6 + 6 + 6 + 1)


def test_channels_pass_over_a_vector():
    """What the vector does not contract goes with whatever is read of the output."""
    net = hidden()
    net.node("MatMul", [net.rand(3), "h"], "s")
    net.node("MatMul", ["s", net.rand(8, 2)], "z")
    assert gained(net.case("z")) == (32 + 8 + 3 + 16, 4 * 6 + 6 + 3 + 6 * 2 + 2)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_vector_of_channels(swapped):
    """A computed vector is contracted with each of a stack of constant matrices, from either side."""
    net = hidden(x=(4,))
    shape = (3, 2, 8) if swapped else (3, 8, 2)
    weight = net.rand(*shape)
    net.node("MatMul", [weight, "h"] if swapped else ["h", weight], "z")
    assert gained(net.case("z")) == (32 + 8 + 48, 24 + 6 + 36 + 6)


@pytest.mark.parametrize("form", ["matrix", "vector", "both"])
def test_computed_vectors(form):
    """Channels that are zero in one operand leave the other, wherever the vector stands."""
    net = Net(**{"x": (2, 3, 4), "v": (4,)} if form != "both" else {"x": (4,), "v": (4,)})
    net.node("MatMul", ["x", net.rand(4, 8, dead=(1, 4), axis=1)], "a")
    net.node("MatMul", ["v", net.rand(4, 8)], "b")
    if form == "matrix":
        net.node("Transpose", ["a"], "t", perm=[0, 2, 1])
        net.node("MatMul", ["b", "t"], "z")
    else:
        net.node("MatMul", ["a", "b"], "z")
    assert gained(net.case("z")) == (64, 2 * 4 * 6)


def test_a_vector_that_is_read_whole():
    """Negative control: nothing is dead, nothing goes."""
    net = Net(x=(2, 3, 4), v=(4,))
    net.node("MatMul", ["x", net.rand(4, 8)], "a")
    net.node("MatMul", ["v", net.rand(4, 8)], "b")
    net.node("MatMul", ["a", "b"], "c")
    net.node("MatMul", ["a", net.rand(8)], "d")
    net.node("Add", ["c", "d"], "z")
    assert gained(net.case("z")) == (72, 72)


def test_what_is_scored_by_a_vector():
    """Attention pooling, a score for each token by a vector, over values with a dead channel and a constant one."""
    net = Net(x=(2, "S", 4))
    net.node("MatMul", ["x", net.rand(4, 6, dead=(0, 5), axis=1)], "k")
    net.node("Tanh", ["k"], "t")
    net.node("MatMul", ["t", net.rand(6)], "e")
    net.node("Softmax", ["e"], "a", axis=-1)
    net.node("Unsqueeze", ["a", np.array([1])], "r")
    net.node("MatMul", ["x", net.rand(4, 6, dead=(2,), axis=1)], "v0")
    net.node("Add", ["v0", net.rand(6)], "v")
    net.node("MatMul", ["r", "v"], "o")
    net.node("MatMul", ["o", net.rand(6, 3)], "z")
    assert gained(net.case("z", opset=18)) == (24 + 6 + 24 + 6 + 18, 16 + 4 + 20 + 5 + 15 + 3)
