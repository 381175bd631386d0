"""Operators that run along some axes (running sums, samples of space, spectra) and pass all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, literal, weight
from etp_deploy.surgery.rules.common import attribute, constant_at, input_at, normal_axis, rank, same_axes
from etp_deploy.surgery.rules.registry import rule
from etp_deploy.surgery.statements.base import opset_of
from etp_deploy.surgery.statements.pointwise import Pointwise

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

# the input of a DFT that holds its axis, and the operator set from which on it does
DFT_AXIS, DFT_AXIS_OPSET = 2, 20


@rule(
    "CumSum",
    examples=(
        example(computed(2, 5, 6), literal(1)),
        example(computed(2, 5, 6), literal(-2), exclusive=1, reverse=1),
        example(computed(2, 6), computed(dtype="int64"), removable=False),
    ),
)
def cumulative_sum(node: ir.Node) -> Statement:
    """y[..., j, ...] = sum of x[..., i, ...] over i <= j"""
    axes = rank(node.inputs[0])
    axis = int(constant_at(node, 1, "its axis is").reshape(-1)[0])
    maps = {0: same_axes(axes, normal_axis(axis, axes))}
    return Pointwise(node, maps, constants="zero", whole="summed along")


@rule(
    "GridSample",
    examples=(
        example(computed(2, 6, 3, 3), computed(2, 4, 5, 2)),
        example(computed(2, 6, 3, 3), weight(2, 4, 5, 2), mode="nearest", padding_mode="border"),
        example(computed(1, 6, 2, 3, 3), computed(1, 2, 4, 5, 3), align_corners=1),
    ),
)
def grid_sample(node: ir.Node) -> Statement:
    """y[n, c, p...] = x[n, c, ...] read between its entries at grid[n, p...]"""
    axes = rank(node.inputs[0])
    maps = {0: same_axes(axes, 0, *range(2, axes))}
    return Pointwise(node, maps, constants="zero", whole="sampled at computed places along")


@rule(
    "RoiAlign",
    examples=(
        example(
            computed(2, 6, 5, 5),
            literal([[-6, -6, 1, 1], [1, 1, 4, 2]], "float32"),
            literal([0, 1]),
            output_height=2,
            output_width=2,
            opset=16,
        ),
    ),
)
def roi_align(node: ir.Node) -> Statement:
    """y[r, c, ...] = means of x[batch[r], c, ...] over the cells of box r"""
    return Pointwise(
        node, {0: (None, 1, None, None)}, constants="zero", whole="sampled in computed boxes along"
    )


@rule(
    "Trilu",
    examples=(
        example(computed(2, 6, 4, 4)),
        example(computed(6, 4, 4), literal(1), upper=0),
    ),
)
def triangle(node: ir.Node) -> Statement:
    """y[..., i, j] = x[..., i, j] in one triangle of the last two axes, = 0 in the other"""
    axes = rank(node.inputs[0])
    maps = {0: same_axes(axes, axes - 2, axes - 1)}
    return Pointwise(node, maps, constants="zero", whole="half of it is set to zero along")


@rule(
    "ReverseSequence",
    examples=(
        example(computed(4, 2, 6), literal([3, 4])),
        example(computed(2, 4, 6), literal([3, 4]), batch_axis=0, time_axis=1),
    ),
)
def reverse_sequence(node: ir.Node) -> Statement:
    """y[t, b, ...] = x[length[b] - 1 - t, b, ...] for t below the length, x[t, b, ...] behind"""
    batch, time = int(attribute(node, "batch_axis", 1)), int(attribute(node, "time_axis", 0))
    maps = {0: same_axes(rank(node.inputs[0]), batch, time)}
    return Pointwise(node, maps, constants="pass", whole="turned round along")


@rule(
    "DFT",
    examples=(
        example(computed(2, 6, 4, 1), None, literal(2)),
        example(computed(2, 6, 4, 2), literal(6), literal(-2), inverse=1),
        example(computed(2, 4, 6, 1), axis=1, onesided=1, opset=17),
        example(computed(2, 6, 4, 1), None, computed(dtype="int64"), removable=False),
    ),
)
def spectrum(node: ir.Node) -> Statement:
    """y[..., k, ..., :] = sum over j of x[..., j, ..., :] * exp(-2 pi i j k / length), complex along the last axis"""
    axes = rank(node.inputs[0])
    axis = int(attribute(node, "axis", 1 if opset_of(node) < DFT_AXIS_OPSET else -2))
    if input_at(node, DFT_AXIS) is not None:
        axis = int(constant_at(node, DFT_AXIS, "its axis is").reshape(-1)[0])
    maps = {0: same_axes(axes, normal_axis(axis, axes), axes - 1)}
    return Pointwise(node, maps, constants="zero", whole="transformed along")
