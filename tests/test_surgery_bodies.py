"""Graphs with bodies: dead structure inside, captured, and across; exact counts, equal outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import Case, failure, shrunk, weight_elements
from onnx import helper, numpy_helper

from etp_deploy.errors import EtpError
from etp_deploy.inputs import InputSpec, draw_inputs
from etp_deploy.inspection import explain, inspect
from etp_deploy.pipeline import compress
from etp_deploy.sizes import count_macs

FLOAT, BOOL, INT = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64
RANDOM = np.random.default_rng(7)


def rand(*shape, dead=(), axis=0):
    """Return random weights, some indices along an axis zero."""
    array = RANDOM.standard_normal(shape).astype(np.float32)
    array[(slice(None),) * axis + (list(dead),)] = 0
    return array


def info(name, kind=FLOAT, shape=None):
    """Return a declaration."""
    return helper.make_tensor_value_info(name, kind, shape)


def body(name, nodes, outputs, inputs=(), weights=None):
    """Return a body; outputs and inputs are names or declarations, weights its initializers."""
    declared = [
        [item if not isinstance(item, str) else info(item) for item in items] for items in (inputs, outputs)
    ]
    held = [numpy_helper.from_array(array, key) for key, array in (weights or {}).items()]
    return helper.make_graph(nodes, name, *declared, held)


def case(nodes, inputs, outputs, weights=None, *, opset=18, feeds=None):
    """Return a model with its inputs."""
    graph = body("main", nodes, outputs, [info(key, FLOAT, shape) for key, shape in inputs.items()], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    drawn = {key: rand(*(3 if isinstance(s, str) else s for s in shape)) for key, shape in inputs.items()}
    return Case(model, {**drawn, **(feeds or {})})


def conditional(then, other, outputs=("y",), *, flag="flag"):
    """Return an If."""
    return helper.make_node("If", [flag], list(outputs), then_branch=then, else_branch=other)


def n(operator, inputs, outputs, **attributes):
    """Return a node."""
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def both_ways(nodes, inputs, outputs, weights, **options):
    """Return the case with the condition an input, true and false."""
    model = case(nodes, inputs, outputs, weights, **options)
    model.model.graph.input.append(info("flag", BOOL, []))
    return [Case(model.model, {**model.feeds, "flag": np.array(flag)}) for flag in (True, False)]


def removed(cases):
    """Assert that all cases come out equal, and return how many weights are left."""
    for item in cases:
        assert failure(item) is None
    return weight_elements(shrunk(cases[0].model))


def test_dead_structure_inside_a_branch():
    """Each branch loses its own hidden channels: 3 of 8 and 1 of 6."""
    then = body(
        "t",
        [n("MatMul", "x a", "h"), n("Relu", "h", "r"), n("MatMul", "r b", "o")],
        ["o"],
        weights={"a": rand(4, 8, dead=(0, 3, 5), axis=1), "b": rand(8, 5)},
    )
    other = body(
        "e",
        [n("MatMul", "x a", "h"), n("MatMul", "h b", "o")],
        ["o"],
        weights={"a": rand(4, 6), "b": rand(6, 5, dead=(2,))},
    )
    cases = both_ways([conditional(then, other)], {"x": (2, 4)}, ["y"], {})
    assert removed(cases) == 5 * (4 + 5) + 5 * (4 + 5)


def test_channels_of_a_captured_tensor():
    """Channels that no branch reads go from the outer producer and from both branches; others stay."""
    then = body("t", [n("MatMul", "h b", "o")], ["o"], weights={"b": rand(8, 5, dead=(0, 1, 2))})
    other = body("e", [n("MatMul", "h c", "o")], ["o"], weights={"c": rand(8, 5, dead=(1, 2, 3))})
    cases = both_ways(
        [n("MatMul", "x a", "h"), conditional(then, other)], {"x": (2, 4)}, ["y"], {"a": rand(4, 8)}
    )
    assert removed(cases) == 6 * 4 + 6 * 5 + 6 * 5


def test_a_captured_constant_is_known_inside():
    """A channel that is constant outside is folded into the branches' products."""
    then = body("t", [n("MatMul", "h b", "m"), n("Relu", "m", "o")], ["o"], weights={"b": rand(8, 5)})
    other = body("e", [n("MatMul", "h c", "o")], ["o"], weights={"c": rand(8, 5)})
    weights = {"a": rand(4, 8, dead=(0, 6), axis=1), "d": rand(8)}
    nodes = [n("MatMul", "x a", "g"), n("Add", "g d", "h"), conditional(then, other)]
    cases = both_ways(nodes, {"x": (2, 4)}, ["y"], weights)
    assert removed(cases) == 6 * 4 + 6 + 6 * 5 + 6 * 5 + 2 * 5


