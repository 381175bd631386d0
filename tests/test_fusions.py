"""What ONNX Runtime's optimiser fused is read as what it was fused from, and comes back fused."""

from __future__ import annotations

import collections
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from graphs import difference, run, shrunk, weight_elements
from test_normalisations import MICROSOFT, reasons, skipping, stays, with_microsoft
from test_surgery_regressions import Net, gained

from etp_deploy.sizes import count_macs
from etp_deploy.surgery import fusions
from etp_deploy.surgery.fusions import put_together, take_apart
from etp_deploy.surgery.resolve import constant


def operators(model):
    """Return how often a model has each operator."""
    return collections.Counter(node.op_type for node in model.graph.node)


# fused convolutions and Gemms


def convolution(activation, params=(), *, added=False, biased=True, dead=(1, 2), opset=18):
    """Return a fused convolution between two plain ones, with or without a residual that it adds."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(6, 3, 1, 1, dead=dead)], "s")
    inputs = ["s", net.rand(6, 6, 3, 3, dead=dead)]
    inputs += [net.rand(6, dead=dead)] if biased else [""] if added else []
    inputs += ["s"] if added else []
    extra = {"activation_params": list(params)} if params else {}
    extra |= {"activation": activation} if activation else {}
    net.node("FusedConv", inputs, "c", domain=MICROSOFT, pads=[1] * 4, kernel_shape=[3, 3], **extra)
    net.node("Conv", ["c", net.rand(4, 6, 1, 1)], "y")
    return with_microsoft(net.case("y", opset=opset))


def product(activation, **extra):
    """Return a fused Gemm between two plain ones."""
    net = Net(x=(2, 7))
    net.node("Gemm", ["x", net.rand(6, 7, dead=(1, 2))], "s", transB=1)
    inputs = ["s", net.rand(8, 6, dead=(0, 5)), net.rand(8, dead=(0, 5))]
    more = {"activation": activation, "alpha": 0.5, "transB": 1, **extra}
    net.node("FusedGemm", inputs, "c", domain=MICROSOFT, **more)
    net.node("Gemm", ["c", net.rand(3, 8)], "y", transB=1)
    return with_microsoft(net.case("y"))


# what a residual of six channels needs when two are dead in all writers, and what it becomes
STREAM = (18 + 324 + 24, 12 + 144 + 16)
FORMS = {
    "Relu": (convolution("Relu"), STREAM, 6, 4),
    "no bias": (convolution("Relu", biased=False), STREAM, 0, 0),
    "no activation": (convolution(""), STREAM, 6, 4),
    "LeakyRelu": (convolution("LeakyRelu", (0.1,)), STREAM, 6, 4),
    "Tanh": (convolution("Tanh"), STREAM, 6, 4),
    "added": (convolution("Relu", added=True), STREAM, 6, 4),
    "added without a bias": (convolution("Relu", added=True, biased=False), STREAM, 0, 0),
    "Gemm": (product("Relu"), (42 + 48 + 24, 28 + 24 + 18), 8, 6),
    "Gemm with alpha": (
        product("LeakyRelu", activation_alpha=0.3),
        (42 + 48 + 24, 28 + 24 + 18),
        8,
        6,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_fused_nodes_lose_what_their_parts_would(form):
    """Exact counts, equal outputs, and every fused node is one again."""
    case, (before, after), bias, cut = FORMS[form]
    assert gained(case) == (before + bias, after + cut)
    assert operators(shrunk(case.model)) == operators(case.model)


def test_a_clip_is_bounds_again():
    """The bounds of a fused Clip are an attribute before and after; a dead channel is its bound, and a bias."""
    case = convolution("Clip", (0.25, 3.0))
    # the two dead channels are 0.25 each, which the last convolution gets a bias for
    assert gained(case) == (STREAM[0] + 6, STREAM[1] + 4 + 4)
    small = shrunk(case.model)
    assert operators(small) == operators(case.model)
    fused = next(node for node in small.graph.node if node.op_type == "FusedConv")
    assert {item.name for item in fused.attribute} >= {"activation", "activation_params"}


def test_a_bias_that_folding_adds_is_the_fused_nodes():
    """Constants in front of a fused node without a bias become its bias."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(6, 3, 1, 1, dead=(1, 2)), net.rand(6)], "s")
    fused = {"domain": MICROSOFT, "activation": "Relu", "kernel_shape": [1, 1]}
    net.node("FusedConv", ["s", net.rand(5, 6, 1, 1)], "c", **fused)
    net.node("Conv", ["c", net.rand(4, 5, 1, 1)], "y")
    case = with_microsoft(net.case("y"))
    assert gained(case) == (18 + 6 + 30 + 20, 12 + 4 + 20 + 5 + 20)
    assert operators(shrunk(case.model)) == operators(case.model)


