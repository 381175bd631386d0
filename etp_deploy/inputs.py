"""Inputs drawn for a model: their names, types, shapes and real ranges, and arrays that respect them.

The same seed gives the same arrays for every model whose inputs are called the same, whatever their order: an
original and its compressed form are fed the same.
"""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
import re
import zlib
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx.helper
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

from etp_deploy.errors import ModelError, UsageError
from etp_deploy.input_ranges import GraphUses, value_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


LEADING_SIZE = 1
SEQUENCE_SIZE = 16
SPATIAL_SIZE = 64  # small enough to be quick, large enough for five halvings
_OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """One input of a model.

    Args:
        name: the input's name.
        dtype: what an array for it must have; strings are `object`, bfloat16 and its kin are from ml_dtypes.
        shape: sizes, or names where they are dynamic; an unnamed dynamic axis is called "input.axis".
        low: smallest value; for "float", mean minus one standard deviation of a normal draw.
        high: largest value, included; for "float", mean plus one standard deviation; infinite for a length.
        kind: "float", "positive", "ids", "mask", "length", "size", "int", "bool" or "string".
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str, ...]
    low: float
    high: float
    kind: str


def input_specs(model: Path | str) -> tuple[InputSpec, ...]:
    """Read the inputs of a model file with their ranges, without loading external data.

    Raises:
        ModelError: when the file is no ONNX model, or an input is no tensor of known rank.
    """
    graph = _graph(model)
    uses = GraphUses(graph)
    constants = {tensor.name for tensor in graph.initializer}
    specs = []
    for value in graph.input:
        if value.name in constants:
            continue
        dtype, shape = _tensor_type(model, value)
        kind, low, high = value_range(value.name, dtype, tuple(uses.uses(value.name)))
        specs.append(InputSpec(value.name, dtype, shape, low, high, kind))
    return tuple(specs)


def dynamic_dims(specs: Sequence[InputSpec]) -> tuple[str, ...]:
    """Names of the dynamic dimensions that can be chosen, in order of appearance."""
    names: dict[str, None] = {}
    for spec in specs:
        for dim in spec.shape:
            if isinstance(dim, str):
                names.update(dict.fromkeys(_free_names(dim)))
    return tuple(names)


def draw_inputs(
    specs: Sequence[InputSpec], *, seed: int, dims: Mapping[str, int] | None = None, batch: int | None = None
) -> dict[str, np.ndarray]:
    """Draw one array for each input, within its range.

    Args:
        specs: what `input_specs` read.
        seed: equal seeds give equal arrays.
        dims: sizes for dynamic dimensions, by name or as "input.axis"; the others get modest defaults.
        batch: size for axis 0 of every input where it is dynamic, unless `dims` says otherwise.

    Raises:
        UsageError: when `dims` names no dynamic dimension, or a size is below one.
    """
    sizes = resolve_dims(specs, dims=dims, batch=batch)
    shapes = {spec.name: tuple(_size(dim, sizes) for dim in spec.shape) for spec in specs}
    longest = max((shape[1] for shape in shapes.values() if len(shape) > 1), default=SEQUENCE_SIZE)
    drawn = {}
    for spec in specs:
        shape, key = shapes[spec.name], zlib.crc32(spec.name.encode())
        if spec.kind == "bool" and math.prod(shape) == 1:
            drawn[spec.name] = _switch(shape, seed, key)
        else:
            drawn[spec.name] = _draw(spec, shape, np.random.default_rng([seed, key]), longest)
    return drawn


def given_inputs(specs: Sequence[InputSpec], given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Pick a model's inputs from those given, in the type that it takes.

    Raises:
        UsageError: when one is missing, of another shape, or not of numbers where numbers are wanted.
    """
    found = {}
    for spec in specs:
        if spec.name not in given:
            raise UsageError("no array was given for this input", where=spec.name, hint="name all inputs")
        array = np.asarray(given[spec.name])
        if not fits(spec, array):
            raise UsageError(f"given {array.shape}, the model takes {spec.shape}", where=spec.name, hint="")
        try:
            found[spec.name] = array.astype(spec.dtype, copy=False)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error), where=spec.name, hint=f"wanted {spec.dtype}") from error
    return found


def fits(spec: InputSpec, array: np.ndarray) -> bool:
    """Whether an array has the axes of an input, with its sizes where they are not dynamic."""
    return array.ndim == len(spec.shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, array.shape, strict=True)
    )


def resolve_dims(
    specs: Sequence[InputSpec], *, dims: Mapping[str, int] | None = None, batch: int | None = None
) -> dict[str, int]:
    """Choose a size for every dynamic dimension.

    Raises:
        UsageError: when `dims` names no dynamic dimension, or a size is below one.
    """
    given = _by_name(specs, dims or {})
    if batch is not None and batch < 1:
        raise UsageError(f"a batch of {batch} cannot be drawn", where="batch", hint="give 1 or more")
    sizes = {}
    for name in dynamic_dims(specs):
        if name in given:
            sizes[name] = given[name]
        elif batch is not None and any(spec.shape[:1] == (name,) for spec in specs):
            sizes[name] = batch
        else:
            sizes[name] = _default_size(specs, name)
    return sizes