def test_a_sum_added_to_what_a_branch_returns():
    """Constants are folded behind a product that a branch returns, whose unread channels go at the same time."""
    then = body("t", [n("MatMul", "h b", "o")], ["o"], weights={"b": rand(8, 5)})
    other = body("e", [n("MatMul", "h c", "o")], ["o"], weights={"c": rand(8, 5)})
    weights = {"a": rand(4, 8, dead=(0, 6), axis=1), "d": rand(8), "w": rand(5, 3, dead=(2,))}
    nodes = [
        n("MatMul", "x a", "g"),
        n("Add", "g d", "h"),
        conditional(then, other, ["s"]),
        n("MatMul", "s w", "y"),
    ]
    cases = both_ways(nodes, {"x": (2, 4)}, ["y"], weights)
    assert removed(cases) == 6 * 4 + 6 + 2 * (6 * 4 + 4) + 4 * 3


def test_outputs_of_both_branches():
    """What nothing reads outside goes inside; what is the same constant in both is one outside."""
    dead_then, dead_else = (0, 1, 2), (1, 2, 3)
    then = body("t", [n("MatMul", "x a", "o")], ["o"], weights={"a": rand(4, 8, dead=dead_then, axis=1)})
    other = body("e", [n("MatMul", "x a", "o")], ["o"], weights={"a": rand(4, 8, dead=dead_else, axis=1)})
    nodes = [conditional(then, other, ["h"]), n("MatMul", "h w", "y")]
    cases = both_ways(nodes, {"x": (2, 4)}, ["y"], {"w": rand(8, 3, dead=(7,))})
    # constant in both: 1 and 2; unread: 7
    assert removed(cases) == 5 * 4 + 5 * 4 + 5 * 3


def test_a_branch_that_returns_a_constant():
    """A constant branch is cut with the other one; where they agree the channel is known."""
    then = body("t", [n("MatMul", "x a", "o")], ["o"], weights={"a": rand(4, 8, dead=(0, 1), axis=1)})
    held = rand(2, 8)
    held[:, 0] = 0
    other = body("e", [], ["z"], weights={"z": held})
    nodes = [conditional(then, other, ["h"]), n("MatMul", "h w", "y")]
    cases = both_ways(nodes, {"x": (2, 4)}, ["y"], {"w": rand(8, 3, dead=(7,))})
    assert removed(cases) == 6 * 4 + 6 * 2 + 6 * 3


def cell(*, dead=(), first=None, read=()):
    """Return weights and nodes of an Elman cell of 8 units (inputs of 4, read by 3), some units wholly dead."""
    weights = {
        "u": rand(4, 8, dead=dead, axis=1),
        "v": rand(8, 8, dead=dead, axis=1),
        "w": rand(8, 3, dead=read),
        "h0": np.zeros((2, 8), np.float32) if first is None else first,
    }
    nodes = [
        n("MatMul", "x_t u", "p"),
        n("MatMul", "h v", "q"),
        n("Add", "p q", "s"),
        n("Tanh", "s", "h_next"),
    ]
    return weights, nodes


