"""Tensors made of constants and sizes alone, one for each of their readers while channels are removed.

A position bias of each head (ALiBi), or indices repeated for each head, is computed once for all blocks of a
network. Blocks lose different heads, so each needs its own. What still is the same afterwards is joined again.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.statements.moves import ROUTES

if TYPE_CHECKING:
    from collections.abc import Sequence

_GROUP = "etp_deploy.copies"
_fresh = count()
# operators that are cheap beside what reads a bias of each head
_LIGHT = frozenset((
    "Abs", "Add", "Cast", "Clip", "Concat", "ConstantOfShape", "Div", "Expand", "Identity", "Max", "Min", "Mul",
    "Neg", "Range", "Reshape", "Slice", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip
_SIZES = frozenset(("Shape", "Size"))


def part_copies(graph: ir.Graph) -> None:
    """Give each reader of such a tensor one of its own, in the main graph.

    Args:
        graph: the graph, sorted; it is changed.
    """
    light: set[ir.Value] = set()
    wide: set[ir.Node] = set()
    for node in graph:
        if not _is_light(node, light):
            continue
        light.update(node.outputs)
        if any(_is_wide(value, wide) for value in node.inputs):
            wide.add(node)
    for node in reversed(list(graph)):
        if node in wide or _is_route(node):
            _part(graph, node)


def _is_light(node: ir.Node, light: set[ir.Value]) -> bool:
    if node.domain != "" or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return False
    integer = node.outputs[0].dtype in {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
    if node.op_type in _SIZES:
        return True
    return (node.op_type in _LIGHT or (integer and node.op_type == "Gather")) and all(
        value is None or is_parameter(value) or value in light for value in node.inputs
    )


def _is_wide(value: ir.Value | None, wide: set[ir.Node]) -> bool:
    """Return whether a tensor has, or is made of, a constant with channels."""
    if value is None:
        return False
    if is_parameter(value):
        tensor = value.const_value
        return tensor is not None and tensor.size > 1 and tensor.dtype.is_floating_point()
    return value.producer() in wide


def _is_route(node: ir.Node) -> bool:
    """Return whether a node repeats indices for each channel that they move."""
    out = node.outputs[0]
    uses = list(out.uses())
    return (
        node.op_type == "Expand"
        and bool(uses)
        and not out.is_graph_output()
        and all((user.op_type, place) in ROUTES for user, place in uses)
    )


def _part(graph: ir.Graph, node: ir.Node) -> None:
    out = node.outputs[0]
    users = list(dict.fromkeys(user for user, _ in out.uses()))
    if len(users) <= 1 or any(user.graph is not graph for user in users):
        return
    group = next(_fresh)
    node.meta[_GROUP] = group
    for user in users[1:]:
        name = f"{out.name}_for_{user.outputs[0].name}"
        copy = ir.node(node.op_type, node.inputs, dict(node.attributes), name=name)
        copy.meta[_GROUP] = group
        made = copy.outputs[0]
        made.name, made.type, made.shape = name, out.type, out.shape
        graph.insert_after(node, copy)
        for place, value in enumerate(user.inputs):
            if value is out:
                user.replace_input_with(place, made)


def is_copy(node: ir.Node) -> bool:
    """Return whether a node is one of those that were one."""
    return _GROUP in node.meta


def join_copies(graph: ir.Graph) -> None:
    """Join what `part_copies` parted and is still the same."""
    first: dict[int, list[ir.Node]] = {}
    for node in list(graph):
        group = node.meta.get(_GROUP)
        if group is None:
            continue
        kept = first.setdefault(group, [])
        same = next((other for other in kept if _same_node(node, other)), None)
        if same is None:
            kept.append(node)
        else:
            node.outputs[0].replace_all_uses_with(same.outputs[0])


def _same_node(one: ir.Node, other: ir.Node) -> bool:
    """Return whether two nodes compute the same from the same."""
    return (
        one.op_type == other.op_type
        and one.domain == other.domain
        and len(one.outputs) == len(other.outputs) == 1
        and dict(one.attributes) == dict(other.attributes)
        and _same_values(one.inputs, other.inputs)
    )


def _same_values(some: Sequence[ir.Value | None], others: Sequence[ir.Value | None]) -> bool:
    return len(some) == len(others) and all(
        a is b or (a is not None and b is not None and _same_value(a, b))
        for a, b in zip(some, others, strict=True)
    )


def _same_value(one: ir.Value, other: ir.Value) -> bool:
    if is_parameter(one) and is_parameter(other):
        a, b = one.const_value, other.const_value
        assert a is not None
        assert b is not None
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a.numpy(), b.numpy())
    makers = one.producer(), other.producer()
    # a target shape that was written anew for each
    return all(maker is not None and maker.op_type in {"Concat", "Div", "Mul"} for maker in makers) and (
        makers[0] is not None and makers[1] is not None and _same_node(makers[0], makers[1])
    )
