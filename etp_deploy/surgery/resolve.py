"""Subgraphs that compute shapes (`Shape -> Gather -> Concat -> Reshape`), replaced by what they compute."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY

import etp_deploy.surgery.fused_shapes
import etp_deploy.surgery.quantized_shapes  # noqa: F401 - teaches shape inference
from etp_deploy.surgery.evaluate import evaluate
from etp_deploy.surgery.shapes import Size, is_parameter

if TYPE_CHECKING:
    from collections.abc import Iterator

# entries that a shape-computing value may have and still be replaced by a constant
_LARGEST_SHAPE = 64
_SHAPE_INPUT = {"Reshape": 1, "Expand": 1, "ConstantOfShape": 0, "Resize": 3}
_ALLOWZERO_OPSET = 14
# operators on integers whose result is no larger than their inputs together
_FOLDED = frozenset(
    (
        *(
            "Abs",
            "Add",
            "And",
            "Cast",
            "Concat",
            "Equal",
            "Gather",
            "Greater",
            "GreaterOrEqual",
            "Identity",
            "Less",
        ),
        *(
            "LessOrEqual",
            "Max",
            "Min",
            "Mul",
            "Neg",
            "Not",
            "Or",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
        ),
        *("Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"),
    )
)
_RESOLVED = "etp_deploy.resolved"
# what of these was built already, kept in the graph's own scratch space while it is prepared
_SIZES, _TARGETS = "etp_deploy.sizes", "etp_deploy.targets"


def shape_data(value: ir.Value | None) -> list[Size] | None:
    """Return what an integer tensor of sizes holds, entry by entry, where inference knows it."""
    if value is None:
        return None
    if is_parameter(value):
        return _literal(value)
    raw = value.metadata_props.get(SYM_DATA_KEY)
    if raw is None or value.shape is None or len(value.shape) > 1:
        return _chosen(value)
    entries = json.loads(raw)
    if entries is None or any(entry is None for entry in entries):
        return None
    return [Size.of(int(entry) if str(entry).lstrip("-").isdigit() else entry) for entry in entries]


def _literal(value: ir.Value) -> list[Size] | None:
    tensor = value.const_value
    if tensor is None or tensor.dtype != ir.DataType.INT64 or tensor.size > _LARGEST_SHAPE:
        return None
    return [Size(int(entry)) for entry in tensor.numpy().reshape(-1)]


def _chosen(value: ir.Value) -> list[Size] | None:
    """Read `Where(Equal(sizes, -1), a, b)`, which TorchScript writes for `expand`: no size is -1."""
    node = value.producer()
    if node is None or node.op_type != "Where" or node.inputs[0] is None:
        return None
    test = node.inputs[0].producer()
    if test is None or test.op_type != "Equal":
        return None
    sides = [shape_data(side) for side in (*test.inputs, *node.inputs[1:])]
    if any(side is None for side in sides):
        return None
    left, right, yes, no = np.broadcast_arrays(*(np.array(side, object) for side in sides))
    chosen: list[Size] = []
    for a, b, if_equal, otherwise in zip(left, right, yes, no, strict=True):
        if a == b:
            chosen.append(if_equal)
        elif _differ(a, b) or _differ(b, a):
            chosen.append(otherwise)
        else:
            return None
    return chosen


def _differ(a: Size, b: Size) -> bool:
    return b.static is not None and (a.static is not None or b.coefficient < 0)


def fold_integers(graph: ir.Graph) -> bool:
    """Evaluate nodes that compute small integer tensors from constants alone."""
    folded = False
    for node in list(graph.all_nodes()):
        value = node.outputs[0]
        if len(node.outputs) != 1 or value.dtype not in {ir.DataType.INT64, ir.DataType.BOOL}:
            continue
        arrays = [_small_constant(item) for item in node.inputs]
        known = [array for array in arrays if array is not None]
        if not known or len(known) < len(arrays) or value.is_graph_output() or not value.uses():
            continue
        if not _harmless(node, known):
            continue
        result = evaluate(node, known)
        if result is not None and result.size <= _LARGEST_SHAPE:
            value.replace_all_uses_with(constant(graph, result, f"{value.name}_folded"))
            folded = True
    return folded


def _harmless(node: ir.Node, arrays: list[np.ndarray]) -> bool:
    """Return whether a node can be evaluated here: no division that traps, no result of any size."""
    if node.op_type in {"Div", "Mod"}:
        return not np.isin(arrays[1], (0, -1)).any()
    if node.op_type == "ConstantOfShape":
        return bool((arrays[0] >= 0).all() and (arrays[0] <= _LARGEST_SHAPE).all() and arrays[0].size <= 2)
    return node.op_type in _FOLDED


def _small_constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None or not is_parameter(value) or value.const_value is None:
        return None
    return value.const_value.numpy() if value.const_value.size <= _LARGEST_SHAPE else None


def resolve_shapes(graph: ir.Graph) -> bool:
    """Replace what computes sizes and targets by constants, and by sizes of inputs, as far as they are known."""
    changed = False
    sources = _symbol_sources(graph)
    for node in list(graph.all_nodes()):
        for value in node.outputs:
            changed |= _fold_static(graph, value)
    for node in list(graph.all_nodes()):
        index = _SHAPE_INPUT.get(node.op_type)
        if index is None or node.domain != "" or len(node.inputs) <= index:
            continue
        target = node.inputs[index]
        if target is None or is_parameter(target):
            continue
        entries = shape_data(target)
        if entries is not None:
            changed |= _rebuild_target(graph, node, index, entries, sources)
    graph.sort()
    return changed


def fill_shapes(graph: ir.Graph) -> bool:
    """Give ConstantOfShape the symbolic shape that its input holds; inference knows only constant ones."""
    changed = False
    for node in graph.all_nodes():
        if node.op_type == "ConstantOfShape" and node.outputs[0].shape is None:
            entries = shape_data(node.inputs[0])
            if entries is not None and all(entry.coefficient >= 0 for entry in entries):
                dims = [entry.coefficient if entry.static is not None else str(entry) for entry in entries]
                node.outputs[0].shape = ir.Shape(dims)
                changed = True
    return changed


def _fold_static(graph: ir.Graph, value: ir.Value) -> bool:
    if value.dtype != ir.DataType.INT64 or value.is_graph_output() or not value.uses():
        return False
    entries = shape_data(value)
    if entries is None or len(entries) > _LARGEST_SHAPE or any(entry.static is None for entry in entries):
        return False
    array = np.array([entry.coefficient for entry in entries], np.int64)
    shape = () if value.shape is not None and len(value.shape) == 0 else (len(entries),)
    value.replace_all_uses_with(constant(graph, array.reshape(shape), f"{value.name}_static"))
    return True


def constant(graph: ir.Graph, content: np.ndarray | ir.TensorProtocol, name: str) -> ir.Value:
    """Add an initializer with a name that is not taken yet."""
    unique, suffix = name, 0
    while unique in graph.initializers:
        suffix += 1
        unique = f"{name}_{suffix}"
    tensor = ir.Tensor(content, name=unique) if isinstance(content, np.ndarray) else content
    value = ir.Value(
        name=unique,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _symbol_sources(graph: ir.Graph) -> dict[str, tuple[ir.Value, int]]:
    """Return, for each symbol that is a graph input's own dimension, that input and axis."""
    sources: dict[str, tuple[ir.Value, int]] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            size = Size.of(dim)
            if size.coefficient == 1 and len(size.symbols) == 1:
                sources.setdefault(size.symbols[0], (value, axis))
    return sources