def scan(nodes, *, sequence="x", state="h0", **attributes):
    """Return a Scan over a sequence and the layer that reads it."""
    inner = body("cell", [*nodes, n("Identity", "h_next", "h_out")], ["h_next", "h_out"], ["h", "x_t"])
    inputs, outputs = [state, sequence], ["last", "all"]
    made = helper.make_node("Scan", inputs, outputs, body=inner, num_scan_inputs=1, **attributes)
    return [made, n("MatMul", "all w", "y")]


def loop(nodes, state="h0", outputs=("h_next",), results=("last",)):
    """Return a Loop; the body sees x as it is."""
    inputs = [info("i", INT, []), info("c", BOOL, []), "h"]
    again = n("Identity", "c", "again")
    inner = body("rounds", [again, *nodes], [info("again", BOOL, []), *outputs], inputs)
    return helper.make_node("Loop", ["rounds", "go", state], list(results), body=inner)


COUNTED = {"rounds": np.array(3), "go": np.array(True)}


def test_a_scan_whose_state_is_dead():
    """Units whose weights are all zero hold zero from the first step to the last: 3 of 8 go everywhere."""
    weights, nodes = cell(dead=(0, 3, 7))
    item = case(scan(nodes), {"x": (5, 2, 4)}, ["y"], weights)
    assert removed([item]) == 5 * 4 + 5 * 5 + 5 * 3 + 2 * 5


def test_a_state_that_begins_as_something_else_stays():
    """A unit that is zero from the second step on is no constant where it begins as another number."""
    first = np.zeros((2, 8), np.float32)
    first[:, 3] = 0.5
    weights, nodes = cell(dead=(0, 3, 7), first=first)
    item = case(scan(nodes), {"x": (5, 2, 4)}, ["y"], weights)
    assert removed([item]) == 6 * 4 + 6 * 6 + 6 * 3 + 2 * 6


def test_a_state_that_only_itself_reads():
    """Units that feed nothing but each other go: what is read is asked around the loop."""
    weights, nodes = cell(read=(1, 4))
    # no other unit reads units 1 and 4
    weights["v"][np.ix_([1, 4], [0, 2, 3, 5, 6, 7])] = 0
    item = case(scan(nodes), {"x": (5, 2, 4)}, ["y"], weights)
    assert removed([item]) == 6 * 4 + 6 * 6 + 6 * 3 + 2 * 6


@pytest.mark.parametrize("axis", [0, 1])
def test_a_sequence_that_a_scan_reads(axis):
    """Dead channels of what is iterated over go inside and outside, whichever axis is iterated over."""
    weights, nodes = cell()
    weights["u"][[2]] = 0
    weights["a"] = rand(6, 4, dead=(0,), axis=1)
    made = [n("MatMul", "x a", "xs"), *scan(nodes, sequence="xs", scan_input_axes=[axis])]
    item = case(made, {"x": (5, 2, 6) if axis == 0 else (2, 5, 6)}, ["y"], weights)
    assert removed([item]) == 2 * 6 + 2 * 8 + 8 * 8 + 8 * 3 + 2 * 8


def test_a_scan_that_writes_along_the_last_axis():
    """The axis that a scan writes along is its own; the channels before it are cut."""
    weights, nodes = cell(dead=(0, 3, 7))
    made = [
        *scan(nodes, scan_output_axes=[2])[:1],
        n("Transpose", "all", "t", perm=[2, 0, 1]),
        n("MatMul", "t w", "y"),
    ]
    item = case(made, {"x": (5, 2, 4)}, ["y"], weights)
    assert removed([item]) == 5 * 4 + 5 * 5 + 5 * 3 + 2 * 5


def test_a_loop_whose_state_is_dead():
    """The same in a Loop, which reads its input as a captured tensor."""
    weights, nodes = cell(dead=(0, 3, 7))
    nodes[0] = n("MatMul", "x u", "p")
    item = case([loop(nodes), n("MatMul", "last w", "y")], {"x": (2, 4)}, ["y"], {**weights, **COUNTED})
    assert removed([item]) == 5 * 4 + 5 * 5 + 5 * 3 + 2 * 5


