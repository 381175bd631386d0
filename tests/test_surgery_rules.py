"""The pieces of the surgery by themselves, with negative controls, and exact counts on small networks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Case, difference, failure, run, shrunk, weight_elements
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from test_surgery_regressions import Net

from etp_deploy.errors import EtpError
from etp_deploy.inspection import explain
from etp_deploy.surgery import carriers, rules
from etp_deploy.surgery.analysis import read
from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.shapes import Factor, Size, axis_size, frame, labelled, normalise, plain, refine
from etp_deploy.surgery.state import closure, nested_fill
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.pointwise import Pointwise

SMALL = settings(max_examples=60, derandomize=True, deadline=None, database=None)
sizes = st.builds(
    Size,
    st.integers(1, 12),
    st.lists(st.sampled_from(["n", "s"]), max_size=2).map(lambda s: tuple(sorted(s))),
)


# sizes and shapes


@SMALL
@given(sizes, sizes)
def test_a_product_divides_by_its_factors(a, b):
    """Products of sizes commute and divide exactly."""
    assert a * b == b * a
    assert (a * b).divide(b) == a
    assert Size.of(str(a * b)) == a * b


def test_sizes_that_do_not_divide():
    """There is no quotient where a number or a symbol is left over."""
    assert Size(7).divide(Size(2)) is None
    assert Size(6, ("n",)).divide(Size(2, ("s",))) is None
    assert Size(6).divide(Size(0)) is None
    assert Size.of("Min(64, s)").static is None
    assert Size.of(None) != Size.of(None)


def test_a_reshape_splits_and_merges_channels():
    """768 channels become 12 heads of 64 and come back; what tears labels apart is refused."""
    structure = (*plain((2, 5)), labelled(12))
    split = refine(structure, [Size(2), Size(5), Size(3), Size(4)])
    assert split == (*plain((2, 5)), labelled(3), labelled(4))
    assert refine(split, [Size(2), Size(5), Size(12)])[2] == labelled(12)
    merged = refine(structure, [Size(10), Size(12)])
    assert merged == (*plain((10,)), labelled(12))
    assert refine(structure, [Size(2), Size(60)])[1] == (Factor(Size(5)), Factor(Size(12), labelled=True))
    assert refine((labelled(12), *plain((5,))), [Size(8), Size(7)]) is None
    assert refine(structure, [Size(4), Size(30)]) is None


@SMALL
@given(st.lists(st.sampled_from([2, 3, 4]), min_size=2, max_size=4), st.data())
def test_a_refined_structure_has_the_target_sizes(factors, data):
    """Whatever refine returns has the target's sizes and as many places in its frame."""
    cut = data.draw(st.integers(1, len(factors)))
    structure = tuple(labelled(size) if data.draw(st.booleans()) else plain((size,))[0] for size in factors)
    target = [Size(int(np.prod(factors[:cut]))), *(Size(size) for size in factors[cut:])]
    refined = refine(structure, target)
    if refined is not None:
        assert [axis_size(axis) for axis in refined] == target
        assert np.prod(frame(refined)) == np.prod(frame(structure))


def test_neighbours_of_one_kind_are_one_factor():
    """Merging keeps labels apart from the rest and drops ones."""
    one = Factor(Size(1))
    assert normalise([one, Factor(Size(2)), Factor(Size(3))]) == (Factor(Size(6)),)
    assert normalise([]) == (one,)


# masks


@SMALL
@given(st.integers(0, 2**12 - 1))
def test_filled_masks_are_rectangles(bits):
    """Every kept slice of a filled mask keeps equally many slices; nothing is lost, nothing added twice."""
    mask = np.array([bits >> place & 1 for place in range(12)], bool).reshape(2, 3, 2)
    filled = nested_fill(mask)
    assert (filled | mask == filled).all()
    assert (nested_fill(filled) == filled).all()
    for depth in (1, 2):
        inner = filled.reshape(*filled.shape[: depth + 1], -1).any(-1).reshape(-1, filled.shape[depth])
        assert len({int(row.sum()) for row in inner if row.any()}) <= 1


