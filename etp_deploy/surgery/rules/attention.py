"""Attention as one operator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, literal, weight
from etp_deploy.surgery.rules.common import attribute, input_at, rank, static
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.attention import Attention
from etp_deploy.surgery.statements.base import array_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement


@rule(
    "Attention",
    examples=(
        example(computed(2, 4, 5, 6), computed(2, 4, 5, 6), computed(2, 4, 5, 3), opset=23),
        example(computed(2, 4, 5, 6), computed(2, 2, 5, 6), computed(2, 2, 5, 6), opset=23, scale=0.3),
        example(computed(2, 4, 5, 6), computed(2, 4, 5, 6), computed(2, 4, 5, 3), weight(5, 5), opset=23),
        example(computed(2, 4, 5, 6), computed(2, 4, 5, 6), computed(2, 4, 5, 3), opset=23, is_causal=1),
        example(
            computed(2, 5, 8),
            computed(2, 5, 8),
            computed(2, 5, 8),
            opset=23,
            q_num_heads=2,
            kv_num_heads=2,
            removable=False,
        ),
        example(computed(2, 4, 5, 6), weight(2, 4, 5, 6), computed(2, 4, 5, 3), opset=23, removable=False),
        example(
            computed(2, 4, 5, 6),
            computed(2, 4, 5, 6),
            computed(2, 4, 5, 3),
            literal([[False] * 5, *[[True] * 5] * 4], "bool"),
            opset=23,
        ),
        example(computed(2, 1, 5, 1), weight(2, 1, 5, 1), computed(2, 1, 5, 3), opset=23, removable=False),
        example(
            computed(2, 4, 5, 6),
            computed(2, 4, 5, 6),
            computed(2, 4, 5, 3),
            None,
            computed(2, 4, 3, 6),
            computed(2, 4, 3, 3),
            opset=23,
            removable=False,
        ),
        example(
            computed(2, 4, 5, 6),
            computed(2, 4, 5, 6),
            computed(2, 4, 5, 3),
            opset=23,
            outputs=3,
            removable=False,
        ),
    ),
)
def attention(node: ir.Node) -> Statement:
    """y[b, h, n, e] = sum_m softmax_m(scale * q[b, h, n] . k[b, g, m] + mask) * v[b, g, m, e]"""
    if rank(node.inputs[0]) != 4:
        raise RefusedError("an Attention on tensors of three axes")
    if any(array_of(value) is not None for value in node.inputs[:3]):
        raise RefusedError("an Attention with constant queries, keys or values")
    if any(input_at(node, index) is not None for index in (4, 5, 6)):
        raise RefusedError("an Attention with a cache")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise RefusedError("a second output of the node is used")
    scale = attribute(node, "scale", 1.0 / math.sqrt(static(node.inputs[0], 3)))
    return Attention(node, scale=float(scale), may_mask_all=input_at(node, 3) is not None)
