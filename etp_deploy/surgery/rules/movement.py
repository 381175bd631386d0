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
    static,
)
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.fill import Fill
from etp_deploy.surgery.statements.moves import Expand, Permute, Reshape, Tile
from etp_deploy.surgery.statements.opaque import Opaque
from etp_deploy.surgery.statements.padding import Padded
from etp_deploy.surgery.statements.select import Select
from etp_deploy.surgery.statements.subpixels import Subpixels

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

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


_WIDER = literal([0, 1, 0, 0, 2, 0])


@rule(
    "Pad",
    examples=(
        example(computed(2, 6, 4), _WIDER),
        example(computed(2, 6, 4), _WIDER, literal(0.5, "float32")),
        example(computed(2, 6, 4), literal([0, 0, 1, 0, 0, 1]), literal(0.5, "float32")),
        example(computed(2, 6, 4), literal([0, 0, 1, 0, 0, 1]), mode="edge"),
        example(computed(2, 6, 4), literal([0, 0, 1, 0, 0, -2]), mode="reflect"),
        example(computed(2, 6, 4), literal([1, 1, 0, 2]), None, literal([-2, 2])),
        example(computed(6, 4), literal([1, 2, 1, 2]), mode="edge", removable=False),
        example(computed(6, 4), literal([-1, 0, 0, 1])),
        example(computed(6, 4), indices(4, below=2), removable=False),
        example(computed(6, 4), literal([0, 1, 0, 0]), computed(), removable=False),
        example(computed(2, 6, 4), pads=[0, 1, 0, 0, 2, 0], value=0.5, opset=10),
        example(computed(2, 6, 4), pads=[0, 0, 1, 0, 0, 1], value=0.5, opset=10),
        example(computed(2, 6, 4), pads=[0, 0, 1, 0, 0, 1], mode="reflect", opset=10),
    ),
)
def pad(node: ir.Node) -> Statement:
    """y[..., before + j, ...] = x[..., j, ...], and around it one value, or x's own entries once more"""
    own = node.attributes.get("pads")
    pads = constant_at(node, 1, "how much is padded is") if own is None else np.array(own.as_ints())
    named = constant_at(node, 3, "which axes are padded is") if input_at(node, 3) is not None else None
    count = len(pads) // 2
    axes = [
        normal_axis(int(axis), rank(node.inputs[0])) for axis in (range(count) if named is None else named)
    ]
    value = np.asarray(attribute(node, "value", 0.0), np.float32)
    if input_at(node, 2) is not None:
        value = constant_at(node, 2, "what is padded with is").reshape(-1)[:1]
    entries = {axis: (place, count + place) for place, axis in enumerate(axes)}
    return Padded(
        node,
        {axis: (int(pads[before]), int(pads[behind])) for axis, (before, behind) in entries.items()},
        value=value if attribute(node, "mode", "constant") == "constant" else None,
        entries=entries,
    )


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
