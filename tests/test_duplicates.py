"""Channels that are multiples of one another merge where that is exact, by exact counts, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import SeededChooser, run, weight_elements
from test_surgery_regressions import Net

from etp_deploy import compress
from etp_deploy.surgery.duplicates import merge_duplicates
from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.rewrite import restore_interface, rewrite

# duplicates of channels 0 and 3 of eight
TWINS = {5: (0, 2.0), 6: (3, 0.7), 7: (0, 0.31)}


def merged(model):
    """Return the model without duplicates, and how many there were."""
    original = ir.from_proto(model)
    prepared = prepare(original)
    count = merge_duplicates(prepared)
    removal, _ = plan(prepared.graph)
    if not removal.edits:
        return model, count
    rewrite(prepared, removal.edits)
    restore_interface(prepared, original)
    return ir.to_proto(prepared), count


def gained(case):
    """Return weight elements before and after and the number merged; outputs are equal."""
    result, count = merged(case.model)
    for one, other in zip(run(case.model, case.feeds), run(result, case.feeds), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max())
    return weight_elements(case.model), weight_elements(result), count


def twins(array, axis=0, multiples=True, sign=1):
    """Let some of eight channels be multiples of others."""
    moved = np.moveaxis(array, axis, 0)
    for channel, (head, factor) in TWINS.items():
        moved[channel] = moved[head] * np.float32(sign * factor if multiples else 1)
    return array


def network(between, *, biased=True, multiples=True, sign=1, **attributes):
    """Return two convolutions of eight channels with an operator between them."""
    net = Net(x=(2, 3, 6, 6))
    bias = [twins(net.rand(8), multiples=multiples, sign=sign)] if biased else []
    weight = twins(net.rand(8, 3, 3, 3), multiples=multiples, sign=sign)
    net.node("Conv", ["x", weight, *bias], "h", pads=[1, 1, 1, 1])
    net.node(between, ["h"], "a", **attributes)
    net.node("Conv", ["a", net.rand(4, 8, 3, 3)], "y", pads=[1, 1, 1, 1])
    return net.case("y", opset=18)


def elements(width, biased=True):
    """Return the elements of that network at a width."""
    return width * 27 + width * biased + 4 * width * 9


POOL = {"kernel_shape": [2, 2]}
FORMS = {
    "Relu": ({}, True, 1),
    "LeakyRelu": ({"alpha": 0.1}, True, 1),
    "MaxPool": (POOL, True, 1),
    "AveragePool": (POOL, True, -1),
    "Identity": ({}, True, -1),
    "Sigmoid": ({}, False, 1),
    "HardSwish": ({}, False, 1),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("between", FORMS)
def test_multiples_merge_where_the_operator_keeps_them(between, biased):
    """Positive ones through what is homogeneous, all through what is linear, equal ones through the rest."""
    attributes, multiples, sign = FORMS[between]
    case = network(between, biased=biased, multiples=multiples, sign=sign, **attributes)
    assert gained(case) == (elements(8, biased), elements(5, biased), 3)


@pytest.mark.parametrize(
    ("between", "sign"), [("Relu", -1), ("MaxPool", -1), ("Sigmoid", 1), ("HardSwish", 1)]
)
def test_other_multiples_stay(between, sign):
    """Negative controls: a change of sign through Relu, a multiple through what is not homogeneous."""
    # with a change of sign channels 5 and 7 are positive multiples of one another still
    attributes = POOL if between == "MaxPool" else {}
    case = network(between, sign=sign, **attributes)
    left = 7 if sign < 0 else 8
    assert gained(case) == (elements(8), elements(left), 8 - left)


def test_a_bias_that_is_no_multiple_keeps_both():
    """Negative control: rows alone do not make a duplicate where something bends the sum."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", twins(net.rand(8, 3, 3, 3)), net.rand(8)], "h")
    net.node("Relu", ["h"], "a")
    net.node("Conv", ["a", net.rand(4, 8, 3, 3)], "y")
    before, after, count = gained(net.case("y"))
    assert (before == after, count) == (True, 0)


