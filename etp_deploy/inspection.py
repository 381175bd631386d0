"""What a model holds that is dead, what could go, and why the rest stays; nothing is written."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etp_deploy.errors import UsageError
from etp_deploy.modelfile import read_model
from etp_deploy.surgery.duplicates import merge_duplicates as merge
from etp_deploy.surgery.plan import Layer, plan, reason
from etp_deploy.surgery.policy import HOST, Target, alignment, convolutions, multiple_fill
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.residuals import partial_residuals as read_partial
from etp_deploy.surgery.residuals import shrink_branches
from etp_deploy.surgery.rounds import carry_out
from etp_deploy.surgery.shapes import frame_dims, has_labels
from etp_deploy.surgery.thresholds import newly_dead, with_zeros
from etp_deploy.tuning import planned_for

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis, Fill
    from etp_deploy.surgery.plan import RemovalPlan

# a chain of reasons longer than this says nothing more
LONGEST_CHAIN = 40
# thresholds whose effect is told
TRIED_SHARES = (1e-6, 1e-4, 1e-2)


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What could be removed from a model.

    Attributes:
        source: the file read.
        align: the alignment that was asked for.
        zero_below: the relative threshold that was used.
        layers: one row for each layer that could shrink.
        target: the name of the target planned for.
        by_align: how many channels, heads and neurons would go in all, by value of `--align`; empty where it makes
            no difference.
        nearly_dead: how many more output channels would count as dead, by value of `--zero-below`.
        merged: how many channels another could stand for, being multiples of it.
    """

    source: str
    align: str | int
    zero_below: float
    layers: tuple[Layer, ...]
    target: str
    by_align: Mapping[str, int]
    nearly_dead: Mapping[str, int]
    merged: int

    def totals(self) -> dict[str, dict[str, int]]:
        """Return sums by kind: total, constant, unread, removable, kept although dead."""
        sums: dict[str, dict[str, int]] = {}
        for row in self.layers:
            entry = sums.setdefault(
                row.kind, {"total": 0, "constant": 0, "unread": 0, "removable": 0, "kept_dead": 0}
            )
            entry["total"] += row.total
            entry["constant"] += row.constant
            entry["unread"] += row.unread
            entry["removable"] += row.removed
            entry["kept_dead"] += row.kept_dead
        return sums

    def to_json(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        return {
            "schema": "etp-deploy/inspect/1",
            "source": self.source,
            "align": self.align,
            "target": self.target,
            "zero_below": self.zero_below,
            "by_align": dict(self.by_align),
            "nearly_dead": dict(self.nearly_dead),
            "merged_duplicates": self.merged,
            "totals": self.totals(),
            "layers": [
                {**dataclasses.asdict(row), "removable": row.removed, "kept_dead": row.kept_dead}
                for row in self.layers
            ],
        }


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why the indices along an axis of a tensor stay or go, as lines for a reader and as values."""

    tensor: str
    axis: int | None
    total: int
    kept: int
    lines: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the explanation as JSON values."""
        return {"schema": "etp-deploy/explain/1", **dataclasses.asdict(self)}


def inspect(
    source: Path | str,
    *,
    align: str | int = "auto",
    target: str = HOST,
    zero_below: float = 0.0,
    merge_duplicates: bool = False,
    partial_residuals: str | bool = False,
) -> Inspection:
    """Return what `compress` would remove, layer by layer.

    Args:
        source: the model.
        align: as for `compress`, but that "auto" is the target's rule: nothing is measured.
        target: as for `compress`.
        zero_below: as for `compress`.
        merge_duplicates: as for `compress`.
        partial_residuals: as for `compress`.

    Raises:
        ModelError: when the source cannot be read as a model.
        UsageError: when an option makes no sense.
    """
    options = _Options(align, planned_for(target), zero_below, merge_duplicates, partial_residuals)
    found = _analyse(_read(source, options), options)
    others = {"off": 1, **{str(multiple): multiple for multiple in options.target.multiples if multiple > 1}}
    by_align = _by_align(found, options, others) if convolutions(found.analysis) else {}
    shares = (share for share in TRIED_SHARES if share > zero_below)
    return Inspection(
        source=str(source),
        align=align,
        zero_below=zero_below,
        layers=found.layers,
        target=options.target.name,
        by_align=by_align if len(set(by_align.values())) > 1 else {},
        nearly_dead={f"{share:g}": newly_dead(found.model, share) for share in shares},
        merged=found.merged,
    )


@dataclasses.dataclass(frozen=True)
class _Options:
    align: str | int
    target: Target
    zero_below: float
    merge_duplicates: bool
    partial_residuals: str | bool

    @property
    def multiple(self) -> int:
        """What counts of channels are to be multiples of."""
        return alignment(self.align, self.target)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What `compress` knows before it writes: of the model as it is read, and after the last removal.

    Attributes:
        model: the model.
        layers: a row for each layer.
        analysis: what the reasons are read from, of a graph that is as it was analysed.
        merged: how many channels another stands for.
        whole: the prepared model, unless it was used up.
    """

    model: ir.Model
    layers: tuple[Layer, ...]
    analysis: Analysis
    merged: int
    whole: ir.Model | None


def _read(source: Path | str, options: _Options) -> ir.Model:
    read_partial(options.partial_residuals, options.multiple)  # refused before anything is read
    model = read_model(Path(source))
    return with_zeros(model, options.zero_below) if options.zero_below else model


def _analyse(model: ir.Model, options: _Options, whole: ir.Model | None = None) -> _Found:
    """Plan what `compress` does, all rounds of it; `whole` is the prepared model, if there is one already."""
    fill = multiple_fill(options.multiple)
    partial = read_partial(options.partial_residuals, options.multiple)
    prepared, removal, analysis, merged = _removal(model, options, fill, whole)
    if partial is None and not removal.given_back:
        return _Found(model, removal.layers, analysis, merged, prepared)
    rest = carry_out(prepared, removal, model, fill)
    more = None if partial is None else shrink_branches(rest.model, rest.layers, partial, fill)
    if partial is None or more is None:
        # an analysis says nothing of a graph that was rewritten
        analysis = rest.analysis or _removal(model, options, fill)[2]
        return _Found(model, rest.layers, analysis, merged, None)
    prepared, removal, analysis = more
    layers = removal.layers
    if removal.given_back:
        last = carry_out(prepared, removal, model, fill)
        again = None if last.analysis else shrink_branches(rest.model, rest.layers, partial, fill)
        layers, analysis = last.layers, again[2] if again else last.analysis or analysis
    return _Found(model, layers, analysis, merged, None)


def _removal(
    model: ir.Model, options: _Options, fill: Fill | None, whole: ir.Model | None = None
) -> tuple[ir.Model, RemovalPlan, Analysis, int]:
    if whole is not None:
        return whole, *plan(whole.graph, fill), 0
    prepared = prepare(model)
    merged = merge(prepared) if options.merge_duplicates else 0
    return prepared, *plan(prepared.graph, fill), merged


def _by_align(found: _Found, options: _Options, names: Mapping[str, int]) -> dict[str, int]:
    """Return how much would go in all by alignment."""
    counts, whole = {}, found.whole
    for name, multiple in names.items():
        other = _analyse(found.model, dataclasses.replace(options, align=multiple), whole)
        counts[name], whole = sum(row.removed for row in other.layers), other.whole
    return counts


def explain(
    source: Path | str,
    tensor: str,
    axis: int | None = None,
    *,
    align: str | int = "auto",
    target: str = HOST,
    zero_below: float = 0.0,
    merge_duplicates: bool = False,
    partial_residuals: str | bool = False,
) -> Explanation:
    """Return the chain of reasons why indices along an axis of a tensor stay, node by node.

    Args:
        source: the model.
        tensor: the name of a tensor, in the main graph or in a body.
        axis: which axis; the first with channels by default.
        align: as for `inspect`.
        target: as for `compress`.
        zero_below: as for `compress`.
        merge_duplicates: as for `compress`.
        partial_residuals: as for `compress`; where branches shrink, the reasons are those of what is left then, as
            they are where removal takes more than one round.

    Raises:
        ModelError: when the source cannot be read as a model.
        UsageError: when there is no such tensor or axis.
    """
    options = _Options(align, planned_for(target), zero_below, merge_duplicates, partial_residuals)
    found = _analyse(_read(source, options), options)
    analysis = found.analysis
    if not _has_channels(analysis, tensor, axis):  # they may be gone by the last round
        analysis = _removal(found.model, options, multiple_fill(options.multiple))[2]
    value = _find(analysis, tensor, source)
    structure = analysis.state.structure(value)
    if structure is None:
        return Explanation(tensor, axis, 0, 0, ("its shape is not known, so nothing of it can be removed",))
    if axis is not None and not -len(structure) <= axis < len(structure):
        raise UsageError(
            f"the tensor has {len(structure)} axes", where=f"{tensor}:{axis}", hint="count from 0"
        )
    labels = [index for index, factors in enumerate(structure) if has_labels(factors)]
    chosen = axis % len(structure) if axis is not None else (labels[0] if labels else None)
    if chosen is None or chosen not in labels:
        text = "no channels lie along this axis: nothing computes them one by one, or an operator could not follow them"
        return Explanation(tensor, axis, 0, 0, (text, *_producer_line(analysis, value)))
    dims = tuple(frame_dims(structure, chosen))
    mask = analysis.state.mask(value)
    others = tuple(dim for dim in range(mask.ndim) if dim not in dims)
    kept = mask.any(axis=others).reshape(-1)
    lines = _reasons(analysis, value, dims, kept)
    stay = int(kept.sum())
    if analysis is not found.analysis and len(dims) == 1:
        later = stay - min(stay, _size(found.analysis, tensor, chosen))
        lines += [f"{later} of these go in a later round, when the others are gone"] * bool(later)
        stay -= later
    return Explanation(tensor, chosen, int(kept.size), stay, tuple(lines))


def _named(analysis: Analysis) -> dict[str | None, ir.Value]:
    return {
        value.name: value for node in analysis.statements for value in (*node.inputs, *node.outputs) if value
    }


def _has_channels(analysis: Analysis, tensor: str, axis: int | None) -> bool:
    value = _named(analysis).get(tensor)
    structure = (None if value is None else analysis.state.structure(value)) or ()
    wanted = range(len(structure)) if axis is None else [axis % len(structure)] if structure else []
    return any(has_labels(structure[index]) for index in wanted)


def _size(analysis: Analysis, tensor: str, axis: int) -> int:
    """Return how long an axis of a tensor is; without a limit where that is not known."""
    value = _named(analysis).get(tensor)
    size = None if value is None or value.shape is None else value.shape[axis]
    return size if isinstance(size, int) else sys.maxsize


def _find(analysis: Analysis, tensor: str, source: Path | str) -> ir.Value:
    values = _named(analysis)
    if tensor not in values:
        close = sorted(str(name) for name in values if tensor.lower() in str(name).lower())[:3]
        hint = f"did you mean {', '.join(close)}" if close else "inspect without --explain lists the layers"
        raise UsageError("the model has no such tensor", where=f"{source}: {tensor}", hint=hint)
    return values[tensor]


def _producer_line(analysis: Analysis, value: ir.Value) -> list[str]:
    node = value.producer()
    if node is None:
        return ["it is an input of the model or an initializer"]
    pins = [cause for item in node.inputs if item for cause in analysis.state.pins.get(item, {}).values()]
    return [f"made by {node.op_type} {node.name or ''}: {cause.text}" for cause in pins if cause.node is node]


def _reasons(analysis: Analysis, value: ir.Value, dims: tuple[int, ...], kept: np.ndarray) -> list[str]:
    """Return one paragraph for each different first reason, most frequent first."""
    state = analysis.state
    why = (
        state.why[value]
        .max(axis=tuple(dim for dim in range(state.why[value].ndim) if dim not in dims))
        .reshape(-1)
    )
    lines = [f"{int(kept.sum())} of {kept.size} stay"]
    constant = state.constant(value)
    if constant is not None:
        held = constant.known.all(
            axis=tuple(dim for dim in range(constant.known.ndim) if dim not in dims)
        ).reshape(-1)
        lines.append(f"{int(held.sum())} are known constants, of which {int((held & kept).sum())} stay")
    gone = int((~kept).sum())
    if gone:
        lines.append(f"{gone} go: constant, or read by nothing that stays")
    groups, counts = np.unique(why[kept], return_counts=True)
    for index, count in sorted(zip(groups, counts, strict=True), key=lambda item: -item[1]):
        lines.append(f"{count} stay, {reason(analysis, int(index))}")
        lines += [f"    because {line}" for line in _chain(analysis, int(index), {value})]
    return lines


def _chain(analysis: Analysis, index: int, seen: set[ir.Value]) -> list[str]:
    """Follow a reason back to where it comes from."""
    state = analysis.state
    lines: list[str] = []
    while len(lines) < LONGEST_CHAIN:
        source = state.causes[index].source
        if source is None or source in seen or source not in state.why:
            return lines
        seen.add(source)
        causes = [int(item) for item in np.unique(state.why[source]) if 0 < item < index]
        if not causes:
            return lines
        index = causes[-1]
        lines.append(f"{source.name} stays, {reason(analysis, index)}")
    return lines
