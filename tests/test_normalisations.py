"""Normalisations lose what their mean can do without, and nothing else: exact counts, pins with their reasons."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphs import failure, shrunk, weight_elements
from test_surgery_regressions import Net, gained

from etp_deploy.inspection import explain
from etp_deploy.surgery.statements.normalised import Centred, Normed

MICROSOFT = "com.microsoft"
RMS = [("RMSNormalization", 23), ("SimplifiedLayerNormalization", 17)]


def attributes(model, operator):
    """Return the attributes of the first node of an operator."""
    node = next(node for node in model.graph.node if node.op_type == operator)
    return {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}


def reasons(case, tmp_path, tensor):
    """Return the explanation of a tensor as one text."""
    path = tmp_path / "model.onnx"
    onnx.save(case.model, path)
    return "\n".join(explain(path, tensor, align="off").lines)


def stays(case):
    """Return whether nothing is removed, and the outputs are equal."""
    before, after = gained(case)
    return before == after


# roots of means of squares


def stream(operator, opset, dead):
    """Return a residual stream of eight channels with a norm in front of each reader."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=dead, axis=1)], "s")
    net.node(operator, ["s", net.rand(8)], "n", epsilon=0.3)
    net.node("MatMul", ["n", net.rand(8, 7)], "h")
    net.node("Relu", ["h"], "r")
    net.node("MatMul", ["r", net.rand(7, 8, dead=dead, axis=1)], "o")
    net.node("Add", ["s", "o"], "t")
    net.node(operator, ["t", net.rand(8)], "m")
    net.node("MatMul", ["m", net.rand(8, 3)], "y")
    return net.case("y", opset=opset)


def stream_elements(width):
    """Return the weights of the stream's network at a width."""
    return 6 * width + width + 7 * width + 7 * width + width + 3 * width


@pytest.mark.parametrize(("operator", "opset"), RMS)
def test_a_stream_under_norms_shrinks_to_what_lives(operator, opset):
    """Zero channels leave stream, scales and readers; scale and epsilon keep the mean."""
    case = stream(operator, opset, dead=(1, 4, 7))
    assert gained(case) == (stream_elements(8), stream_elements(5))
    assert attributes(shrunk(case.model), operator)["epsilon"] == pytest.approx(0.3 * 8 / 5)


def test_without_the_rescaled_mean_the_outputs_differ(monkeypatch):
    """Negative control: a norm that is cut like any elementwise operator computes something else."""
    monkeypatch.setattr(Normed, "edits", Normed.__mro__[1].edits)
    assert failure(stream("RMSNormalization", 23, dead=(1, 4, 7)), floor=False).startswith("wrong")


def constant_channels(unread):
    """Return eight channels of which three are constants, under a norm that is read but for some channels."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(0, 3, 5), axis=1)], "a")
    net.node("Add", ["a", np.array([0.7, 0.1, 0.2, -2.0, 0.3, 0.0, 0.5, 0.1], np.float32)], "b")
    net.node("RMSNormalization", ["b", net.rand(8)], "n", epsilon=0.25)
    net.node("MatMul", ["n", net.rand(8, 4, dead=unread)], "y")
    return net.case("y", opset=23)


def test_constants_that_nobody_reads_become_epsilon():
    """A constant adds its square to every mean, which is what epsilon does."""
    case = constant_channels(unread=(0, 3))
    before, after = gained(case)
    assert (before, after) == (6 * 8 + 8 + 8 + 32, 6 * 5 + 5 + 5 + 20)
    epsilon = attributes(shrunk(case.model), "RMSNormalization")["epsilon"]
    assert epsilon == pytest.approx((0.25 * 8 + 0.7**2 + 2.0**2) / 5)


def test_constants_that_are_read_stay(tmp_path):
    """What the norm makes of a constant depends on the other channels: only the zero channel goes."""
    case = constant_channels(unread=())
    assert gained(case) == (6 * 8 + 8 + 8 + 32, 6 * 7 + 7 + 7 + 28)
    assert "RMSNormalization" in reasons(case, tmp_path, "b")


def test_a_channel_that_is_not_read_stays_in_the_mean(monkeypatch):
    """A live channel that nobody reads after the norm is in the mean of those that are read (and the control)."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8)], "a")
    net.node("RMSNormalization", ["a", net.rand(8)], "n")
    net.node("MatMul", ["n", net.rand(8, 4, dead=(2, 3))], "y")
    case = net.case("y", opset=23)
    assert stays(case)
    monkeypatch.setattr(Normed, "spread", Normed.__mro__[1].spread)
    assert failure(case, floor=False).startswith("wrong")


