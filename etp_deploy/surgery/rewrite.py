"""Apply a plan's edits to a model: the only module that changes graphs beyond their shapes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.errors import PlanError
from etp_deploy.surgery.boundaries import name_apart, release_bodies, remove_unused, undeclare
from etp_deploy.surgery.copies import join_copies
from etp_deploy.surgery.effects import holds, moot, takes_all
from etp_deploy.surgery.fusions import put_together
from etp_deploy.surgery.projections import close_projections
from etp_deploy.surgery.resolve import constant
from etp_deploy.surgery.statements.base import (
    AddVector,
    Affine,
    Bypass,
    Edit,
    FreeShape,
    GatherInput,
    PickInput,
    SetAttribute,
    SetInput,
    SetShape,
    SetSlice,
    SliceInput,
    TakeEntries,
    array_of,
    new_target,
    taken,
)
from etp_deploy.surgery.stored import pack, set_stored, stored
from etp_deploy.tensors import deferred, unshared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etp_deploy.surgery.shapes import Size


class Rewriter:
    """Applies edits to a graph and the bodies in it; cuts that come out equal are one initializer.

    Also those of several initializers: exporters write a weight that a model uses twice as two equal ones. All
    initializers are the main graph's: bodies read them from there.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._takes: dict[tuple[ir.Value, bytes], ir.Value] = {}
        self._cut: dict[bytes, ir.Value] = {}
        self.wanted: dict[ir.Value, str] = {}
        # of a tensor that something was put behind: what readers see instead
        self._behind: dict[ir.Value, ir.Value] = {}

    def apply(self, edits: Sequence[tuple[ir.Node, tuple[Edit, ...]]]) -> None:
        """Apply all edits; vectors to add come last, since they may join an initializer that was cut."""
        for node, changes in edits:
            for change in changes:
                if not isinstance(change, AddVector | Affine | FreeShape | Bypass):
                    self._apply(node, change)
        for node, changes in edits:
            for change in changes:
                if isinstance(change, AddVector):
                    self._add_vector(node, change)
                elif isinstance(change, Affine):
                    self._affine(node, change)
        for node, changes in edits:
            if Bypass() in changes:
                self._leave_out(node)
        self._free_shapes(edits)

    def _leave_out(self, node: ir.Node) -> None:
        source, out = node.inputs[0], node.outputs[0]
        if source is not None and not out.is_graph_output():
            out.replace_all_uses_with(source)
            graph_of(node).remove(node, safe=True)

    def _free_shapes(self, edits: Sequence[tuple[ir.Node, tuple[Edit, ...]]]) -> None:
        """Forget what bodies declare and is no longer so; last, since what is added asks for ranks."""
        freed = (change for _, changes in edits for change in changes if isinstance(change, FreeShape))
        for change in freed:
            value: ir.Value | None = change.value
            while value is not None:
                value.shape = None
                value = self._behind.get(value)

    def _apply(self, node: ir.Node, edit: Edit) -> None:
        if isinstance(edit, SetAttribute | SetShape | SetSlice):
            self._change_node(node, edit)
        elif not self._take_stored(node, edit):
            self._change_input(node, edit)

    def _change_input(self, node: ir.Node, edit: Edit) -> None:
        match edit:
            case SetInput(index, array):
                self._set_input(node, index, array)
            case SliceInput(index, takes):
                self._slice_input(node, index, takes)
            case PickInput(index, takes):
                self._pick_input(node, index, takes)
            case GatherInput(index, split, indices, merged):
                array = self._array(node, index).reshape(split)[indices].reshape(merged)
                self._set_input(node, index, array)
            case TakeEntries():
                self._take_entries(node, edit)
            case _:
                raise PlanError(f"an edit of an unknown kind: {type(edit).__name__}")

    def _change_node(self, node: ir.Node, edit: SetAttribute | SetShape | SetSlice) -> None:
        match edit:
            case SetAttribute(name, None):
                node.attributes.pop(name, None)
            case SetAttribute(name, (int() | float() | tuple()) as value):
                node.attributes[name] = _attribute(name, value)
            case SetShape():
                self._set_shape(node, edit)
            case SetSlice():
                self._set_slice(node, edit)

    def _take_entries(self, node: ir.Node, edit: TakeEntries) -> None:
        array = self._array(node, edit.index)
        cut = array.reshape(-1)[edit.positions]
        if edit.added is not None:
            cut = (cut.astype(np.float64) + edit.added).astype(array.dtype)
        self._set_input(node, edit.index, cut)

    def _take_stored(self, node: ir.Node, edit: Edit) -> bool:
        """Cut a weight in the form in which it is stored; say whether there is one that holds the result."""
        index: int = getattr(edit, "index", len(node.inputs))
        value = node.inputs[index] if index < len(node.inputs) else None
        form = stored(value)
        if value is None or form is None:
            return False
        if moot(node, edit):
            return True
        positions = taken(edit, self._array(node, index).shape)
        cut = None if positions is None else form.take(positions)
        if (
            isinstance(edit, TakeEntries)
            and edit.added is not None
            and edit.slack is not None
            and cut is not None
        ):
            cut = cut.plus(edit.added, edit.slack)
        if cut is None:
            return False
        fresh = self.shared(value.name or "", cut.values(), stored=value.name or "stored")
        set_stored(fresh, cut)
        node.replace_input_with(index, fresh)
        return True

    def _array(self, node: ir.Node, index: int) -> np.ndarray:
        array = array_of(node.inputs[index])
        assert array is not None
        return array

    def _set_input(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        old = node.inputs[index] if index < len(node.inputs) else None
        name = old.name if old is not None and old.name else f"{node.outputs[0].name}_{index}"
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        kept = old if holds(old, array) else None
        node.replace_input_with(index, self.shared(name, array, kept=kept))

    def _named(self, tensor: np.ndarray | ir.TensorProtocol, name: str) -> ir.Value:
        """Add an initializer that takes over a name as soon as that is free."""
        value = constant(self.graph, tensor, name)
        self.wanted[value] = name
        return value

    def shared(
        self, name: str, array: np.ndarray, *, stored: str = "", kept: ir.Value | None = None
    ) -> ir.Value:
        """Return an initializer with this content, one for all nodes whose cuts come out equal.

        Args:
            name: what it should be called.
            array: the content.
            stored: of a weight that is stored in another form, what tells it from those that are not.
            kept: an initializer that holds this content already, and serves where no other does yet.
        """
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        digest = hashlib.sha256(f"{array.dtype} {array.shape} {stored}".encode() + content.data).digest()
        if digest not in self._cut:
            self._cut[digest] = self._named(array, name) if kept is None else kept
        return self._cut[digest]

    def _slice_input(self, node: ir.Node, index: int, takes: tuple[tuple[int, np.ndarray], ...]) -> None:
        old = node.inputs[index]
        assert old is not None
        lines = b"".join(bytes([axis]) + np.ascontiguousarray(line).tobytes() for axis, line in takes)
        if (old, lines) not in self._takes:
            name = old.name or f"{node.outputs[0].name}_{index}"
            self._takes[old, lines] = self._taken(old, takes, name)
        node.replace_input_with(index, self._takes[old, lines])

    def _pick_input(self, node: ir.Node, index: int, takes: tuple[tuple[int, np.ndarray], ...]) -> None:
        """Gather from an initializer, which the runtime does once when it loads the model."""
        value = node.inputs[index]
        assert value is not None
        for axis, line in takes:
            places = self.shared(f"{value.name}_picked", line.astype(np.int64))
            picked = ir.node("Gather", [value, places], {"axis": axis})
            out = picked.outputs[0]
            out.name, out.type = f"{value.name}_{axis}_for_{node.outputs[0].name}", value.type
            graph_of(node).insert_before(node, picked)
            value = out
        node.replace_input_with(index, value)

    def _taken(self, old: ir.Value, takes: tuple[tuple[int, np.ndarray], ...], name: str) -> ir.Value:
        """Add an initializer that is cut when it is written, so that no two cuts are in memory at once."""
        source = old.const_value
        assert source is not None
        shape = list(source.shape.numpy())
        for axis, line in takes:
            shape[axis] = line.size

        def cut() -> np.ndarray:
            array = unshared(source).numpy()
            for axis, line in sorted(takes, key=lambda take: take[1].size / max(array.shape[take[0]], 1)):
                array = np.take(array, line, axis=axis)
            return array

        kept = old if takes_all(old, takes) else None
        tensor = deferred(cut, source.dtype, ir.Shape(shape), name)
        if isinstance(tensor, ir.LazyTensor):
            return self._named(tensor, name) if kept is None else kept
        return self.shared(name, tensor.numpy(), kept=kept)

    def _set_shape(self, node: ir.Node, edit: SetShape) -> None:
        index, sizes = edit.index, edit.sizes
        target = node.inputs[index]
        assert target is not None
        literal = array_of(target)
        if literal is not None:
            changed = new_target(literal, edit)
            if changed is None:
                raise PlanError("a target shape has more than one open entry", where=node.name or "")
            self._set_input(node, index, changed)
            return
        concat = target.producer()
        if concat is None or concat.op_type != "Concat" or len(concat.inputs) != len(sizes):
            raise PlanError(
                "a target shape is computed in a way that cannot be changed", where=node.name or ""
            )
        parts = [
            part if size == old else self._set_entry(node, part, size, old, f"{target.name}_{position}")
            for position, (part, (size, old)) in enumerate(zip(concat.inputs, sizes, strict=True))
        ]
        fresh = ir.node("Concat", parts, {"axis": 0})
        fresh.outputs[0].name = f"{target.name}_{node.outputs[0].name}"
        fresh.outputs[0].type, fresh.outputs[0].shape = target.type, target.shape
        graph_of(node).insert_before(node, fresh)
        node.replace_input_with(index, fresh.outputs[0])

    def _set_entry(
        self, node: ir.Node, part: ir.Value | None, size: Size, old: Size, name: str
    ) -> ir.Value | None:
        """Return what stands for a size that changed: a number, or a computed one's share that stays."""
        if size.static is not None:
            return constant(self.graph, np.array([size.coefficient], np.int64), name)
        if array_of(part) is not None:
            return part  # -1 or 0, which the runtime works out
        for operator, number in (("Div", old.coefficient), ("Mul", size.coefficient)):
            operand = constant(self.graph, np.array([number], np.int64), f"{name}_{number}")
            made = ir.node(operator, [part, operand])
            part = made.outputs[0]
            part.name = f"{name}_{node.outputs[0].name}_{operator}"
            part.type, part.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
            graph_of(node).insert_before(node, made)
        return part

    def _set_slice(self, node: ir.Node, edit: SetSlice) -> None:
        starts, stops = self._array(node, 1).copy(), self._array(node, 2).copy()
        axes = (
            self._array(node, 3)
            if len(node.inputs) > 3 and node.inputs[3] is not None
            else np.arange(len(starts))
        )
        rank = len(node.outputs[0].shape or ())
        place = [int(axis) % rank for axis in axes].index(edit.axis)
        starts[place], stops[place] = edit.start, edit.stop
        self._set_input(node, 1, starts)
        self._set_input(node, 2, stops)
        if len(node.inputs) > 4 and node.inputs[4] is not None:
            steps = self._array(node, 4).copy()
            steps[place] = edit.step
            self._set_input(node, 4, steps)

    def _add_vector(self, node: ir.Node, edit: AddVector) -> None:
        """Add into the bias that follows (a Linear is MatMul and Add), or behind the node where there is none."""
        out = node.outputs[0]
        rank = len(out.shape or ())
        found = _bias_behind(out, edit.vector.shape) if edit.axis == rank - 1 else None
        if found is not None:
            user, place = found
            other = self._array(user, place)
            total = (other.astype(np.float64) + edit.vector.astype(np.float64)).astype(other.dtype)
            self._set_input(user, place, total)
            return
        shape = [1] * (rank - edit.axis)
        shape[0] = -1
        vector = self.shared(f"{out.name}_constant", edit.vector.reshape(shape))
        self._insert_after(out, "Add", vector, "constant")

    def _affine(self, node: ir.Node, edit: Affine) -> None:
        out = node.outputs[0]
        dtype = np.dtype(np.float32) if out.dtype is None else out.dtype.numpy()
        if edit.offset is not None and edit.scale == 1.0 and self._joined(out, edit.offset):
            return
        if edit.offset is not None:  # added second, so inserted first
            array = edit.offset.astype(dtype)
            if (array == array.flat[0]).all():
                array = array.reshape(-1)[:1].reshape((1,) * array.ndim)
            offset = constant(self.graph, array, f"{out.name}_offset")
            self._insert_after(out, "Add", offset, "offset")
        if edit.scale != 1.0:
            scale = constant(self.graph, np.array(edit.scale, dtype), f"{out.name}_scale")
            self._insert_after(out, "Mul", scale, "scale")

    def _joined(self, out: ir.Value, offset: np.ndarray) -> bool:
        """Add an array to the constant that alone is added to a tensor; say if there is one of its shape."""
        users = list(out.uses())
        if len(users) != 1 or out.is_graph_output() or users[0][0].op_type != "Add":
            return False
        user, place = users[0]
        other = array_of(user.inputs[1 - place])
        if other is None or _trimmed(other.shape) != _trimmed(offset.shape):
            return False
        total = other.astype(np.float64) + offset.reshape(other.shape).astype(np.float64)
        self._set_input(user, 1 - place, total.astype(other.dtype))
        return True

    def _insert_after(self, out: ir.Value, operator: str, operand: ir.Value, what: str) -> None:
        """Put an operator with a constant behind a tensor, in front of all that reads it."""
        producer = out.producer()
        assert producer is not None
        users = list(out.uses())
        added = ir.node(operator, [out, operand])
        fresh = added.outputs[0]
        fresh.type, fresh.shape = out.type, out.shape
        self._behind[out] = fresh
        graph = graph_of(producer)
        places = [place for place, value in enumerate(graph.outputs) if value is out]
        if places:
            fresh.name, out.name = out.name, f"{out.name}_without_{what}"
        else:
            fresh.name = f"{out.name}_with_{what}"
        for user, place in users:
            user.replace_input_with(place, fresh)
        for place in places:
            graph.outputs[place] = fresh
        graph.insert_after(producer, added)


def _bias_behind(value: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Node, int] | None:
    """Return the sum that takes a vector of constants, and where; other sums may lie between (a residual's)."""
    while True:
        users = list(value.uses())
        if len(users) != 1 or value.is_graph_output():
            return None
        user, place = users[0]
        if user.op_type != "Add" or user.domain != "":
            return None
        other = array_of(user.inputs[1 - place])
        if other is not None and other.shape == shape:
            return user, 1 - place
        value = user.outputs[0]


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without the axes of size 1 in front, which broadcasting adds anyway."""
    return () if not shape else shape if shape[0] != 1 else _trimmed(shape[1:])


def graph_of(node: ir.Node) -> ir.Graph:
    """Return the graph, main or body, that a node stands in."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _attribute(name: str, value: float | tuple[int, ...]) -> ir.Attr:
    if isinstance(value, tuple):
        return ir.AttrInt64s(name, value)
    return ir.AttrInt64(name, value) if isinstance(value, int) else ir.AttrFloat32(name, value)


def rewrite(model: ir.Model, edits: Sequence[tuple[ir.Node, tuple[Edit, ...]]]) -> None:
    """Apply edits to a prepared model, in place, and drop what nothing uses any more."""
    rewriter = Rewriter(model.graph)
    rewriter.apply(edits)
    close_projections(model.graph, rewriter.shared)
    put_together(model.graph)
    join_copies(model.graph)
    for value in (value for node in model.graph.all_nodes() for value in node.outputs):
        if not value.is_graph_output():
            value.shape = None
    undeclare(model.graph)
    release_bodies(model.graph)
    remove_unused(model)
    rewriter.wanted.update(pack(model.graph, constant, rewriter.wanted))
    for value, name in rewriter.wanted.items():
        if value.is_initializer() and name not in model.graph.initializers:
            value.name = name
    name_apart(model)


def restore_interface(model: ir.Model, original: ir.Model) -> None:
    """Give the inputs and outputs back the shapes that the original declares (their sizes never change)."""
    declared = {value.name: value for value in (*original.graph.inputs, *original.graph.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape, value.type = declared[value.name].shape, declared[value.name].type
