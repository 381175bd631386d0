"""What goes, what stays and why: the analysis's result as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.analysis import read, solve
from etp_deploy.surgery.copies import is_copy
from etp_deploy.surgery.effects import joins, moot
from etp_deploy.surgery.shapes import frame_dims, is_parameter, single_label
from etp_deploy.surgery.state import Cause
from etp_deploy.surgery.statements.attention import Attention
from etp_deploy.surgery.statements.base import PickInput, SliceInput, array_of, cut_size, taken
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.moves import Reshape
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.product import Product
from etp_deploy.surgery.statements.stacked import Stacked
from etp_deploy.surgery.stored import is_weight_type, stored

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis, Fill
    from etp_deploy.surgery.statements.base import Edit

    NodeEdits = tuple[tuple[ir.Node, tuple[Edit, ...]], ...]


@dataclass(frozen=True)
class Layer:
    """The output channels of one contraction.

    Attributes:
        name: the tensor that holds them.
        operator: what computes them.
        kind: "channels" of a convolution, "neurons" of a matrix product, "heads" of an attention, or the
            "projections" that make them.
        total: how many there are.
        constant: how many are known constants.
        unread: how many others nothing that stays reads.
        kept: how many stay.
        reasons: why dead ones stay, with how many.
    """

    name: str
    operator: str
    kind: str
    total: int
    constant: int
    unread: int
    kept: int
    reasons: tuple[tuple[str, int], ...]

    @property
    def removed(self) -> int:
        """How many go."""
        return self.total - self.kept

    @property
    def kept_dead(self) -> int:
        """How many dead ones stay."""
        return self.constant + self.unread - self.removed


@dataclass(frozen=True)
class RemovalPlan:
    """What to change, and what goes with it.

    Attributes:
        edits: for each node; none where nothing would change.
        layers: a row for each layer.
        given_back: whether anything stays only so that tensors are valid: what is left may lose more.
    """

    edits: tuple[tuple[ir.Node, tuple[Edit, ...]], ...]
    layers: tuple[Layer, ...]
    given_back: bool = False


def plan(graph: ir.Graph, fill: Fill | None = None) -> tuple[RemovalPlan, Analysis]:
    """Analyse a prepared graph and return what to remove, with the analysis for questions of detail.

    Args:
        graph: from `prepare`.
        fill: the alignment policy, see `analysis.solve`.

    Raises:
        PlanError: where channels that stay cannot be lined up.
    """
    analysis = read(graph)
    solve(analysis, fill)
    edits = _edits(analysis)
    while _pin_grown(analysis, edits) or _pin_unstorable(analysis, edits):
        analysis.state.given_back = True
        solve(analysis, fill)
        edits = _edits(analysis)
    gains = any(not moot(node, change) for node, changes in edits for change in changes) or joins(edits)
    removal = RemovalPlan(
        _kept_whole(edits) if gains else (), tuple(layers(analysis)), analysis.state.given_back
    )
    return removal, analysis


def _edits(analysis: Analysis) -> NodeEdits:
    found = ((node, tuple(says.edits(analysis.state))) for node, says in analysis.statements.items())
    return tuple((node, changes) for node, changes in found if changes)


def _pin_grown(analysis: Analysis, edits: NodeEdits) -> bool:
    """Pin what reads a shared initializer whose different cuts would hold more than it does; say if any was."""
    pinned = False
    text = "its constant is shared with other nodes, and what each could lose differs, at"
    for nodes in _grown(edits).values():
        if all(is_copy(node) for node in nodes):
            continue  # see `_kept_whole`
        for node in nodes:
            cause = Cause(text, node, spare=True)
            for tensor in (*node.inputs, *node.outputs):
                pinned |= analysis.state.grow(tensor, np.ones((), bool), cause)
    return pinned


def _grown(edits: NodeEdits) -> dict[ir.Value, list[ir.Node]]:
    """Return the shared initializers whose different cuts would hold more than they do, and what cuts them."""
    cuts: dict[ir.Value, dict[ir.Node, tuple[int, bytes]]] = {}
    for node, changes in edits:
        for change in changes:
            index = getattr(change, "index", None)
            value = node.inputs[index] if index is not None and index < len(node.inputs) else None
            if value is not None and _shared_weight(value):
                cuts.setdefault(value, {})[node] = cut_size(change, value)
    grown = {}
    for value, by_node in cuts.items():
        assert value.const_value is not None
        untouched = any(node not in by_node for node, _ in value.uses())
        total = sum(size for size, _ in set(by_node.values())) + (value.const_value.size if untouched else 0)
        if total > value.const_value.size:
            grown[value] = list(by_node)
    return grown


def _kept_whole(edits: NodeEdits) -> NodeEdits:
    """Let readers that were one before `part_copies` pick from the initializer instead of cutting it for each."""
    grown = {value for value, nodes in _grown(edits).items() if all(is_copy(node) for node in nodes)}
    if not grown:
        return edits
    return tuple(
        (
            node,
            tuple(
                PickInput(change.index, change.takes)
                if isinstance(change, SliceInput) and node.inputs[change.index] in grown
                else change
                for change in changes
            ),
        )
        for node, changes in edits
    )


def _pin_unstorable(analysis: Analysis, edits: NodeEdits) -> bool:
    """Pin what reads a weight whose cut has no form in which it is stored; say if any was."""
    pinned = False
    for node, changes in edits:
        for change in changes:
            index: int = getattr(change, "index", len(node.inputs))
            value = node.inputs[index] if index < len(node.inputs) else None
            form, array = stored(value), array_of(value)
            if form is None or array is None:
                continue
            positions = taken(change, array.shape)
            if positions is not None and form.take(positions) is None:
                cause = Cause("channels that share a scale would no longer do so at", node, spare=True)
                for tensor in (*node.inputs, *node.outputs):
                    pinned |= analysis.state.grow(tensor, np.ones((), bool), cause)
    return pinned


def _shared_weight(value: ir.Value) -> bool:
    return is_parameter(value) and is_weight_type(value.dtype) and len(value.uses()) > 1


def layers(analysis: Analysis) -> list[Layer]:
    """Return a row for each contraction whose output channels could go."""
    rows = []
    spare = np.array([cause.spare for cause in analysis.state.causes])
    for says in analysis.statements.values():
        if isinstance(says, Contraction) and says.active:
            structure = analysis.state.structure(says.out)
            if structure is not None and single_label(structure[says.out_axis]):
                dim = frame_dims(structure, says.out_axis)[0]
                rows.append(_layer(analysis, says, (dim,), _kind(analysis, says), spare))
        elif isinstance(says, Stacked) and says.active and says.made:
            # channels of a stack's matrices are counted one by one, wherever they stand
            rows.append(_layer(analysis, says, says.made, "neurons", spare))
        elif isinstance(says, Pointwise) and says.node.op_type == "Softmax":
            heads = [dim for dim, extent in enumerate(analysis.state.mask(says.out).shape) if extent > 1]
            if len(heads) == 1:
                rows.append(_layer(analysis, says, tuple(heads), "heads", spare))
    return rows


def _layer(
    analysis: Analysis,
    says: Contraction | Pointwise | Stacked,
    dims: tuple[int, ...],
    kind: str,
    spare: np.ndarray,
) -> Layer:
    state = analysis.state
    mask = state.mask(says.out)
    others = tuple(other for other in range(mask.ndim) if other not in dims)
    kept = mask.any(axis=others).reshape(-1)
    constant = final_constant(analysis, says.out, dims)
    # what was kept first for a reason other than liveness is dead although it stays
    why = state.why[says.out].max(axis=others).reshape(-1)
    refilled = kept & spare[why] & ~constant
    dead_kept = kept & (constant | refilled)
    reasons: dict[str, int] = {}
    for index in why[dead_kept]:
        text = reason(analysis, root_cause(analysis, int(index)))
        reasons[text] = reasons.get(text, 0) + 1
    return Layer(
        name=says.out.name or "",
        operator=says.node.op_type,
        kind=kind,
        total=int(kept.size),
        constant=int(constant.sum()),
        unread=int((~kept & ~constant).sum() + refilled.sum()),
        kept=int(kept.sum()),
        reasons=tuple(sorted(reasons.items(), key=lambda item: -item[1])),
    )


def final_constant(analysis: Analysis, value: ir.Value, dims: tuple[int, ...]) -> np.ndarray:
    """Return which indices along dimensions of the frame hold a known constant."""
    mask = analysis.state.mask(value)
    state = analysis.state
    constant = (state.constants if state.proved is None else state.proved).get(value)
    if constant is None:
        return np.zeros(int(np.prod([mask.shape[dim] for dim in dims])), bool)
    others = tuple(other for other in range(mask.ndim) if other not in dims)
    return np.asarray(constant.known.all(axis=others)).reshape(-1)


def root_cause(analysis: Analysis, index: int) -> int:
    """Follow why a dead channel stays to what asked for it: alignment, equal counts, a carrier, a pin."""
    state = analysis.state
    for _ in range(len(state.causes)):
        source = state.causes[index].source
        if state.causes[index].spare or source is None or source not in state.why:
            break
        earlier = [int(item) for item in np.unique(state.why[source]) if 0 < item < index]
        if not earlier:
            break
        index = max(earlier, key=lambda item: (state.causes[item].spare, item))
    return index


def reason(analysis: Analysis, index: int) -> str:
    """Return why something stays, in one line."""
    cause = analysis.state.causes[index]
    if cause.node is None:
        return cause.text
    return f"{cause.text} {cause.node.op_type} {cause.node.name or ''}".rstrip()


def _kind(analysis: Analysis, says: Contraction) -> str:
    if says.windowed:
        return "channels"
    return "projections" if _feeds_heads(analysis, says.out) else "neurons"


def _feeds_heads(analysis: Analysis, value: ir.Value, depth: int = 6) -> bool:
    """Return whether a Reshape or an attention downstream splits a tensor's channels into heads."""
    labels = sum(extent > 1 for extent in analysis.state.mask(value).shape)
    for node, _ in value.uses():
        says = analysis.statements.get(node)
        if isinstance(says, Attention):
            return True
        if isinstance(says, Contraction | Product) or says is None:
            continue
        for out in node.outputs:
            more = sum(extent > 1 for extent in analysis.state.mask(out).shape)
            if (isinstance(says, Reshape) and more > labels) or (
                depth and _feeds_heads(analysis, out, depth - 1)
            ):
                return True
    return False
