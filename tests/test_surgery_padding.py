"""Pad along space and along channels, with exact counts."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained


def padded(pads, *, mode="constant", value=None, bias=False, opset=18, width=8):
    """Return eight channels, 1 and 4 dead, padded and read by a convolution.

    Args:
        pads: how much, for each axis in front, and then behind.
        mode: as for Pad.
        value: what is padded with; None for 0.
        bias: whether the dead channels hold 0.5 instead of zero.
        opset: below 11, the pads are attributes.
        width: how many channels come out.
    """
    net = Net(x=("N", 3, 6, 6))
    biases = [np.full(8, 0.5, np.float32)] if bias else []
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(1, 4)), *biases], "h")
    if opset < 11:
        net.node("Pad", ["h"], "p", pads=pads, mode=mode, value=value or 0.0)
    else:
        given = [] if value is None else [np.array(value, np.float32)]
        net.node("Pad", ["h", np.array(pads), *given], "p", mode=mode)
    net.node("Conv", ["p", net.rand(2, width, 3, 3)], "z")
    return net.case("z", opset=opset)


SPACE = [0, 0, 1, 1, 0, 0, 1, 1]
CHANNELS = [0, 2, 0, 0, 0, 3, 0, 0]


@pytest.mark.parametrize("opset", [10, 18])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_space_is_padded(mode, opset):
    """Channels that are zero are zero all over."""
    assert gained(padded(SPACE, mode=mode, opset=opset)) == (24 + 144, 18 + 108)


@pytest.mark.parametrize(
    ("mode", "value", "kept"), [("edge", None, 6), ("constant", 0.5, 6), ("constant", 0.25, 8)]
)
def test_constants_meet_the_border(mode, value, kept):
    """A constant is known all over where the border is the same; else nothing of it goes."""
    before, after = gained(padded(SPACE, mode=mode, value=value, bias=True))
    # the value is one element, and what is folded becomes a bias of two
    value_elements = 0 if value is None else 1
    assert before == 24 + 8 + 144 + value_elements
    assert after == kept * 3 + kept + kept * 18 + value_elements + (2 if kept == 6 else 0)


@pytest.mark.parametrize("opset", [10, 18])
def test_channels_are_padded(opset):
    """New channels hold zero, so that nobody needs them: two in front and three behind go, and so do the dead."""
    assert gained(padded(CHANNELS, opset=opset, width=13)) == (24 + 13 * 18, 18 + 6 * 18)


def test_new_channels_that_hold_a_value_are_folded():
    """The value of the five new channels goes into the bias of what reads them."""
    assert gained(padded(CHANNELS, value=0.5, width=13)) == (24 + 13 * 18 + 1, 18 + 6 * 18 + 1 + 2)


def test_a_shortcut_whose_new_channels_meet_living_ones():
    """A ResNet's shortcut without weights: of six new channels those stay that meet living channels of the branch."""
    net = Net(x=(1, 3, 4, 4))
    net.node("Conv", ["x", net.rand(6, 3, 1, 1, dead=(0, 2))], "h")
    net.node("Pad", ["h", np.array([0, 3, 0, 0, 0, 3, 0, 0])], "s")
    net.node("Conv", ["h", net.rand(12, 6, 1, 1, dead=(0, 1, 3, 10))], "b")
    net.node("Add", ["s", "b"], "t")
    net.node("Conv", ["t", net.rand(2, 12, 1, 1)], "z")
    # of the twelve, 0 and 1 of the new ones in front, 3 (the data's 0) and 10 go; the data's 2 meets a living one
    assert gained(net.case("z")) == (18 + 72 + 24, 5 * 3 + 8 * 5 + 2 * 8)


def test_padding_of_living_channels():
    """Negative control: nothing is dead and all is read by an output."""
    net = Net(x=(1, 3, 4, 4))
    net.node("Conv", ["x", net.rand(4, 3, 1, 1)], "h")
    net.node("Pad", ["h", np.array([0, 1, 1, 1, 0, 2, 1, 1])], "z")
    assert gained(net.case("z")) == (12, 12)
