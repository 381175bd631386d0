"""Graphs that the surgery once got wrong, each as small as it goes."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Case, failure, run, shrunk, weight_elements
from onnx import helper, numpy_helper

from etp_deploy.errors import EtpError
from etp_deploy.sizes import count_macs
from etp_deploy.surgery.prepare import prepare


class Net:
    """A small graph under construction: float inputs, weights from one seed, nodes in order."""

    def __init__(self, **inputs):
        self.random = np.random.default_rng(0)
        self.inputs = inputs
        self.nodes, self.weights = [], {}

    def rand(self, *shape, dead=None, axis=0):
        """Return random numbers, zero at some indices of an axis."""
        array = self.random.standard_normal(shape).astype(np.float32)
        if dead is not None:
            array[(slice(None),) * axis + (list(dead),)] = 0
        return array

    def node(self, operator, inputs, output, **attributes):
        """Add a node; arrays among its inputs become initializers."""
        names = []
        for item in inputs:
            if isinstance(item, str):
                names.append(item)
            else:
                names.append(f"w{len(self.weights)}")
                self.weights[names[-1]] = np.asarray(item)
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(helper.make_node(operator, names, outputs, **attributes))

    def case(self, *outputs, opset=18, overridable=()):
        """Return the graph with inputs for it; named dimensions are 2."""
        infos = {**self.inputs, **{name: self.weights[name].shape for name in overridable}}
        graph = helper.make_graph(
            self.nodes,
            "small",
            [
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
                for name, shape in infos.items()
            ],
            [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
        feeds = {
            name: self.rand(*(4 if isinstance(size, str) else size for size in shape))
            for name, shape in self.inputs.items()
        }
        return Case(model, feeds)


def gained(case):
    """Return the weight elements before and after, having checked that nothing else changed."""
    assert failure(case) is None
    return weight_elements(case.model), weight_elements(shrunk(case.model))


@pytest.mark.parametrize(("beta", "folded"), [(0.5, 3), (-1.5, 0), (2.0, 3)])
def test_constants_behind_a_scaled_bias(beta, folded):
    """Gemm multiplies its bias by beta, and the constants of dead neurons with it."""
    net = Net(x=(2, 4))
    net.node("Gemm", ["x", net.rand(8, 4, dead=(1, 3)), net.rand(8) + 2], "y", transB=1, beta=beta, alpha=0.7)
    net.node("Relu", ["y"], "r")
    net.node("Gemm", ["r", net.rand(3, 8)], "z", transB=1)
    assert gained(net.case("z")) == (64, 6 * 4 + 6 + 3 * 6 + folded)


def test_resize_to_sizes_that_name_the_channels():
    """Sizes of a Resize include the channel count, which follows."""
    net = Net(x=(1, 3, 4, 4))
    net.node("Conv", ["x", net.rand(8, 3, 3, 3, dead=(2, 5))], "y", pads=[1, 1, 1, 1])
    net.node("Resize", ["y", "", "", np.array([1, 8, 8, 8])], "r", mode="nearest")
    net.node("Conv", ["r", net.rand(2, 8, 1, 1)], "z")
    assert gained(net.case("z")) == (8 * 27 + 16, 6 * 27 + 12)


def test_resize_along_channels():
    """A Resize that makes 16 channels of 8 relates them in no way we follow."""
    net = Net(x=(1, 3, 4, 4))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(2, 5))], "y")
    net.node("Resize", ["y", "", np.array([1, 2, 1, 1], np.float32)], "r", mode="nearest")
    net.node("Conv", ["r", net.rand(2, 16, 1, 1)], "z")
    gained(net.case("z"))


@pytest.mark.parametrize("between", ["Slice", "MaxPool", "AveragePool", "ReduceMax", "ReduceMean", "Gather"])
def test_rows_that_no_longer_sum_to_one(between):
    """Only what leaves a Softmax as it is hands on that its rows sum to one."""
    net = Net(x=(1, "S", 4))
    net.node("MatMul", ["x", net.rand(4, 4)], "q")
    net.node("Transpose", ["x"], "t", perm=[0, 2, 1])
    net.node("MatMul", ["q", "t"], "s")
    net.node("Softmax", ["s"], "p", axis=-1)
    net.node("Identity", ["x"], "x2")
    if between == "Slice":
        net.node("Slice", ["p", np.array([1]), np.array([3]), np.array([2])], "p2")
        net.nodes.pop(-2)
        net.node("Slice", ["x", np.array([1]), np.array([3]), np.array([1])], "x2")
    elif between == "Gather":
        net.node("Gather", ["p", np.array([1, 0])], "p2", axis=2)
        net.nodes.pop(-2)
        net.node("Gather", ["x", np.array([1, 0])], "x2", axis=1)
    elif between.endswith("Pool"):
        net.node(between, ["p"], "p2", kernel_shape=[3], pads=[1, 1])
    else:
        net.node(between, ["p"], "p2", axes=[1])
    net.node("MatMul", ["x2", np.zeros((4, 6), np.float32)], "v0")
    net.node("Add", ["v0", net.rand(6)], "v")
    net.node("MatMul", ["p2", "v"], "o")
    net.node("MatMul", ["o", net.rand(6, 3)], "z")
    gained(net.case("z", opset=13))


def test_a_weight_that_three_products_share():
    """Different cuts of one shared weight would be more than the weight itself."""
    net = Net(x=(2, 40))
    net.node("MatMul", ["x", net.rand(40, 40, dead=range(0, 40, 10), axis=1)], "a")
    net.node("MatMul", ["a", "w0"], "b")
    net.node("MatMul", ["b", "w0"], "c")
    before, after = gained(net.case("c"))
    assert after <= before


def test_a_weight_shared_by_what_could_lose_inputs_and_what_could_not():
    """All inputs stay on both sides, though on one of them they are channels; the outputs go from the one weight."""
    net = Net(x=(2, 6))
    shared, reader = net.rand(6, 8), net.rand(8, 3, dead=(1, 4))
    net.node("MatMul", ["x", net.rand(6, 6)], "h")
    for name, source in (("a", "x"), ("b", "h")):
        net.node("MatMul", [source, shared if name == "a" else "w1"], name)
        net.node("Relu", [name], f"{name}r")
        net.node("MatMul", [f"{name}r", reader if name == "a" else "w2"], f"{name}y")
    assert gained(net.case("ay", "by")) == (36 + 48 + 24, 36 + 36 + 18)


def test_a_filter_that_two_convolutions_share():
    """As for products."""
    net = Net(x=(2, 4, 9))
    net.node("Conv", ["x", net.rand(4, 4, 3, dead=(1,))], "a", pads=[1, 1])
    net.node("Conv", ["a", "w0", net.rand(4)], "b", pads=[1, 1])
    before, after = gained(net.case("b"))
    assert after <= before


def test_an_initializer_that_a_caller_may_override():
    """An initializer that is also an input holds what the caller says: it is no constant."""
    net = Net(x=(2, 4))
    net.node("Gemm", ["x", net.rand(8, 4, dead=(1,))], "y", transB=1)
    net.node("Gemm", ["y", net.rand(3, 8)], "z", transB=1)
    case = net.case("z", overridable=("w0",))
    before, after = gained(case)
    assert after <= before
    feeds = {**case.feeds, "w0": np.ones((8, 4), np.float32)}
    assert np.allclose(run(case.model, feeds)[0], run(shrunk(case.model), feeds)[0], rtol=1e-5)


@pytest.mark.parametrize("opset", [11, 12])
def test_an_equal_split_of_an_old_opset(opset):
    """Before opset 13 the sizes of a Split are an attribute, also where it had none."""
    net = Net(x=(2, 4))
    net.node("Gemm", ["x", net.rand(8, 4, dead=(1,))], "y", transB=1)
    net.node("Split", ["y"], ["a", "b"], axis=1)
    net.node("Concat", ["b", "a"], "c", axis=1)
    net.node("Gemm", ["c", net.rand(3, 8)], "z", transB=1)
    assert gained(net.case("z", opset=opset)) == (56, 49)


def test_even_and_odd_halves():
    """Slices by two cannot say every selection; where they cannot, all stays, and nothing is refused."""
    net = Net(x=(2, 4))
    net.node("MatMul", ["x", net.rand(4, 8, dead=(1, 5), axis=1)], "y")
    for name, start in (("even", 0), ("odd", 1)):
        net.node("Slice", ["y", *(np.array([entry]) for entry in (start, 100, -1, 2))], name)
    net.node("Concat", ["even", "odd"], "c", axis=1)
    net.node("MatMul", ["c", net.rand(8, 3)], "z")
    gained(net.case("z"))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("dead", "biased"), [((0, 2), True), (range(4), True), (range(4), False)])
def test_attention_over_tokens_that_are_channels(groups, dead, biased):
    """Constant channels of a convolution are tokens of an attention: a Softmax over them counts each of them."""
    net = Net(x=(2, 4, 9))
    inputs = ["x", net.rand(4, 4 // groups, 1, dead=dead), *([net.rand(4)] if biased else [])]
    net.node("Conv", inputs, "y", group=groups)
    net.node("MatMul", ["y", net.rand(9, 9, dead=(0, 1, 2, 3, 6, 7), axis=1)], "qkv0")
    net.node("Add", ["qkv0", net.rand(9)], "qkv")
    net.node("Split", ["qkv", np.array([3, 3, 3])], ["q", "k", "v"], axis=2)
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        net.node("Reshape", [name, np.array([-1, 4, 3, 1])], f"{name}h")
        net.node("Transpose", [f"{name}h"], f"{name}t", perm=perm)
    net.node("MatMul", ["qt", "kt"], "s")
    net.node("Softmax", ["s"], "p", axis=-1)
    net.node("MatMul", ["p", "vt"], "o")
    net.node("Transpose", ["o"], "ot", perm=[0, 2, 1, 3])
    net.node("Reshape", ["ot", np.array([-1, 4, 3])], "m")
    net.node("MatMul", ["m", net.rand(3, 9)], "z")
    gained(net.case("z"))


@pytest.mark.parametrize("dead", [(), (1, 4), range(12)])
def test_channels_and_columns_merged_by_a_flatten(dead):
    """A Flatten may merge two axes of which both lose channels."""
    net = Net(x=(2, 3, 6, 5))
    net.node("Conv", ["x", net.rand(15, 1, 2, 3, dead=(0, 6, 7, 12)), net.rand(15)], "y", group=3)
    net.node("MatMul", ["y", net.rand(3, 12, dead=dead, axis=1)], "m")
    net.node("Flatten", ["m"], "f", axis=1)
    net.node("Gemm", ["f", net.rand(900, 8), net.rand(8)], "z")
    gained(net.case("z"))


def test_a_softmax_over_a_merged_axis():
    """An axis of which a part holds channels meets one of which nothing can be removed."""
    net = Net(x=(2, 3, 6, 5))
    net.node("MatMul", ["x", net.rand(5, 12, dead=(1, 5, 6), axis=1)], "y")
    net.node("Reshape", ["y", np.array([-1, 3, 72])], "r")
    net.node("Transpose", ["r"], "t", perm=[0, 2, 1])
    net.node("MatMul", ["t", net.rand(3, 9, dead=(4,), axis=1)], "m")
    net.node("Split", ["m", np.array([3, 3, 3])], ["q", "k", "v"], axis=2)
    for name, perm in (("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        net.node("Reshape", [name, np.array([2, 72, 1, 3])], f"{name}h")
        net.node("Transpose", [f"{name}h"], f"{name}t", perm=perm)
    net.node("Softmax", ["kt"], "p", axis=-1)
    net.node("MatMul", ["p", "vt"], "z")
    gained(net.case("z"))


def test_projections_that_are_wholly_dead_keep_the_same_channel():
    """Emptied tensors that must line up get one channel back together, not one each."""
    net = Net(x=(2, 5, 6))
    for name, perm, dead in (
        ("q", [0, 2, 1, 3], (0, 1, 4)),
        ("k", [0, 2, 3, 1], (2, 3, 5, 9)),
        ("v", [0, 2, 1, 3], range(12)),
    ):
        net.node("MatMul", ["x", net.rand(6, 12, dead=dead, axis=1)], name)
        net.node("Reshape", [name, np.array([2, 5, 4, 3])], f"{name}h")
        net.node("Transpose", [f"{name}h"], f"{name}t", perm=perm)
    net.node("MatMul", ["qt", "kt"], "s")
    net.node("MatMul", ["s", "vt"], "o")
    net.node("Transpose", ["o"], "ot", perm=[0, 2, 1, 3])
    net.node("Reshape", ["ot", np.array([2, 5, 12])], "m")
    net.node("MatMul", ["m", net.rand(12, 6)], "z")
    # queries and keys keep a zero column each: two equal cuts, which are one
    assert gained(net.case("z")) == (4 * 72, 3 * 6)


def test_a_chain_whose_last_weight_is_zero():
    """The one channel that stays of a wholly unread tensor may hold anything: it keeps one channel before it."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 3)], "a")
    net.node("MatMul", ["a", net.rand(3, 6, dead=(0,))], "b")
    net.node("MatMul", ["b", np.zeros((6, 8), np.float32)], "c")
    case = net.case("c")
    assert failure(case) is None
    assert weight_elements(shrunk(case.model)) == 6 + 1 + 8


