"""Reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, indices, literal
from etp_deploy.surgery.rules.common import attribute, constant_at, input_at, normal_axis, rank
from etp_deploy.surgery.rules.registry import rule
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.reduction import Reduction

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement
    from etp_deploy.surgery.statements.mapped import AxisMap, Constants


def _reduced(node: ir.Node) -> list[int]:
    axes = rank(node.inputs[0])
    if input_at(node, 1) is not None:
        listed = [int(axis) for axis in constant_at(node, 1, "its axes are").reshape(-1)]
    else:
        listed = [int(axis) for axis in attribute(node, "axes", ())]
    if not listed and attribute(node, "noop_with_empty_axes", 0):
        return []
    return sorted(normal_axis(axis, axes) for axis in listed) or list(range(axes))


def _axis_map(node: ir.Node) -> AxisMap:
    """Return the output axis of each input axis, None for those that are reduced."""
    reduced = _reduced(node)
    axes = rank(node.inputs[0])
    kept = [axis for axis in range(axes) if axis not in reduced]
    keepdims = bool(attribute(node, "keepdims", 1))
    places = {axis: axis if keepdims else place for place, axis in enumerate(kept)}
    return tuple(places.get(axis) for axis in range(axes))


def _reduction(node: ir.Node, constants: Constants) -> Statement:
    whole = f"{node.op_type} reads this axis as a whole"
    return Pointwise(node, {0: _axis_map(node)}, constants=constants, whole=whole)


@rule(
    "ReduceMax",
    "ReduceMin",
    examples=(
        example(computed(2, 6, 4, 4), literal([2, 3])),
        example(computed(2, 6, 4), literal([-1]), keepdims=0),
        example(computed(2, 6, 4), opset=13, axes=[1]),
        example(computed(2, 6, 4), removable=False),
        example(computed(2, 6, 4), noop_with_empty_axes=1),
    ),
)
def reduce_to_itself(node: ir.Node) -> Statement:
    """y = maximum or minimum of x over axes; a constant stays itself"""
    return _reduction(node, "pass")


@rule(
    "ReduceMean",
    examples=(
        example(computed(2, 6, 4, 4), literal([2, 3])),
        example(computed(2, 6, 4, 4), literal([1]), keepdims=0),
        example(computed(2, 6, 4), literal([1, 2])),
    ),
)
def reduce_mean(node: ir.Node) -> Statement:
    """y = sum of x over axes / number of entries"""
    return Reduction(node, _axis_map(node), "mean")


@rule(
    "ReduceSum",
    examples=(
        example(computed(2, 6, 4), literal([1])),
        example(computed(2, 6, 4), literal([1, 2]), keepdims=0),
        example(computed(2, 6, 4), indices(1, below=2), removable=False),
    ),
)
def reduce_sum(node: ir.Node) -> Statement:
    """y = sum of x over axes"""
    return Reduction(node, _axis_map(node), "sum")


@rule(
    "ReduceSumSquare",
    "ReduceL1",
    "ReduceL2",
    examples=(
        example(computed(2, 6, 4), literal([1])),
        example(computed(2, 6, 4), literal([2]), keepdims=0),
    ),
)
def reduce_norm(node: ir.Node) -> Statement:
    """y = sum of squares, or norm, of x over axes; only zeros give nothing"""
    return Reduction(node, _axis_map(node), "norm")


@rule("ReduceProd", "ReduceLogSum", "ReduceLogSumExp", examples=(example(computed(2, 6, 4), literal([2])),))
def reduce_other(node: ir.Node) -> Statement:
    """y = product or logarithm of a sum of x over axes"""
    return _reduction(node, "none")


@rule(
    "ArgMax",
    "ArgMin",
    examples=(
        example(computed(2, 6, 4), axis=2),
        example(computed(2, 6, 4), axis=-2, keepdims=0),
        example(computed(2, 6, 4), axis=2, select_last_index=1),
        example(computed(4, 6)),
    ),
)
def arg(node: ir.Node) -> Statement:
    """y = place of the extreme entry along an axis"""
    axes = rank(node.inputs[0])
    axis = normal_axis(int(attribute(node, "axis", 0)), axes)
    keepdims = bool(attribute(node, "keepdims", 1))
    kept = [other for other in range(axes) if other != axis]
    places = {other: other if keepdims else place for place, other in enumerate(kept)}
    maps = {0: tuple(places.get(other) for other in range(axes))}
    return Pointwise(node, maps, constants="none", whole=f"{node.op_type} compares along this axis")
