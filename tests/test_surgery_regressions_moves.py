"""Channels and pixels, and graphs that random ones showed to be refused or not to run; exact counts."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import failure, shrunk, weight_elements
from onnx import helper
from test_surgery_regressions import Net, gained


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_channels_become_pixels(mode):
    """A channel of the larger image goes with the four that its pixels were, biases alive."""
    net = Net(x=("N", 3, 4, 5))
    dead = (1, 4, 7, 10) if mode == "DCR" else (4, 5, 6, 7)
    bias = net.rand(12)
    bias[list(dead)] = 0.5
    net.node("Conv", ["x", net.rand(12, 3, 1, 1, dead=dead), bias], "a")
    net.node("DepthToSpace", ["a"], "b", blocksize=2, mode=mode)
    net.node("Relu", ["b"], "c")
    net.node("Conv", ["c", net.rand(4, 3, 1, 1), net.rand(4)], "y")
    assert gained(net.case("y")) == (36 + 12 + 12 + 4, 24 + 8 + 8 + 4)


def test_pixels_of_different_constants_stay():
    """Control: four constants that differ make an image, not a constant channel."""
    net = Net(x=(1, 3, 4, 5))
    net.node("Conv", ["x", net.rand(12, 3, 1, 1, dead=(1, 4, 7, 10)), net.rand(12) + 2], "a")
    net.node("DepthToSpace", ["a"], "b", blocksize=2)
    net.node("Conv", ["b", net.rand(4, 3, 1, 1), net.rand(4)], "y")
    assert gained(net.case("y")) == (36 + 12 + 12 + 4, 36 + 12 + 12 + 4)


def test_pixels_become_channels():
    """A dead channel goes with all the channels that its pixels become, a live one that nobody reads too."""
    net = Net(x=(2, 3, 4, 6))
    reader = net.rand(5, 16, 1, 1)
    reader[:, [1, 5, 9, 13]] = 0
    net.node("Conv", ["x", net.rand(4, 3, 1, 1, dead=(3,)), net.rand(4)], "a")
    net.node("SpaceToDepth", ["a"], "b", blocksize=2)
    net.node("Conv", ["b", reader, net.rand(5)], "y")
    assert gained(net.case("y")) == (12 + 4 + 80 + 5, 6 + 2 + 40 + 5)


def test_an_einsum_of_what_was_dequantised_runs():
    """The runtime cannot move DequantizeLinear behind a Transpose: such an Einsum stays one."""
    net = Net(x=(2, 3, 4))
    net.node("MatMul", ["x", net.rand(4, 6, dead=(1,), axis=1)], "a")
    net.node("QuantizeLinear", ["a", np.float32(0.1), np.uint8(128)], "q")
    net.node("DequantizeLinear", ["q", np.float32(0.1), np.uint8(128)], "d")
    net.node("Einsum", ["a", "d"], "e", equation="bnk,bmk->bnm")
    net.node("MatMul", ["e", net.rand(3, 2)], "y")
    assert failure(net.case("y", opset=21)) is None


def test_a_slice_to_an_end_that_is_far_away():
    """An end beyond any axis is that axis's own, also where its size is open."""
    net = Net(x=("N", 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8)], "h")
    net.node("Transpose", ["h"], "t", perm=[1, 2, 0])
    net.node("Slice", ["t", np.array([0]), np.array([1 << 31]), np.array([2])], "s")
    net.node("MatMul", ["s", net.rand(4, 4)], "m")
    net.node("Transpose", ["m"], "u", perm=[0, 2, 1])
    net.node("MatMul", ["u", net.rand(8, 3, dead=(0, 3))], "z")
    case = net.case("z")
    assert failure(case) is None
    assert (weight_elements(case.model), weight_elements(shrunk(case.model))) == (48 + 16 + 24, 36 + 16 + 18)


def test_a_body_declares_no_shape_that_it_did_not_declare():
    """The runtime's inference counts a pooling otherwise than its kernel: it must learn no shape to hold against it."""
    net = Net(x=(2, 7))
    net.node("MatMul", ["x", net.rand(7, 4)], "s")
    graph = helper.make_graph(
        [
            helper.make_node("Tanh", ["state"], ["next"]),
            helper.make_node("Identity", ["next"], ["seen"]),
            helper.make_node("Identity", ["more"], ["again"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", onnx.TensorProto.INT64, []),
            helper.make_tensor_value_info("more", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", onnx.TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("again", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", onnx.TensorProto.FLOAT, None),
            helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, None),
        ],
    )
    net.node("Loop", [np.array(2), np.array(True), "s"], ["last", "all"], body=graph)
    net.node("AveragePool", ["all"], "p", ceil_mode=1, kernel_shape=[1], strides=[2])
    net.node("MatMul", ["last", net.rand(4, 5, dead=(0, 1), axis=1)], "h")
    net.node("MatMul", ["h", net.rand(5, 2)], "y")
    net.node("MatMul", ["p", net.rand(2, 3)], "z")
    case = net.case("y", "z")
    assert gained(case) == (28 + 20 + 10 + 6, 28 + 12 + 6 + 6)
    body = next(node for node in shrunk(case.model).graph.node if node.op_type == "Loop").attribute[0].g
    assert not any(value.type.tensor_type.HasField("shape") for value in (body.input[2], *body.output[1:]))