def test_a_channel_that_nothing_reads_stays_a_number():
    """In front of a Log no weights are taken for zeros: minus infinity times zero is no zero."""
    net = Net(x=(2, 5, 6))
    net.node("Abs", ["x"], "p")
    net.node("MatMul", ["p", np.abs(net.rand(6, 3))], "a")
    net.node("Log", ["a"], "b")
    net.node("MatMul", ["b", np.zeros((3, 8), np.float32)], "c")
    assert failure(net.case("c")) is None


def test_a_single_channel_that_is_read():
    """A tensor of one channel is kept by who reads it, not only because a tensor keeps at least one."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(0, 1), axis=1)], "a")
    net.node("Slice", ["a", np.array([3]), np.array([4]), np.array([2])], "b")
    net.node("MatMul", ["b", net.rand(1, 8)], "c")
    case = net.case("c")
    assert failure(case) is None
    assert weight_elements(shrunk(case.model)) == 6 + 8


def test_a_constant_part_of_a_concat_that_is_gone():
    """A part of which nothing is left is cut again without harm."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 6)], "a")
    net.node("Concat", ["a", np.zeros((2, 5, 3), np.float32)], "b", axis=2)
    net.node("MatMul", ["b", net.rand(9, 8)], "c")
    case = net.case("c")
    assert failure(case) is None
    assert weight_elements(shrunk(shrunk(case.model))) == 6 * 6 + 6 * 8


