"""Bodies (of If, Loop, Scan) made ready: names, operator sets, shapes that hold each time a body runs.

The shape of a loop's state is that of its first value only if the body keeps it. Inference assumes so; here that
is checked, and where it does not hold the shape is given up and inferred again.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx_shape_inference import SYM_DATA_KEY, registry

from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.statements.body import bodies
from etp_deploy.tensors import unshared

if TYPE_CHECKING:
    from collections.abc import Iterator

    from onnx_shape_inference import ShapeInferenceContext

# of a state: the axes whose size the body changes; of a node: whether its body changes a rank
_FREE, _UNKNOWN = "etp_deploy.free", "etp_deploy.unknown"
# of an Identity: that it stands between an initializer and a body only for the analysis
_ENTRANCE = "etp_deploy.entrance"
_BOUND = {"Loop", "Scan"}
_fresh = count()

# names and operator sets


def name_apart(model: ir.Model) -> None:
    """Give each tensor a name of its own: one that a body and the main graph share would hide the outer one."""
    if has_bodies(model):
        passes.NameFixPass()(model)


def has_bodies(model: ir.Model) -> bool:
    """Return whether any node has a body."""
    return any(True for _ in model.graph.subgraphs())


def remove_unused(model: ir.Model) -> bool:
    """Remove nodes and initializers that nothing uses, and what only bodies of removed nodes used; say if any were."""
    removed = passes.RemoveUnusedNodesPass()(model).modified
    while _detach(model):
        passes.RemoveUnusedNodesPass()(model)
    return removed


def without_unused(model: ir.Model) -> ir.Model:
    """Return the model without nodes and initializers that nothing uses; the model itself where there are none."""
    trimmed = model.clone()
    return trimmed if remove_unused(trimmed) else model


def _detach(model: ir.Model) -> bool:
    """Let nodes that stand in no graph of the model read nothing; say whether there were any."""
    graphs = list(model.graphs())
    nodes = set(model.graph.all_nodes())
    values = [value for graph in graphs for value in (*graph.inputs, *graph.initializers.values())]
    values += [value for node in nodes for value in node.outputs]
    gone = [use for value in values for use in value.uses() if use[0] not in nodes]
    for node, index in gone:
        node.replace_input_with(index, None)
    return bool(gone)


def own_initializers(model: ir.Model) -> None:
    """Give bodies' initializers tensors of their own: renaming a value renames its tensor, another model's too."""
    for body in model.graph.subgraphs():
        for value in body.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = unshared(tensor)
            elif tensor is not None:
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.LazyTensor(
                    partial(_itself, tensor), tensor.dtype, shape, name=value.name
                )


def _itself(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor


def open_returns(model: ir.Model) -> None:
    """Let an Identity make what a body returns unchanged from a constant, so that it can be cut."""
    for body in list(model.graph.subgraphs()):
        for place, value in enumerate(list(body.outputs)):
            producer = value.producer()
            constant = producer is not None and producer.op_type == "Constant"
            if constant or (value.is_initializer() and not value.is_graph_input()):
                added = _identity(value, f"{value.name}_returned_{place}")
                body.append(added)
                body.outputs[place] = added.outputs[0]


def open_bodies(model: ir.Model) -> None:
    """Let bodies be read as the main graph is: its operator sets, initializers given to them behind an Identity."""
    for body in model.graph.subgraphs():
        body.opset_imports.update(model.graph.opset_imports)
    for node in list(model.graph.all_nodes()):
        for index, value in enumerate(node.inputs if bodies(node) else ()):
            if value is not None and is_parameter(value) and _may_shrink(value):
                _enter(node, index, value)


def open_copies(graph: ir.Graph) -> None:
    """Give initializers to what repeats them behind an Identity: that is read as computed, and its channels can go."""
    for node in list(graph.all_nodes()):
        value = node.inputs[0] if node.op_type in {"Expand", "Tile"} and node.domain == "" else None
        if value is not None and is_parameter(value) and _may_shrink(value):
            _enter(node, 0, value)


def _enter(node: ir.Node, index: int, value: ir.Value) -> None:
    entrance = _identity(value, f"{value.name}_into_{node.name or node.op_type}_{index}")
    entrance.meta[_ENTRANCE] = True
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_before(node, entrance)
    node.replace_input_with(index, entrance.outputs[0])


def _may_shrink(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size > 1 and tensor.dtype.is_floating_point()


def _identity(value: ir.Value, name: str) -> ir.Node:
    tensor = ir.convenience.get_const_tensor(value)
    node = ir.node("Identity", [value], name=name)
    out = node.outputs[0]
    out.name = name
    out.type = value.type if tensor is None else ir.TensorType(tensor.dtype)
    return node


def release_bodies(graph: ir.Graph) -> None:
    """Take out again what stands between initializers and bodies, or copies."""
    for node in list(graph.all_nodes()):
        if node.op_type == "Identity" and node.meta.get(_ENTRANCE):
            initializer = node.inputs[0]
            assert initializer is not None
            node.outputs[0].replace_all_uses_with(initializer)


# shapes

_UNDECLARED = "etp_deploy.undeclared"


def note_undeclared(model: ir.Model) -> None:
    """Remember which inputs and outputs of bodies declare no shape."""
    for body in model.graph.subgraphs():
        for value in (*body.inputs, *body.outputs):
            if value.shape is None:
                value.meta[_UNDECLARED] = True


def undeclare(graph: ir.Graph) -> None:
    """Take back shapes that bodies did not declare: the runtime's inference would hold its kernels against them."""
    for body in graph.subgraphs():
        for value in (*body.inputs, *body.outputs):
            if value.meta.get(_UNDECLARED):
                value.shape = None


