"""Weights that a model stores in another form than its operators read: quantised, narrower, transposed.

`DequantizeLinear(q, scale, zero)` of three initializers is a weight like any other: its zeros are exact where q is
the zero point. `unpack` puts an initializer with the values in the place of such nodes, so that every statement
reads it as it reads any weight, and remembers the form; a cut takes the same entries of what is stored, and `pack`
writes the nodes again. A value that has no exact form any more becomes a plain initializer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.evaluate import evaluate
from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.state import coordinates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_KEY = "etp_deploy.stored"
# the Microsoft operators are the standard ones for more types at older opsets
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
_NARROW = 16
_MOVES = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})
# integers that numpy and the runtime exchange
_EXCHANGED = frozenset({np.dtype(kind) for kind in ("int8", "uint8", "int16", "uint16")})


def is_weight_type(dtype: ir.DataType | None) -> bool:
    """Return whether initializers of a type are weights: floating-point numbers, or integers too narrow for indices."""
    return dtype is not None and (
        dtype.is_floating_point() or (dtype.is_integer() and dtype.bitwidth <= _NARROW)
    )


@dataclass(frozen=True)
class Step:
    """A node that makes a weight from what is stored, without its tensors."""

    operator: str
    domain: str
    attributes: tuple[ir.Attr, ...]
    name: str | None


@dataclass(frozen=True)
class Stored:
    """The form in which a weight is stored.

    Attributes:
        tensors: the first step's inputs: entries, and for DequantizeLinear scale and zero point (None if omitted).
        names: their names.
        steps: the nodes from there to the weight.
        axis: DequantizeLinear's axis.
        block: how many entries along it share a scale; 0 where each index has its own, None where all share one.
    """

    tensors: tuple[np.ndarray | None, ...]
    names: tuple[str, ...]
    steps: tuple[Step, ...]
    axis: int = 0
    block: int | None = None

    @property
    def quantized(self) -> bool:
        """Whether entries stand for multiples of a scale."""
        return self.steps[0].operator == "DequantizeLinear"

    @property
    def entries(self) -> np.ndarray:
        """The stored entries."""
        entries = self.tensors[0]
        assert entries is not None
        return entries

    def values(self) -> np.ndarray:
        """Return the weight, as the runtime computes it: in float32, rounded once to the type of the steps."""
        array = self.entries
        for step in self.steps:
            if step.operator == "Transpose":
                array = np.transpose(array, _permutation(step, array.ndim))
            elif step.operator == "Cast":
                array = array.astype(_target(step))
            else:
                array = self._dequantized()
        return np.ascontiguousarray(array)

    def _dequantized(self) -> np.ndarray:
        scale, zero = self.tensors[1], self.tensors[2]
        assert scale is not None
        array = self.entries
        if array.dtype.kind in "iu" or array.dtype in (ml_dtypes.int4, ml_dtypes.uint4):
            array = array.astype(np.int64)
        else:
            array = array.astype(np.float32)
        if zero is not None:
            array = array - self.spread(zero).astype(array.dtype)
        return (array.astype(np.float32) * self.spread(scale).astype(np.float32)).astype(scale.dtype)

    def spread(self, parameter: np.ndarray) -> np.ndarray:
        """Give every entry its scale or zero point."""
        shape = self.entries.shape
        if self.block is None:
            return np.broadcast_to(parameter.reshape(()), shape)
        if self.block:
            repeated = np.repeat(parameter, self.block, axis=self.axis)
            return np.take(repeated, np.arange(shape[self.axis]), axis=self.axis)
        along = [1] * len(shape)
        along[self.axis] = -1
        return np.broadcast_to(parameter.reshape(along), shape)

    def take(self, positions: np.ndarray) -> Stored | None:
        """Return the form of these entries of the weight (flat, in the new shape); None where it has none."""
        for step in reversed(self.steps):
            if step.operator == "Transpose":
                positions = self._untransposed(positions, step)
        entries = self.entries.reshape(-1)[positions]
        if self.block is None:
            return replace(self, tensors=(entries, *self.tensors[1:]))
        scale = self.tensors[1]
        assert scale is not None
        wanted = self.spread(np.arange(scale.size).reshape(scale.shape)).reshape(-1)[positions]
        # one scale for each index or block along the axis, and along all other axes of a blocked weight
        along = np.arange(0, wanted.shape[self.axis], self.block or 1)
        kept = np.take(wanted, along, axis=self.axis)
        if not self.block:
            kept = np.moveaxis(kept, self.axis, 0).reshape(len(along), -1)[:, 0]
        parameters = tuple(None if item is None else item.reshape(-1)[kept] for item in self.tensors[1:])
        taken = replace(self, tensors=(entries, *parameters))
        return taken if np.array_equal(taken.spread(kept), wanted) else None

    def _untransposed(self, positions: np.ndarray, step: Step) -> np.ndarray:
        """Return positions in a transposed weight as positions in what was transposed."""
        permutation = _permutation(step, positions.ndim)
        inner = self.entries.shape
        found = coordinates(positions, tuple(inner[axis] for axis in permutation))
        flat = np.ravel_multi_index(
            tuple(found[permutation.index(axis)] for axis in range(len(inner))), inner
        )
        return np.transpose(flat, np.argsort(permutation))

    def block_along(self, axis: int) -> int:
        """Return how many neighbours along an axis of the weight share a scale; 1 where each has its own, or all."""
        at = self.axis
        for step in self.steps:
            if step.operator == "Transpose":
                at = _permutation(step, self.entries.ndim).index(at)
        return self.block if self.block and at == axis else 1

    def plus(self, added: np.ndarray, slack: np.ndarray) -> Stored | None:
        """Return the form of the weight with an array added, where it comes within the slack of one.

        Args:
            added: what to add.
            slack: how much rounding error the sum may have in floating point anyway.
        """
        scale, zero = self.tensors[1:] if self.quantized else (None, None)
        if len(self.steps) != 1 or scale is None or self.entries.dtype.kind not in "iu":
            return None
        if zero is not None and zero.any():
            return None
        each = self.spread(scale).astype(np.float64)
        with np.errstate(all="ignore"):
            moved = added / each
        if not np.isfinite(moved).all() or (np.abs(np.rint(moved) * each - added) > slack).any():
            return None
        total = self.entries.astype(np.int64) + np.rint(moved).astype(np.int64)
        limits = np.iinfo(self.entries.dtype)
        if total.min(initial=0) < limits.min or total.max(initial=0) > limits.max:
            return None
        return replace(self, tensors=(total.astype(self.entries.dtype), *self.tensors[1:]))


def stored(value: ir.Value | None) -> Stored | None:
    """Return the form in which an initializer of a prepared graph is stored; None for a plain one."""
    return None if value is None else value.meta.get(_KEY)


def set_stored(value: ir.Value, form: Stored) -> None:
    """Remember the form in which an initializer is stored."""
    value.meta[_KEY] = form


def unpack(graph: ir.Graph, constant: Callable[[ir.Graph, np.ndarray, str], ir.Value]) -> None:
    """Put an initializer in the place of nodes that make a weight from stored ones.

    Args:
        graph: changed in place; what it no longer uses stays.
        constant: adds an initializer.
    """
    for node in list(graph):
        out = node.outputs[0]
        if node.domain not in _DOMAINS or out.is_graph_output() or not all(map(_given, node.inputs)):
            continue
        if node.op_type == "QuantizeLinear" and len(node.outputs) == 1:
            arrays = [_array(value) for value in node.inputs]
            entries = evaluate(node, arrays)
            if entries is not None and entries.dtype in _EXCHANGED:
                out.replace_all_uses_with(constant(graph, entries, out.name or "quantized"))
                graph.remove(node, safe=True)
            continue
        if node.op_type in _MOVES and stored(node.inputs[0]) is None:
            _fold_move(graph, node, constant)
            continue
        form = _form(node)
        if form is not None:
            weight = constant(graph, form.values(), f"{out.name}")
            set_stored(weight, form)
            out.replace_all_uses_with(weight)
            graph.remove(node, safe=True)


def _fold_move(
    graph: ir.Graph, node: ir.Node, constant: Callable[[ir.Graph, np.ndarray, str], ir.Value]
) -> None:
    """Replace a weight that only this node moves by what it makes of it; that holds as many entries."""
    source, out = node.inputs[0], node.outputs[0]
    if source is None or len(source.uses()) > 1 or not is_weight_type(source.dtype):
        return
    moved = evaluate(node, [_array(value) for value in node.inputs])
    if moved is not None:
        out.replace_all_uses_with(constant(graph, moved, out.name or "moved"))
        graph.remove(node, safe=True)


def _given(value: ir.Value | None) -> bool:
    return value is None or (is_parameter(value) and value.const_value is not None)


def _array(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _form(node: ir.Node) -> Stored | None:
    """Return what a node makes of its initializers, as a form; None for a node of another kind."""
    source = node.inputs[0] if node.inputs else None
    step = Step(node.op_type, node.domain, tuple(node.attributes.values()), node.name)
    before = stored(source)
    if source is None or node.op_type not in {"DequantizeLinear", "Cast", "Transpose"}:
        return None
    if before is not None:
        return None if node.op_type == "DequantizeLinear" else replace(before, steps=(*before.steps, step))
    entries = _array(source)
    assert entries is not None
    if node.op_type == "DequantizeLinear":
        return _quantized(node, step)
    floating = source.dtype is not None and source.dtype.is_floating_point()
    if node.op_type == "Cast" and floating and _target(step) is not None:
        return Stored((entries,), (source.name or "",), (step,))
    return None


def _quantized(node: ir.Node, step: Step) -> Stored | None:
    tensors = tuple(_array(value) for value in (*node.inputs, None)[:3])
    names = tuple("" if value is None else value.name or "" for value in (*node.inputs, None)[:3])
    entries, scale, zero = tensors
    wide = node.attributes.get_int("output_dtype", 0)
    if entries is None or scale is None or scale.dtype.kind not in "fV" or wide:
        return None
    if zero is not None and zero.size != scale.size:
        return None
    axis = node.attributes.get_int("axis", 1)
    axis = axis + entries.ndim if axis < 0 else axis
    block = node.attributes.get_int("block_size", 0)
    if not block and scale.size == 1:
        return Stored(tensors, names, (step,))
    if not 0 <= axis < entries.ndim:
        return None
    shape = list(entries.shape)
    if block:
        shape[axis] = -(-shape[axis] // block)
    fits = scale.shape == (tuple(shape) if block else entries.shape[axis : axis + 1])
    return Stored(tensors, names, (step,), axis, block) if fits else None


def _permutation(step: Step, rank: int) -> list[int]:
    given = {item.name: item for item in step.attributes}.get("perm")
    return list(range(rank))[::-1] if given is None else list(given.as_ints())


def _target(step: Step) -> np.dtype | None:
    """Return the floating-point type that a Cast makes; None for any other."""
    kind = ir.DataType({item.name: item for item in step.attributes}["to"].as_int())
    return kind.numpy() if kind in _WEIGHT_TYPES else None


_WEIGHT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def pack(
    graph: ir.Graph, constant: Callable[[ir.Graph, np.ndarray, str], ir.Value], names: Mapping[ir.Value, str]
) -> dict[ir.Value, str]:
    """Write the nodes again that make weights from what is stored.

    Args:
        graph: changed in place.
        constant: adds an initializer.
        names: what weights should be called, where they are not called so yet.

    Returns:
        The names that the stored initializers take over as soon as these are free.
    """
    weights = [value for value in graph.initializers.values() if stored(value) is not None and value.uses()]
    wanted: dict[ir.Value, str] = {}
    known: dict[tuple[str, bytes], ir.Value] = {}
    taken: set[str] = set()
    for weight in weights:
        form, own = weight.meta[_KEY], weight.name or ""
        graph.initializers.pop(own)
        name = names.get(weight, own)
        inputs: list[ir.Value | None] = []
        for array, label in zip(form.tensors, form.names, strict=True):
            if array is None:
                continue
            key = (label, _digest(array))
            if key not in known:
                known[key] = constant(graph, array, label)
                wanted[known[key]] = label
            inputs.append(known[key])
        made = _written(graph, form.steps, inputs)
        made.type, made.shape = weight.type, weight.shape
        made.name = own if name in taken or name in graph.initializers else name
        taken.add(made.name)
        weight.replace_all_uses_with(made)
    return wanted


def _written(graph: ir.Graph, steps: Sequence[Step], inputs: Sequence[ir.Value | None]) -> ir.Value:
    """Insert the steps' nodes at the graph's beginning; return what the last one makes."""
    first = graph[0]
    for step in steps:
        node = ir.Node(step.domain, step.operator, inputs, step.attributes, name=step.name)
        graph.insert_before(first, node)
        inputs = [node.outputs[0]]
    return node.outputs[0]


def _digest(array: np.ndarray) -> bytes:
    content = np.ascontiguousarray(array)
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + content.tobytes()).digest()