@SMALL
@given(st.integers(0, 2**9 - 1))
def test_a_closure_is_the_smallest_product(bits):
    """A closure holds the mask and is a product of index sets."""
    mask = np.array([bits >> place & 1 for place in range(9)], bool).reshape(3, 3)
    closed = closure(mask)
    assert (closed | mask == closed).all()
    assert (closed == np.outer(mask.any(1), mask.any(0))).all()


# constants


def constants_hold(case):
    """Return names of tensors whose claimed constants do not hold for random inputs, and how many were claimed."""
    prepared = prepare(ir.from_proto(case.model))
    analysis = read(prepared.graph)
    proto = ir.to_proto(prepared)
    names = [value.name for value in analysis.state.constants if not value.is_initializer()]
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    if not names:
        return set(), 0
    values = dict(zip(names, run(proto, case.feeds), strict=True))
    wrong, claimed = set(), 0
    for value, constant in analysis.state.constants.items():
        array, structure = values[value.name], analysis.state.structure(value)
        split = array.reshape([f.size.static or -1 for axis in structure for f in axis])
        known = np.broadcast_to(constant.known, split.shape)
        held = np.broadcast_to(constant.value, split.shape)
        claimed += int(constant.known.sum())
        scale = 1e-5 * max(1.0, float(np.abs(held[known]).max(initial=0)))
        if np.abs(held[known].astype(float) - split[known].astype(float)).max(initial=0) > scale:
            wrong.add(value.name)
    return wrong, claimed


ONE_INPUT = {
    **{
        name: {}
        for name in rules.elementwise.UNARY
        if name not in {"Cast", "Not", "BitwiseNot", "IsInf", "IsNaN"}
    },
    "Cast": {"to": onnx.TensorProto.DOUBLE},
    "Identity": {},
    "Dropout": {},
    "Clip": {},
    "MaxPool": {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]},
    "AveragePool": {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0], "count_include_pad": 1},
    "GlobalAveragePool": {},
    "GlobalMaxPool": {},
    "GlobalLpPool": {},
    "LpPool": {"kernel_shape": [2, 2]},
    "LRN": {"size": 3},
    "Softmax": {"axis": 2},
    "LogSoftmax": {"axis": 1},
    "ReduceMean": {"keepdims": 1},
    "ReduceSum": {},
    "Flatten": {},
    "Transpose": {"perm": [0, 2, 3, 1]},
}


TWO_INPUTS = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum")


def planted(operator, attributes, opset):
    """Return a convolution with constant channels, an operator and a layer that reads it."""
    net = Net(x=(2, 3, 4, 4))
    bias = np.array([0.5, -0.3, 0.0, 0.7, 0.2, 0.9], np.float32)
    net.node("Conv", ["x", net.rand(6, 3, 1, 1, dead=(0, 2, 3)), bias], "t0")
    net.node("Abs" if operator in {"Log", "Sqrt", "Acosh"} else "Identity", ["t0"], "t1")
    net.node("Sin" if operator in {"Acos", "Asin", "Atanh"} else "Identity", ["t1"], "t2")
    net.node(operator, ["t2"], "t3", **attributes)
    return net, opset


@pytest.mark.parametrize("operator", sorted(ONE_INPUT))
def test_constants_pass_through(operator):
    """What a rule claims to be constant is what ONNX Runtime computes there."""
    net, opset = planted(operator, ONE_INPUT[operator], 24 if operator == "Swish" else 20)
    case = net.case("t3", opset=opset)
    try:
        run(case.model, case.feeds)
    except Exception:  # noqa: BLE001 - not implemented for floats on this build
        pytest.skip("ONNX Runtime has no such kernel")
    case.feeds["x"] = case.feeds["x"] * 0.2
    wrong, claimed = constants_hold(case)
    assert wrong == set()
    assert claimed >= 3


@pytest.mark.parametrize("shape", [(), (6, 1, 1), (1, 6, 1, 1), (6, 4, 4), (4,)])
@pytest.mark.parametrize(
    ("operator", "swapped"),
    [(name, False) for name in (*TWO_INPUTS, "PRelu")] + [(name, True) for name in TWO_INPUTS],
)
def test_constants_meet_parameters(operator, shape, swapped):
    """The same for two operands, broadcast in every way, either first."""
    net, opset = planted("Abs", {}, 18)
    other = np.abs(net.rand(*shape)) + np.float32(0.1) if shape else np.array(0.4, np.float32)
    net.node(operator, [other, "t3"] if swapped else ["t3", other], "t4")
    wrong, claimed = constants_hold(net.case("t4", opset=opset))
    assert wrong == set()
    assert claimed >= 6