def test_what_a_loop_collects():
    """What a Loop collects loses what nothing reads, though the state itself stays whole."""
    weights, nodes = cell()
    weights["z"] = rand(8, 5)
    weights["r"] = rand(5, 3, dead=(1, 2))
    nodes = [n("MatMul", "x u", "p"), *nodes[1:], n("MatMul", "h_next z", "o")]
    made = [loop(nodes, outputs=["h_next", "o"], results=["last", "all"]), n("MatMul", "all r", "y")]
    del weights["w"]
    item = case(made, {"x": (2, 4)}, ["y"], {**weights, **COUNTED})
    assert removed([item]) == 4 * 8 + 8 * 8 + 2 * 8 + 8 * 3 + 3 * 3


def test_a_state_that_grows():
    """A state whose size changes from round to round keeps its shape unknown; the rest is cut."""
    weights = cell()[0]
    grown = [n("MatMul", "x u", "p"), n("MatMul", "p v", "q"), n("Concat", "h q", "h_next", axis=0)]
    weights["v"][[1, 2]] = 0
    item = case([loop(grown), n("MatMul", "last w", "y")], {"x": (2, 4)}, ["y"], {**weights, **COUNTED})
    assert removed([item]) == 4 * 6 + 6 * 8 + 8 * 3 + 2 * 8


def test_a_state_whose_channels_move():
    """Units that change places from round to round cannot be told apart: all stay, and nothing is wrong."""
    weights, nodes = cell(dead=(0, 3, 7))
    nodes = [
        n("MatMul", "x u", "p"),
        *nodes[1:3],
        n("Gather", "s order", "g", axis=1),
        n("Tanh", "g", "h_next"),
    ]
    weights["order"] = np.array([1, 2, 3, 4, 5, 6, 7, 0])
    weights["w"][[4]] = 0
    item = case([loop(nodes), n("MatMul", "last w", "y")], {"x": (2, 4)}, ["y"], {**weights, **COUNTED})
    assert failure(item, floor=False) is None


def test_a_loop_that_ends_early():
    """How often a body may run says nothing of how often it does: the collected size is not the limit."""
    weights, nodes = cell()
    inputs = [info("i", INT, []), info("c", BOOL, []), "h"]
    early = [n("Less", "i limit", "again"), n("MatMul", "x u", "p"), *nodes[1:], n("Identity", "h_next", "o")]
    inner = body("rounds", early, [info("again", BOOL, []), "h_next", "o"], inputs)
    made = [
        helper.make_node("Loop", ["rounds", "go", "h0"], ["last", "all"], body=inner),
        n("MatMul", "all w", "m"),
        n("Shape", "m", "size"),
        n("Cast", "size", "y", to=FLOAT),
    ]
    weights |= {"rounds": np.array(10), "go": np.array(True), "limit": np.array(2)}
    assert removed([case(made, {"x": (2, 4)}, ["y", "m"], weights)]) == 4 * 8 + 8 * 8 + 8 * 3 + 2 * 8


def test_branches_in_a_scan():
    """An If in a Scan's body: what its branches do not read of the state's candidate goes, at any depth."""
    weights, nodes = cell(read=(1, 4))
    weights["v"][np.ix_([1, 4], [0, 2, 3, 5, 6, 7])] = 0
    then = body("t", [n("Relu", "s", "o")], ["o"])
    deeper = body("d", [n("Tanh", "s", "o")], ["o"]), body("d2", [n("Neg", "s", "o")], ["o"])
    other = body("e", [conditional(*deeper, ["o"])], ["o"])
    nodes = [*nodes[:3], conditional(then, other, ["h_next"])]
    cases = both_ways(scan(nodes), {"x": (5, 2, 4)}, ["y"], weights)
    assert removed(cases) == 6 * 4 + 6 * 6 + 6 * 3 + 2 * 6


