"""Normalisations and softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, literal, weight
from etp_deploy.surgery.rules.common import attribute, constant_at, normal_axis, rank, same_axes
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.pointwise import Pointwise

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement


@rule(
    "BatchNormalization",
    examples=(
        example(computed(2, 6, 4), weight(6), weight(6), weight(6), literal([1, 2, 0.5, 1, 3, 1], "float32")),
        example(
            computed(2, 6, 4),
            weight(6),
            computed(6),
            weight(6),
            literal([1, 2, 0.5, 1, 3, 1], "float32"),
            removable=False,
        ),
        example(
            computed(2, 6, 4),
            weight(6),
            weight(6),
            weight(6),
            literal([1, 2, 0.5, 1, 3, 1], "float32"),
            training_mode=1,
            outputs=3,
            removable=False,
        ),
    ),
)
def batch_normalization(node: ir.Node) -> Statement:
    """y[n, c, ...] = (x[n, c, ...] - mean[c]) / sqrt(var[c] + epsilon) * scale[c] + bias[c]"""
    if attribute(node, "training_mode", 0):
        raise RefusedError("BatchNormalization in training mode reads the whole batch")
    for index in range(1, 5):
        constant_at(node, index, "its statistics are")
    maps: dict[int, tuple[int | None, ...]] = {0: same_axes(rank(node.inputs[0]))}
    maps.update(dict.fromkeys(range(1, 5), (1,)))
    return Pointwise(node, maps, absorbing=(1,))


@rule(
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    examples=(
        example(computed(2, 6, 4), weight(4), weight(4), operator="LayerNormalization"),
        example(computed(2, 6, 4), weight(6, 4), operator="LayerNormalization", axis=1),
        example(computed(2, 6, 4), weight(4), operator="LayerNormalization", outputs=3, removable=False),
        example(computed(2, 6, 4), weight(4), operator="RMSNormalization", opset=23),
        example(computed(2, 6, 4), weight(4), operator="SimplifiedLayerNormalization"),
    ),
)
def layer_normalization(node: ir.Node) -> Statement:
    """y = (x - mean) / std * scale + bias over the last axes; a removed channel would change mean and std"""
    axes = rank(node.inputs[0])
    first = normal_axis(int(attribute(node, "axis", -1)), axes)
    kept = same_axes(axes, *range(first, axes))
    return Pointwise(
        node, {0: kept}, constants="none", whole=f"{node.op_type} takes mean and variance over this axis"
    )


@rule(
    "Softmax",
    "LogSoftmax",
    "Hardmax",
    examples=(
        example(computed(2, 6, 4)),
        example(computed(2, 6, 4), axis=1),
        example(computed(2, 6, 4), axis=2, opset=11),
        example(computed(2, 6, 4), axis=1, opset=11, removable=False),
    ),
)
def softmax(node: ir.Node) -> Statement:
    """y = exp(x) / sum(exp(x)) along an axis; rows sum to one"""
    axes = rank(node.inputs[0])
    axis = normal_axis(int(attribute(node, "axis", -1)), axes)
    opset = node.graph.opset_imports.get("", 1) if node.graph is not None else 1
    if opset < 13 and axis != axes - 1:
        raise RefusedError("a Softmax of an opset before 13 over several axes")
    return Pointwise(
        node,
        {0: same_axes(axes, axis)},
        constants="none",
        whole=f"{node.op_type} runs over this axis",
        stochastic=axis if node.op_type == "Softmax" else None,
    )


@rule("InstanceNormalization", examples=(example(computed(2, 6, 4, 4), weight(6), weight(6)),))
def instance_normalization(node: ir.Node) -> Statement:
    """y[n, c, ...] = (x[n, c, ...] - mean over space) / std over space * scale[c] + bias[c]"""
    axes = rank(node.inputs[0])
    maps: dict[int, tuple[int | None, ...]] = {0: (0, 1, *([None] * (axes - 2))), 1: (1,), 2: (1,)}
    return Pointwise(node, maps, constants="none", whole="normalised over")