def test_a_wrong_claim_is_caught(monkeypatch):
    """Negative control: a rule that passes constants through unchanged where it should compute is found out."""
    monkeypatch.setattr(
        Pointwise,
        "_evaluate",
        lambda self, parts, structure: next(iter(parts.values()))[1],  # noqa: ARG005 - the method's own signature
    )
    net, opset = planted("Exp", {}, 18)
    wrong, _ = constants_hold(net.case("t3", opset=opset))
    assert "t3" in wrong


def test_every_rule_answers_for_every_operator_it_names():
    """The registry and what the tests rely on agree."""
    names = {name for domain, name in rules.covered() if domain == ""}
    assert set(ONE_INPUT) <= names
    assert {
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "Reshape",
        "Concat",
        "Split",
        "Slice",
        "Gather",
    } <= names


# networks with known floors


def chain(*widths, dead=(), bias=True, pads=1, batch_norm=False):
    """Return a VGG-like chain; `dead` are indices of filters that are zero in each inner layer."""
    net = Net(x=(2, widths[0], 8, 8))
    name = "x"
    for layer, (narrow, wide) in enumerate(pairwise(widths)):
        last = layer == len(widths) - 2
        inputs = [name, net.rand(wide, narrow, 3, 3, dead=None if last else dead)]
        inputs += [net.rand(wide)] if bias else []
        net.node("Conv", inputs, f"c{layer}", pads=[pads] * 4)
        name = f"c{layer}"
        if batch_norm and not last:
            statistics = [net.rand(wide), net.rand(wide), net.rand(wide), np.abs(net.rand(wide)) + 1]
            net.node("BatchNormalization", [name, *statistics], f"n{layer}")
            name = f"n{layer}"
        if not last:
            net.node("Relu", [name], f"r{layer}")
            name = f"r{layer}"
    return net.case(name)


def widths_of(model):
    """Return the shapes of the convolutions' weights."""
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    return [shapes[node.input[1]] for node in model.graph.node if node.op_type == "Conv"]


def test_a_chain_without_padding_reaches_the_native_size():
    """Every dead filter goes; its constant is folded into the next bias."""
    case = chain(3, 8, 8, 5, dead=(0, 3, 4), pads=0)
    assert failure(case) is None
    assert widths_of(shrunk(case.model)) == [(5, 3, 3, 3), (5, 5, 3, 3), (5, 5, 3, 3)]


def test_a_chain_with_padding_keeps_one_carrier():
    """Under zero padding one positive constant of each layer stays for all of them."""
    case = chain(3, 8, 8, 5, dead=range(6), pads=1, batch_norm=True)
    assert failure(case) is None
    shapes = widths_of(shrunk(case.model))
    assert all(2 <= shape[0] <= 3 for shape in shapes[:-1])


def test_a_chain_of_zero_filters_keeps_no_carrier():
    """Zero constants need none."""
    case = chain(3, 8, 8, 5, dead=(0, 3, 4), bias=False)
    assert failure(case) is None
    assert widths_of(shrunk(case.model)) == [(5, 3, 3, 3), (5, 5, 3, 3), (5, 5, 3, 3)]


def test_nothing_dead_nothing_changed():
    """A network without dead structure comes back as the same object."""
    case = chain(3, 8, 8, 5)
    assert shrunk(case.model) is case.model


@pytest.mark.parametrize("align", ["off", 4])
def test_a_layer_that_is_wholly_dead(align):
    """The network computes what is left; one channel stays because a tensor needs one."""
    case = chain(3, 8, 8, 5, dead=range(8))
    assert failure(case, align, floor=False) is None
    first = widths_of(shrunk(case.model, align))[0]
    assert first[0] <= (1 if align == "off" else 4)


