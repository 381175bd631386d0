"""Branches of residuals that are partly dead while the stream lives (`--partial-residuals`).

`stream + branch` keeps all channels that the stream does, those included that the branch adds nothing to. Written as
`stream + Pad(branch without them)` the branch loses them, for which this puts a Gather of its living channels and a
Pad behind it, in a model from which all else is removed already; the ordinary surgery shrinks what makes the branch
through the Gather, which is then nothing and goes.

The Pad costs a copy and breaks what the runtime fuses with the sum (Conv, Add and Relu), so this pays only where
channels are many and maps small; and only where what lives is one run of channels, which is what one Pad can place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from etp_deploy.errors import UsageError
from etp_deploy.surgery.analysis import read
from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.resolve import constant
from etp_deploy.surgery.rounds import merged_rows
from etp_deploy.surgery.shapes import is_parameter, single_label
from etp_deploy.surgery.statements.base import Bypass

if TYPE_CHECKING:
    from etp_deploy.surgery.analysis import Analysis, Fill
    from etp_deploy.surgery.plan import Layer, RemovalPlan
    from etp_deploy.surgery.state import Constant

# where the copy is less than what the branch's last convolution saves, as measured on ONNX Runtime's CPU kernels
_FEWEST_CHANNELS = 1024
_LARGEST_MAP = 14
_LARGEST_SHARE = 0.5
_PAD_INPUT_OPSET = 11


@dataclass(frozen=True)
class Partial:
    """How branches are treated.

    Attributes:
        always: whether they shrink even where that does not pay.
        multiple: what the number of channels that a branch keeps should be a multiple of.
    """

    always: bool
    multiple: int


def partial_residuals(wanted: str | bool, multiple: int) -> Partial | None:
    """Read the option; None where branches stay as they are.

    Args:
        wanted: False or "off", True or "auto" (where it pays), or "always".
        multiple: what counts of channels should be multiples of.

    Raises:
        UsageError: when it is something else.
    """
    kind = ("auto" if wanted else "off") if isinstance(wanted, bool) else wanted
    if kind not in {"off", "auto", "always"}:
        raise UsageError("no way to treat residuals", where=str(wanted), hint="off, auto or always")
    return None if kind == "off" else Partial(kind == "always", multiple)


def shrink_branches(
    model: ir.Model, layers: tuple[Layer, ...], how: Partial, fill: Fill | None
) -> tuple[ir.Model, RemovalPlan, Analysis] | None:
    """Plan the removal of what branches do not add; None where there is nothing of it.

    Args:
        model: from which all else is removed already; it is left alone.
        layers: what was removed from it.
        how: which branches.
        fill: the alignment policy.

    Returns:
        A prepared model, what to remove from it, with the rows of both removals together, and its analysis.
    """
    useless: set[str] = set()
    while True:
        prepared = prepare(model)
        cuts = _cut_all(prepared.graph, how, useless)
        if not cuts:
            return None
        removal, analysis = plan(prepared.graph, fill)
        gone = {node for node, changes in removal.edits if Bypass() in changes}
        # where what makes a branch cannot shrink to its run (equal counts in groups), a copy is all that is gained
        more = {name for name, gather in cuts.items() if gather not in gone}
        if not more:
            break
        useless |= more
    return prepared, replace(removal, layers=merged_rows(layers, removal.layers)), analysis


def _cut_all(graph: ir.Graph, how: Partial, useless: set[str]) -> dict[str, ir.Node]:
    """Put a Gather and a Pad behind all branches but some; return the Gathers by the branches' names."""
    analysis = read(graph)
    cuts: dict[str, ir.Node] = {}
    for node in list(graph):
        for which in (0, 1) if node.op_type == "Add" and node.domain == "" else ():
            branch = node.inputs[which]
            gather = (
                None if branch is None or branch.name in useless else _cut_off(analysis, node, which, how)
            )
            if branch is not None and gather is not None:
                cuts[branch.name or ""] = gather
    return cuts


