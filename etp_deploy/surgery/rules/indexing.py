"""Operators that take entries by index, and put them there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.examples import computed, example, indices, literal, weight
from etp_deploy.surgery.rules.common import (
    attribute,
    constant_at,
    input_at,
    normal_axis,
    rank,
    same_axes,
    static,
)
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.picked import Picked
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.select import Select

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement
    from etp_deploy.surgery.statements.mapped import AxisMap

# what was an attribute before opset 10, by the input that it is now; steps came with the inputs
BOUNDS = {1: "starts", 2: "ends", 3: "axes", 4: "steps"}

# the rank of a GatherND's indices that pick along one axis, each index by itself
PICKING = 2


@rule(
    "GatherND",
    examples=(
        example(computed(2, 6, 4), indices(3, 1, below=2)),
        example(computed(2, 5, 6), indices(3, 2, 2, below=2)),
        example(computed(2, 5, 6), indices(3, 2, below=2, copied=True)),
        example(computed(2, 5, 6), indices(2, 3, 1, below=5), batch_dims=1),
        example(computed(6, 4, 5), indices(6, 3, 2, below=4, copied=True), batch_dims=1),
        example(computed(6, 4), literal([[4], [0], [-1], [0]])),
    ),
)
def gather_nd(node: ir.Node) -> Statement:
    """y[b..., ..., rest] = x[b..., indices[b..., ...], rest]"""
    data, indices = rank(node.inputs[0]), rank(node.inputs[1])
    batch, depth = int(attribute(node, "batch_dims", 0)), static(node.inputs[1], indices - 1)
    places = array_of(node.inputs[1])
    if places is not None and places.ndim == 1 + depth == PICKING and not batch:
        return gather_channels(node, 0, places.reshape(-1))
    rest = batch + depth
    axes = tuple(
        own if own < batch else None if own < rest else own - rest + indices - 1 for own in range(data)
    )
    maps = {0: axes, 1: (*range(indices - 1), None)}
    return Pointwise(node, maps, constants="pass", routes=(1,), whole="indexed along")


@rule(
    "ScatterND",
    examples=(
        example(computed(5, 6), indices(3, 1, below=5), computed(3, 6)),
        example(computed(2, 5, 6), indices(2, 2, 2, below=2), computed(2, 2, 6)),
        example(computed(5, 6), literal([[0], [2]]), weight(2, 6), reduction="add"),
    ),
)
def scatter_nd(node: ir.Node) -> Statement:
    """y = x with y[indices[...], rest] = or += updates[..., rest]"""
    data, indices = rank(node.inputs[0]), rank(node.inputs[1])
    depth = static(node.inputs[1], indices - 1)
    own = tuple(None if axis < depth else axis for axis in range(data))
    updates = tuple(
        None if axis < indices - 1 else axis - (indices - 1) + depth for axis in range(rank(node.inputs[2]))
    )
    return Pointwise(node, {0: own, 2: updates}, constants="zero", whole="indexed along")


@rule(
    "ScatterElements",
    examples=(
        example(computed(5, 6), indices(7, 6, below=5, copied=True), computed(7, 6), reduction="add", axis=0),
        example(computed(2, 5, 6), indices(2, 5, 6, below=6, copied=True), computed(2, 5, 6), axis=-1),
        example(weight(5, 6), indices(3, 6, below=5, copied=True), computed(3, 6), reduction="max", axis=0),
        example(computed(5, 6), indices(3, 4, below=5), computed(3, 4), axis=0, removable=False),
        example(weight(5, 6), indices(3, 4, below=5, copied=True), computed(3, 4), axis=0, removable=False),
    ),
)
def scatter_elements(node: ir.Node) -> Statement:
    """y = x with y[..., indices[j, ...], ...] = or += updates[..., j, ...], entry by entry along one axis"""
    data, places, updates = node.inputs[0], node.inputs[1], node.inputs[2]
    axes = _alike(node, (data, places, updates))
    return Pointwise(
        node, dict.fromkeys(range(3), axes), constants="zero", routes=(1,), whole="indexed along"
    )


@rule(
    "GatherElements",
    examples=(
        example(computed(5, 6), indices(7, 6, below=5, copied=True), axis=0),
        example(computed(2, 6, 5), indices(2, 6, 3, below=5, copied=True), axis=-1),
        example(computed(5, 6), indices(3, 4, below=5), axis=0, removable=False),
    ),
)
def gather_elements(node: ir.Node) -> Statement:
    """y[..., j, ...] = x[..., indices[..., j, ...], ...], entry by entry along one axis"""
    axes = _alike(node, (node.inputs[0], node.inputs[1]))
    return Pointwise(node, {0: axes, 1: axes}, constants="pass", routes=(1,), whole="indexed along")


def _alike(node: ir.Node, values: Sequence[ir.Value | None]) -> AxisMap:
    """Return the map that all operands share: every axis but the indexed one.

    Raises:
        RefusedError: where an operand is shorter than another along one of these.
    """
    axis = normal_axis(int(attribute(node, "axis", 0)), rank(values[0]))
    shapes = [value.shape for value in values if value is not None and value.shape is not None]
    if len({len(shape) for shape in shapes}) != 1 or len(shapes) != len(values):
        raise RefusedError("shapes are not known here")
    for own in range(len(shapes[0])):
        if own != axis and len({shape[own] for shape in shapes}) != 1:
            raise RefusedError("only some of the channels are indexed here")
    return same_axes(len(shapes[0]), axis)


@rule(
    "Slice",
    examples=(
        example(computed(2, 6, 4), literal([1]), literal([5]), literal([1])),
        example(
            computed(2, 6, 4),
            literal([0, 1]),
            literal([2**63 - 1, 2**63 - 1]),
            literal([0, -2]),
            literal([1, 2]),
        ),
        example(computed(2, 6, 4), literal([0, 0]), literal([2, 3])),
        example(computed(2, 6, 4), literal([0]), literal([2**63 - 1]), literal([1])),
        example(computed(2, 6, 4, 4), literal([1, 1]), literal([4, 3]), literal([2, 3])),
        example(computed(2, 6, 4), literal([-1]), literal([-7]), literal([1]), literal([-1])),
        example(computed(2, 6, 4), literal([4]), literal([-(2**31)]), literal([1]), literal([-2])),
        example(computed(6, 4), literal([-1]), literal([-9]), None, literal([-1])),
        example(computed(2, 6, 4), indices(1, below=2), literal([5]), literal([1])),
        example(computed(2, 6, 4), literal([0]), indices(1, below=6), literal([-2])),
        example(weight(6, 5), indices(1, below=2), literal([5]), literal([1])),
        example(computed(6, 4), indices(2, below=2), literal([5, 3]), removable=False),
        example(computed(6, 4), literal([1]), literal([3]), indices(1, below=2), removable=False),
        example(computed(2, 6, 4), starts=[1], ends=[5], axes=[1], opset=9),
        example(computed(2, 6, 4), starts=[0, 1], ends=[9, 9], opset=9),
    ),
)
def slice_(node: ir.Node) -> Statement:
    """y[..., j, ...] = x[..., start + j * step, ...]"""
    data, axes = node.inputs[0], rank(node.inputs[0])
    starts, stops = _bounds(node, 1), _bounds(node, 2)
    if starts is None or stops is None:
        return _cut_while_running(node)
    named, steps = _named_axes(node), _bounds(node, 4)
    sliced = {}
    for place, axis in enumerate(named):
        step = 1 if steps is None else int(steps[place])
        own = normal_axis(int(axis), axes)
        if _cuts(node, own, slice(int(starts[place]), int(stops[place]), step)):
            sliced[own] = slice(int(starts[place]), int(stops[place]), step)
    if not sliced:
        return Pointwise(node, {0: same_axes(axes)}, constants="pass")
    if len(sliced) > 1:
        return Pointwise(node, {0: same_axes(axes, *sliced)}, constants="pass", whole="sliced along")
    axis, places = next(iter(sliced.items()))
    size = data.shape[axis] if data is not None and data.shape is not None else None
    if not isinstance(size, int):
        return Pointwise(node, {0: same_axes(axes, axis)}, constants="pass", whole="sliced along")
    return Select(node, axis, [[(0, np.arange(size)[places])]], how="slice")


def _bounds(node: ir.Node, index: int) -> np.ndarray | None:
    """Return a Slice's starts (1), ends (2), axes (3) or steps (4), attributes before opset 10; None if not known."""
    if "starts" not in node.attributes:
        return array_of(input_at(node, index))
    given = attribute(node, BOUNDS[index], None)
    return None if given is None else np.asarray(given, np.int64)