def test_a_norm_inside_each_head():
    """Queries normalised head by head lose dimensions that are zero in every head, and whole heads."""
    net = Net(x=(2, 5, 6))
    dead = [head * 4 + 1 for head in range(3)] + [4, 5, 6, 7]
    net.node("MatMul", ["x", net.rand(6, 12, dead=dead, axis=1)], "a")
    net.node("Reshape", ["a", np.array([0, 0, 3, 4])], "h")
    net.node("RMSNormalization", ["h", net.rand(4)], "n")
    net.node("Reshape", ["n", np.array([0, 0, 12])], "b")
    net.node("MatMul", ["b", net.rand(12, 4)], "y")
    assert gained(net.case("y", opset=23)) == (72 + 4 + 48, 6 * 6 + 3 + 6 * 4)


@pytest.mark.parametrize(
    ("attributes", "scale", "why"),
    [
        ({"axis": -2}, (5, 8), "several axes"),
        ({"axis": 1}, (8,), "several axes"),
        ({}, "computed", "its scale is computed"),
    ],
)
def test_norms_that_are_not_understood_stay(attributes, scale, why, tmp_path):
    """Several normalised axes, or a scale that is computed, pin the channels."""
    net = Net(x=(2, 5, 6), z=(8,))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(1, 4), axis=1)], "a")
    net.node("Neg", ["z"], "computed")
    net.node("RMSNormalization", ["a", scale if scale == "computed" else net.rand(*scale)], "n", **attributes)
    net.node("MatMul", ["n", net.rand(8, 4)], "y")
    case = net.case("y", opset=23)
    assert stays(case)
    assert why in reasons(case, tmp_path, "a")


def test_statistics_that_are_read_pin_the_norm(tmp_path):
    """The inverse deviation as a second output would change."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(1, 4), axis=1)], "a")
    net.node("SimplifiedLayerNormalization", ["a", net.rand(8)], ["n", "d"])
    net.node("MatMul", ["n", net.rand(8, 4)], "y")
    case = net.case("y", "d", opset=17)
    assert stays(case)
    assert "second output" in reasons(case, tmp_path, "a")


@pytest.mark.parametrize("p", [1, 2])
def test_unit_length_loses_zeros_and_nothing_else(p):
    """A sum of powers does not know of zeros; what is live and not read stays in it."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(1, 4), axis=1)], "a")
    net.node("LpNormalization", ["a"], "n", p=p)
    net.node("MatMul", ["n", net.rand(8, 4, dead=(0,))], "y")
    assert gained(net.case("y")) == (48 + 32, 36 + 24)


# sums and norms in one node


def skipping(operator, affine, *, dead, biased=True, outputs=4):
    """Return two of ONNX Runtime's sums with a norm, the second reading the first's sum."""
    net = Net(x=(2, 5, 6))
    for name in ("s", "o"):
        net.node("MatMul", ["x", net.rand(6, 8, dead=dead, axis=1)], name)
    bias = net.rand(8, dead=dead)
    rest = [bias] if biased else []
    names = ["n", "", "", "t"][:outputs]
    scales = [net.rand(8, dead=dead) if place else net.rand(8) for place in range(affine)]
    net.node(operator, ["s", "o", *scales, *rest], names, domain=MICROSOFT, epsilon=0.2)
    net.node("MatMul", ["n", net.rand(8, 8, dead=dead, axis=1)], "p")
    net.node(operator, ["t" if outputs > 3 else "s", "p", *scales], "m", domain=MICROSOFT, epsilon=0.2)
    net.node("MatMul", ["m", net.rand(8, 3)], "y")
    return with_microsoft(net.case("y", opset=17))


