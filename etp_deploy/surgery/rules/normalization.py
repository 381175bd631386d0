"""Normalisations and softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, literal, weight
from etp_deploy.surgery.rules.common import (
    attribute,
    constant_at,
    input_at,
    normal_axis,
    rank,
    same_axes,
)
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of, opset_of, softmax_axis
from etp_deploy.surgery.statements.normalised import Centred, Normed
from etp_deploy.surgery.statements.pointwise import Pointwise

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement
    from etp_deploy.surgery.statements.mapped import AxisMap

EPSILON = 1e-5
PER_CHANNEL_OPSET = 21
"""From here on GroupNormalization has a scale and a bias for each channel, before for each group."""


def _axes(node: ir.Node) -> int:
    """Return the rank of the data, which must be computed."""
    if array_of(node.inputs[0]) is not None:
        raise RefusedError("it normalises a constant")
    return rank(node.inputs[0])


_STATISTICS = (literal([0.5, 1.0, 2.0, 1.5, 0.7, 1.1], "float32"),)


@rule(
    "BatchNormalization",
    examples=(
        example(computed(2, 6, 4, 5), weight(6), weight(6), weight(6), *_STATISTICS),
        example(computed(3, 6), weight(6), weight(6), weight(6), *_STATISTICS, epsilon=0.5),
        example(computed(2, 6, 4), weight(6), computed(6), weight(6), *_STATISTICS, removable=False),
        example(
            computed(2, 6, 4, 5),
            weight(6),
            weight(6),
            weight(6),
            *_STATISTICS,
            training_mode=1,
            outputs=3,
            removable=False,
        ),
        example(
            computed(2, 6, 4),
            weight(6),
            weight(6),
            weight(6),
            literal([1, 2, 0.5, 1, 3, 1], "float32"),
            training_mode=1,
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
    examples=(
        example(computed(2, 3, 6), weight(6), weight(6)),
        example(computed(2, 3, 5, 6), weight(6), axis=-1),
        example(computed(2, 4, 5, 6), weight(5, 6), weight(5, 6), axis=2),
        example(computed(2, 3, 6), computed(6), weight(6), removable=False),
        example(computed(2, 3, 6), weight(6), outputs=3, removable=False),
    ),
)
def layer_normalization(node: ir.Node) -> Statement:
    """y = (x - mean) / std * scale + bias over the last axes; a removed channel would change mean and std"""
    axes = rank(node.inputs[0])
    first = normal_axis(int(attribute(node, "axis", -1)), axes)
    for index in (1, 2):
        if input_at(node, index) is not None:
            constant_at(node, index, "its scale or bias is")
    kept = same_axes(axes, *range(first, axes))
    return Pointwise(
        node, {0: kept}, constants="none", whole=f"{node.op_type} takes mean and variance over this axis"
    )


@rule(
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    examples=(
        example(computed(2, 3, 6), weight(6), opset=23),
        example(computed(2, 3, 6), weight(6), opset=23, axis=2, epsilon=0.5),
        example(computed(2, 4, 5, 6), weight(6), opset=23, axis=-1),
        example(computed(2, 3, 6), weight(1), opset=23),
        example(computed(2, 4, 3, 6), weight(3, 6), opset=23, axis=2, epsilon=0.1),
        example(computed(2, 3, 6), computed(6), opset=23, removable=False),
        example(
            computed(2, 3, 6),
            weight(6),
            operator="SimplifiedLayerNormalization",
            outputs=2,
            removable=False,
        ),
    ),
)
def rms_normalization(node: ir.Node) -> Statement:
    """y[..., c] = x[..., c] / sqrt(mean_c x[..., c] ** 2 + epsilon) * scale[c]"""
    axes = _axes(node)
    first = normal_axis(int(attribute(node, "axis", -1)), axes)
    scale = constant_at(node, 1, "its scale is")
    if first != axes - 1:
        kept = same_axes(axes, *range(first, axes))
        whole = f"{node.op_type} takes the mean of squares over several axes"
        return Pointwise(node, {0: kept}, constants="none", whole=whole)
    maps: dict[int, AxisMap] = {0: same_axes(axes), 1: tuple(range(axes - scale.ndim, axes))}
    return Normed(node, axes - 1, maps, float(attribute(node, "epsilon", EPSILON)))


@rule(
    "LpNormalization",
    examples=(
        example(computed(2, 3, 6)),
        example(computed(2, 6, 4), axis=1, p=1),
        example(computed(2, 6, 4, 3), axis=2, p=2),
        example(weight(2, 3, 6), removable=False),
    ),
)
def lp_normalization(node: ir.Node) -> Statement:
    """y[..., c] = x[..., c] / (sum_c |x[..., c]| ** p) ** (1 / p); zeros add nothing to the sum"""
    axes = _axes(node)
    return Normed(node, normal_axis(int(attribute(node, "axis", -1)), axes), {0: same_axes(axes)})


@rule(
    "Softmax",
    "LogSoftmax",
    "Hardmax",
    examples=(
        example(computed(2, 4, 5, 6)),
        example(computed(2, 4, 6), axis=1),
        example(computed(2, 4, 6), axis=-1, opset=12),
        example(computed(2, 4, 6), axis=1, opset=12, removable=False),
        example(computed(2, 4, 6), opset=12, removable=False),
        example(computed(4, 6), opset=12),
    ),
)
def softmax(node: ir.Node) -> Statement:
    """y = exp(x) / sum(exp(x)) along an axis; rows sum to one"""
    axes = rank(node.inputs[0])
    axis = softmax_axis(node, axes)
    if axis is None:
        raise RefusedError("a Softmax of an opset before 13 over several axes")
    return Pointwise(
        node,
        {0: same_axes(axes, axis)},
        constants="none",
        whole=f"{node.op_type} runs over this axis",
        stochastic=axis if node.op_type == "Softmax" else None,
    )


@rule(
    "InstanceNormalization",
    examples=(
        example(computed(2, 6, 4, 5), weight(6), weight(6)),
        example(computed(2, 6, 9), weight(6), weight(6), epsilon=0.5),
    ),
)
def instance_normalization(node: ir.Node) -> Statement:
    """y[n, c, ...] = (x[n, c, ...] - mean over space) / sqrt(variance over space + epsilon) * scale[c] + bias[c]"""
    axes = _axes(node)
    maps: dict[int, AxisMap] = {0: same_axes(axes), 1: (1,), 2: (1,)}
    epsilon = float(attribute(node, "epsilon", EPSILON))
    return Centred(node, maps, over=tuple(range(2, axes)), affine=(1, 2), epsilon=epsilon)


@rule(
    "GroupNormalization",
    examples=(
        example(computed(2, 8, 4, 5), weight(8), weight(8), num_groups=4),
        example(computed(2, 8, 6), weight(8), weight(8), num_groups=8, epsilon=0.5),
        example(computed(2, 8, 4, 5), weight(4), weight(4), num_groups=4, opset=18),
        example(computed(2, 8, 4, 5), computed(4), weight(4), num_groups=4, opset=18, removable=False),
        example(computed(2, 8, 4, 5), weight(8), weight(8), num_groups=1),
    ),
)
def group_normalization(node: ir.Node) -> Statement:
    """y[n, g*c, ...] = (x[n, g*c, ...] - mean over c and space) / sqrt(variance + epsilon) * scale[g*c] + bias[g*c]"""
    axes, groups = _axes(node), int(attribute(node, "num_groups", 1))
    epsilon = float(attribute(node, "epsilon", EPSILON))
    over = tuple(range(2, axes))
    if opset_of(node) >= PER_CHANNEL_OPSET:
        maps: dict[int, AxisMap] = {0: same_axes(axes), 1: (1,), 2: (1,)}
        return Centred(node, maps, over=over, groups=groups, affine=(1, 2), epsilon=epsilon)
    for index in (1, 2):
        constant_at(node, index, "its scale or bias is")
    return Centred(
        node,
        {0: same_axes(axes)},
        over=over,
        groups=groups,
        by_group=(1, 2),
        affine=(1, 2),
        epsilon=epsilon,
    )


@rule(
    "MeanVarianceNormalization",
    examples=(
        example(computed(2, 6, 4, 5)),
        example(computed(2, 6, 4, 5), axes=[0, 1, 2, 3], removable=False),
    ),
)
def mean_variance_normalization(node: ir.Node) -> Statement:
    """y = (x - mean) / sqrt(variance), both over axes; of zeros ONNX Runtime makes NaN, so no constant is known"""
    axes = _axes(node)
    over = tuple(sorted(normal_axis(int(axis), axes) for axis in attribute(node, "axes", (0, 2, 3))))
    return Centred(node, {0: same_axes(axes)}, over=over, epsilon=0.0)


@rule(
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    domain="com.microsoft",
    examples=(example(computed(2, 3, 6), computed(2, 3, 6), weight(6), outputs=3, removable=False),),
)
def skip_normalization(node: ir.Node) -> Statement:
    """y = normalised(x + skip + bias): read as these operators (see `fusions`), but where statistics are outputs"""
    raise RefusedError(f"{node.op_type} gives its statistics out")


@rule(
    "EmbedLayerNormalization",
    domain="com.microsoft",
    examples=(
        example(
            computed(2, 5, dtype="int32"),
            None,
            weight(6, 8),
            weight(5, 8),
            None,
            weight(8),
            weight(8),
            outputs=2,
            removable=False,
        ),
    ),
)
def embed_layer_normalization(node: ir.Node) -> Statement:
    """y = LayerNormalization(words[i] + positions[p] + segments[s]): mean and variance are over the tables' columns"""
    raise RefusedError(f"{node.op_type} takes mean and variance over this axis")


@rule(
    "GroupNorm",
    "SkipGroupNorm",
    domain="com.microsoft",
    examples=(
        example(computed(2, 4, 5, 6), weight(6), weight(6), operator="GroupNorm", groups=3, removable=False),
        example(
            computed(2, 4, 5, 6),
            weight(6),
            weight(6),
            computed(2, 4, 5, 6),
            operator="SkipGroupNorm",
            groups=3,
            removable=False,
        ),
    ),
)
def fused_group_normalization(node: ir.Node) -> Statement:
    """y = activation(GroupNormalization(x + skip + bias)), channels last: not on the CPU, so it cannot be verified"""
    raise RefusedError(f"{node.op_type} runs on no CPU, so that what it computes cannot be compared")