def test_a_window_larger_than_its_axis():
    """ONNX Runtime and shape inference disagree on such a pooling; what is raised, if anything, is ours."""
    net = Net(x=(2, 1, 7, 1))
    net.node("MaxPool", ["x"], "y", kernel_shape=[2, 2], strides=[2, 2])
    net.node("MatMul", ["y", net.rand(1, 3)], "z")
    with contextlib.suppress(EtpError):
        shrunk(net.case("z").model)


def test_a_filter_that_two_convolutions_share_under_an_alignment():
    """Cuts that an alignment makes larger than the shared filter together are not made."""
    net = Net(x=(2, 3, 6, 5))
    net.node("Gather", ["x", np.array([0, 1, 2, 0])], "g", axis=1)
    net.node("Conv", ["g", np.zeros((4, 4, 3, 3), np.float32)], "a", pads=[1, 1, 1, 1])
    net.node("Conv", ["a", "w1", net.rand(4)], "b", pads=[1, 1, 1, 1])
    case = net.case("b")
    assert failure(case, 3, floor=False) is None
    assert weight_elements(shrunk(case.model, 3)) <= weight_elements(case.model)


def test_an_attention_operator_on_constant_keys():
    """The Attention operator may be given keys and values that are initializers."""
    net = Net(q=(1, 1, 5, 1))
    net.node("Attention", ["q", net.rand(1, 1, 5, 1), net.rand(1, 1, 5, 1)], "y")
    assert failure(net.case("y", opset=23)) is None