def with_microsoft(case):
    """Let a case import ONNX Runtime's operators."""
    case.model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    return case


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outputs", [4, 1])
def test_a_stream_through_fused_norms_shrinks_and_stays_fused(biased, outputs):
    """Sum, bias and norm lose the same channels, and come back as the node that they were."""
    operator = "SkipSimplifiedLayerNormalization"
    case = skipping(operator, 1, dead=(1, 4, 7), biased=biased, outputs=outputs)
    before, after = gained(case)
    assert before == 2 * 48 + 2 * 8 + 64 + 24 + 8 * biased
    # the two scales are equal: their cuts are one initializer
    assert after == 2 * 30 + 5 + 25 + 15 + 5 * biased
    assert [node.op_type for node in shrunk(case.model).graph.node].count(operator) == 2


def test_a_fused_layer_normalization_pins_its_axis(tmp_path):
    """Mean and variance are over dead channels too; nothing is changed."""
    case = skipping("SkipLayerNormalization", 2, dead=(1, 4))
    assert stays(case)
    assert "mean and variance" in reasons(case, tmp_path, "t")


def test_fused_statistics_that_are_read_pin_the_node(tmp_path):
    """A node whose statistics are outputs is left as it is, and says so."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(1, 4), axis=1)], "a")
    names = ["n", "m", "d"]
    net.node("SkipSimplifiedLayerNormalization", ["a", "a", net.rand(8)], names, domain=MICROSOFT)
    net.node("MatMul", ["n", net.rand(8, 4)], "y")
    case = with_microsoft(net.case("y", "d", opset=17))
    assert stays(case)
    assert "gives its statistics out" in reasons(case, tmp_path, "a")


# means and variances


def in_groups(form, dead, *, bias=False, groups=4):
    """Return a convolution, a group normalisation in one of its forms and a padded reader."""
    net = Net(x=(2, 3, 6, 5))
    given = [net.rand(8)] if bias else []
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=dead), *given], "a")
    if form == "written out":
        net.node("Reshape", ["a", np.array([0, groups, -1])], "r")
        ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
        net.node("InstanceNormalization", ["r", ones, zeros], "i", epsilon=0.01)
        net.node("Reshape", ["i", np.array([2, 8, 6, 5])], "b")
        net.node("Mul", ["b", net.rand(8, 1, 1)], "m")
        net.node("Add", ["m", net.rand(8, 1, 1)], "n")
    else:
        size = 8 if form == "by channel" else groups
        scales = [net.rand(size), net.rand(size)]
        net.node("GroupNormalization", ["a", *scales], "n", num_groups=groups, epsilon=0.01)
    net.node("Relu", ["n"], "q")
    net.node("Conv", ["q", net.rand(4, 8, 1, 1)], "y")
    return net.case("y", opset=18 if form == "by group" else 21)


def group_elements(form, width, groups, folded):
    """Return the weights of that network."""
    affine = {"by channel": 2 * width, "by group": 2 * groups, "written out": 2 * width + 2 * groups}
    return 3 * width + affine[form] + 4 * width + folded


FORMS = ["by channel", "by group", "written out"]


@pytest.mark.parametrize("form", FORMS)
def test_groups_go_as_a_whole(form):
    """Of four groups of two the one that is zero goes, and what it leaves (its bias) joins the reader's bias."""
    case = in_groups(form, dead=(2, 3, 4))
    assert gained(case) == (group_elements(form, 8, 4, 0), group_elements(form, 6, 3, 4))
    if form != "written out":
        assert attributes(shrunk(case.model), "GroupNormalization")["num_groups"] == 3


def test_without_whole_groups_the_outputs_differ(monkeypatch):
    """Negative control: a group that loses one of its channels has another mean."""
    case = read_in_part(in_groups("written out", dead=()), unread=(0, 3, 4, 6))
    assert stays(case)
    monkeypatch.setattr(Centred, "spread", Centred.__mro__[1].spread)
    assert failure(case, floor=False).startswith("wrong")


def read_in_part(case, unread):
    """Let the reader of eight channels not read some of them."""
    for item in case.model.graph.initializer:
        if tuple(item.dims) == (4, 8, 1, 1):
            array = onnx.numpy_helper.to_array(item).copy()
            array[:, list(unread)] = 0
            item.raw_data = array.tobytes()
    return case


@pytest.mark.parametrize("form", FORMS)
def test_constants_in_a_group_stay(form):
    """ONNX Runtime's mean of equal numbers is not that number: what a group makes of constants is not known."""
    case = in_groups(form, dead=(2, 3), bias=True)
    assert stays(case)


