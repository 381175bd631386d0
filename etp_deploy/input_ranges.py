"""What values a graph input may take, read from how the graph uses it.

A token id must be a row of every table it is looked up in, an attention mask is 0 or 1, a length is at least
one: drawn outside these ranges a model fails, or computes something that nobody deploys. Uses are followed
through the nodes that only move values, and through additions of constants.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import onnx
import onnx.numpy_helper

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy as np

# Operators whose outputs hold values of their first inputs, elsewhere or in another type.
MOVERS = frozenset(
    {
        "Cast",
        "CastLike",
        "Concat",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "GatherND",
        "Identity",
        "Pad",
    }
    | {"Reshape", "ReverseSequence", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
# operator -> pairs of (position of the index, position of the table it selects from)
LOOKUPS = {
    "Gather": ((1, 0),),
    "GatherElements": ((1, 0),),
    "GatherBlockQuantized": ((1, 0),),
    "EmbedLayerNormalization": ((0, 2), (1, 4)),
}
LENGTHS = {"GRU": 4, "LSTM": 4, "RNN": 4, "ReverseSequence": 1}
SIZES = {"ConstantOfShape": 0, "Expand": 1, "Range": 1, "Reshape": 1, "Tile": 1, "TopK": 1}
COMPARISONS = frozenset(
    {"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor"}
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One way in which the graph reads an input's values.

    Args:
        kind: "ids", "mask", "length", "size" or "positive".
        high: the largest value allowed, for ids.
    """

    kind: str
    high: float = math.inf


class GraphUses:
    """Who reads what in a graph and its subgraphs, and what is constant in it."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        self._producers: dict[str, onnx.NodeProto] = {}
        self._constants: dict[str, onnx.TensorProto] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for part in with_subgraphs(graph):
            self._index(part)

    def _index(self, graph: onnx.GraphProto) -> None:
        self._constants.update((tensor.name, tensor) for tensor in graph.initializer)
        for value in (*graph.value_info, *graph.input):
            dims = value.type.tensor_type.shape.dim
            self._shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        for node in graph.node:
            for position, name in enumerate(node.input):
                self._readers.setdefault(name, []).append((node, position))
            for name in node.output:
                self._producers[name] = node
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                self._constants[node.output[0]] = node.attribute[0].t

    def uses(self, name: str) -> Iterator[Use]:
        """Yield what the graph does with the values of `name`, directly or after moving them."""
        pending, seen = [(name, 0.0)], {name}
        while pending:
            value, offset = pending.pop()
            for node, position in self._readers.get(value, ()):
                yield from self._use(node, position, offset)
                shift = self._shift(node, position)
                for output in node.output:
                    if shift is not None and output and output not in seen:
                        seen.add(output)
                        pending.append((output, offset + shift))

    def _shift(self, node: onnx.NodeProto, position: int) -> float | None:
        """What passing through the node adds to the values; None where they do not pass."""
        if node.op_type in MOVERS and (position == 0 or node.op_type == "Concat"):
            return 0.0
        if node.op_type == "Add":
            added = self._constant(node.input[1 - position])
            if added is not None and added.size and added.dtype.kind in "iu":
                return float(added.max())
        return None

    def _use(self, node: onnx.NodeProto, position: int, offset: float) -> Iterator[Use]:
        kind = node.op_type
        for index, table in LOOKUPS.get(kind, ()):
            if position == index:
                yield Use("ids", self._rows(node, table) - 1 - offset)
        if LENGTHS.get(kind) == position:
            yield Use("length")
        elif SIZES.get(kind) == position:
            yield Use("size")
        elif kind in {"Log", "Sqrt"}:
            yield Use("positive")
        elif self._reads_truth(node, position):
            yield Use("mask")

    def _reads_truth(self, node: onnx.NodeProto, position: int) -> bool:
        """Whether the node asks of a value only whether it is zero, or takes it from one."""
        kind = node.op_type
        if kind in COMPARISONS or (kind == "Where" and position == 0):
            return True
        if kind == "Cast":
            return any(a.name == "to" and a.i == _BOOL for a in node.attribute)
        if kind == "EmbedLayerNormalization":
            return position == 7
        if kind == "Sub" and position == 1:
            first = self._constant(node.input[0])
            return first is not None and first.size == 1 and float(first.reshape(-1)[0]) == 1.0
        return False

    def _rows(self, node: onnx.NodeProto, position: int) -> int:
        """How many entries a lookup chooses from; 1 where that is unknown, since entry 0 always exists."""
        axis = next((a.i for a in node.attribute if a.name in {"axis", "gather_axis"}), 0)
        table = node.input[position] if position < len(node.input) else ""
        for _ in range(8):
            if table in self._constants or table not in self._producers:
                break
            producer = self._producers[table]
            if producer.op_type not in {"Cast", "DequantizeLinear", "Identity"} or table in self._shapes:
                break
            table = producer.input[0]
        constant = self._constants.get(table)
        dims = tuple(constant.dims) if constant is not None else self._shapes.get(table, ())
        if not -len(dims) <= axis < len(dims):
            return 1
        return max(int(dims[axis]), 1)

    def _constant(self, name: str) -> np.ndarray | None:
        """A small constant's value; None for anything else, since large ones may not even be in the file."""
        producer = self._producers.get(name)
        if name not in self._constants and producer is not None and producer.op_type in {"Cast", "Identity"}:
            return self._constant(producer.input[0])
        tensor = self._constants.get(name)
        if (
            tensor is None
            or tensor.data_location == onnx.TensorProto.EXTERNAL
            or math.prod(tensor.dims) > _SMALL
        ):
            return None
        value: np.ndarray = onnx.numpy_helper.to_array(tensor)
        return value


_BOOL = 9  # TensorProto.BOOL
_SMALL = 1 << 20


def value_range(name: str, dtype: np.dtype, uses: Iterable[Use]) -> tuple[str, float, float]:
    """Decide the kind of an input and its lowest and highest value.

    Normal draws ("float") state their mean minus and plus one standard deviation.
    """
    found = {use.kind: use for use in uses if use.kind != "ids"}
    limits = [use.high for use in uses if use.kind == "ids"]
    kind = dtype.kind if dtype.name != "bfloat16" and not dtype.name.startswith("float") else "f"
    named_mask = "mask" in name.lower()
    if kind == "b":
        return ("mask" if named_mask else "bool"), 0.0, 1.0
    if kind in "OSU":
        return "string", 0.0, 0.0
    if kind not in "iu" or dtype.name.startswith(("int2", "int4", "uint2", "uint4")):
        if named_mask:
            return "mask", 0.0, 1.0
        return ("positive", 0.1, 2.0) if "positive" in found else ("float", -1.0, 1.0)
    return _integer_range(name, dtype, found, limits)


def _integer_range(
    name: str, dtype: np.dtype, found: dict[str, Use], limits: list[float]
) -> tuple[str, float, float]:
    lowered = name.lower()
    if limits:
        return "ids", 0.0, max(min(limits), 0.0)
    if "size" in found:
        return "size", 1.0, 1.0
    if "length" in found or lowered.endswith(("length", "lengths", "len", "lens")):
        return "length", 1.0, math.inf
    if "mask" in found or "mask" in lowered:
        return "mask", 0.0, 1.0
    if dtype.itemsize == 1:
        return "int", float(-128 if dtype.kind == "i" else 0), float(127 if dtype.kind == "i" else 255)
    return "int", 0.0, 9.0


def with_subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the bodies in it, at any depth."""
    pending = [graph]
    while pending:
        part = pending.pop()
        yield part
        for node in part.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)
