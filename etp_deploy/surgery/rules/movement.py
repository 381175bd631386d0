"""Operators that move entries without computing."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.absorb import drops_any
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
from etp_deploy.surgery.statements.fill import Fill
from etp_deploy.surgery.statements.moves import Expand, Permute, Reshape, Tile
from etp_deploy.surgery.statements.opaque import Opaque
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.select import Select
from etp_deploy.surgery.statements.subpixels import Subpixels

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement
    from etp_deploy.surgery.statements.pointwise import AxisMap

# with the number of repetitions of each axis; before it was one axis's
TILE_INPUTS = 2


@rule(
    "Reshape",
    examples=(
        example(computed(2, 6, 4), literal([2, 3, 2, 4])),
        example(computed(2, 3, 2, 4), literal([0, 6, -1])),
        example(computed(2, 6, 4), literal([2, 8, 3])),
    ),
)
def reshape(node: ir.Node) -> Statement:
    """y = x under another shape, entries in the same order"""
    return Reshape(node, target=1)


@rule(
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    examples=(
        example(computed(2, 6, 4), operator="Flatten"),
        example(computed(2, 6, 1, 4), literal([2]), operator="Squeeze"),
        example(computed(2, 6, 1, 4), operator="Squeeze", removable=False),
        example(computed(2, 6, 4), literal([1]), operator="Unsqueeze"),
    ),
)
def flatten(node: ir.Node) -> Statement:
    """y = x with axes merged, dropped or added, entries in the same order"""
    if drops_any(node):
        raise RefusedError("which axes a Squeeze drops is not known before the model runs")
    return Reshape(node)


@rule(
    "Transpose",
    examples=(
        example(computed(2, 6, 4), perm=[0, 2, 1]),
        example(computed(2, 6, 4)),
    ),
)
def transpose(node: ir.Node) -> Statement:
    """y[perm(...)] = x[...]"""
    axes = rank(node.inputs[0])
    return Permute(node, tuple(attribute(node, "perm", tuple(reversed(range(axes))))))


@rule(
    "Expand",
    examples=(
        example(computed(2, 6, 1, 4), literal([2, 6, 3, 4])),
        example(computed(6, 1), literal([2, 6, 4])),
        example(weight(1), literal([2, 6, 4])),
    ),
)
def expand(node: ir.Node) -> Statement:
    """y[...] = x[...], repeated along axes of size 1"""
    single = array_of(node.inputs[0])
    if single is not None and single.size == 1:
        return Fill(node, 1, single)
    return Expand(node)


@rule(
    "Tile",
    examples=(
        example(computed(2, 6, 4), literal([3, 1, 1])),
        example(computed(2, 6, 4), literal([1, 2, 1])),
        example(computed(2, 1, 4), literal([2, 3, 1])),
        example(computed(2, 6, 4), indices(3, below=3)),
        example(computed(2, 6, 4), literal(2), literal(1), opset=5, removable=False),
    ),
)
def tile(node: ir.Node) -> Statement:
    """y[..., r * n + i, ...] = x[..., i, ...], n being the size of x along an axis"""
    if len(node.inputs) != TILE_INPUTS:
        raise RefusedError("a Tile of an opset before 6")
    return Tile(node)


@rule(
    "ConstantOfShape",
    examples=(
        example(literal([2, 6, 4])),
        example(literal([2, 6, 4]), value=np.array([0.5], np.float32)),
        example(literal([2, 6, 4]), value=np.array([3], np.int64), removable=False),
    ),
)
def constant_of_shape(node: ir.Node) -> Statement:
    """y[...] = value"""
    given = node.attributes.get("value")
    return Fill(node, 0, np.zeros((), np.float32) if given is None else given.as_tensor().numpy())


@rule(
    "GatherND",
    examples=(
        example(computed(2, 6, 4), indices(3, 1, below=2)),
        example(computed(2, 5, 6), indices(3, 2, 2, below=2)),
        example(computed(2, 5, 6), indices(2, 3, 1, below=5), batch_dims=1, removable=False),
    ),
)
def gather_nd(node: ir.Node) -> Statement:
    """y[..., rest] = x[indices[...], rest]"""
    data, indices = rank(node.inputs[0]), rank(node.inputs[1])
    if attribute(node, "batch_dims", 0):
        raise RefusedError("GatherND with batch dimensions")
    depth = static(node.inputs[1], indices - 1)
    axes = tuple(None if own < depth else own - depth + indices - 1 for own in range(data))
    return Pointwise(node, {0: axes}, constants="pass", whole="indexed along")


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
    "Concat",
    examples=(
        example(computed(2, 6, 4), computed(2, 3, 4), axis=1),
        example(computed(2, 6, 4), weight(2, 2, 4), computed(2, 6, 4), axis=-2),
    ),
)
def concat(node: ir.Node) -> Statement:
    """y[..., offset + j, ...] = x_i[..., j, ...]"""
    axis = normal_axis(int(attribute(node, "axis", 0)), rank(node.outputs[0]))
    pieces = []
    for index, value in enumerate(node.inputs):
        size = value.shape[axis] if value is not None and value.shape is not None else None
        pieces.append((index, np.arange(size if isinstance(size, int) else 1)))
    return Select(node, axis, [pieces])


@rule(
    "Split",
    examples=(
        example(computed(2, 6, 4), literal([2, 4]), axis=1, outputs=2),
        example(computed(2, 6, 4), axis=-2, num_outputs=3, outputs=3),
        example(computed(2, 6, 4), axis=1, split=[1, 5], outputs=2, opset=11),
    ),
)
def split(node: ir.Node) -> Statement:
    """y_i[..., j, ...] = x[..., offset + j, ...]"""
    axis = normal_axis(int(attribute(node, "axis", 0)), rank(node.inputs[0]))
    sizes = [static(value, axis) for value in node.outputs]
    bounds = np.cumsum([0, *sizes])
    parts = [[(0, np.arange(low, high))] for low, high in pairwise(bounds)]
    return Select(node, axis, parts, how="split")


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
        example(computed(2, 6, 4), literal([1, 1]), literal([5, 3]), literal([1, 2]), removable=False),
        example(
            computed(2, 6, 4), literal([-1]), literal([-7]), literal([1]), literal([-1]), removable=False
        ),
        example(computed(2, 6, 4), indices(1, below=2), literal([5]), literal([1])),
        example(computed(2, 6, 4), literal([0]), indices(1, below=6), literal([-2])),
        example(weight(6, 5), indices(1, below=2), literal([5]), literal([1])),
        example(computed(6, 4), indices(2, below=2), literal([5, 3]), removable=False),
        example(computed(2, 6, 4), starts=[1], ends=[5], axes=[1], opset=9, removable=False),
    ),
)
def slice_(node: ir.Node) -> Statement:
    """y[..., j, ...] = x[..., start + j * step, ...]"""
    data = node.inputs[0]
    if "starts" in node.attributes:  # opset 9 and before
        raise RefusedError("a Slice of an opset before 10")
    if array_of(input_at(node, 1)) is None or array_of(input_at(node, 2)) is None:
        return _cut_while_running(node)
    axes, bounds = _slice_bounds(node, rank(data))
    sliced = [axis for axis in axes if _cuts(node, axis, bounds[axis])]
    if not sliced:
        return Pointwise(node, {0: same_axes(rank(data))}, constants="pass")
    if len(sliced) > 1:
        raise RefusedError("a slice along several axes at once")
    axis = sliced[0]
    size = data.shape[axis] if data is not None and data.shape is not None else None
    if not isinstance(size, int):
        return Pointwise(node, {0: same_axes(rank(data), axis)}, constants="pass", whole="sliced along")
    start, stop, step = bounds[axis]
    return Select(node, axis, [[(0, np.arange(size)[slice(start, stop, step)])]], how="slice")


def _cut_while_running(node: ir.Node) -> Statement:
    """Leave alone the axes that are cut somewhere, and hand on all others."""
    data, cut = node.inputs[0], {normal_axis(int(axis), rank(node.inputs[0])) for axis in _named_axes(node)}
    axes = same_axes(rank(data), *cut)
    own = tuple(axis for axis in axes if axis is not None) if array_of(data) is not None else ()
    return Pointwise(node, {0: axes}, constants="pass", whole="sliced along", fresh=own)


def _named_axes(node: ir.Node) -> np.ndarray:
    """Return the axes that a Slice has bounds for."""
    if input_at(node, 3) is not None:
        return constant_at(node, 3, "its axes are")
    return np.arange(static(input_at(node, 1), 0))


def _slice_bounds(node: ir.Node, axes: int) -> tuple[list[int], dict[int, tuple[int, int, int]]]:
    """Return the axes that are sliced and, for each, start, stop and step as numpy takes them."""
    starts, stops = constant_at(node, 1, "its start is"), constant_at(node, 2, "its end is")
    named = _named_axes(node)
    steps = (
        constant_at(node, 4, "its steps are") if input_at(node, 4) is not None else np.ones(len(starts), int)
    )
    bounds = {}
    for axis, start, stop, step in zip(named, starts, stops, steps, strict=True):
        if step < 0:
            raise RefusedError("a slice that runs backwards")
        bounds[normal_axis(int(axis), axes)] = (int(start), int(stop), int(step))
    return list(bounds), bounds


def _cuts(node: ir.Node, axis: int, bounds: tuple[int, int, int]) -> bool:
    """Return whether a slice leaves anything out along an axis."""
    value = node.inputs[0]
    size = value.shape[axis] if value is not None and value.shape is not None else None
    start, stop, step = bounds
    if isinstance(size, int):
        return len(range(size)[slice(start, stop, step)]) != size
    return not (start == 0 and step == 1 and stop >= np.iinfo(np.int32).max)


def gather_channels(node: ir.Node, axis: int) -> Statement:
    """y[..., j, ...] = x[..., indices[j], ...] with constant indices"""
    indices = constant_at(node, 1, "its indices are")
    data = node.inputs[0]
    size = data.shape[axis] if data is not None and data.shape is not None else None
    if indices.ndim > 1 or not isinstance(size, int):
        return _gather_unlabelled(node, axis, indices.ndim)
    flat = indices.reshape(-1).astype(np.int64) % size
    if len(np.unique(flat)) != len(flat):
        return _gather_unlabelled(node, axis, indices.ndim)
    return Select(node, axis, [[(0, flat)]], drop=indices.ndim == 0, how="gather")


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
        example(computed(2, 6, 4), indices(3, below=6), axis=1),
        example(weight(7, 6), indices(2, 5, below=7)),
        example(weight(6, 7), indices(2, 5, below=7), axis=1),
    ),
)
def gather(node: ir.Node) -> Statement:
    """y[..., j, ...] = x[..., indices[j], ...]: channels by constant indices, or rows of a table"""
    data = node.inputs[0]
    axis = normal_axis(int(attribute(node, "axis", 0)), rank(data))
    if array_of(node.inputs[1]) is not None and array_of(data) is None:
        return gather_channels(node, axis)
    between = rank(node.inputs[1])
    places = tuple(
        None if own == axis else (own if own < axis else own + between - 1) for own in range(rank(data))
    )
    columns = tuple(place for place in places if place is not None) if array_of(data) is not None else ()
    return Pointwise(node, {0: places}, constants="pass", whole="indexed along", fresh=columns)


@rule(
    "Shape",
    "Size",
    examples=(
        example(computed(2, 6, 4), removable=False),
        example(computed(2, 6, 4), start=0, end=-2, operator="Shape"),
    ),
)
def shape(node: ir.Node) -> Statement:
    """y = sizes of x; what is read afterwards must not change"""
    return Opaque(node, "its size is read while the model runs", axes=_axes_read(node))


def _axes_read(node: ir.Node) -> tuple[int, ...] | None:
    """Return which of a Shape's entries are used, or None for all."""
    axes = rank(node.inputs[0])
    if node.op_type == "Size" or node.outputs[0].is_graph_output():
        return None
    first = normal_axis(int(attribute(node, "start", 0)), axes)
    last = min(normal_axis(int(attribute(node, "end", axes)), axes), axes)
    read: set[int] = set()
    for user, _ in node.outputs[0].uses():
        picked = array_of(user.inputs[1]) if user.op_type == "Gather" else None
        if picked is None:
            return tuple(range(first, last))
        read.update(range(first, last)[int(index)] for index in picked.reshape(-1))
    return tuple(sorted(read))


