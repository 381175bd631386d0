"""Bring equivalent ways of writing a layer into the one that the rules read: padding, repetition, states, copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.shapes import Size, is_parameter
from etp_deploy.surgery.statements.base import opset_of

if TYPE_CHECKING:
    from collections.abc import Callable


def absorb_padding(graph: ir.Graph) -> bool:
    """Move Pads by zeros into the convolutions that read them, as ONNX Runtime does itself; say if any was."""
    absorbed = False
    for node in list(graph.all_nodes()):
        padding = _spatial_zeros(node)
        users = [user for user, _ in node.outputs[0].uses()]
        if padding is None or not users or node.outputs[0].is_graph_output():
            continue
        if any(not _takes_padding(user, node.outputs[0]) for user in users):
            continue
        for user in users:
            own = user.attributes.get_ints("pads") or [0] * len(padding)
            total = tuple(a + b for a, b in zip(own, padding, strict=True))
            user.attributes["pads"] = ir.AttrInt64s("pads", total)
            user.replace_input_with(0, node.inputs[0])
        absorbed = True
    return absorbed


def expand_tiles(graph: ir.Graph) -> bool:
    """Write Tiles that repeat axes of size 1 as the Expand that they are; say if there was any."""
    found = False
    for node in graph:
        if node.op_type != "Tile" or node.domain != "" or len(node.inputs) != 2:
            continue
        value, repeats = node.inputs[0], _parameter(node.inputs[1])
        if repeats is None or value is None or value.shape is None or len(value.shape) != len(repeats):
            continue
        if all(count == 1 or size == 1 for count, size in zip(repeats, value.shape, strict=True)):
            node.op_type = "Expand"
            found = True
    return found


# where Squeeze takes its axes as an input
_SQUEEZE_INPUT_OPSET = 13


def name_squeezed_axes(graph: ir.Graph, constant: Callable[[ir.Graph, np.ndarray, str], ir.Value]) -> None:
    """Let each Squeeze say which axes it drops, where sizes are fixed: one that shrinks to size 1 must not go too.

    Args:
        graph: with inferred shapes; it is changed.
        constant: adds an initializer.
    """
    for node in graph.all_nodes():
        if not drops_any(node) or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        sizes = list(node.inputs[0].shape)
        if not all(isinstance(size, int) for size in sizes):
            continue
        axes = [axis for axis, size in enumerate(sizes) if size == 1]
        if opset_of(node) < _SQUEEZE_INPUT_OPSET:
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
            continue
        node.resize_inputs(2)
        named = constant(graph, np.array(axes, np.int64), f"{node.outputs[0].name}_axes")
        node.replace_input_with(1, named)


def drops_any(node: ir.Node) -> bool:
    """Return whether a node is a Squeeze that drops all axes that turn out to be of size 1."""
    named = "axes" in node.attributes or (len(node.inputs) > 1 and node.inputs[1] is not None)
    return node.op_type == "Squeeze" and node.domain == "" and not named


_STATES = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}


def omit_zero_states(graph: ir.Graph) -> bool:
    """Leave out initial states that are computed as zeros, which is what an omitted one is; say if any was."""
    omitted = False
    for node in graph.all_nodes():
        for index in _STATES.get(node.op_type, ()):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and not is_parameter(value) and _is_zero(value):
                node.replace_input_with(index, None)
                omitted = True
    return omitted


_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div"})


def omit_expansions(graph: ir.Graph, sizes: Callable[[ir.Value | None], list[Size] | None]) -> bool:
    """Let arithmetic broadcast what an Expand copies to the other operand's very shape; say if any was omitted.

    The copies (a node's number of neighbours for each of its channels) are no channels that could be removed.

    Args:
        graph: with inferred shapes; it is changed.
        sizes: reads a tensor that holds a shape.
    """
    omitted = False
    for node in graph:
        if node.op_type not in _BROADCASTING or node.domain != "":
            continue
        for place, other in ((0, node.inputs[1]), (1, node.inputs[0])):
            copies = node.inputs[place]
            source = None if copies is None else copies.producer()
            if source is None or source.op_type != "Expand" or other is None or other.shape is None:
                continue
            named = [dim if isinstance(dim, int) else dim.value for dim in other.shape]
            if None not in named and sizes(source.inputs[1]) == [Size.of(dim) for dim in other.shape]:
                node.replace_input_with(place, source.inputs[0])
                omitted = True
    return omitted


def _is_zero(value: ir.Value | None) -> bool:
    """Return whether a tensor is zero throughout, however large."""
    if value is None:
        return False
    if is_parameter(value):
        return value.const_value is not None and not value.const_value.numpy().any()
    node = value.producer()
    if node is None:
        return False
    if node.op_type in {
        "Expand",
        "Unsqueeze",
        "Squeeze",
        "Reshape",
        "Transpose",
        "Tile",
        "Identity",
        "Slice",
        "Cast",
    }:
        return _is_zero(node.inputs[0])
    filled = node.attributes.get("value")
    return node.op_type == "ConstantOfShape" and (filled is None or not filled.as_tensor().numpy().any())


def _takes_padding(node: ir.Node, value: ir.Value) -> bool:
    automatic = node.attributes.get_string("auto_pad", "NOTSET") not in {"NOTSET", ""}
    return node.op_type == "Conv" and node.domain == "" and node.inputs[0] is value and not automatic


def _spatial_zeros(node: ir.Node) -> list[int] | None:
    """Return a Pad's spatial pads in Conv's order, if it pads space alone, by zeros and by a constant amount."""
    if (
        node.op_type != "Pad"
        or node.domain != ""
        or node.attributes.get_string("mode", "constant") != "constant"
    ):
        return None
    pads = _parameter(node.inputs[1]) if len(node.inputs) > 1 else None
    if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        value = _parameter(node.inputs[2])
        if value is None or (value.size and value.reshape(-1)[0] != 0):
            return None
    rank = len(pads) // 2
    begin, end = [int(pad) for pad in pads[:rank]], [int(pad) for pad in pads[rank:]]
    if rank < 3 or any(begin[:2]) or any(end[:2]) or min(begin + end) < 0:
        return None
    return begin[2:] + end[2:]


def _parameter(value: ir.Value | None) -> np.ndarray | None:
    if value is None or not is_parameter(value) or value.const_value is None:
        return None
    return value.const_value.numpy()


# an end from here on means the axis's own end, whatever its size
_FAR = (1 << 31) - 1


def open_ends(graph: ir.Graph, constant: Callable[[ir.Graph, np.ndarray, str], ir.Value]) -> None:
    """Write the end of a Slice that runs to its axis's end as the largest number: inference counts up to others."""
    far = np.iinfo(np.int64).max
    for node in graph.all_nodes():
        ends = node.inputs[2] if node.op_type == "Slice" and len(node.inputs) > 2 else None
        array = _parameter(ends)
        if ends is None or array is None or array.dtype != np.int64 or node.domain != "":
            continue
        if ((array >= _FAR) & (array < far)).any():
            opened = np.where(array >= _FAR, far, array)
            node.replace_input_with(2, constant(graph, opened, f"{ends.name}_open"))
