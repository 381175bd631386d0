"""How large a model is: parameters, bytes, multiply-accumulates, nodes."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.stored import is_weight_type

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

# sizes that dynamic dimensions are given for counting: one sample, sixteen of anything else
BATCH, OTHER = 1, 16

# what each operator multiplies as, and where its weight is
_CONTRACTIONS = {
    "Conv": ("Conv", 1),
    "ConvTranspose": ("ConvTranspose", 1),
    "ConvInteger": ("Conv", 1),
    "QLinearConv": ("Conv", 3),
    "Gemm": ("Gemm", 1),
    "QGemm": ("Gemm", 3),
    "QLinearMatMul": ("MatMul", 3),
    **dict.fromkeys(
        ("MatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), ("MatMul", 1)
    ),
    "MatMulNBits": ("packed", 1),
}


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model.

    Attributes:
        parameters: elements of all constants of a type that weights have (floating point, integers of at most 16 bits),
            initializers and Constant nodes, in all graphs.
        bytes: of the file, with its external data.
        macs: multiply-accumulates of convolutions and matrix products for one sample, dynamic sizes at 16;
            None where a shape is not known.
        nodes: in all graphs, Constant nodes left out.
    """

    parameters: int
    bytes: int
    macs: int | None
    nodes: int


def model_sizes(model: ir.Model, path: Path, prepared: ir.Graph | None = None) -> ModelSizes:
    """Count a model's sizes; `path` is where it lies, `prepared` its graph with shapes where that is at hand."""
    return ModelSizes(
        parameters=sum(int(tensor.size) for tensor in _weights(model)),
        bytes=file_bytes(model, path),
        macs=count_macs(model) if prepared is None else graph_macs(prepared),
        nodes=sum(1 for node in model.graph.all_nodes() if node.op_type != "Constant"),
    )


def elements(value: ir.Value) -> int:
    """Return how many elements an initializer has."""
    return 0 if value.const_value is None else int(value.const_value.size)


def _weights(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    for graph in model.graphs():
        constants = [value.const_value for value in graph.initializers.values()]
        constants += [
            node.attributes["value"].as_tensor()
            for node in graph
            if node.op_type == "Constant" and "value" in node.attributes
        ]
        yield from (tensor for tensor in constants if tensor is not None and is_weight_type(tensor.dtype))


def file_bytes(model: ir.Model, path: Path) -> int:
    """Return the bytes of a model's file and of the external data that it names."""
    files = {
        (path.parent / tensor.location).resolve()
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return path.stat().st_size + sum(file.stat().st_size for file in files)


def count_macs(model: ir.Model) -> int | None:
    """Return the multiply-accumulates of a model's main graph for one sample, None where a shape is not known."""
    return graph_macs(prepare(model).graph)


def graph_macs(graph: ir.Graph) -> int | None:
    """As `count_macs`, of a graph whose shapes are inferred."""
    bindings = counting_sizes(graph)
    total = 0
    for node in graph:
        count = node_macs(node, bindings)
        if count is None:
            return None
        total += count
    return total


def counting_sizes(graph: ir.Graph) -> dict[str, int]:
    """Return a size for each symbol in the graph's inputs: one sample, sixteen of anything else."""
    bindings: dict[str, int] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                bindings.setdefault(dim.value, BATCH if axis == 0 else OTHER)
    return bindings


def node_macs(node: ir.Node, bindings: Mapping[str, int]) -> int | None:
    """Return a node's multiply-accumulates: 0 for what is no contraction, None where a shape is not known."""
    kind, weight = _CONTRACTIONS.get(node.op_type, ("", 0))
    if not kind:
        return 0
    first, second, out = (
        concrete(value, bindings) for value in (node.inputs[0], node.inputs[weight], node.outputs[0])
    )
    if first is None or second is None or out is None:
        return None
    if kind == "Conv":
        return math.prod(out) * math.prod(second[1:])
    if kind == "ConvTranspose":
        return math.prod(first) * math.prod(second[1:])
    if kind == "packed":
        return math.prod(out) * first[-1]
    inner = second[1] if kind == "Gemm" and node.attributes.get_int("transB", 0) != 0 else second[-2:][0]
    return math.prod(out) * inner


def concrete(value: ir.Value | None, bindings: Mapping[str, int]) -> list[int] | None:
    """Return a tensor's shape with symbols replaced, None where a dimension is not known."""
    if value is None or value.shape is None:
        return None
    sizes = [dim if isinstance(dim, int) else dim.evaluate(bindings) for dim in value.shape]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None