@rule(
    "DepthToSpace",
    examples=(
        example(computed(2, 12, 2, 3), blocksize=2),
        example(computed(2, 12, 2, 3), blocksize=2, mode="CRD"),
        example(computed(1, 18, 2, 2), blocksize=3, mode="DCR"),
        example(computed(2, 4, 2, 3), blocksize=2, removable=False),
    ),
)
def depth_to_space(node: ir.Node) -> Statement:
    """y[n, c, h * b + i, w * b + j] = x[n, (i * b + j) * C + c, h, w] (DCR), x[n, (c * b + i) * b + j, h, w] (CRD)"""
    block = int(attribute(node, "blocksize", 1))
    channels = static(node.inputs[0], 1) // block**2
    last = attribute(node, "mode", "DCR") == "CRD"
    table = np.arange(channels * block**2)
    gathered = table.reshape(channels, -1) if last else table.reshape(-1, channels).T
    return Subpixels(node, gathered, spreads=True, channels_last=last)


@rule(
    "SpaceToDepth",
    examples=(
        example(computed(2, 3, 4, 6), blocksize=2),
        example(computed(1, 2, 3, 6), blocksize=3),
    ),
)
def space_to_depth(node: ir.Node) -> Statement:
    """y[n, (i * b + j) * C + c, h, w] = x[n, c, h * b + i, w * b + j]"""
    block = int(attribute(node, "blocksize", 1))
    channels = static(node.inputs[0], 1)
    gathered = np.arange(channels * block**2).reshape(-1, channels).T
    return Subpixels(node, gathered, spreads=False, channels_last=False)
