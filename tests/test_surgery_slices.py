"""Slices that run backwards or in strides, along several axes, and those of old operator sets, with exact counts."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained

FIRST = np.iinfo(np.int64).min


def sliced(start, stop, step, *, dead=(1, 4), extra=False, size=8, opset=18):
    """Return eight channels, some dead, sliced, read by a matrix, and perhaps added to what they were.

    Args:
        start: the first index.
        stop: the end.
        step: the step; None leaves it out.
        dead: which channels are dead.
        extra: whether the channels meet themselves the other way round.
        size: how many channels the slice leaves.
        opset: below 10, the bounds are attributes.
    """
    net = Net(x=(2, 3, 4))
    net.node("MatMul", ["x", net.rand(4, 8, dead=dead, axis=1)], "h")
    if opset < 10:
        net.node("Slice", ["h"], "s", starts=[start], ends=[stop], axes=[2])
    else:
        steps = [] if step is None else [np.array([step])]
        net.node("Slice", ["h", np.array([start]), np.array([stop]), np.array([2]), *steps], "s")
    if extra:
        net.node("Add", ["h", "s"], "t")
    net.node("MatMul", ["t" if extra else "s", net.rand(size, 3)], "z")
    return net.case("z", opset=opset)


@pytest.mark.parametrize("stop", [FIRST, -9])
def test_channels_turned_round(stop):
    """The dead channels leave both matrices, and the slice still ends before the first index."""
    assert gained(sliced(-1, stop, -1)) == (32 + 24, 24 + 18)


def test_every_second_channel_backwards():
    """Of 7, 5, 3 and 1 the last is dead; the other channels are read by nobody."""
    assert gained(sliced(7, FIRST, -2, size=4)) == (32 + 12, 12 + 9)


@pytest.mark.parametrize(("dead", "kept"), [((1, 6), 6), ((1, 4), 8)])
def test_channels_that_meet_themselves_turned_round(dead, kept):
    """A channel goes if its mirror image is dead, too; of two pairs that are half dead all stays."""
    assert gained(sliced(-1, FIRST, -1, dead=dead, extra=True)) == (32 + 24, 7 * kept)


def test_a_stride_over_channels():
    """Every third of 1, 4, 7: two of three are dead, and what stays needs no stride."""
    assert gained(sliced(1, 8, 3, size=3)) == (32 + 9, 4 + 3)


def test_nothing_dead_nothing_gone():
    """Negative control: all channels live."""
    net = Net(x=(2, 3, 4))
    net.node("MatMul", ["x", net.rand(4, 8)], "h")
    net.node("Slice", ["h", np.array([-1]), np.array([FIRST]), np.array([2]), np.array([-1])], "s")
    net.node("MatMul", ["s", net.rand(8, 3)], "z")
    assert gained(net.case("z")) == (56, 56)


def test_bounds_that_are_attributes():
    """Before opset 10: of channels 1 to 6, two are dead, and 0 and 7 are read by nobody."""
    assert gained(sliced(1, 7, None, size=6, opset=9)) == (32 + 18, 16 + 12)


def test_channels_pass_a_slice_of_space():
    """A slice of height and width at once hands on the channels."""
    net = Net(x=(1, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(1, 4))], "h")
    net.node("Slice", ["h", np.array([1, 2]), np.array([5, 6]), np.array([2, 3])], "s")
    net.node("Conv", ["s", net.rand(2, 8, 1, 1)], "z")
    assert gained(net.case("z")) == (24 + 16, 18 + 12)


def test_channels_in_another_order_with_no_steps():
    """Channels that stand in another order may leave every second place to a slice that had no steps."""
    net = Net(x=(2, 3, 4))
    net.node("MatMul", ["x", net.rand(4, 8, dead=(6, 7), axis=1)], "h")
    net.node("Gather", ["h", np.array([0, 3, 1, 4, 2, 5, 6, 7])], "g", axis=2)
    net.node("Slice", ["g", np.array([1]), np.array([6]), np.array([2])], "s")
    net.node("MatMul", ["s", net.rand(5, 2)], "a")
    net.node("MatMul", ["h", net.rand(8, 2)], "b")
    net.node("Add", ["a", "b"], "z")
    assert gained(net.case("z")) == (32 + 10 + 16, 24 + 10 + 12)
