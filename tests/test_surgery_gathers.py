"""Gather along channels: indices that repeat, copies that nothing reads, and indices that have channels themselves."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained


def taken(indices, read, *, dead=(1, 4), also=False):
    """Return six channels of which some are taken and read by a matrix.

    Args:
        indices: the channels taken.
        read: which of the places taken the matrix reads.
        dead: which channels are dead and hold a constant.
        also: whether a second matrix reads the channels themselves.
    """
    net = Net(x=(2, 3, 4))
    net.node("MatMul", ["x", net.rand(4, 6, dead=dead, axis=1)], "m")
    net.node("Add", ["m", net.rand(6)], "h")
    net.node("Gather", ["h", np.array(indices)], "g", axis=2)
    unread = [place for place in range(len(indices)) if place not in read]
    net.node("MatMul", ["g", net.rand(len(indices), 2, dead=unread)], "a")
    if also:
        net.node("MatMul", ["h", net.rand(6, 2)], "b")
        net.node("Add", ["a", "b"], "a2")
    return net.case("a2" if also else "a")


def test_a_channel_lives_where_one_of_its_copies_does():
    """Of 0, 0, 2, 2, 3 the second and the third are read: 0 and 2 stay, once each."""
    assert gained(taken([0, 0, 2, 2, 3], read=(1, 2))) == (24 + 6 + 10, 8 + 2 + 4)


def test_dead_channels_leave_all_their_copies():
    """Channels 1 and 4 are taken five times; what they hold goes into a bias."""
    assert gained(taken([1, 0, 1, 4, 4, 1, 5], read=range(7))) == (24 + 6 + 14, 8 + 2 + 4 + 2)


def test_a_copy_that_nothing_reads_goes_though_the_channel_stays():
    """The second matrix needs four channels; of the three copies one is read."""
    case = taken([0, 3, 5], read=(1,), also=True)
    assert gained(case) == (24 + 6 + 6 + 12, 16 + 4 + 2 + 8 + 2)


def test_all_copies_live():
    """Negative control: nothing is dead, nothing goes."""
    assert gained(taken([0, 1, 2, 3, 4, 5, 0], read=range(7), dead=())) == (24 + 6 + 14,) * 2


@pytest.mark.parametrize("dead", [(), (2, 3)], ids=["alive", "dead"])
def test_key_heads_that_are_copied(dead):
    """Two key heads of two, copied for four query heads by Gather: a dead value head takes its two query heads."""
    net = Net(x=(2, "S", 4))
    net.node("MatMul", ["x", net.rand(4, 8)], "q0")
    net.node("MatMul", ["x", net.rand(4, 4)], "k0")
    net.node("MatMul", ["x", net.rand(4, 4, dead=dead, axis=1)], "v0")
    for name, heads in (("q", 4), ("k", 2), ("v", 2)):
        net.node("Reshape", [f"{name}0", np.array([2, -1, heads, 2])], f"{name}1")
        net.node("Transpose", [f"{name}1"], f"{name}2", perm=[0, 2, 1, 3])
    for name in ("k", "v"):
        net.node("Gather", [f"{name}2", np.array([0, 0, 1, 1])], f"{name}3", axis=1)
    net.node("Transpose", ["k3"], "t", perm=[0, 1, 3, 2])
    net.node("MatMul", ["q2", "t"], "s")
    net.node("Softmax", ["s"], "p", axis=-1)
    net.node("MatMul", ["p", "v3"], "o")
    net.node("Transpose", ["o"], "o1", perm=[0, 2, 1, 3])
    net.node("Reshape", ["o1", np.array([2, -1, 8])], "o2")
    net.node("MatMul", ["o2", net.rand(8, 3)], "z")
    half = len(dead) // 2
    assert gained(net.case("z")) == (32 + 16 + 16 + 24, (32 + 16 + 16 + 24) >> half)


def test_indices_that_have_channels():
    """Places of the largest entries, one for each of six channels, look up rows of a table: none of them goes."""
    net = Net(x=(2, 5, 4))
    net.node("MatMul", ["x", net.rand(4, 6, dead=(1, 4), axis=1)], "h")
    net.node("ArgMax", ["h"], "i", axis=1, keepdims=0)
    net.node("Gather", [net.rand(5, 3), "i"], "g")
    net.node("MatMul", [net.rand(2, 6, dead=(0,), axis=1), "g"], "z")
    assert gained(net.case("z")) == (24 + 15 + 12, 20 + 15 + 10)


def test_rows_that_are_picked_batch_by_batch():
    """GatherND with a batch axis, as for the tokens that a model was asked about: the channels pass."""
    net = Net(x=(2, 5, 4))
    net.node("MatMul", ["x", net.rand(4, 6, dead=(1, 4), axis=1)], "h")
    net.node("GatherND", ["h", np.array([[[0], [3]], [[4], [4]]])], "g", batch_dims=1)
    net.node("MatMul", ["g", net.rand(6, 2)], "z")
    assert gained(net.case("z")) == (24 + 12, 16 + 8)


def test_channels_by_gather_nd():
    """`x[..., [0, 0, 4, 2]]` as it is exported; of four channels taken the fourth is read by nobody, the third dead."""
    net = Net(x=(2, 3, 4))
    net.node("MatMul", ["x", net.rand(4, 6, dead=(4,), axis=1)], "m")
    net.node("Add", ["m", net.rand(6)], "h")
    net.node("Transpose", ["h"], "first", perm=[2, 0, 1])
    net.node("GatherND", ["first", np.array([[0], [-6], [4], [2]])], "g")
    net.node("Transpose", ["g"], "last", perm=[1, 2, 0])
    net.node("MatMul", ["last", net.rand(4, 2, dead=(3,))], "a")
    assert gained(net.case("a")) == (24 + 6 + 8, 4 + 1 + 4 + 2)
