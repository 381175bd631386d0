"""What all blocks of a network read of their heads, computed once: biases, indices, sizes; exact counts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from graphs import shrunk, weight_elements
from onnx import TensorProto
from test_surgery_regressions import Net, gained

HEADS, TOKENS, WIDTH = 4, "T", 6
# of a block: what makes four heads of tokens, and what reads them
BLOCK = WIDTH * HEADS + HEADS * 3


def smaller(heads):
    """Return a block's weight elements with fewer heads."""
    return WIDTH * heads + heads * 3


class Blocks(Net):
    """Two blocks, each computing something for every head and token from the same input."""

    def __init__(self, merged):
        super().__init__(x=("N", TOKENS, WIDTH))
        self.merged = merged
        self.node("Shape", ["x"], "sizes")
        for name, place in (("N", 0), ("T", 1)):
            self.node("Gather", ["sizes", np.array([place])], name, axis=0)
        self.node("Reshape", ["T", np.array([], np.int64)], "t")
        self.node("Range", [np.int64(0), "t", np.int64(1)], "places")

    def block(self, number, unread, shared, operator):
        """Add a block whose heads meet what is shared; heads that are unread count for nothing."""
        name = f"b{number}"
        self.node("MatMul", ["x", self.rand(WIDTH, HEADS)], f"{name}h")
        self.node("Transpose", [f"{name}h"], f"{name}t", perm=[0, 2, 1])
        scores = f"{name}t"
        if self.merged:
            self.node("Concat", [np.array([-1]), "T"], f"{name}m", axis=0)
            self.node("Reshape", [scores, f"{name}m"], f"{name}r")
            scores = f"{name}r"
        more = {"axis": 1 if self.merged else 2} if operator == "GatherElements" else {}
        self.node(operator, [scores, shared], f"{name}s", **more)
        self.node("Concat", ["N", np.array([HEADS]), "T"], f"{name}c", axis=0)
        self.node("Reshape", [f"{name}s", f"{name}c"], f"{name}o")
        self.node("Softmax", [f"{name}o"], f"{name}p", axis=2)
        self.node("Transpose", [f"{name}p"], f"{name}u", perm=[0, 2, 1])
        self.node("MatMul", [f"{name}u", self.rand(HEADS, 3, dead=unread)], f"{name}y")


def counted(net):
    """Return the weight elements before and after, and how often each operator is in the result."""
    case = net.case("b1y", "b2y")
    assert gained(case) == (weight_elements(case.model), weight_elements(shrunk(case.model)))
    operators = Counter(node.op_type for node in shrunk(case.model).graph.node)
    return weight_elements(case.model), weight_elements(shrunk(case.model)), operators


def biased(merged, unread):
    """Return two blocks with a bias of each head that grows with the place (ALiBi), repeated for each sample or not."""
    net = Blocks(merged)
    net.node("Cast", ["places"], "ramp", to=TensorProto.FLOAT)
    net.node("Mul", [net.rand(HEADS, 1), "ramp"], "bias")
    if merged:
        net.node("Concat", ["N", np.array([1])], "times", axis=0)
        net.node("Tile", ["bias", "times"], "repeated")
    for number, dead in enumerate(unread, 1):
        net.block(number, dead, "repeated" if merged else "bias", "Add")
    return net


@pytest.mark.parametrize("merged", [False, True])
def test_a_bias_of_each_head_for_blocks_that_lose_different_ones(merged):
    """Each block has its own bias then, of one table that stays whole."""
    before, after, operators = counted(biased(merged, ([1], [0, 2])))
    assert (before, after) == (2 * BLOCK + HEADS, smaller(3) + smaller(2) + HEADS)
    assert operators["Mul"] == 2
    assert operators["Tile"] == 2 * merged


@pytest.mark.parametrize("merged", [False, True])
def test_a_bias_of_each_head_for_blocks_that_lose_the_same(merged):
    """There is one for both, as there was."""
    before, after, operators = counted(biased(merged, ([0, 2], [0, 2])))
    assert (before, after) == (2 * BLOCK + HEADS, 2 * smaller(2) + 2)
    assert operators["Mul"] == 1
    assert operators["Tile"] == merged


