"""How large a model is: parameters, bytes, multiply-accumulates, nodes."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import onnx_ir as ir

from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.statements.body import bodies
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
    **dict.fromkeys(("FusedMatMul", "TransposeMatMul"), ("Gemm", 1)),
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
        macs: multiply-accumulates of convolutions and matrix products for one sample, dynamic sizes at 16, those
            in bodies included (see `count_macs`); None where a shape is not known.
        nodes: in all graphs, Constant nodes left out.
    """

    parameters: int
    bytes: int
    macs: int | None
    nodes: int


def model_sizes(model: ir.Model, path: Path, prepared: ir.Graph | None = None) -> ModelSizes:
    """Count a model's sizes; `path` is where it lies, `prepared` its graph with shapes where that is at hand."""
    return ModelSizes(
        parameters=sum(int(tensor.size) for tensor in weights(model)),
        bytes=file_bytes(model, path),
        macs=count_macs(model) if prepared is None else graph_macs(prepared),
        nodes=sum(1 for node in model.graph.all_nodes() if node.op_type != "Constant"),
    )


def elements(value: ir.Value) -> int:
    """Return how many elements an initializer has."""
    return 0 if value.const_value is None else int(value.const_value.size)


def constants(model: ir.Model) -> Iterable[int]:
    """Yield the size of each constant of a model, of any type, in all graphs."""
    return (int(tensor.size) for tensor in _constants(model))


def weights(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    """Yield all constants of a model of a type that weights have: initializers and Constant nodes, in all graphs."""
    return (tensor for tensor in _constants(model) if is_weight_type(tensor.dtype))


def _constants(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    for graph in model.graphs():
        tensors = [value.const_value for value in graph.initializers.values()]
        tensors += [
            node.attributes["value"].as_tensor()
            for node in graph
            if node.op_type == "Constant" and "value" in node.attributes
        ]
        yield from (tensor for tensor in tensors if tensor is not None)


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
    """Return the multiply-accumulates of a model for one sample, None where a shape is not known.

    Of an If the larger branch counts, of a Scan its body once for each step; of a Loop likewise, or once where the
    number of rounds is not known before the model runs.
    """
    return graph_macs(prepare(model).graph)


def graph_macs(graph: ir.Graph) -> int | None:
    """As `count_macs`, of a graph whose shapes are inferred."""
    return _graph_macs(graph, counting_sizes(graph))


def _graph_macs(graph: ir.Graph, bindings: Mapping[str, int]) -> int | None:
    counts = [node_macs(node, bindings) for node in graph]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


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
    if held := bodies(node):
        return _body_macs(node, held, bindings)
    kind, weight = _CONTRACTIONS.get(node.op_type, ("", 0))
    return _contraction_macs(node, kind, weight, bindings) if kind else 0


def _contraction_macs(node: ir.Node, kind: str, weight: int, bindings: Mapping[str, int]) -> int | None:
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
    inner = second[-1] if kind == "Gemm" and node.attributes.get_int("transB", 0) != 0 else second[-2:][0]
    return math.prod(out) * inner


def _body_macs(node: ir.Node, held: list[ir.Graph], bindings: Mapping[str, int]) -> int | None:
    counts = [_graph_macs(body, bindings) for body in held]
    known = [count for count in counts if count is not None]
    times = _times(node, bindings)
    return max(known) * times if len(known) == len(counts) and times is not None else None


def _times(node: ir.Node, bindings: Mapping[str, int]) -> int | None:
    """Return how often a node runs its body."""
    if node.op_type == "Loop":
        limit = ir.convenience.get_const_tensor(node.inputs[0]) if node.inputs[0] is not None else None
        return 1 if limit is None else max(int(limit.numpy().reshape(-1)[0]), 0)
    if node.op_type != "Scan":
        return 1
    axes = node.attributes.get_ints("scan_input_axes") or [0]
    sequence = concrete(
        node.inputs[len(node.inputs) - node.attributes.get_int("num_scan_inputs", 1)], bindings
    )
    return None if sequence is None else sequence[axes[0]]


def concrete(value: ir.Value | None, bindings: Mapping[str, int]) -> list[int] | None:
    """Return a tensor's shape with symbols replaced, None where a dimension is not known."""
    if value is None or value.shape is None:
        return None
    sizes = [dim if isinstance(dim, int) else dim.evaluate(bindings) for dim in value.shape]
    known = [size for size in sizes if isinstance(size, int)]
    return known if len(known) == len(sizes) else None
