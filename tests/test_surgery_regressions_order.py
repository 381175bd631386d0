"""Orders of channels, merged axes and constants joined to channels that the surgery once got wrong; exact counts."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper
from test_surgery_regressions import Net, gained

from etp_deploy.surgery.state import coordinates


def shuffled_groups():
    """Return a grouped convolution whose groups read one channel each, in an order that a shuffle has changed."""
    net = Net(x=(1, 2, 4, 4))
    net.node("Conv", ["x", net.rand(6, 2, 1, 1)], "y")
    net.node("Reshape", ["y", np.array([1, 2, 3, 4, 4])], "a")
    net.node("Transpose", ["a"], "b", perm=[0, 2, 1, 3, 4])
    net.node("Reshape", ["b", np.array([1, 6, 4, 4])], "c")
    weight = np.zeros((4, 3, 1, 1), np.float32)
    weight[:, 1] = net.rand(4, 1, 1)
    net.node("Conv", ["c", weight, net.rand(4)], "d", group=2)
    return net


def test_groups_that_would_change_places():
    """All output channels of a grouped convolution stay: they stay in their order, and with their biases."""
    net = shuffled_groups()
    net.node("Conv", ["d", net.rand(3, 4, 1, 1)], "z")
    assert gained(net.case("z")) == (40, 40)


def test_an_output_of_the_model_keeps_its_order():
    """A model's output has all its channels, and where they were."""
    assert gained(shuffled_groups().case("d")) == (28, 28)


def test_a_carrier_among_channels_merged_with_rows():
    """A Reshape has merged channels and rows; the carrier of a padded convolution has a weight for each row."""
    net = Net(x=(1, 2, 3, 5))
    net.node("Conv", ["x", net.rand(4, 2, 1, 1, dead=(0, 2)), net.rand(4) + 2], "y")
    net.node("Relu", ["y"], "r")
    net.node("Reshape", ["r", np.array([1, 12, 5])], "m")
    net.node("Conv", ["m", net.rand(3, 12, 3)], "z", pads=[1, 1])
    assert gained(net.case("z")) == (8 + 4 + 108, 6 + 3 + 81)


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_a_recurrent_node_whose_steps_are_channels(operator, gates):
    """Channels along the steps are pinned; those along the inputs go all the same."""
    net = Net(x=(3, 2, 5))
    net.node("MatMul", [net.rand(4, 2), "x"], "y")
    net.node("MatMul", ["y", net.rand(5, 6, dead=(1, 4), axis=1)], "u")
    net.node(operator, ["u", net.rand(1, 3 * gates, 6), net.rand(1, 3 * gates, 3)], "h", hidden_size=3)
    rows = 3 * gates
    assert gained(net.case("h")) == (8 + 30 + rows * 9, 8 + 20 + rows * 7)


def test_an_attention_whose_tokens_are_channels():
    """The Attention operator runs over its tokens: where these are channels, they stay; dimensions of heads go."""
    net = Net(x=(1, 1, 5, 6))
    for name in "qkv":
        net.node("MatMul", [net.rand(4, 5), "x"], f"{name}0")
        net.node("MatMul", [f"{name}0", net.rand(6, 4, dead=(1,), axis=1)], name)
    net.node("Attention", ["q", "k", "v"], "a")
    net.node("MatMul", ["a", net.rand(4, 3)], "z")
    assert gained(net.case("z", opset=23)) == (3 * (20 + 24) + 12, 3 * (20 + 18) + 9)


def test_a_constant_for_each_head_behind_a_merged_axis():
    """A constant operand of a product is cut where its contracted axis is columns and channels."""
    net = Net(x=(1, 2, 3, 2))
    net.node("Conv", ["x", net.rand(4, 2, 1, 1, dead=(1,))], "y")
    net.node("Transpose", ["y"], "t", perm=[0, 2, 3, 1])
    net.node("Reshape", ["t", np.array([1, 3, 1, 8])], "m")
    net.node("MatMul", ["m", net.rand(3, 8, 5)], "z")
    assert gained(net.case("z")) == (8 + 120, 6 + 90)


def test_a_constant_joined_to_a_merged_axis():
    """A constant that is joined to channels merged with rows holds something for all of them."""
    net = Net(x=(1, 2, 2, 3))
    net.node("Conv", ["x", net.rand(4, 2, 1, 1, dead=(1,))], "y")
    net.node("Reshape", ["y", np.array([1, 8, 3])], "m")
    net.node("Concat", ["m", net.rand(1, 8, 2)], "c", axis=2)
    net.node("Conv", ["c", net.rand(3, 8, 1)], "z")
    assert gained(net.case("z")) == (48, 48)