def test_a_bias_of_each_head_that_stays_as_it_is():
    """Where no head goes there is one for both blocks, as there was."""
    before, after, operators = counted(biased(True, ([], [])))
    assert before == after
    assert (operators["Mul"], operators["Tile"]) == (1, 1)


@pytest.mark.parametrize(("unread", "left"), [(([1], [0, 2]), 4), (([1], [1]), 3)])
def test_a_table_of_biases_cut_to_the_tokens_that_there_are(unread, left):
    """A Slice whose bounds are computed hands on the axes that it does not cut, a constant's too."""
    net = Blocks(merged=False)
    net.node("Slice", [net.rand(HEADS, 9), np.array([0]), "T", np.array([1])], "bias")
    for number, dead in enumerate(unread, 1):
        net.block(number, dead, "bias", "Add")
    heads = sum(smaller(HEADS - len(dead)) for dead in unread)
    assert counted(net)[:2] == (2 * BLOCK + 9 * HEADS, heads + 9 * left)


@pytest.mark.parametrize("merged", [False, True])
def test_indices_repeated_for_each_head(merged):
    """DeBERTa looks relative positions up in each head; with heads and samples in one axis the number is computed."""
    net = Blocks(merged)
    if merged:
        net.node("Mul", ["N", np.array([HEADS])], "rows")
        net.node("Concat", ["rows", "T"], "size", axis=0)
    else:
        net.node("Concat", ["N", np.array([HEADS]), "T"], "size", axis=0)
    net.node("Unsqueeze", ["places", np.array([0] if merged else [0, 1])], "one")
    net.node("Expand", ["one", "size"], "each")
    for number, dead in enumerate(([1], [0, 2]), 1):
        net.block(number, dead, "each", "GatherElements")
    before, after, operators = counted(net)
    assert (before, after) == (2 * BLOCK, smaller(3) + smaller(2))
    assert operators["Expand"] == 2


def test_constant_values_under_weights_of_heads_and_samples_in_one_axis():
    """Weights that sum to one still do behind a Reshape and a Transpose that leave their axis alone."""
    for order, axis, folded in (([0, 1, 2], 2, True), ([0, 2, 1], 1, True), ([0, 1, 2], 1, False)):
        net = Net(x=("N", 8, 5, 5), v=("N", 5, WIDTH))
        net.node("Softmax", ["x"], "p", axis=3 if axis == 2 else 2)
        net.node("Reshape", ["p", np.array([-1, 5, 5])], "m")
        net.node("Transpose", ["m"], "w", perm=order if folded else [0, 1, 2])
        net.node("MatMul", ["v", net.rand(WIDTH, 4, dead=[1], axis=1)], "a")
        net.node("Add", ["a", net.rand(4)], "b")
        net.node("Unsqueeze", ["b", np.array([1])], "e")
        net.node("Expand", ["e", np.array([1, 8, 1, 1])], "f")
        net.node("Reshape", ["f", np.array([-1, 5, 4])], "values")
        net.node("MatMul", ["w", "values"], "z")
        net.node("MatMul", ["z", net.rand(4, 3)], "y")
        # the constant that goes is folded into a bias, which there was none of
        after = WIDTH * 3 + 3 + 9 + 3 if folded else WIDTH * 4 + 4 + 12
        assert gained(net.case("y")) == (WIDTH * 4 + 4 + 12, after)


def test_sizes_that_hang_on_the_data_beside_channels():
    """A tensor shaped as another has its size read anew, but for the channels."""
    net = Net(x=(5, WIDTH))
    net.node("ReduceSum", ["x", np.array([1])], "total", keepdims=0)
    net.node("NonZero", ["total"], "found")
    net.node("Reshape", ["found", np.array([-1])], "rows")
    net.node("MatMul", ["x", net.rand(WIDTH, HEADS, dead=[1], axis=1)], "h")
    net.node("Gather", ["h", "rows"], "picked", axis=0)
    net.node("Shape", ["picked"], "size")
    net.node("ConstantOfShape", ["size"], "nothing")
    net.node("Max", ["picked", "nothing"], "most")
    net.node("MatMul", ["most", net.rand(HEADS, 3)], "y")
    assert gained(net.case("y")) == (WIDTH * HEADS + HEADS * 3, WIDTH * 3 + 3 * 3)