def test_one_weight_written_as_two_initializers():
    """A weight used twice, which an exporter wrote twice, is cut twice alike: one cut is enough."""
    net = Net(x=(2, 8))
    up, down, shift = net.rand(8, 24, dead=(3, 7, 8), axis=1), net.rand(24, 8), np.abs(net.rand(24))
    for turn, source in enumerate(("x", "y0")):
        net.node("MatMul", [source, up], f"u{turn}")
        net.node("Add", [f"u{turn}", shift], f"a{turn}")
        net.node("Relu", [f"a{turn}"], f"r{turn}")
        net.node("MatMul", [f"r{turn}", down], f"y{turn}")
    one = 8 * 21 + 21 + 21 * 8
    # and one vector of folded constants
    assert gained(net.case("y1")) == (2 * (8 * 24 + 24 + 24 * 8), one + 8)


def test_sizes_that_are_not_known_are_not_equal():
    """PaddlePaddle declares -1 and "?" for unknown sizes: none is a number, and no two are one."""
    net = Net(x=("N", 3, "H", "W"))
    net.node("Conv", ["x", net.rand(6, 3, 3, 3, dead=(1,)), net.rand(6)], "y")
    net.node("GlobalAveragePool", ["y"], "p")
    net.node("Conv", ["p", net.rand(2, 6, 1, 1)], "z")
    proto = net.case("z").model
    sizes = proto.graph.input[0].type.tensor_type.shape.dim
    sizes[0].dim_value, sizes[2].dim_param, sizes[3].dim_param = -1, "?", "?"
    batch, _, height, width = prepare(ir.from_proto(proto)).graph.inputs[0].shape
    assert not isinstance(batch, int)
    assert height.value is None or height.value != width.value
    assert count_macs(ir.from_proto(proto)) in {None, 14 * 14 * 6 * 27 + 12}
    small, feeds = shrunk(proto), {"x": net.rand(2, 3, 5, 7)}
    assert weight_elements(small) == 5 * 27 + 5 + 2 * 5 + 2
    assert np.allclose(run(proto, feeds)[0], run(small, feeds)[0], rtol=1e-5, atol=1e-6)