def test_a_difference_beyond_rounding_keeps_both():
    """Negative control: a millionth is no rounding."""
    net = Net(x=(2, 3))
    weight = net.rand(3, 8)
    weight[:, 5] = weight[:, 0] * 2
    weight[:, 6] = weight[:, 0] * 2
    weight[1, 6] *= np.float32(1 + 1e-6)
    net.node("MatMul", ["x", weight], "h")
    net.node("Relu", ["h"], "a")
    net.node("MatMul", ["a", net.rand(8, 4)], "y")
    case = net.case("y")
    assert gained(case) == (56, 49, 1)


@pytest.mark.parametrize("pin", ["output", "unknown reader", "norm", "residual"])
def test_duplicates_of_which_something_else_reads_stay(pin):
    """Negative control: a reader that cannot add columns keeps all channels."""
    net = Net(x=(2, 3))
    net.node("MatMul", ["x", twins(net.rand(3, 8), 1)], "h")
    net.node("Relu", ["h"], "a")
    outputs = ["y"]
    if pin == "output":
        outputs.append("a")
    elif pin == "unknown reader":
        net.node("CumSum", ["a", np.array(1)], "z")
        outputs.append("z")
    elif pin == "norm":
        net.node("LayerNormalization", ["a", net.rand(8)], "n")
    else:
        net.node("MatMul", ["x", net.rand(3, 8)], "skip")
        net.node("Add", ["a", "skip"], "n")
    net.node("MatMul", ["n" if pin in {"norm", "residual"} else "a", net.rand(8, 4)], "y")
    before, after, count = gained(net.case(*outputs))
    assert (before == after, count) == (True, 0)


def test_batch_normalisation_may_tell_channels_apart_or_not():
    """Parameters that are multiples likewise merge; a mean of its own does not (channel 7)."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", twins(net.rand(8, 3, 3, 3), multiples=False)], "h")
    gamma, beta, mean = (twins(net.rand(8)) for _ in range(3))
    mean = twins(mean, multiples=False)
    mean[7] += 1
    variance = twins(np.abs(net.rand(8)) + 1, multiples=False)
    net.node("BatchNormalization", ["h", gamma, beta, mean, variance], "n")
    net.node("Relu", ["n"], "a")
    net.node("Conv", ["a", net.rand(4, 8, 3, 3)], "y")
    assert gained(net.case("y")) == (8 * 27 + 32 + 8 * 36, 6 * 27 + 24 + 6 * 36, 2)


def test_depthwise_convolutions_between():
    """Kernels that are multiples keep multiples; of one that is none the channel stays (7)."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", twins(net.rand(8, 3, 1, 1)), twins(net.rand(8))], "h")
    net.node("Relu", ["h"], "a")
    kernels = twins(net.rand(8, 1, 3, 3))
    kernels[7] = net.rand(1, 3, 3)
    bias = twins(net.rand(8))
    bias[[5, 6]] *= np.array([2.0, 0.7], np.float32)
    net.node("Conv", ["a", kernels, bias], "d", group=8, pads=[1, 1, 1, 1])
    net.node("Relu", ["d"], "b")
    net.node("Conv", ["b", net.rand(4, 8, 1, 1)], "y")
    assert gained(net.case("y")) == (24 + 8 + 72 + 8 + 32, 6 * (3 + 1 + 9 + 1 + 4), 2)


@pytest.mark.parametrize("between", ["Round", "Sign"])
def test_steps_are_not_passed(between):
    """Negative control: a difference of a rounding may become a whole one there, so even equal channels stay."""
    case = network(between, multiples=False)
    assert gained(case) == (elements(8), elements(8), 0)


def test_several_readers_and_a_flatten():
    """Every reader adds its own columns, one of them for each place of a map."""
    net = Net(x=(2, 3, 4, 4))
    net.node("Conv", ["x", twins(net.rand(8, 3, 3, 3))], "h")
    net.node("Relu", ["h"], "a")
    net.node("Flatten", ["a"], "f")
    net.node("Gemm", ["f", net.rand(5, 32)], "y", transB=1)
    net.node("GlobalAveragePool", ["a"], "p")
    net.node("Conv", ["p", net.rand(2, 8, 1, 1)], "z")
    assert gained(net.case("y", "z")) == (216 + 160 + 16, 5 * 27 + 5 * 20 + 10, 3)