# taking apart and putting together

ROUND = {
    **{name: form[0] for name, form in FORMS.items()},
    "Clip": convolution("Clip", (0.25, 3.0)),
    "HardSigmoid": convolution("HardSigmoid", (0.3, 0.4)),
    "norm": skipping("SkipSimplifiedLayerNormalization", 1, dead=()),
    "norm without a sum": skipping("SkipSimplifiedLayerNormalization", 1, dead=(), outputs=1),
    "norm with means": skipping("SkipLayerNormalization", 2, dead=()),
    "norm with means, no bias": skipping("SkipLayerNormalization", 1, dead=(), biased=False),
}


@pytest.mark.parametrize("form", ROUND)
def test_parts_compute_what_the_node_did(form):
    """Taken apart the graph computes the same without fused nodes; put together it is the graph that it was."""
    case = ROUND[form]
    model = ir.from_proto(case.model)
    assert take_apart(model.graph, constant)
    apart = ir.to_proto(model)
    assert not set(fusions._MAKERS) & set(operators(apart))
    assert difference(run(case.model, case.feeds), run(apart, case.feeds)) is None
    put_together(model.graph)
    again = ir.to_proto(model)
    assert operators(again) == operators(case.model)
    for before, after in zip(case.model.graph.node, again.graph.node, strict=True):
        assert list(after.input) == list(before.input)
        assert list(after.output) == list(before.output)
        assert sorted(map(str, after.attribute)) == sorted(map(str, before.attribute))
    assert difference(run(case.model, case.feeds), run(again, case.feeds)) is None


@pytest.mark.parametrize(("biased", "added"), [(True, 0), (False, 6)])
def test_constants_go_into_the_bias_behind_a_residual(biased, added):
    """What dead neurons gave is added in the bias of the fused norm, beyond the sum; on its own where there is none."""
    net = Net(x=("N", 3, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(1, 4), axis=1)], "h")
    net.node("Add", ["h", net.rand(8)], "a")
    net.node("Relu", ["a"], "r")
    net.node("MatMul", ["r", net.rand(8, 6)], "m")
    inputs = ["m", "x", net.rand(6), net.rand(6)] + ([net.rand(6)] if biased else [])
    net.node("SkipLayerNormalization", inputs, "y", domain=MICROSOFT)
    case = with_microsoft(net.case("y"))
    ends = 12 + 6 * biased
    assert gained(case) == (48 + 8 + 48 + ends, 36 + 6 + 36 + ends + added)
    assert operators(shrunk(case.model))["SkipLayerNormalization"] == 1


def test_a_broken_chain_stays_apart():
    """A node between two parts, or a second reader of one, is no fused node."""
    for change in ("between", "second reader"):
        model = ir.from_proto(convolution("Relu", added=True).model)
        take_apart(model.graph, constant)
        sum_ = next(node for node in model.graph if node.op_type == "Add")
        relu = next(node for node in model.graph if node.op_type == "Relu")
        extra = ir.node("Neg", [sum_.outputs[0]])
        model.graph.insert_before(relu, extra)
        if change == "between":
            relu.replace_input_with(0, extra.outputs[0])
        put_together(model.graph)
        assert "FusedConv" not in operators(ir.to_proto(model))


@pytest.mark.parametrize(
    ("operator", "activation"),
    [("FusedConv", "Clip"), ("FusedConv", "Softplus"), ("FusedConv", "HardSigmoid")],
)
def test_forms_that_are_not_known_are_left_as_they_are(operator, activation, tmp_path):
    """An activation that is not known, or parameters that are missing, pin the node under its own name."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(6, 3, 1, 1, dead=(1, 2))], "s")
    wrong = [0.5] if activation != "Softplus" else []
    extra = {"activation_params": wrong} if wrong else {}
    net.node(operator, ["s", net.rand(6, 6, 1, 1)], "c", domain=MICROSOFT, activation=activation, **extra)
    net.node("Conv", ["c", net.rand(4, 6, 1, 1)], "y")
    case = with_microsoft(net.case("y"))
    assert shrunk(case.model) is case.model
    assert f"{MICROSOFT}.{operator}" in reasons(case, tmp_path, "s")


# products and gelus


@pytest.mark.parametrize("turned", [0, 1])
def test_a_fused_product_with_a_weight(turned):
    """Rows and columns of the weight go, whichever way it lies, and constants come through multiplied by alpha."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(0, 3), axis=1)], "a")
    net.node("Add", ["a", np.full(8, 0.5, np.float32)], "b")
    weight = net.rand(8, 7, dead=(1,), axis=1)
    weight = np.ascontiguousarray(weight.T) if turned else weight
    net.node("FusedMatMul", ["b", weight], "c", domain=MICROSOFT, transB=turned, alpha=0.25)
    net.node("MatMul", ["c", net.rand(7, 3)], "y")
    case = with_microsoft(net.case("y"))
    # what the constants of two channels sum to is added to the six columns that are left
    assert gained(case) == (48 + 8 + 56 + 21, 36 + 6 + 36 + 6 + 18)