def _rebuild_target(
    graph: ir.Graph, node: ir.Node, index: int, entries: list[Size], sources: dict[str, tuple[ir.Value, int]]
) -> bool:
    """Write a Reshape's or Expand's target anew from its entries, as a constant wherever that is possible."""
    reshape = node.op_type == "Reshape"
    data = node.inputs[0]
    shape = [Size.of(dim) for dim in data.shape] if data is not None and data.shape is not None else []
    wanted = _wanted_sizes(node, entries, shape)
    if wanted is None or any(size == Size(0) for size in wanted):
        return False
    values = _literal_entries(wanted, shape if reshape else [])
    unknown = [position for position, value in enumerate(values) if isinstance(value, Size)]
    if reshape and unknown:
        # -1 is best spent on a size that no graph input has as it is
        values[max(unknown, key=lambda position: str(wanted[position]) not in sources)] = -1
    wording = " ".join(str(value) for value in values)
    target = node.inputs[index]
    if target is None or target.metadata_props.get(_RESOLVED) == wording:
        return False  # nothing more became known since the last round
    pieces = list(_pieces(graph, values, sources, target))
    if None in pieces:
        return False
    if reshape:
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
        if opset(graph) < _ALLOWZERO_OPSET:
            del node.attributes["allowzero"]
    rebuilt = _concatenated(graph, node, pieces)
    rebuilt.metadata_props[_RESOLVED] = wording
    node.replace_input_with(index, rebuilt)
    return True


def _wanted_sizes(node: ir.Node, entries: list[Size], shape: list[Size]) -> list[Size] | None:
    """Return the sizes that a target asks for, its -1 resolved; None where that is not known."""
    if node.op_type != "Reshape":
        return entries
    wanted = _without_minus_one(entries, shape)
    out = node.outputs[0].shape
    if wanted is None and out is not None:
        return [Size.of(dim) if entry == Size(-1) else entry for entry, dim in zip(entries, out, strict=True)]
    return wanted


