"""Tensors without entries: taken from channels, joined with them, contracted; what is beside them loses its dead."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained

# of six channels one is dead; what it held goes into a bias of two
WHOLE, LEFT = 24 + 6 + 12, 20 + 5 + 10 + 2


def channels(net, name="h"):
    """Add six channels of which one is dead and holds a constant; return their name."""
    net.node("MatMul", ["x", net.rand(4, 6, dead=(1,), axis=1)], f"{name}_product")
    net.node("Add", [f"{name}_product", net.rand(6)], name)
    return name


def joined(net, *names, axis=1, opset=18):
    """Return the weight elements before and after, tensors being joined and read by a matrix."""
    net.node("Concat", list(names), "c", axis=axis)
    net.node("MatMul", ["c", net.rand(6, 2)], "y")
    return gained(net.case("y", opset=opset))


@pytest.mark.parametrize(
    ("start", "end", "step"), [(3, 3, 1), (5, 2, 1), (2, 5, -1), (6, 99, 1), (0, 0, 2)], ids=str
)
def test_a_slice_that_takes_nothing(start, end, step):
    """No channel is read by it, and its bounds stay."""
    net = Net(x=("B", 4))
    bounds = [np.array([bound]) for bound in (start, end, 1, step)]
    net.node("Slice", [channels(net), *bounds], "s")
    assert joined(net, "s", "h") == (WHOLE, LEFT)


def test_a_slice_with_attributes_that_takes_nothing():
    """The same, before opset 10."""
    net = Net(x=("B", 4))
    net.node("Slice", [channels(net)], "s", starts=[4], ends=[2], axes=[1])
    assert joined(net, "s", "h", opset=9) == (WHOLE, LEFT)


@pytest.mark.parametrize("sizes", [(0, 6), (6, 0), (2, 0, 4), (0, 0, 6), (1, 5)], ids=str)
def test_a_split_with_pieces_of_nothing(sizes):
    """An empty piece stays empty; the others lose what is dead in them."""
    net = Net(x=("B", 4))
    names = [f"s{place}" for place in range(len(sizes))]
    net.node("Split", [channels(net), np.array(sizes)], names, axis=1)
    assert joined(net, *names[::-1]) == (WHOLE, LEFT)


@pytest.mark.parametrize(("shape", "axis"), [((3, 0), 1), ((0, 6), 0)], ids=["channels", "rows"])
def test_a_constant_without_entries_is_joined(shape, axis):
    """It has no channels and no rows, so that none of them hold anything else."""
    net = Net(x=(3, 4))
    channels(net)
    net.weights["none"] = np.zeros(shape, np.float32)
    assert joined(net, "none", "h", axis=axis) == (WHOLE, LEFT)


def test_a_matrix_without_rows():
    """A product with no channels is zeros: its bias is all there is; each tensor keeps a channel."""
    net = Net(x=("B", 4))
    net.node("Slice", [channels(net), *(np.array([bound]) for bound in (3, 3, 1))], "s")
    net.node("MatMul", ["s", np.zeros((0, 3), np.float32)], "p")
    net.node("Add", ["p", net.rand(3)], "b")
    net.node("MatMul", ["b", net.rand(3, 2)], "y")
    assert gained(net.case("y")) == (24 + 6 + 3 + 6, 4 + 1 + 1 + 2 + 2)
