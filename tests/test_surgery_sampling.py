"""Operators that run along some axes and pass the channels, with exact counts."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained

GRID = np.linspace(-1, 1, 2 * 4 * 3 * 2, dtype=np.float32).reshape(2, 4, 3, 2)
BOXES = np.array([[0, 0, 3, 3], [1, 1, 4, 2]], np.float32)


def image(operator, *inputs, bias=0.0, opset=18, **attributes):
    """Return eight channels, 1 and 4 dead, through an operator, read by a convolution."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(1, 4)), np.full(8, bias, np.float32)], "h")
    net.node(operator, ["h", *inputs], "p", **attributes)
    net.node("Conv", ["p", net.rand(2, 8, 1, 1)], "z")
    return net.case("z", opset=opset)


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        (image("CumSum", np.array(2)), 0),
        (image("GridSample", GRID), GRID.size),
        (image("RoiAlign", BOXES, np.array([0, 1]), output_height=2, output_width=2), BOXES.size),
        (image("Trilu"), 0),
    ],
    ids=["CumSum", "GridSample", "RoiAlign", "Trilu"],
)
def test_dead_channels_pass(case, extra):
    """Channels that are zero leave both convolutions."""
    assert gained(case) == (24 + 8 + 16 + extra, 18 + 6 + 12 + extra)


@pytest.mark.parametrize(
    ("case", "extra"),
    [(image("CumSum", np.array(2), bias=0.5), 0), (image("GridSample", GRID, bias=0.5), GRID.size)],
    ids=["CumSum", "GridSample"],
)
def test_constants_do_not_pass(case, extra):
    """Negative control: a running sum of a constant is none, and beyond the image there are zeros."""
    assert gained(case) == (24 + 8 + 16 + extra,) * 2


def test_a_running_sum_over_channels_pins_them():
    """Negative control: along the axis that is summed all stays."""
    assert gained(image("CumSum", np.array(1))) == (24 + 8 + 16,) * 2


@pytest.mark.parametrize(("batch", "time"), [(0, 1), (1, 0)])
def test_sequences_turned_round(batch, time):
    """What runs backwards, as for the second direction of a recurrent network, keeps its channels apart."""
    net = Net(x=(2, 2, 4))
    net.node("MatMul", ["x", net.rand(4, 6, dead=(0, 3), axis=1)], "m")
    net.node("Add", ["m", net.rand(6)], "h")
    net.node("ReverseSequence", ["h", np.array([1, 2])], "r", batch_axis=batch, time_axis=time)
    net.node("MatMul", ["r", net.rand(6, 2)], "z")
    assert gained(net.case("z")) == (24 + 6 + 12, 16 + 4 + 8 + 2)


def test_where_to_sample_is_computed():
    """The channels of the convolution that makes the grid stay, those that are sampled go."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(1, 4))], "h")
    net.node("Conv", ["x", net.rand(2, 3, 1, 1, dead=(1,))], "o")
    net.node("Transpose", ["o"], "g", perm=[0, 2, 3, 1])
    net.node("GridSample", ["h", "g"], "p")
    net.node("Conv", ["p", net.rand(2, 8, 1, 1)], "z")
    assert gained(net.case("z")) == (24 + 6 + 16, 18 + 6 + 12)


def test_a_spectrum_of_dead_channels():
    """DFT along time: two of six channels are zero, and so are their spectra."""
    net = Net(x=(2, 4, 9))
    net.node("Conv", ["x", net.rand(6, 4, 1, dead=(0, 3))], "h")
    net.node("Unsqueeze", ["h", np.array([3])], "u")
    net.node("DFT", ["u", "", np.array(2)], "f")
    net.node("Slice", ["f", np.array([0]), np.array([1]), np.array([3])], "r")
    net.node("Conv", ["r", net.rand(2, 6, 1, 1)], "z")
    assert gained(net.case("z", opset=20)) == (24 + 12, 16 + 8)