def test_a_fused_product_is_counted():
    """The multiply-accumulates of a product do not depend on how it is written."""
    counts = set()
    for turned in (0, 1):
        net = Net(x=(2, 5, 6))
        weight = net.rand(7, 6) if turned else net.rand(6, 7)
        net.node("FusedMatMul", ["x", weight], "y", domain=MICROSOFT, transB=turned)
        counts.add(count_macs(ir.from_proto(with_microsoft(net.case("y")).model)))
    assert counts == {2 * 5 * 6 * 7}


def test_fused_attention_loses_heads_and_dimensions():
    """A scaled product with transposed keys is the product of attention: a dead head and a dead dimension go."""
    net = Net(x=("N", 10, 12))
    values = [3, 4, 5]
    queries = [3 * head + 2 for head in range(4)]
    for name, dead in (("q", queries), ("k", ()), ("v", values)):
        net.node("MatMul", ["x", net.rand(12, 12, dead=dead, axis=1)], name)
        net.node("Reshape", [name, np.array([0, 0, 4, 3])], f"{name}h")
        net.node("Transpose", [f"{name}h"], f"{name}t", perm=[0, 2, 1, 3])
    net.node("FusedMatMul", ["qt", "kt"], "s", domain=MICROSOFT, transB=1, alpha=0.5)
    net.node("Softmax", ["s"], "p", axis=-1)
    net.node("MatMul", ["p", "vt"], "o")
    net.node("Transpose", ["o"], "ot", perm=[0, 2, 1, 3])
    net.node("Reshape", ["ot", np.array([0, 0, 12])], "m")
    net.node("MatMul", ["m", net.rand(12, 12)], "y")
    case = with_microsoft(net.case("y"))
    assert gained(case) == (4 * 144, 12 * (6 + 6 + 9) + 9 * 12)


@pytest.mark.parametrize("operator", ["BiasGelu", "FastGelu", "Gelu", "QuickGelu"])
def test_gelus_pass_constants(operator):
    """The runtime's own Gelu of a constant is folded, its bias cut."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(0, 3), axis=1)], "a")
    biased = operator in {"BiasGelu", "FastGelu"}
    source = "a"
    if not biased:
        net.node("Add", ["a", np.full(8, 0.5, np.float32)], "b")
        source = "b"
    net.node(operator, [source, *([net.rand(8)] if biased else [])], "c", domain=MICROSOFT)
    net.node("MatMul", ["c", net.rand(8, 3)], "y")
    case = with_microsoft(net.case("y"))
    assert gained(case) == (48 + 8 + 24, 36 + 6 + 18 + 3)


def test_embeddings_with_a_norm_stay():
    """The tables of a fused embedding stay, since their columns are under one mean."""
    net = Net(x=(2, 5))
    net.node("Cast", ["x"], "i", to=onnx.TensorProto.INT32)
    net.node("Clip", ["i", np.array(0, np.int32), np.array(5, np.int32)], "ids")
    tables = [net.rand(6, 8, dead=(1,), axis=1), net.rand(5, 8, dead=(1,), axis=1)]
    inputs = ["ids", "", tables[0], tables[1], "", net.rand(8), net.rand(8)]
    net.node("EmbedLayerNormalization", inputs, ["e", ""], domain=MICROSOFT)
    net.node("MatMul", ["e", net.rand(8, 3, dead=(1,))], "y")
    case = with_microsoft(net.case("y"))
    assert stays(case)


def test_blocked_layouts_stay():
    """Nodes of the runtime's blocked layout, which it writes for one machine only, are pinned, not misread."""
    net = Net(x=(2, 16, 6, 6))
    net.node("Conv", ["x", net.rand(32, 16, 3, 3, dead=(1, 2))], "s", kernel_shape=[3, 3])
    net.node("Conv", ["s", net.rand(16, 32, 1, 1)], "y", kernel_shape=[1, 1])
    case = net.case("y")
    blocked = optimised(case.model, "ORT_ENABLE_ALL")
    assert weight_elements(shrunk(blocked)) <= weight_elements(blocked)
    assert difference(run(case.model, case.feeds), run(shrunk(blocked), case.feeds)) is None


def optimised(model, level):
    """Return what the runtime's optimiser makes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "optimised.onnx")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        options.optimized_model_filepath = path
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)