def forget_shapes(model: ir.Model) -> None:
    """Drop the shapes of all that nodes make; the main graph's outputs keep what they declare."""
    declared = set(model.graph.outputs)
    returned = {value for body in model.graph.subgraphs() for value in body.outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.pop(SYM_DATA_KEY, None)
            if value not in declared:
                value.shape = None
                if value not in returned:
                    value.type = None


def forget_body_inputs(model: ir.Model) -> None:
    """Drop what bodies declare of their inputs where inference binds it to the node's; set names apart elsewhere.

    A symbol's name means one size in a body and maybe another outside.
    """
    for node in model.graph.all_nodes():
        for body in bodies(node):
            for value in body.inputs:
                if value.shape is None or value.shape.is_static():
                    continue
                bound = node.op_type in _BOUND and node.domain in {"", "ai.onnx"}
                value.shape = (
                    None
                    if bound
                    else ir.Shape(
                        [dim if isinstance(dim, int) else _own_symbol(value) for dim in value.shape]
                    )
                )


def _own_symbol(value: ir.Value) -> str:
    return re.sub(r"\W", "_", f"in_{value.name}_{next(_fresh)}")


def states(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Yield a Loop's states: first value, the body's input, the body's output."""
    if node.op_type == "Loop" and node.domain in {"", "ai.onnx"}:
        (body,) = bodies(node)
        for source, inner, result in zip(node.inputs[2:], body.inputs[2:], body.outputs[1:], strict=False):
            if source is not None:
                yield source, inner, result


def give_up_all(model: ir.Model) -> bool:
    """Assume nothing of any loop's states but their ranks; say whether more was assumed."""
    changed = False
    for node in model.graph.all_nodes():
        for source, inner, _ in states(node):
            shape = inner.shape if source.shape is None else source.shape
            free = inner.meta.setdefault(_FREE, set())
            if shape is not None and len(free) < len(shape):
                free.update(range(len(shape)))
                inner.shape = ir.Shape([_own_symbol(inner) for _ in shape])
                changed = True
    if changed:
        forget_shapes(model)
    return changed


def rebind(model: ir.Model) -> bool:
    """Compare what inference assumed of loops' states with what bodies return; say if it must be done again."""
    changed = False
    for node in model.graph.all_nodes():
        if node.meta.get(_UNKNOWN):
            continue
        for source, inner, result in states(node):
            changed |= _compare(node, source, inner, result)
    if not changed:
        return False
    forget_shapes(model)
    for node in model.graph.all_nodes():
        for _, inner, _ in states(node):
            free = inner.meta.get(_FREE, set())
            if inner.shape is not None and free:
                inner.shape = ir.Shape(
                    [_own_symbol(inner) if axis in free else dim for axis, dim in enumerate(inner.shape)]
                )
    return True


def _compare(node: ir.Node, source: ir.Value, inner: ir.Value, result: ir.Value) -> bool:
    """Note the axes of a state that the body changes; say if there are new ones."""
    if inner.shape is None or not isinstance(inner.type, ir.TensorType):
        return False
    ranks = {None if value.shape is None else len(value.shape) for value in (inner, result)}
    if len(ranks) > 1 or (source.shape is not None and len(source.shape) not in ranks):
        node.meta[_UNKNOWN] = True
        return True
    assert result.shape is not None
    free: set[int] = inner.meta.setdefault(_FREE, set())
    known = len(free)
    for axis, dim in enumerate(inner.shape):
        first = dim if source.shape is None else source.shape[axis]
        declared = isinstance(dim, int) and not isinstance(first, int)
        if not _same(dim, result.shape[axis]) or not (declared or _same(dim, first)):
            free.add(axis)
    return len(free) > known


def _same(one: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    return one.value is not None and one.value == other.value


def hide_unknown(model: ir.Model) -> None:
    """Drop the shapes inside bodies of which nothing could be assumed: what inference says there may be wrong."""
    for node in model.graph.all_nodes():
        if not node.meta.get(_UNKNOWN):
            continue
        for body in bodies(node):
            for value in (*body.inputs[2:], *(value for item in body.all_nodes() for value in item.outputs)):
                value.shape = None
                value.metadata_props.pop(SYM_DATA_KEY, None)


def _infer_loop(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Infer a Loop's outputs: a state may be the first one still, and fewer rounds than the most may be run."""
    (body,) = bodies(node)
    sources = node.inputs[2:]
    for index, out in enumerate(node.outputs):
        result = body.outputs[index + 1]
        if not isinstance(result.type, ir.TensorType):
            if result.type is not None:
                context.set_type(out, result.type)
            continue
        shape = None if node.meta.get(_UNKNOWN) else result.shape
        if index < len(sources):
            source = sources[index]
            shape = _either(context, shape, None if source is None else source.shape)
        elif shape is not None:
            shape = ir.Shape([_rounds(context, node, body), *shape.dims])
        context.set_shape_and_dtype(out, shape, result.dtype)


def _either(context: ShapeInferenceContext, one: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    if one is None or other is None or len(one) != len(other):
        return None
    return ir.Shape(
        [a if _same(a, b) else context.new_symbolic_dim() for a, b in zip(one, other, strict=True)]
    )


def _rounds(context: ShapeInferenceContext, node: ir.Node, body: ir.Graph) -> int | ir.SymbolicDim:
    """Return how often a body runs: the most that is allowed, if nothing stops it before."""
    most = None if node.inputs[0] is None else context.get_symbolic_value(node.inputs[0])
    starts = node.inputs[1] is None or _always(node.inputs[1], body)
    if most is not None and len(most) == 1 and starts and _always(body.outputs[0], body):
        known: int | ir.SymbolicDim = most[0]
        if not isinstance(known, int) or known >= 0:
            return known
    symbol: ir.SymbolicDim = context.new_symbolic_dim()
    return symbol


def _always(value: ir.Value | None, body: ir.Graph) -> bool:
    """Return whether a condition is the constant True, or what the body was given."""
    while value is not None:
        node = value.producer()
        if value is body.inputs[1]:
            return True
        if node is None or node.op_type != "Identity":
            tensor = ir.convenience.get_const_tensor(value)
            return tensor is not None and bool(np.all(tensor.numpy()))
        value = node.inputs[0]
    return False


# the library registers its own for version 1, whenever it is first used
registry.register("", "Loop", since_version=2)(_infer_loop)