def _cut_while_running(node: ir.Node) -> Statement:
    """Leave alone the axes that are cut somewhere, and hand on all others."""
    data, cut = node.inputs[0], {normal_axis(int(axis), rank(node.inputs[0])) for axis in _named_axes(node)}
    axes = same_axes(rank(data), *cut)
    own = tuple(axis for axis in axes if axis is not None) if array_of(data) is not None else ()
    return Pointwise(node, {0: axes}, constants="pass", whole="sliced along", fresh=own)


def _named_axes(node: ir.Node) -> np.ndarray:
    """Return the axes that a Slice has bounds for."""
    named = _bounds(node, 3)
    if named is not None:
        return named
    if input_at(node, 3) is not None:
        raise RefusedError("its axes are computed while the model runs")
    starts = _bounds(node, 1)
    return np.arange(static(input_at(node, 1), 0) if starts is None else len(starts))


def _cuts(node: ir.Node, axis: int, places: slice) -> bool:
    """Return whether a slice leaves anything out along an axis, or turns it round."""
    value = node.inputs[0]
    size = value.shape[axis] if value is not None and value.shape is not None else None
    if isinstance(size, int):
        return range(size)[places] != range(size)
    return not (places.start == 0 and places.step == 1 and places.stop >= np.iinfo(np.int32).max)