def _literal_entries(wanted: list[Size], shape: list[Size]) -> list[int | Size]:
    """Write sizes as numbers, as 0 where a Reshape copies its data's size, or as they are."""
    return [
        size.coefficient
        if size.static is not None
        else (0 if position < len(shape) and shape[position] == size else size)
        for position, size in enumerate(wanted)
    ]


def _without_minus_one(entries: list[Size], shape: list[Size]) -> list[Size] | None:
    """Replace a Reshape's -1 by what remains of the data's size, None where that is no monomial."""
    if Size(-1) not in entries:
        return entries
    rest: Size | None = Size(1)
    for size in shape:
        rest = None if rest is None else rest * size
    for entry in entries:
        if rest is not None and entry != Size(-1):
            rest = rest.divide(entry)
    return None if rest is None else [rest if entry == Size(-1) else entry for entry in entries]


def opset(graph: ir.Graph) -> int:
    """Return the version of the default operator set."""
    return graph.opset_imports.get("", 1)


def _concatenated(graph: ir.Graph, node: ir.Node, pieces: list[int | ir.Value | None]) -> ir.Value:
    """Return the target as a tensor; one for all nodes that ask for the same."""
    name = f"{node.outputs[0].name}_target"
    if all(isinstance(piece, int) for piece in pieces):
        return constant(graph, np.array(pieces, np.int64), name)
    known: dict[object, ir.Value] = graph.meta.setdefault(_TARGETS, {})
    key = tuple(pieces)
    if not _present(known.get(key), graph):
        parts = [
            constant(graph, np.array([piece], np.int64), f"{name}_{position}")
            if isinstance(piece, int)
            else piece
            for position, piece in enumerate(pieces)
        ]
        known[key] = _insert(graph, ir.node("Concat", parts, {"axis": 0}), name, len(pieces))
    return known[key]


def _present(value: ir.Value | None, graph: ir.Graph) -> bool:
    """Return whether a tensor built in an earlier round is still there; unused ones are dropped in between."""
    producer = None if value is None else value.producer()
    return producer is not None and producer.graph is graph


def _insert(graph: ir.Graph, node: ir.Node, name: str, size: int) -> ir.Value:
    """Insert a node that computes `size` integers at the graph's beginning, which is sorted afterwards."""
    value = node.outputs[0]
    value.name = name
    value.type = ir.TensorType(ir.DataType.INT64)
    value.shape = ir.Shape([size])
    graph.insert_before(graph[0], node)
    return value


def _pieces(
    graph: ir.Graph,
    values: list[int | Size],
    sources: dict[str, tuple[ir.Value, int]],
    target: ir.Value,
) -> Iterator[int | ir.Value | None]:
    """Yield what each entry is: a number, a size read from a graph's input or the old target, or None if neither."""
    open_ = _entries_open(graph, values, target)
    for position, size in enumerate(values):
        if isinstance(size, int):
            yield size
        elif str(size) in sources:
            yield _read_size(graph, *sources[str(size)])
        elif open_:
            yield _read_entry(graph, target, position)
        else:
            yield None


def _entries_open(graph: ir.Graph, values: list[int | Size], target: ir.Value) -> bool:
    """Return whether entries may be read from a target: in the main graph, where others are numbers of channels.

    What is concatenated already is as good as it gets.
    """
    producer = target.producer()
    return (
        producer is not None
        and producer.graph is graph
        and producer.op_type != "Concat"
        and any(isinstance(size, int) and size > 1 for size in values)
    )


def _read_entry(graph: ir.Graph, target: ir.Value, position: int) -> ir.Value:
    """Return one entry of a tensor of sizes as a tensor of one entry."""
    known: dict[object, ir.Value] = graph.meta.setdefault(_SIZES, {})
    if not _present(known.get((target, position)), graph):
        name = f"{target.name}_entry_{position}"
        where = constant(graph, np.array([position], np.int64), f"{name}_place")
        known[target, position] = _insert(graph, ir.node("Gather", [target, where], {"axis": 0}), name, 1)
    return known[target, position]


def _read_size(graph: ir.Graph, value: ir.Value, axis: int) -> ir.Value:
    """Return the size of an input's axis as a tensor of one entry; read once, at the graph's beginning."""
    known: dict[object, ir.Value] = graph.meta.setdefault(_SIZES, {})
    if not _present(known.get((value, axis)), graph):
        name = f"{value.name}_size_{axis}"
        shape = _insert(graph, ir.node("Shape", [value]), f"{name}_of", len(value.shape or ()))
        where = constant(graph, np.array([axis], np.int64), f"{name}_axis")
        gather = ir.node("Gather", [shape, where], {"axis": 0})
        known[value, axis] = _insert(graph, gather, name, 1)
    return known[value, axis]
