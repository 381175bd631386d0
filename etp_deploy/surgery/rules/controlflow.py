"""Operators with bodies: If, Loop, Scan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx.parser import parse_graph

from etp_deploy.surgery.examples import computed, example, literal
from etp_deploy.surgery.rules.common import attribute, normal_axis, rank
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import opset_of
from etp_deploy.surgery.statements.body import End, Tie, Ties, bodies

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

_SCAN_WITHOUT_BATCH = 9

_CONSTANT = parse_graph(
    "branch () => (float[2, 4] y) { y = Constant <value = float[2, 4] {1, 0, 2, 3, 1, 0, 4, 5}> () }"
)
_ROUND = parse_graph("""
    round (int64 i, bool c, float[2, 4] h) => (bool again, float[2, 4] next, float[2, 4] made) {
        again = Identity (c)
        next = Relu (h)
        made = Neg (next)
    }
""")
_STEP = parse_graph("""
    step (float[2, 4] h, float[2, 4] x) => (float[2, 4] next, float[2, 4] made) {
        next = Max (h, x)
        made = Relu (next)
    }
""")


@rule(
    "If",
    examples=(example(literal(True, "bool"), then_branch=_CONSTANT, else_branch=_CONSTANT, removable=False),),
)
def branch(node: ir.Node) -> Statement:
    """y[...] = then[...] if condition else other[...]"""
    then, other = bodies(node)
    ties = [
        Tie(results=(End(one), End(two)), out=End(out))
        for one, two, out in zip(then.outputs, other.outputs, node.outputs, strict=True)
    ]
    return Ties(node, ties, whole="the condition of")


@rule(
    "Loop",
    examples=(example(literal(3), literal(True, "bool"), computed(2, 4), outputs=2, body=_ROUND),),
)
def loop(node: ir.Node) -> Statement:
    """state[t + 1, ...], y[t, ...] = body(t, state[t, ...]) while the condition holds"""
    (body,) = bodies(node)
    states = len(node.inputs) - 2
    ties = []
    for index in range(states):
        source = node.inputs[index + 2]
        if source is None:
            raise RefusedError("a state has no first value")
        ties.append(
            Tie(
                End(source),
                End(body.inputs[index + 2]),
                (End(body.outputs[index + 1]),),
                End(node.outputs[index]),
            )
        )
    ties += [
        Tie(results=(End(result),), out=End(out, 0))
        for result, out in zip(body.outputs[states + 1 :], node.outputs[states:], strict=True)
    ]
    return Ties(node, ties, whole="the condition of")


@rule(
    "Scan",
    examples=(
        example(computed(2, 4), computed(3, 2, 4), outputs=2, body=_STEP, num_scan_inputs=1),
        example(
            computed(2, 4),
            computed(2, 3, 4),
            outputs=2,
            body=_STEP,
            num_scan_inputs=1,
            scan_input_axes=[1],
            scan_output_axes=[-1],
        ),
        example(
            computed(1, 2, 4),
            computed(1, 3, 2, 4),
            outputs=2,
            body=_STEP,
            num_scan_inputs=1,
            opset=8,
            removable=False,
        ),
    ),
)
def scan(node: ir.Node) -> Statement:
    """state[t + 1, ...], y[t, ...] = body(state[t, ...], x[t, ...])"""
    if opset_of(node) < _SCAN_WITHOUT_BATCH:
        raise RefusedError("this version of the operator has a batch axis of its own")
    (body,) = bodies(node)
    sequences = attribute(node, "num_scan_inputs", 0)
    states = len(node.inputs) - sequences
    read = attribute(node, "scan_input_axes", [0] * sequences)
    written = attribute(node, "scan_output_axes", [0] * (len(node.outputs) - states))
    ties = []
    for index, source in enumerate(node.inputs):
        if source is None:
            raise RefusedError("an input is left out")
        if index < states:
            state = (End(body.outputs[index]),), End(node.outputs[index])
            ties.append(Tie(End(source), End(body.inputs[index]), *state))
        else:
            axis = normal_axis(read[index - states], rank(source))
            ties.append(Tie(End(source, axis), End(body.inputs[index])))
    for result, out, axis in zip(body.outputs[states:], node.outputs[states:], written, strict=True):
        ties.append(Tie(results=(End(result),), out=End(out, normal_axis(axis, rank(out)))))
    return Ties(node, ties, whole="an input of")