def _graph(path: Path | str) -> onnx.GraphProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"cannot read the model: {error.strerror or error}", where=str(path)) from error
    except DecodeError as error:
        raise ModelError(
            "not an ONNX model, or truncated", where=str(path), hint="export it again"
        ) from error
    if not model.graph.output:
        raise ModelError("not an ONNX model: it has no outputs", where=str(path), hint="export it again")
    return model.graph


def _tensor_type(path: Path | str, value: onnx.ValueInfoProto) -> tuple[np.dtype, tuple[int | str, ...]]:
    where = f"{path}, input {value.name!r}"
    if not value.type.HasField("tensor_type") or not value.type.tensor_type.elem_type:
        raise ModelError("the input is no tensor", where=where, hint="only tensors can be drawn")
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ModelError(
            "the input declares no shape", where=where, hint="declare one, with names where it is dynamic"
        )
    shape = tuple(
        dim.dim_value
        if dim.HasField("dim_value") and dim.dim_value >= 0
        else (dim.dim_param or f"{value.name}.{axis}")
        for axis, dim in enumerate(tensor.shape.dim)
    )
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape


def _by_name(specs: Sequence[InputSpec], dims: Mapping[str, int]) -> dict[str, int]:
    """Sizes by dimension name, "input.axis" translated."""
    places = {
        f"{s.name}.{axis}": dim for s in specs for axis, dim in enumerate(s.shape) if isinstance(dim, str)
    }
    known = set(dynamic_dims(specs))
    given = {}
    for name, size in dims.items():
        target = name if name in known else places.get(name)
        if target not in known:
            raise UsageError(
                "no dynamic dimension has this name",
                where=name,
                hint=f"there are: {', '.join(sorted(known)) or 'none'}",
            )
        if size < 1:
            raise UsageError(f"a size of {size} cannot be drawn", where=name, hint="give 1 or more")
        given[target] = size
    return given


def _default_size(specs: Sequence[InputSpec], name: str) -> int:
    places = [(spec, axis) for spec in specs for axis, dim in enumerate(spec.shape) if dim == name]
    if "batch" in name.lower() or (places and all(axis == 0 for _, axis in places)):
        return LEADING_SIZE
    if any(len(spec.shape) >= 4 and axis >= 2 and spec.kind == "float" for spec, axis in places):
        return SPATIAL_SIZE
    return SEQUENCE_SIZE


def _expression(dim: str) -> ast.expr | None:
    """The arithmetic in a dimension's name, such as `past + sequence`; None where it is only a name."""
    if not re.search(r"[+\-*/]", dim):
        return None
    try:
        tree = ast.parse(dim.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = [node for node in ast.walk(tree) if not isinstance(node, ast.expr_context | ast.operator)]
    allowed = all(
        isinstance(node, ast.Name)
        or (isinstance(node, ast.Constant) and isinstance(node.value, int))
        or (isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS)
        for node in nodes
    )
    return tree if allowed else None


def _free_names(dim: str) -> tuple[str, ...]:
    tree = _expression(dim)
    if tree is None:
        return (dim,)
    return tuple(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))


def _size(dim: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(dim, int):
        return dim
    tree = _expression(dim)
    return sizes[dim] if tree is None else max(_evaluate(tree, sizes), 0)


def _evaluate(tree: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(tree, ast.Name):
        return sizes[tree.id]
    if isinstance(tree, ast.BinOp):
        left, right = _evaluate(tree.left, sizes), _evaluate(tree.right, sizes)
        if isinstance(tree.op, ast.FloorDiv) and right == 0:
            return 0
        return int(_OPERATIONS[type(tree.op)](left, right))
    assert isinstance(tree, ast.Constant)
    return int(str(tree.value))


def _draw(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator, longest: int) -> np.ndarray:
    if spec.kind == "string":
        return rng.choice(np.array(["a", "b", "c", "d"], dtype=object), size=shape)
    if spec.kind == "mask":
        return _right_padded(shape, rng).astype(spec.dtype)
    if spec.kind == "bool":
        drawn = rng.random(shape) < 0.5
        drawn.reshape(-1)[:1] = True
        return drawn
    if spec.kind == "float":
        middle, spread = (spec.low + spec.high) / 2, (spec.high - spec.low) / 2
        return (rng.standard_normal(shape) * spread + middle).astype(spec.dtype)
    if spec.kind == "positive":
        return rng.uniform(spec.low, spec.high, shape).astype(spec.dtype)
    high = longest if math.isinf(spec.high) else int(spec.high)
    numbers = np.asarray(rng.integers(int(spec.low), high, size=shape, endpoint=True))
    if spec.kind == "length":
        numbers.reshape(-1)[:1] = high  # what packed a batch expects its longest row to fill it
    return numbers.astype(spec.dtype)


def _switch(shape: tuple[int, ...], seed: int, key: int) -> np.ndarray:
    """A condition: two seeds that follow each other, the first even, try both ways."""
    first = np.random.default_rng([seed // 2, key]).random() < 0.5
    return np.full(shape, bool(first) ^ bool(seed % 2))


def _right_padded(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Ones then zeros along the last axis, as padding leaves them; the first row has only ones."""
    if not shape:
        return np.ones(shape, dtype=bool)
    width = shape[-1]
    counts = np.asarray(rng.integers(max(width // 2, 1), max(width, 1), size=shape[:-1], endpoint=True))
    counts.reshape(-1)[:1] = width
    return np.asarray(np.arange(width) < counts[..., None])