def gather_channels(node: ir.Node, axis: int, indices: np.ndarray) -> Statement:
    """y[..., j, ...] = x[..., indices[j], ...] with constant indices"""
    data = node.inputs[0]
    size = data.shape[axis] if data is not None and data.shape is not None else None
    if indices.ndim > 1 or not isinstance(size, int):
        return _gather_unlabelled(node, axis, indices.ndim)
    return Picked(node, axis, indices.astype(np.int64) % size)


def _gather_unlabelled(node: ir.Node, axis: int, between: int) -> Statement:
    axes = tuple(
        None if own == axis else (own if own < axis else own + between - 1)
        for own in range(rank(node.inputs[0]))
    )
    return Pointwise(node, {0: axes}, constants="pass", whole="indexed along")


@rule(
    "Gather",
    examples=(
        example(computed(2, 6, 4), literal([4, 0, -1]), axis=1),
        example(computed(2, 6, 4), literal(3), axis=-2),
        example(computed(2, 6, 4), literal([[0, 1], [2, 3]]), axis=1),
        example(computed(2, 6, 4), literal([1, 2, 1]), axis=1),
        example(computed(2, 3, 4), literal([0, 0, 1, 1, 2, 2]), axis=1),
        example(computed(2, 6), literal([5, 4, 3, 5, -6, 0]), axis=-1),
        example(computed(2, 6, 4), indices(3, below=6), axis=1),
        example(weight(7, 6), indices(2, 5, below=7)),
        example(weight(7, 4), indices(2, 6, below=7, copied=True)),
        example(computed(2, 6, 4), indices(3, below=6, copied=True), axis=1),
        example(weight(6, 7), indices(2, 5, below=7), axis=1),
    ),
)
def gather(node: ir.Node) -> Statement:
    """y[..., j, ...] = x[..., indices[j], ...]: channels by constant indices, or rows of a table"""
    data = node.inputs[0]
    axis = normal_axis(int(attribute(node, "axis", 0)), rank(data))
    if array_of(node.inputs[1]) is not None and array_of(data) is None:
        return gather_channels(node, axis, constant_at(node, 1, "its indices are"))
    between = rank(node.inputs[1])
    places = tuple(
        None if own == axis else (own if own < axis else own + between - 1) for own in range(rank(data))
    )
    columns = tuple(place for place in places if place is not None) if array_of(data) is not None else ()
    maps = {0: places, 1: tuple(range(axis, axis + between))}
    return Pointwise(node, maps, constants="pass", routes=(1,), whole="indexed along", fresh=columns)
