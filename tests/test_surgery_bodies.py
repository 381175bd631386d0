"""Graphs with bodies: dead structure inside, captured, and across; exact counts, equal outputs."""

from __future__ import annotations

import numpy as np
import onnx
from graphs import Case, failure, shrunk, weight_elements
from onnx import helper, numpy_helper

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


def recurrent(cell, *, dead_input=(), dead_state=(), first=None, read=(), name="Scan"):
    """Return an Elman cell written out as a Scan or a Loop: state 8, sequence of 4, output by 3."""
    del name
    weights = {
        "u": rand(4, 8, dead=dead_state, axis=1),
        "v": rand(8, 8, dead=dead_state, axis=1),
        "w": rand(8, 3, dead=read),
        "h0": np.zeros((2, 8), np.float32) if first is None else first,
    }
    weights["u"][list(dead_input)] = 0
    nodes = [
        n("MatMul", "x_t u", "p"),
        n("MatMul", "h v", "q"),
        n("Add", "p q", "s"),
        n(cell, "s", "h_next"),
        n("Identity", "h_next", "h_out"),
    ]
    return weights, nodes


def scan(weights, nodes, outputs=("last", "all")):
    """Return a Scan over axis 0 of x."""
    inner = body("cell", nodes, ["h_next", "h_out"], ["h", "x_t"])
    return [
        helper.make_node("Scan", ["h0", "x"], list(outputs), body=inner, num_scan_inputs=1),
        n("MatMul", f"{outputs[1]} w", "y"),
    ], weights


def test_a_scan_whose_state_is_dead():
    """Units whose weights are all zero hold zero from the first step to the last: 3 of 8 go everywhere."""
    weights, inner = recurrent("Tanh", dead_state=(0, 3, 7))
    nodes, weights = scan(weights, inner)
    item = case(nodes, {"x": (5, 2, 4)}, ["y"], weights)
    assert removed([item]) == 5 * 4 + 5 * 5 + 5 * 3 + 2 * 5