@pytest.mark.parametrize("form", FORMS)
def test_a_group_that_nobody_reads_goes(form):
    """Live channels of a group that is not read go with it; a group that is read in part stays."""
    case = read_in_part(in_groups(form, dead=()), unread=(0, 4, 5))
    assert gained(case) == (group_elements(form, 8, 4, 0), group_elements(form, 6, 3, 0))


def test_groups_in_a_residual_stream():
    """A stream around a group normalisation that is written out loses the group that all its writers lost."""
    net = Net(x=(2, 3, 6, 5))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(0, 1, 5))], "s")
    net.node("Reshape", ["s", np.array([0, 4, -1])], "r")
    net.node("InstanceNormalization", ["r", np.ones(4, np.float32), np.zeros(4, np.float32)], "i")
    net.node("Reshape", ["i", np.array([2, 8, 6, 5])], "b")
    net.node("Conv", ["b", net.rand(8, 8, 3, 3, dead=(0, 1, 4))], "c", pads=[1, 1, 1, 1])
    net.node("Add", ["s", "c"], "t")
    net.node("Conv", ["t", net.rand(4, 8, 1, 1)], "y")
    before, after = 24 + 8 + 8 * 8 * 9 + 32, 18 + 6 + 6 * 6 * 9 + 24
    assert gained(net.case("y")) == (before, after)


@pytest.mark.parametrize(("bias", "after"), [(None, 5 * 3 + 10 + 20 + 4), (0.5, 24 + 8 + 16 + 32)])
def test_a_zero_channel_of_an_instance_normalization_is_its_bias(bias, after):
    """Zero minus its mean is zero, exactly; of another constant ONNX Runtime leaves a rounding error."""
    net = Net(x=(2, 3, 6, 5))
    given = [] if bias is None else [np.full(8, bias, np.float32)]
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(1, 2, 6)), *given], "a")
    net.node("InstanceNormalization", ["a", net.rand(8), net.rand(8)], "n", epsilon=0.01)
    net.node("Conv", ["n", net.rand(4, 8, 1, 1)], "y")
    case = net.case("y")
    before = 24 + 16 + 32 + (0 if bias is None else 8)
    assert gained(case) == (before, after)


def test_a_mean_over_the_batch_and_space_leaves_channels_free():
    """MeanVarianceNormalization loses channels that nobody reads, and no others."""
    net = Net(x=(2, 3, 6, 5))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1)], "a")
    net.node("MeanVarianceNormalization", ["a"], "n")
    net.node("Conv", ["n", net.rand(4, 8, 1, 1, dead=(1, 2), axis=1)], "y")
    assert gained(net.case("y")) == (24 + 32, 18 + 24)
    assert weight_elements(net.case("y").model) == 56


@pytest.mark.parametrize(("opset", "after"), [(11, 24 + 8 + 16), (13, 18 + 6 + 12)])
@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "Hardmax"])
def test_a_softmax_without_an_axis_runs_over_all_but_the_first(operator, opset, after):
    """Before opset 13 channels that nobody reads are in its sums too, and stay."""
    net = Net(x=(2, 3, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1), net.rand(8) + 1], "y")
    net.node(operator, ["y"], "p")
    net.node("Conv", ["p", net.rand(2, 8, 1, dead=(2, 5), axis=1)], "z")
    assert gained(net.case("z", opset=opset)) == (48, after)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize(("opset", "after"), [(11, 30 + 6 + 18), (13, 20 + 4 + 12 + 3)])
def test_rows_of_an_old_softmax_do_not_sum_to_one(opset, after, guarded):
    """Constant values are averaged to themselves by rows that sum to one, and by no others."""
    net = Net(x=(2, 5, 5))
    net.node("Softmax", ["x"], "s")
    if guarded:
        net.node("IsNaN", ["s"], "n")
        net.node("Where", ["n", np.zeros((), np.float32), "s"], "t")
    net.node("MatMul", ["x", net.rand(5, 6, dead=(1, 2), axis=1)], "u")
    net.node("Add", ["u", net.rand(6)], "v")
    net.node("MatMul", ["t" if guarded else "s", "v"], "o")
    net.node("MatMul", ["o", net.rand(6, 3)], "z")
    before, after = 54 + guarded, after + guarded
    assert gained(net.case("z", opset=opset)) == (before, after)