def residual(dead_main, dead_skip):
    """Return a residual stream of eight channels that two convolutions write."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=dead_skip)], "s")
    net.node("Conv", ["s", net.rand(6, 8, 3, 3)], "a", pads=[1, 1, 1, 1])
    net.node("Relu", ["a"], "b")
    net.node("Conv", ["b", net.rand(8, 6, 3, 3, dead=dead_main)], "c", pads=[1, 1, 1, 1])
    net.node("Add", ["c", "s"], "d")
    net.node("Conv", ["d", net.rand(4, 8, 1, 1)], "y")
    return net.case("y")


def test_a_residual_stream_loses_what_all_its_writers_lost():
    """Channels dead in both writers go; those dead in one stay."""
    case = residual((1, 2, 5), (1, 2, 7))
    assert failure(case) is None
    assert widths_of(shrunk(case.model)) == [(6, 3, 1, 1), (6, 6, 3, 3), (6, 6, 3, 3), (4, 6, 1, 1)]


def test_a_depthwise_chain():
    """A depthwise filter goes with the channel before and after it."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(0, 5))], "a")
    net.node("Conv", ["a", net.rand(8, 1, 3, 3, dead=(2,))], "b", pads=[1, 1, 1, 1], group=8)
    net.node("Conv", ["b", net.rand(4, 8, 1, 1, dead=(7,), axis=1)], "c")
    case = net.case("c")
    assert failure(case) is None
    small = shrunk(case.model)
    assert widths_of(small) == [(4, 3, 1, 1), (4, 1, 3, 3), (4, 4, 1, 1)]
    group = {a.name: a.i for a in small.graph.node[1].attribute}["group"]
    assert group == 4


def heads(*, dead_values=(), dead_output=(), dimensions=()):
    """Return attention of four heads of three, some of them dead, on ten tokens of twelve channels."""
    net = Net(x=("N", 10, 12))
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        columns = [3 * head + place for head in dead_values for place in range(3)] if name == "v" else []
        columns += [3 * head + place for head in range(4) for place in dimensions] if name == "q" else []
        net.node("MatMul", ["x", net.rand(12, 12, dead=columns, axis=1)], name)
        net.node("Reshape", [name, np.array([0, 0, 4, 3])], f"{name}h")
        net.node("Transpose", [f"{name}h"], f"{name}t", perm=perm)
    net.node("MatMul", ["qt", "kt"], "s")
    net.node("Softmax", ["s"], "p", axis=-1)
    net.node("MatMul", ["p", "vt"], "o")
    net.node("Transpose", ["o"], "ot", perm=[0, 2, 1, 3])
    net.node("Reshape", ["ot", np.array([0, 0, 12])], "m")
    rows = [3 * head + place for head in dead_output for place in range(3)]
    net.node("MatMul", ["m", net.rand(12, 12, dead=rows)], "y")
    return net.case("y")


@pytest.mark.parametrize(
    ("options", "after"),
    [
        ({}, 4 * 144),
        ({"dead_values": (1,)}, 4 * 108),
        ({"dead_values": (0, 2)}, 4 * 72),
        ({"dead_output": (3,)}, 4 * 108),
        ({"dead_output": (3,), "dead_values": (1,)}, 4 * 72),
        ({"dimensions": (2,)}, 2 * 144 + 2 * 96),
    ],
)
def test_attention_loses_its_dead_heads_and_dimensions(options, after):
    """Heads go as a whole, whichever projection is dead; dimensions go from queries and keys together."""
    case = heads(**options)
    assert failure(case) is None
    assert weight_elements(shrunk(case.model)) == after


