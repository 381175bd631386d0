"""Write out the projections that ONNX Runtime's attention operators hold, and take them back in.

`Attention(x, w, b)` becomes a product and a bias for each of queries, keys and values in front of a
`MultiHeadAttention`, and the bias of a `MultiHeadAttention` becomes three additions; the analysis then sees
products, additions and heads, each by its own rule. When all is cut, what was written out is merged again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.errors import PlanError
from etp_deploy.surgery.shapes import is_parameter

if TYPE_CHECKING:
    from collections.abc import Sequence

Named = Callable[[np.ndarray, str], ir.Value]
"""Adds an initializer with a name that is not taken yet."""
Shared = Callable[[str, np.ndarray], ir.Value]
"""Adds an initializer, one for all of one name that hold the same."""
Split = Callable[[ir.Value, tuple[int, ...]], list[ir.Value]]
"""Cuts an initializer into parts along its last axis."""

_MICROSOFT = "com.microsoft"
# marks a node whose projections are written out, with what it held
_OPENED = "etp_deploy.opened"
_PARTS = ("query", "key", "value")
# input numbers: both operators take an added bias at the same place, and a mask at places of their own
_ATTENTION_MASK, _HEADS_MASK, _ADDED = 3, 4, 5


def open_projections(graph: ir.Graph, named: Named) -> bool:
    """Write out the projections of all nodes that allow it; say if any was."""
    cuts: dict[tuple[ir.Value, tuple[int, ...]], list[ir.Value]] = {}

    def split(value: ir.Value, sizes: tuple[int, ...]) -> list[ir.Value]:
        if (value, sizes) not in cuts:  # once for all nodes that share it
            parts = np.split(_array(value), np.cumsum(sizes)[:-1], axis=-1)
            names = [f"{value.name}_{name}" for name in _PARTS]
            cuts[value, sizes] = [named(part, name) for part, name in zip(parts, names, strict=True)]
        return cuts[value, sizes]

    opened = False
    for node in list(graph):
        if node.domain == _MICROSOFT and node.op_type == "Attention":
            opened |= _open_weight(graph, node, split)
        elif node.domain == _MICROSOFT and node.op_type == "MultiHeadAttention":
            opened |= _open_bias(graph, node, split)
    return opened


def _open_weight(graph: ir.Graph, node: ir.Node, split: Split) -> bool:
    x, weight, bias = node.inputs[0], node.inputs[1], _input(node, 2)
    held = any(_input(node, index) is not None for index in (4, 6)) or bool(
        node.attributes.get_int("do_rotary")
    )
    present = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if weight is None or not _held(weight) or (bias is not None and not _held(bias)) or held or present:
        return False
    width = _array(weight).shape[-1]
    sizes = tuple(node.attributes.get_ints("qkv_hidden_sizes") or (width // 3,) * 3)
    if len(sizes) != len(_PARTS) or sum(sizes) != width:
        return False
    parts: list[ir.Value | None] = [
        _before(graph, node, "MatMul", [x, part], name)
        for name, part in zip(_PARTS, split(weight, sizes), strict=True)
    ]
    if bias is not None:
        parts = _biased(graph, node, parts, split(bias, sizes))
    node.metadata_props[_OPENED] = f"{weight.name}\n{bias.name if bias is not None else ''}"
    node.op_type = "MultiHeadAttention"
    node.attributes.pop("qkv_hidden_sizes", None)
    _set_inputs(node, [*parts, None, _input(node, _ATTENTION_MASK), _input(node, _ADDED)])
    return True


def _open_bias(graph: ir.Graph, node: ir.Node, split: Split) -> bool:
    bias, parts = _input(node, 3), [_input(node, index) for index in range(3)]
    if bias is None or not _held(bias):
        return False
    widths = [None if value is None or value.shape is None else value.shape[-1] for value in parts]
    flat = all(value is not None and value.shape is not None and len(value.shape) == 3 for value in parts)
    sizes = tuple(width for width in widths if isinstance(width, int))
    if not flat or len(sizes) != len(_PARTS) or sum(sizes) != _array(bias).shape[0]:
        return False
    node.metadata_props[_OPENED] = f"\n{bias.name}"
    for index, value in enumerate(_biased(graph, node, parts, split(bias, sizes))):
        node.replace_input_with(index, value)
    node.replace_input_with(3, None)
    return True


def _biased(
    graph: ir.Graph, node: ir.Node, parts: Sequence[ir.Value | None], biases: Sequence[ir.Value]
) -> list[ir.Value | None]:
    return [
        _before(graph, node, "Add", [part, bias], f"{name}_biased")
        for name, part, bias in zip(_PARTS, parts, biases, strict=True)
    ]


def close_projections(graph: ir.Graph, shared: Shared) -> None:
    """Merge again what was written out.

    Args:
        graph: the graph.
        shared: adds an initializer with a name, one for all that hold the same.

    Raises:
        PlanError: where the projections do not end in the nodes that were written; a defect of ours.
    """
    for node in list(graph):
        names = node.metadata_props.pop(_OPENED, None)
        if names is not None:
            weight, bias = names.split("\n")
            _close(node, weight, bias, shared)


def _close(node: ir.Node, weight: str, bias: str, shared: Shared) -> None:
    parts = [_unbiased(node.inputs[index]) for index in range(len(_PARTS))]
    products = [_product(source, node) for source, _ in parts] if weight else []
    if any(x is not products[0][0] for x, _ in products):
        raise _lost(node)
    widths = [_array(factor).shape[-1] for _, factor in products]
    offsets = [None if offset is None else _array(offset) for _, offset in parts]
    known = [offset for offset in offsets if offset is not None]
    joint: ir.Value | None = None
    if known:
        filled = [
            np.zeros(widths[place], known[0].dtype) if offset is None else offset
            for place, offset in enumerate(offsets)
        ]
        joint = shared(bias or f"{node.outputs[0].name}_bias", np.concatenate(filled))
    if not weight:
        for index, (source, _) in enumerate(parts):
            node.replace_input_with(index, source)
        if len(node.inputs) <= len(_PARTS):  # omitted inputs at the end may have been dropped
            node.resize_inputs(len(_PARTS) + 1)
        node.replace_input_with(len(_PARTS), joint)
        return
    factor = shared(weight, np.concatenate([_array(factor) for _, factor in products], axis=-1))
    node.op_type = "Attention"
    if len(set(widths)) > 1:
        node.attributes["qkv_hidden_sizes"] = ir.AttrInt64s("qkv_hidden_sizes", widths)
    mask, added = _input(node, _HEADS_MASK), _input(node, _ADDED)
    _set_inputs(node, [products[0][0], factor, joint, mask, None, added])


def _unbiased(value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Return what a tensor is without its bias, and the bias, where it has one."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Add":
        return value, None
    for place in (0, 1):
        bias = node.inputs[place]
        if bias is not None and _held(bias) and _array(bias).ndim == 1:
            return node.inputs[1 - place], bias
    return value, None


def _product(value: ir.Value | None, node: ir.Node) -> tuple[ir.Value, ir.Value]:
    product = None if value is None else value.producer()
    if product is None or product.op_type != "MatMul":
        raise _lost(node)
    x, factor = product.inputs
    if x is None or factor is None or not _held(factor):
        raise _lost(node)
    return x, factor


def _lost(node: ir.Node) -> PlanError:
    return PlanError(
        "the projections of an attention are not where they were written",
        where=node.name or "",
        hint="please report the model",
    )


def _held(value: ir.Value) -> bool:
    return is_parameter(value) and value.const_value is not None


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None
    return value.const_value.numpy()


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _before(
    graph: ir.Graph, node: ir.Node, operator: str, inputs: Sequence[ir.Value | None], name: str
) -> ir.Value:
    """Put a node in front of another, and return its output."""
    added = ir.node(operator, inputs)
    added.outputs[0].name = f"{node.outputs[0].name}_{name}"
    graph.insert_before(node, added)
    return added.outputs[0]


def _set_inputs(node: ir.Node, inputs: Sequence[ir.Value | None]) -> None:
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
