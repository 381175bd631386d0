"""Nodes that ONNX Runtime's optimiser fused from several, read as what they were fused from.

`FusedConv(x, w, b, z)` is `activation(Conv(x, w, b) + z)`, and each of these operators has a rule: so the node is
taken apart before the analysis, and put together again after the rewrite where its parts are still a chain. A
model that was optimised before it is deployed, and is loaded without optimisation, keeps its fused nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from etp_deploy.surgery.statements.base import array_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Constant = Callable[[ir.Graph, np.ndarray, str], ir.Value]

DOMAIN = "com.microsoft"
_FUSION = "etp_deploy.fusion"
_SKIP_EPSILON = 1e-12
# where Clip takes its bounds as inputs
_CLIP_INPUTS_OPSET = 11
_PREVIOUS = None


@dataclass(frozen=True)
class Part:
    """One of the operators that a node stands for, which reads what the part before it computes.

    Attributes:
        operator: the operator, of the default domain.
        inputs: for each of its inputs the fused node's, `None` for the output of the part before, and an array for
            a constant of its own.
        attributes: its attributes.
        returned: which of these the fused node has too, under the same name.
        output: the output of the fused node that it computes besides the last part's, where there is one.
    """

    operator: str
    inputs: tuple[int | np.ndarray | None, ...]
    attributes: Mapping[str, ir.Attr]
    returned: tuple[str, ...] = ()
    output: int | None = None


@dataclass(frozen=True)
class Fusion:
    """A fused node that was taken apart.

    Attributes:
        operator: the fused operator.
        name: the node's name.
        attributes: its attributes.
        inputs: how many it had.
        outputs: how many it had.
        parts: what it stands for.
        nodes: the nodes that these became.
    """

    operator: str
    name: str | None
    attributes: Mapping[str, ir.Attr]
    inputs: int
    outputs: int
    parts: tuple[Part, ...]
    nodes: tuple[ir.Node, ...]


def take_apart(graph: ir.Graph, constant: Constant) -> bool:
    """Replace fused nodes by what they stand for, in bodies too; say if there were any.

    Args:
        graph: the model's.
        constant: adds an initializer to a graph.
    """
    found = False
    for node in list(graph.all_nodes()):
        parts = _parts(node)
        if parts is not None and isinstance(node.graph, ir.Graph):
            _replace(node.graph, node, parts, lambda array, name: constant(graph, array, name))
            found = True
    return found


def put_together(graph: ir.Graph) -> None:
    """Fuse again what was taken apart and is a chain still."""
    for node in list(graph.all_nodes()):
        fusion = node.meta.get(_FUSION)
        if fusion is not None and isinstance(node.graph, ir.Graph) and _is_chain(fusion, node.graph):
            _fuse(node.graph, fusion)


# taking apart


def _parts(node: ir.Node) -> tuple[Part, ...] | None:
    maker = _MAKERS.get(node.op_type) if node.domain == DOMAIN else None
    return None if maker is None else maker(node)


def _has(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _inputs(node: ir.Node, *indices: int) -> tuple[int, ...]:
    """Return the first of some inputs, up to the last that is there."""
    given = [place for place, index in enumerate(indices) if _has(node, index)]
    return indices[: max(given, default=-1) + 1]


def _without(node: ir.Node, *prefixes: str) -> dict[str, ir.Attr]:
    return {name: item for name, item in node.attributes.items() if not name.startswith(prefixes)}


def _convolution(node: ir.Node) -> tuple[Part, ...] | None:
    """Conv, an addend, an activation."""
    attributes = _without(node, "activation")
    parts = [Part("Conv", _inputs(node, 0, 1, 2), attributes, (*attributes, "group"))]
    if _has(node, 3):
        parts.append(Part("Add", (_PREVIOUS, 3), {}))
    name = node.attributes.get_string("activation", "")
    if not name:
        return tuple(parts)
    given = node.attributes.get_floats("activation_params") or ()
    if name == "Clip":
        activation = _clip(node, given)
    elif name in _CONVOLUTION_ACTIVATIONS and len(given) == len(_CONVOLUTION_ACTIVATIONS[name]):
        names = _CONVOLUTION_ACTIVATIONS[name]
        own = {key: ir.AttrFloat32(key, value) for key, value in zip(names, given, strict=True)}
        activation = Part(name, (_PREVIOUS,), own)
    else:
        return None
    return None if activation is None else (*parts, activation)


_CONVOLUTION_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Tanh": (),
    "Sigmoid": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}


def _clip(node: ir.Node, bounds: Sequence[float]) -> Part | None:
    weight = node.inputs[1]
    opset = 1 if node.graph is None else node.graph.opset_imports.get("", 1)
    if len(bounds) != 2 or weight is None or weight.dtype is None or opset < _CLIP_INPUTS_OPSET:
        return None
    low, high = (np.array(bound, weight.dtype.numpy()) for bound in bounds)
    return Part("Clip", (_PREVIOUS, low, high), {})


def _gemm(node: ir.Node) -> tuple[Part, ...]:
    """Gemm, an activation."""
    attributes = _without(node, "activation")
    product = Part("Gemm", _inputs(node, 0, 1, 2), attributes, tuple(attributes))
    name = node.attributes.get_string("activation", "")
    if not name:
        return (product,)
    prefix = "activation_"
    own = {
        key.removeprefix(prefix): ir.Attr(key.removeprefix(prefix), item.type, item.value)
        for key, item in node.attributes.items()
        if key.startswith(prefix)
    }
    return (product, Part(name, (_PREVIOUS,), own))


def _skip(
    normalisation: str, affine: tuple[int, ...], bias: int
) -> Callable[[ir.Node], tuple[Part, ...] | None]:
    """Return what takes apart: the sum of two tensors and a bias, normalised."""

    def made(node: ir.Node) -> tuple[Part, ...] | None:
        if any(value.uses() or value.is_graph_output() for value in node.outputs[1:3]):
            return None  # the statistics are read
        total = 3 if len(node.outputs) > 3 else None
        biased = _has(node, bias)
        sums = [Part("Add", (0, 1), {}, output=None if biased else total)]
        if biased:
            sums.append(Part("Add", (_PREVIOUS, bias), {}, output=total))
        epsilon = ir.AttrFloat32("epsilon", node.attributes.get_float("epsilon", _SKIP_EPSILON))
        inputs = (_PREVIOUS, *_inputs(node, *affine))
        return (*sums, Part(normalisation, inputs, {"epsilon": epsilon}, ("epsilon",)))

    return made


_MAKERS: dict[str, Callable[[ir.Node], tuple[Part, ...] | None]] = {
    "FusedConv": _convolution,
    "FusedGemm": _gemm,
    "SkipLayerNormalization": _skip("LayerNormalization", (2, 3), bias=4),
    "SkipSimplifiedLayerNormalization": _skip("SimplifiedLayerNormalization", (2,), bias=3),
}


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    parts: tuple[Part, ...],
    constant: Callable[[np.ndarray, str], ir.Value],
) -> None:
    nodes: list[ir.Node] = []
    old, new = [], []
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        inputs = [
            constant(item, f"{node.outputs[0].name}_bound")
            if isinstance(item, np.ndarray)
            else (nodes[-1].outputs[0] if item is _PREVIOUS else node.inputs[item])
            for item in part.inputs
        ]
        # the runtime refuses two nodes of one name, and outputs have names that are unique
        name = f"{node.outputs[0].name}_{place}_{part.operator}"
        made = ir.node(part.operator, inputs, dict(part.attributes), name=name)
        made.outputs[0].name = name
        index = 0 if last else part.output
        if index is not None and index < len(node.outputs):
            old.append(node.outputs[index])
            new.append(made.outputs[0])
        nodes.append(made)
    fusion = Fusion(
        node.op_type,
        node.name,
        dict(node.attributes),
        len(node.inputs),
        len(node.outputs),
        parts,
        tuple(nodes),
    )
    replace_nodes_and_values(graph, node, [node], nodes, old, new)
    nodes[-1].meta[_FUSION] = fusion


# putting together


def _is_chain(fusion: Fusion, graph: ir.Graph) -> bool:
    """Return whether each part still reads what the one before it computes, and nobody else does."""
    if any(node.graph is not graph for node in fusion.nodes):
        return False
    for (_, before), (part, after) in pairwise(zip(fusion.parts, fusion.nodes, strict=True)):
        value = before.outputs[0]
        if after.inputs[part.inputs.index(_PREVIOUS)] is not value:
            return False
    for part, node in zip(fusion.parts[:-1], fusion.nodes[:-1], strict=True):
        value = node.outputs[0]
        if part.output is None and (len(value.uses()) != 1 or value.is_graph_output()):
            return False
    return all(_own_constants_stay(part, node) for part, node in zip(fusion.parts, fusion.nodes, strict=True))


def _own_constants_stay(part: Part, node: ir.Node) -> bool:
    """Return whether a part reads the constants that the fused node has as attributes."""
    for item, value in zip(part.inputs, node.inputs, strict=False):
        array = array_of(value)
        if isinstance(item, np.ndarray) and (array is None or not np.array_equal(item, array)):
            return False
    return True


def _fuse(graph: ir.Graph, fusion: Fusion) -> None:
    inputs: list[ir.Value | None] = [None] * fusion.inputs
    attributes = dict(fusion.attributes)
    old, places = [fusion.nodes[-1].outputs[0]], [0]
    for part, node in zip(fusion.parts, fusion.nodes, strict=True):
        # a bias that the rewrite added stands where the fused operator has one, too
        places_of_inputs = (*part.inputs, *range(len(part.inputs), len(node.inputs)))
        for index, value in zip(places_of_inputs, node.inputs, strict=True):
            if isinstance(index, int):
                inputs += [None] * (index + 1 - len(inputs))
                inputs[index] = value
        for name in part.returned:
            if name in node.attributes:
                attributes[name] = node.attributes[name]
        if part.output is not None:
            old.append(node.outputs[0])
            places.append(part.output)
    whole = ir.Node(
        DOMAIN,
        fusion.operator,
        inputs,
        list(attributes.values()),
        num_outputs=fusion.outputs,
        name=fusion.name,
    )
    new = [whole.outputs[place] for place in places]
    replace_nodes_and_values(graph, fusion.nodes[-1], list(fusion.nodes), [whole], old, new)
    for place, value in enumerate(whole.outputs):
        if place not in places:
            value.name = ""  # an output that was not asked for stays so