def test_one_weight_in_two_branches():
    """Branches that cut a shared weight alike share the cut; cuts that would not pay are not made."""
    alike = [body(key, [n("MatMul", "h b", "o")], ["o"]) for key in "te"]
    nodes = [n("MatMul", "x a", "h"), conditional(*alike)]
    cases = both_ways(nodes, {"x": (2, 4)}, ["y"], {"a": rand(4, 8), "b": rand(8, 5, dead=(0, 3))})
    assert removed(cases) == 4 * 6 + 6 * 5
    apart = [
        body("t", [n("MatMul", "h b", "o")], ["o"]),
        body("e", [n("MatMul", "g b", "o")], ["o"]),
    ]
    nodes = [n("MatMul", "x a", "h"), n("MatMul", "x c", "g"), conditional(*apart)]
    weights = {"a": rand(4, 8, dead=(0,), axis=1), "c": rand(4, 8, dead=(1,), axis=1), "b": rand(8, 5)}
    assert removed(both_ways(nodes, {"x": (2, 4)}, ["y"], weights)) == 2 * 32 + 40


def test_sequences_and_optionals_stay():
    """A body that maps over a sequence keeps its interface; what is inside and around it is cut."""
    inner = body(
        "each",
        [n("MatMul", "piece b", "m"), n("MatMul", "m c", "o")],
        ["o"],
        [info("piece", FLOAT, ["n", 5])],
    )
    nodes = [
        n("MatMul", "x a", "h"),
        n("MatMul", "h d", "g"),
        helper.make_node("SplitToSequence", ["g"], ["pieces"], axis=0),
        helper.make_node("SequenceMap", ["pieces"], ["mapped"], body=inner),
        n("ConcatFromSequence", "mapped", "y", axis=0),
    ]
    weights = {"a": rand(4, 6), "d": rand(6, 5, dead=(0, 1)), "b": rand(5, 7), "c": rand(7, 2, dead=(3,))}
    assert removed([case(nodes, {"x": (2, 4)}, ["y"], weights)]) == 4 * 4 + 4 * 5 + 5 * 6 + 6 * 2