def test_a_constant_joined_to_a_batch_that_is_not_known():
    """A constant's own batch size is known, that of what it is joined to is not."""
    net = Net(x=("N", 2, 3))
    net.node("Conv", ["x", net.rand(4, 2, 1, dead=(1,))], "y")
    net.node("Concat", ["y", net.rand(4, 4, 2)], "c", axis=2)
    net.node("Conv", ["c", net.rand(3, 4, 1)], "z")
    assert gained(net.case("z")) == (52, 52)


@pytest.mark.parametrize(("indices", "rank"), [([2, 0, 2], 3), ([[2, 0], [1, 1]], 4)])
def test_channels_beside_an_axis_that_is_indexed_at_will(indices, rank):
    """An index taken twice, or a table of indices, concerns its own axis alone."""
    net = Net(x=(1, 2, 3))
    net.node("Conv", ["x", net.rand(4, 2, 1, dead=(1,))], "y")
    net.node("Gather", ["y", np.array(indices)], "g", axis=2)
    net.node("Conv", ["g", net.rand(3, 4, *([1] * (rank - 2)))], "z")
    assert gained(net.case("z")) == (8 + 12, 6 + 9)


def test_coordinates_of_large_layouts_with_single_entries_last():
    """A filter of one by one is such a layout, and numpy 2.4 alone gets its coordinates wrong."""
    shape = (9000, 2, 1, 1)
    layout = np.arange(18000).reshape(shape)
    first, second, *rest = coordinates(layout, shape)
    assert np.array_equal(first, layout // 2)
    assert np.array_equal(second, layout % 2)
    assert not any(line.any() for line in rest)


def test_a_filter_of_one_by_one_that_is_computed():
    """A filter filled with one number, more than eight thousand rows of it, stays in its order."""
    net = Net(x=(1, 2, 3, 3))
    net.node(
        "ConstantOfShape",
        [np.array([9000, 2, 1, 1])],
        "w",
        value=numpy_helper.from_array(np.ones(1, np.float32)),
    )
    net.node("Conv", ["x", "w"], "y")
    assert gained(net.case("y")) == (0, 0)


def test_a_target_that_copies_a_size_of_channels_and_space():
    """`[0, 0, 0, 0, -1, 1]` copies twice the height, which is the height when half of each pixel's rows are dead."""
    net = Net(x=("n", 3, "h", "w"))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(2, 3, 6, 7))], "c")
    net.node("Unsqueeze", ["c", np.array([2, 3])], "u")
    net.node("Reshape", ["u", np.array([0, -1, 2, 2, 0, 0])], "a")
    net.node("Transpose", ["a"], "b", perm=[0, 1, 4, 2, 5, 3])
    net.node("Reshape", ["b", np.array([0, 0, -1, 1, 0, 0])], "d")
    net.node("Reshape", ["d", np.array([0, 0, 0, 0, -1, 1])], "e")
    net.node("Relu", ["e"], "r")
    net.node("Reshape", ["r", np.array([0, 0, -1, 2, 0, 1])], "f")
    net.node("Reshape", ["f", np.array([0, 0, 0, 0, -1, 2])], "g")
    net.node("Transpose", ["g"], "i", perm=[0, 1, 3, 5, 2, 4])
    net.node("Reshape", ["i", np.array([0, -1, 1, 1, 0, 0])], "j")
    net.node("Squeeze", ["j", np.array([2, 3])], "k")
    net.node("Conv", ["k", net.rand(2, 8, 1, 1)], "z")
    assert gained(net.case("z")) == (24 + 16, 12 + 8)


@pytest.mark.parametrize("opset", [11, 13])
def test_a_squeeze_of_all_axes_of_size_one_keeps_the_last_channel(opset):
    """One channel stays of eight, and is no axis that Squeeze drops; with an open batch size, all stay."""
    for batch, after in ((2, 3 + 2), ("n", 24 + 16)):
        net = Net(x=(batch, 3, 4, 4))
        net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=range(1, 8))], "c")
        net.node("GlobalAveragePool", ["c"], "g")
        net.node("Squeeze", ["g"], "s")
        net.node("MatMul", ["s", net.rand(8, 2)], "z")
        assert gained(net.case("z", opset=opset)) == (24 + 16, after)