def scattered(divided):
    """Return a graph that sums neighbours' channels by index, and divides by their number, at least one or not."""
    net = Net(x=(4, 6), where=(4, 1))
    size = np.array([4, 8])
    net.node("MatMul", ["x", net.rand(6, 8, dead=(1, 4, 5), axis=1)], "h")
    net.node("Cast", ["where"], "column", to=onnx.TensorProto.INT64)
    net.node("Reshape", ["column", np.array([-1])], "rows")
    net.node("Gather", ["h", "rows"], "message", axis=0)
    net.node("Expand", ["column", size], "places")
    net.node("ConstantOfShape", [size], "nothing")
    net.node("ScatterElements", ["nothing", "places", "message"], "sum", axis=0, reduction="add")
    net.node("ReduceSum", ["x", np.array([1])], "total", keepdims=1)
    net.node("Max", ["total", np.float32(1)], "number")
    net.node("Expand", ["number" if divided else "total", size], "numbers")
    net.node("Div", ["sum", "numbers"], "mean")
    net.node("MatMul", ["mean", net.rand(8, 3)], "y")
    return net.case("y")


def test_channels_that_are_summed_by_index():
    """Indices that are copied for each channel shrink with the channels, and a mean of zeros is zero."""
    assert gained(scattered(divided=True)) == (6 * 8 + 1 + 8 * 3, 6 * 5 + 1 + 5 * 3)


def test_zero_divided_by_what_may_be_zero():
    """Zero by zero is not zero: such channels stay; what goes is the least number, which nothing uses."""
    assert gained(scattered(divided=False)) == (6 * 8 + 1 + 8 * 3, 6 * 8 + 8 * 3)


def test_channels_that_are_picked_by_index():
    """Each channel's own indices go with it; where only some channels are picked, all stay."""
    for columns, after in ((8, 5 * 6 + 5 * 3), (7, 8 * 6 + 7 * 3)):
        net = Net(x=(4, 6))
        net.node("MatMul", ["x", net.rand(6, 8, dead=(1, 4, 5), axis=1)], "h")
        net.node("GatherElements", ["h", np.arange(3 * columns).reshape(3, columns) % 4], "g", axis=0)
        net.node("MatMul", ["g", net.rand(columns, 3)], "y")
        assert gained(net.case("y"))[1] == after


def test_a_sum_for_each_channel_of_each_sample():
    """What removed neurons gave to a sum is added once where channels and samples share an axis."""
    net = Net(x=("N", 2, 6))
    net.node("Conv", ["x", net.rand(3, 2, 1)], "c")
    net.node("Reshape", ["c", np.array([-1, 6])], "rows")
    net.node("MatMul", ["rows", net.rand(6, 8, dead=(1, 4, 5), axis=1)], "h")
    net.node("Add", ["h", net.rand(8)], "a")
    net.node("ReduceSum", ["a", np.array([1])], "total", keepdims=1)
    net.node("Div", ["a", "total"], "share")
    net.node("MatMul", ["share", net.rand(8, 3, dead=(1, 4, 5))], "y")
    assert gained(net.case("y")) == (6 + 48 + 8 + 24, 6 + 30 + 5 + 15 + 1)