def test_unread_channels_do_not_matter():
    """Filters that the plan drops as unread can hold anything."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1)], "a")
    net.node("Sigmoid", ["a"], "b")
    net.node("Conv", ["b", net.rand(4, 8, 3, 3, dead=(1, 4, 6), axis=1)], "c", pads=[1, 1, 1, 1])
    case = net.case("c")
    prepared = prepare(ir.from_proto(case.model))
    _, analysis = plan(prepared.graph)
    value = next(value for value in analysis.state.keep if value.name == "a")
    gone = ~analysis.state.mask(value).reshape(-1)
    assert gone.sum() == 3
    changed = Case(onnx.ModelProto.FromString(case.model.SerializeToString()), case.feeds)
    weight = changed.model.graph.initializer[0]
    array = np.frombuffer(weight.raw_data, np.float32).reshape(weight.dims).copy()
    array[gone] = net.rand(3, 3, 1, 1)
    weight.raw_data = array.tobytes()
    assert difference(run(case.model, case.feeds), run(changed.model, changed.feeds)) is None


# negative controls


def test_without_folding_the_outputs_differ(monkeypatch):
    """The constants of removed channels matter: without them the result is wrong."""
    case = chain(3, 8, 8, 5, dead=(0, 3, 4), pads=0)
    monkeypatch.setattr(Contraction, "_sums", lambda self, value: np.zeros(self.reads.shape[:2]))  # noqa: ARG005
    text = failure(case, floor=False)
    assert text is not None
    assert text.startswith("wrong")


def test_without_a_carrier_the_outputs_differ(monkeypatch):
    """Under zero padding the constants cannot go without one."""
    case = chain(3, 8, 8, 5, dead=(0, 3, 4), pads=1)
    monkeypatch.setattr("etp_deploy.surgery.analysis.keep_carriers", lambda analysis: False)  # noqa: ARG005
    text = failure(case, floor=False)
    assert carriers.keep_carriers is not None
    assert text is not None
    assert text.startswith("wrong")


# pins


def explained(case, tmp_path, tensor):
    """Return the explanation of a tensor as one text."""
    path = tmp_path / "model.onnx"
    onnx.save(case.model, path)
    return "\n".join(explain(path, tensor, align="off").lines)


def pinned_by(node):
    """Return a dead convolution, something that pins it, and a reader."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(0, 5))], "a")
    node(net)
    net.node("Conv", ["b", net.rand(4, 8, 1, 1)], "c")
    return net


def test_an_operator_without_a_rule_is_named(tmp_path):
    """What is not known stays, and the explanation names it."""
    net = pinned_by(lambda net: net.node("CastLike", ["a", np.float32([1])], "b"))
    case = net.case("c")
    assert shrunk(case.model) is case.model
    assert "CastLike" in explained(case, tmp_path, "a")


def test_an_output_of_the_model_stays(tmp_path):
    """What a caller sees keeps its shape."""
    case = pinned_by(lambda net: net.node("Relu", ["a"], "b")).case("c", "b")
    assert shrunk(case.model) is case.model
    assert "output of the model" in explained(case, tmp_path, "a")


def test_a_layer_normalization_pins_its_axis(tmp_path):
    """Mean and variance are taken over dead channels too."""
    net = Net(x=(2, 5, 6))
    net.node("MatMul", ["x", net.rand(6, 8, dead=(0, 5), axis=1)], "a")
    net.node("LayerNormalization", ["a", net.rand(8), net.rand(8)], "b")
    net.node("MatMul", ["b", net.rand(8, 4)], "c")
    case = net.case("c")
    assert shrunk(case.model) is case.model
    assert "mean and variance" in explained(case, tmp_path, "a")


def test_what_a_body_sums_along_stays(tmp_path):
    """A tensor that a branch reads as a whole keeps its channels, and the explanation names the operator."""
    net = Net(x=(2, 3, 6, 6))
    net.node("Conv", ["x", net.rand(8, 3, 1, 1, dead=(0, 5))], "a")
    info = helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, [None] * 4)
    axis = helper.make_node("Constant", [], ["axis"], value_int=1)
    branches = {
        "then_branch": [axis, helper.make_node("CumSum", ["a", "axis"], ["inner"])],
        "else_branch": [helper.make_node("Neg", ["a"], ["inner"])],
    }
    graphs = {key: helper.make_graph(nodes, key, [], [info]) for key, nodes in branches.items()}
    net.node("If", [np.array(True)], "b", **graphs)
    net.node("Conv", ["b", net.rand(4, 8, 1, 1)], "c")
    case = net.case("c")
    assert shrunk(case.model) is case.model
    assert "CumSum" in explained(case, tmp_path, "a")


def test_a_tensor_that_is_not_there_is_an_error_of_ours(tmp_path):
    """Asking for an unknown tensor is answered in our words."""
    with pytest.raises(EtpError, match="no such tensor"):
        explained(chain(3, 4, 4), tmp_path, "nothing")