def test_gates_of_two_steps():
    """`x * sigmoid(x)` of equal channels is equal, of multiples it is not."""
    for multiples, left in ((False, 5), (True, 8)):
        net = Net(x=(2, 3))
        net.node("MatMul", ["x", twins(net.rand(3, 8), 1, multiples=multiples)], "h")
        net.node("Sigmoid", ["h"], "s")
        net.node("Mul", ["h", "s"], "a")
        net.node("MatMul", ["a", net.rand(8, 4)], "y")
        assert gained(net.case("y")) == (56, 7 * left, 8 - left)


def test_merging_makes_more_duplicates():
    """Rows that differ only in columns of duplicates are the same once these are merged."""
    net = Net(x=(2, 3))
    net.node("MatMul", ["x", twins(net.rand(3, 8), 1)], "h")
    net.node("Relu", ["h"], "a")
    second = net.rand(8, 6)
    second[:, 4] = second[:, 1]
    second[0, 4] += 2
    second[5, 4] -= 1  # channel 5 is twice channel 0
    net.node("MatMul", ["a", second], "i")
    net.node("Relu", ["i"], "b")
    net.node("MatMul", ["b", net.rand(6, 2)], "y")
    assert gained(net.case("y")) == (24 + 48 + 12, 15 + 25 + 10, 4)


def test_a_weight_that_two_share_is_left_alone():
    """A shared weight would have to be there twice."""
    net = Net(x=(2, 8))
    shared = twins(net.rand(8, 8), 1)
    net.node("MatMul", ["x", shared], "h")
    name = net.nodes[0].input[1]
    net.node("MatMul", ["h", name], "y")
    assert gained(net.case("y")) == (64, 64, 0)


@pytest.mark.parametrize("seed", range(12))
def test_random_chains_keep_their_outputs(seed):
    """Chains of channelwise operators over planted multiples: equal outputs, and fewer weights where it is exact."""
    choose, net = SeededChooser(seed), Net(x=(2, 4, 7, 7))
    net.random = np.random.default_rng(seed)
    positive, name = True, "h"
    net.node("Conv", ["x", twins(net.rand(8, 4, 3, 3)), twins(net.rand(8))], name, pads=[1, 1, 1, 1])
    for step in range(choose.integer(1, 5)):
        kind = choose.one_of(("Relu", "PRelu", "Mul", "Add", "MaxPool", "AveragePool", "Tanh", "Neg", "Clip"))
        extra = {
            "PRelu": [np.full((8, 1, 1), 0.2, np.float32)],
            "Mul": [np.abs(net.rand(8, 1, 1))],
            "Add": [net.rand(1)],
            "Clip": [np.float32(-0.5), np.float32(0.5)],
        }.get(kind, [])
        positive &= kind in {"Relu", "PRelu", "Mul", "MaxPool", "AveragePool", "Neg"}
        pool = {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]} if kind.endswith("Pool") else {}
        net.node(kind, [name, *extra], f"h{step}", **pool)
        name = f"h{step}"
    net.node("Conv", [name, net.rand(3, 8, 3, 3)], "y", pads=[1, 1, 1, 1])
    before, after, count = gained(net.case("y"))
    assert count == (3 if positive else 0)
    assert (after < before) == positive


def test_compress_merges_on_request(tmp_path):
    """The option is off by default; the report says how many channels went into others."""
    case = network("Relu")
    onnx.save(case.model, tmp_path / "model.onnx")
    plain = compress(tmp_path / "model.onnx", tmp_path / "a.onnx", align="off")
    assert (plain.after.parameters, plain.merged) == (elements(8), 0)
    report = compress(tmp_path / "model.onnx", tmp_path / "b.onnx", align="off", merge_duplicates=True)
    assert (report.after.parameters, report.merged, report.removed["channels"]) == (elements(5), 3, 3)
    assert report.to_json()["merged_duplicates"] == 3