def _cut_off(analysis: Analysis, node: ir.Node, which: int, how: Partial) -> ir.Node | None:
    """Put a Gather and a Pad behind a branch, where an operand of a sum is one; return the Gather."""
    branch, stream = node.inputs[which], node.inputs[1 - which]
    found = None if branch is None else _constants(analysis, node, branch)
    # what is added to a constant is a bias, and no residual
    if branch is None or stream is None or is_parameter(stream) or found is None or branch.shape is None:
        return None
    axis, held = found
    # a constant that is not zero must be added, which is one more copy
    dead = held.known.reshape(-1) if how.always else held.zero.reshape(-1)
    if not dead.any() or dead.all():
        return None
    first, last = _run(~dead, how.multiple)
    if last - first >= dead.size or not (how.always or _pays(branch.shape, axis, last - first)):
        return None
    gather, whole = _padded(analysis.graph, node, branch, axis, (first, last, dead.size))
    lost = np.where(dead, held.value.reshape(-1), 0)
    lost[first:last] = 0
    if lost.any():
        vector = lost.astype(held.value.dtype).reshape([-1] + [1] * (len(branch.shape) - axis - 1))
        added = ir.node("Add", [whole, constant(analysis.graph, vector, f"{branch.name}_constants")])
        whole = _inserted(added, node, branch, "added")
    node.replace_input_with(which, whole)
    return gather


def _padded(
    graph: ir.Graph, node: ir.Node, branch: ir.Value, axis: int, run: tuple[int, int, int]
) -> tuple[ir.Node, ir.Value]:
    """Insert a Gather of a run of channels and a Pad to as many as there were, in front of a node."""
    assert branch.shape is not None
    first, last, count = run
    indices = constant(graph, np.arange(first, last), f"{branch.name}_living")
    gather = ir.node("Gather", [branch, indices], {"axis": axis})
    living = _inserted(gather, node, branch, "living")
    living.shape = ir.Shape([last - first if at == axis else dim for at, dim in enumerate(branch.shape)])
    pads = np.zeros((2, len(branch.shape)), np.int64)
    pads[:, axis] = first, count - last
    flat = pads.reshape(-1)
    if graph.opset_imports.get("", 1) < _PAD_INPUT_OPSET:
        pad = ir.node("Pad", [living], {"pads": flat.tolist()})
    else:
        pad = ir.node("Pad", [living, constant(graph, flat, f"{branch.name}_pads")])
    return gather, _inserted(pad, node, branch, "whole")


def _inserted(made: ir.Node, before: ir.Node, like: ir.Value, what: str) -> ir.Value:
    """Insert a node in front of another; return what it makes, which is like another tensor."""
    out = made.outputs[0]
    out.name, out.type, out.shape = f"{like.name}_{what}", like.type, like.shape
    assert isinstance(before.graph, ir.Graph)
    before.graph.insert_before(before, made)
    return out


def _constants(analysis: Analysis, node: ir.Node, branch: ir.Value) -> tuple[int, Constant] | None:
    """Return a branch's axis of channels and what is known of these; None for an operand that is none."""
    state, out = analysis.state, node.outputs[0]
    structure, held = state.structure(branch), state.constant(branch)
    alone = branch.producer() is not None and len(branch.uses()) == 1 and not branch.is_graph_output()
    if structure is None or held is None or not alone or structure != state.structure(out):
        return None
    labels = [axis for axis, factors in enumerate(structure) if single_label(factors)]
    one = len(labels) == 1 and sum(extent > 1 for extent in held.known.shape) == 1
    return (labels[0], held) if one else None


def _run(living: np.ndarray, multiple: int) -> tuple[int, int]:
    """Return the shortest run of channels that holds all living ones, of a length that is a multiple if possible."""
    places = np.flatnonzero(living)
    first, last = int(places[0]), int(places[-1]) + 1
    length = min(-(-(last - first) // multiple) * multiple, living.size)
    last = min(first + length, living.size)
    return last - length, last


def _pays(shape: ir.Shape, axis: int, length: int) -> bool:
    """Return whether a branch with so many living channels is quicker with a Pad."""
    channels, spatial = shape[axis], list(shape)[2:]
    maps = len(spatial) == 2 and all(isinstance(size, int) and size <= _LARGEST_MAP for size in spatial)
    return (
        axis == 1
        and maps
        and isinstance(channels, int)
        and channels >= _FEWEST_CHANNELS
        and length <= _LARGEST_SHARE * channels
    )