def test_a_local_function_with_a_body():
    """Functions are inlined at any depth, with the bodies that they hold and the attributes they pass on."""
    then = body("t", [n("MatMul", "h b", "o")], ["o"])
    other = body("e", [helper.make_node("LeakyRelu", ["h"], ["p"]), n("MatMul", "p b", "o")], ["o"])
    reference = other.node[0].attribute.add(
        name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT
    )
    assert reference.ref_attr_name == "slope"
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    choose = helper.make_function(
        "own", "Choose", ["h", "flag", "b"], ["y"], [conditional(then, other)], imports, ["slope"]
    )
    call = helper.make_node("Choose", ["h", "flag", "b"], ["y"], domain="own")
    call.attribute.add(name="slope", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    outer = helper.make_function("own", "Outer", ["h", "flag", "b"], ["y"], [call], imports, ["slope"])
    made = [
        n("MatMul", "x a", "h"),
        helper.make_node("Outer", ["h", "flag", "b"], ["y"], domain="own", slope=0.3),
    ]
    cases = both_ways(made, {"x": (2, 4)}, ["y"], {"a": rand(4, 8), "b": rand(8, 5, dead=(0, 3))})
    for item in cases:
        item.model.functions.extend([choose, outer])
        item.model.opset_import.append(imports[1])
        del item.model.functions[2:], item.model.opset_import[2:]
    assert removed(cases) == 4 * 6 + 6 * 5


def branching_model(tmp_path, *, nearly=0.0):
    """Write a model whose branches hold weights as Constant nodes, rows 0 and 3 of one of them nearly zero."""
    weights = {"b": rand(8, 5), "c": rand(8, 5, dead=(0, 3))}
    weights["b"][[0, 3]] = nearly
    then, other = (
        body(
            key,
            [
                helper.make_node("Constant", [], [name], value=numpy_helper.from_array(weights[name], name)),
                n("MatMul", f"h {name}", f"{name}_out"),
            ],
            [info(f"{name}_out", FLOAT, ["n", 5])],
        )
        for key, name in (("then", "b"), ("else", "c"))
    )
    made = [n("MatMul", "x a", "h"), conditional(then, other)]
    item = both_ways(made, {"x": ("n", 4)}, [info("y", FLOAT, ["n", 5])], {"a": rand(4, 8)})[0]
    onnx.save(item.model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_sizes_and_rows_count_what_is_inside(tmp_path):
    """The report counts bodies' weights, of two branches the larger one's work, and their layers' rows."""
    report = compress(branching_model(tmp_path), tmp_path / "small.onnx", align="off")
    assert (report.before.parameters, report.after.parameters) == (4 * 8 + 2 * 40, 4 * 6 + 2 * 30)
    assert (report.before.macs, report.after.macs) == (4 * 8 + 40, 4 * 6 + 30)
    assert report.verification.passed
    assert {row.name: (row.total, row.kept) for row in report.layers} == {
        "h": (8, 6),
        "b_out": (5, 5),
        "c_out": (5, 5),
    }


def test_a_threshold_reaches_into_bodies(tmp_path):
    """Weights of a branch that are nearly zero count as zero, though a Constant node holds them."""
    model = branching_model(tmp_path, nearly=1e-5)
    assert compress(model, tmp_path / "as_it_is.onnx", align="off").after.parameters == 4 * 8 + 2 * 40
    assert compress(model, tmp_path / "less.onnx", align="off", zero_below=1e-3).after.parameters == 84


def test_a_tensor_in_a_body_is_explained(tmp_path):
    """The reasons of a captured tensor lead into the branch that reads it, and the branch's tensors have some."""
    model = branching_model(tmp_path)
    lines = "\n".join(explain(model, "h").lines)
    assert "6 of 8 stay" in lines
    assert "MatMul" in lines
    assert "an output of the model" in "\n".join(explain(model, "c_out").lines)


def test_the_work_of_a_scan_and_of_a_loop():
    """A body's work counts once for each step of a sequence, and once for each of a known number of rounds."""
    weights, nodes = cell()
    item = case(scan(nodes), {"x": (5, 2, 4)}, ["y"], weights)
    assert count_macs(ir.from_proto(item.model)) == 5 * 2 * (4 * 8 + 8 * 8 + 8 * 3)
    nodes[0] = n("MatMul", "x u", "p")
    item = case([loop(nodes), n("MatMul", "last w", "y")], {"x": (2, 4)}, ["y"], {**weights, **COUNTED})
    assert count_macs(ir.from_proto(item.model)) == 3 * 2 * (4 * 8 + 8 * 8) + 2 * 8 * 3


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_condition_is_tried_both_ways(shape):
    """Two seeds that follow each other draw a condition true and false."""
    spec = InputSpec("flag", np.dtype(bool), shape, 0.0, 1.0, "bool")
    drawn = [draw_inputs([spec], seed=seed)["flag"] for seed in range(4)]
    assert all(array.shape == shape and array.dtype == bool for array in drawn)
    assert [bool(drawn[0].all()), bool(drawn[2].all())] != [bool(drawn[1].all()), bool(drawn[3].all())]
    assert drawn[0].all() != drawn[1].all()
    assert drawn[2].all() != drawn[3].all()


def test_functions_that_call_each_other_twice_are_refused(tmp_path):
    """What would unfold into a thousand million nodes is refused before it is unfolded."""
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    functions = [helper.make_function("own", "F0", ["v"], ["z"], [n("Relu", "v", "z")], imports)]
    for level in range(1, 31):
        calls = [
            helper.make_node(f"F{level - 1}", ["v"], ["m"], domain="own"),
            helper.make_node(f"F{level - 1}", ["m"], ["z"], domain="own"),
        ]
        functions.append(helper.make_function("own", f"F{level}", ["v"], ["z"], calls, imports))
    call = helper.make_node("F30", ["x"], ["y"], domain="own")
    graph = body("main", [call], [info("y", FLOAT, [2, 4])], [info("x", FLOAT, [2, 4])])
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)
    onnx.save(model, tmp_path / "bomb.onnx")
    with pytest.raises(EtpError, match="unfold"):
        inspect(tmp_path / "bomb.onnx")
