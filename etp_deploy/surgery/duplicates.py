"""Channels that are multiples of one another: one of them is enough (`--merge-duplicates`).

Where `y_j = s * y_i` holds for a tensor whatever the data, a reader's `W[:, i] y_i + W[:, j] y_j` is
`(W[:, i] + s * W[:, j]) y_i`. So the column of the duplicate is added to the one that stays and becomes zero, in every
reader of the channels, before the analysis; nobody reads the duplicate then, and it goes as any unread channel does.

Channels are followed from the rows of the contraction that makes them as `a * u + c`, with one unknown function `u`
of the data for each group of parallel rows: affine operators change `a` and `c`; behind any other operator two
channels are multiples of one another where they were before and the operator says so, and otherwise on their own.

Numbers count as equal where they differ by no more than `TOLERANCE` roundings of float32, or of float64 where weights
are that. It is what multiplying a row by a number and storing it does to it, and what the runtime's sums are off by
themselves: each product changes by less than a kernel that adds in another order may change it. Of narrower weights,
whose products are summed in float32, the stored multiples must be exact. No such difference may pass a step (Round),
where it could become a whole one. Verification judges the result as any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from etp_deploy.surgery.analysis import read
from etp_deploy.surgery.resolve import constant
from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.statements.base import array_of, floating
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.moves import Permute, Reshape
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.reduction import Reduction
from etp_deploy.surgery.stored import stored

if TYPE_CHECKING:
    from etp_deploy.surgery.analysis import Analysis

    Ratio = Literal["any", "positive", "equal"]
    """Which multiples an operator keeps: all (it is linear), positive ones, or only equal channels."""

# roundings by which two numbers may differ and still count as equal
TOLERANCE = 4
_ROUNDING, _ROUNDING_DOUBLE = 2.0**-23, 2.0**-52
# how far apart two rows' projections may be and still be looked at; they differ by rounding where the rows do
_NEAR = 1e-4
_AFFINE = frozenset({"Add", "BatchNormalization", "Div", "Identity", "Mul", "Neg", "Sub"})
_LINEAR = frozenset({"AveragePool", "Dropout", "GlobalAveragePool", "ReduceMean", "ReduceSum"})
_HOMOGENEOUS = frozenset({"GlobalMaxPool", "LeakyRelu", "MaxPool", "PRelu", "ReduceMax", "Relu"})
# not functions of the channel, or with steps
_OTHER = frozenset(
    (
        *("Bernoulli", "RandomNormalLike", "RandomUniformLike"),
        *("Ceil", "Floor", "Mod", "Round", "Shrink", "Sign", "ThresholdedRelu"),
    )
)


@dataclass(frozen=True)
class Channels:
    """The channels of a tensor as `scale * u[group] + shift`.

    Attributes:
        group: which unknown function each channel is made of.
        scale: its multiple of that.
        shift: what is added.
        slack: the magnitude of the numbers that the shift was computed from.
        rounding: the largest relative difference of numbers that count as equal.
    """

    group: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    slack: np.ndarray
    rounding: float

    def regrouped(self, ratio: Ratio, others: tuple[np.ndarray, ...] = ()) -> Channels:
        """Return the channels behind an operator that keeps some multiples: each group's first is the new unknown.

        Args:
            ratio: which multiples it keeps.
            others: further numbers by channel that must be the same.
        """
        group, scale = np.arange(self.group.size), np.ones(self.group.size)
        heads: dict[tuple[object, ...], list[int]] = {}
        for channel in range(self.group.size):
            key = (self.group[channel], *(item[channel] for item in others))
            for head in heads.setdefault(key, []):
                found = self.ratio(channel, head)
                if found is not None and _keeps(ratio, found, self.rounding):
                    group[channel], scale[channel] = head, found
                    break
            else:
                heads[key].append(channel)
        none = np.zeros(self.group.size)
        return replace(self, group=group, scale=scale, shift=none, slack=none)

    def ratio(self, channel: int, head: int) -> float | None:
        """Return what multiple of another channel a channel is; None if it is none."""
        if self.group[channel] != self.group[head] or not self.scale[channel] or not self.scale[head]:
            return None
        found = self.scale[channel] / self.scale[head]
        allowed = self.rounding * (self.slack[channel] + abs(found) * self.slack[head])
        return found if abs(self.shift[channel] - found * self.shift[head]) <= allowed else None

    def affine(self, scale: np.ndarray, shift: np.ndarray) -> Channels:
        """Return the channels times a number, plus another."""
        slack = np.abs(scale) * self.slack + np.abs(shift)
        return replace(self, scale=self.scale * scale, shift=self.shift * scale + shift, slack=slack)


def _keeps(ratio: Ratio, found: float, rounding: float) -> bool:
    if ratio == "equal":
        return abs(found - 1) <= rounding
    return ratio == "any" or found > 0


def merge_duplicates(model: ir.Model) -> int:
    """Let one channel stand for its multiples in all that read them, in place; return for how many channels.

    Args:
        model: prepared.
    """
    analysis = read(model.graph)
    return sum(
        _merged(analysis, says)
        for node, says in analysis.statements.items()
        if node.graph is model.graph and isinstance(says, Contraction)
    )


def _merged(analysis: Analysis, says: Contraction) -> int:
    """Merge the channels that a contraction makes; return how many."""
    made = _rows(analysis, says)
    if made is None or np.unique(made.group).size == made.group.size:
        return 0
    readers = _readers(analysis, says.out, made)
    if not readers:
        return 0
    keys = np.stack([channels.regrouped("any").group for _, channels in readers])
    _, key = np.unique(keys, axis=1, return_inverse=True)
    merged = 0
    for number in np.flatnonzero(np.bincount(key.reshape(-1)) > 1):
        members = np.flatnonzero(key.reshape(-1) == number)
        largest = members[np.argmax(np.abs(readers[0][1].scale[members]))]
        others = members[members != largest]
        for reader, channels in readers:
            _add_columns(analysis.graph, reader, largest, others, channels)
        merged += others.size
    return merged


# what a contraction makes


def _rows(analysis: Analysis, says: Contraction) -> Channels | None:
    """Return a contraction's output channels by the direction of their rows; None where they are not one axis."""
    weight = array_of(says.node.inputs[says.weight.index])
    # integer contractions and packed ones have rows of another kind
    if type(says) is not Contraction or not says.active or weight is None or not floating(weight.dtype):
        return None
    rows = says.weight.grouped(weight).astype(np.float64)
    groups, outputs = rows.shape[:2]
    if not _one_axis(analysis, says.out, groups * outputs):
        return None
    flat = rows.reshape(groups * outputs, -1)
    rounding = TOLERANCE * (_ROUNDING_DOUBLE if weight.dtype == np.float64 else _ROUNDING)
    group, scale = np.arange(len(flat)), np.ones(len(flat))
    for first in range(0, len(flat), outputs):  # groups read different inputs
        part = slice(first, first + outputs)
        own, scale[part] = _parallel(flat[part], rounding)
        group[part] = own + first
    shift = _bias(says, len(flat))
    if shift is None:
        return None
    scale *= says.bias_scale * says.out_scale
    return Channels(group, scale, shift, np.abs(shift), rounding)


def _one_axis(analysis: Analysis, value: ir.Value, count: int) -> bool:
    """Return whether a tensor's channels are so many, all along one axis."""
    return [extent for extent in analysis.state.mask(value).shape if extent > 1] == [count]


def _bias(says: Contraction, count: int) -> np.ndarray | None:
    """Return the bias by channel, zeros where there is none; None where it is computed or differs along other axes."""
    value = (
        says.node.inputs[says.bias] if says.bias is not None and says.bias < len(says.node.inputs) else None
    )
    if value is None:
        return np.zeros(count)
    array = array_of(value)
    if array is None or array.size not in {1, count}:
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1) * says.out_scale, (count,)).copy()


def _parallel(rows: np.ndarray, rounding: float) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the first that it is a multiple of, and the multiple; rows of zeros are on their own."""
    group, scale = np.arange(len(rows)), np.ones(len(rows))
    length = np.linalg.norm(rows, axis=1)
    first = np.take_along_axis(rows, (rows != 0).argmax(axis=1)[:, None], axis=1)[:, 0]
    alive = np.flatnonzero((length > 0) & np.isfinite(length))
    directions = rows[alive] * (np.sign(first[alive]) / length[alive])[:, None]
    along = directions @ np.random.default_rng(0).standard_normal(rows.shape[1])
    order = np.argsort(along, kind="stable")
    heads: list[tuple[float, int]] = []
    for place, row in zip(along[order], alive[order], strict=True):
        heads = [head for head in heads if place - head[0] <= _NEAR]
        for _, head in heads:
            largest = np.argmax(np.abs(rows[head]))
            multiple = rows[row, largest] / rows[head, largest]
            if (np.abs(rows[row] - multiple * rows[head]) <= rounding * np.abs(rows[row])).all():
                group[row], scale[row] = head, multiple
                break
        else:
            heads.append((place, int(row)))
    return group, scale


# what becomes of the channels


def _readers(
    analysis: Analysis, source: ir.Value, made: Channels
) -> list[tuple[Contraction, Channels]] | None:
    """Follow channels to the contractions that read them; None where anything else does."""
    followed: dict[ir.Value, Channels] = {source: made}
    readers: list[tuple[Contraction, Channels]] = []
    pending, waiting = [source], set[ir.Node]()
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return None
        for node in {node: None for node, _ in value.uses()}:
            says = analysis.statements.get(node)
            if isinstance(says, Contraction) and _reads(analysis, says, value):
                readers.append((says, followed[value]))
                continue
            if node.outputs[0] in followed:
                continue
            live = [item for item in node.inputs if item is not None and not is_parameter(item)]
            if any(item not in followed for item in live):
                waiting.add(node)
                continue
            waiting.discard(node)
            behind = _behind(analysis, node, followed)
            if behind is None:
                return None
            followed[node.outputs[0]] = behind
            pending.append(node.outputs[0])
    return None if waiting else readers


def _reads(analysis: Analysis, says: Contraction, value: ir.Value) -> bool:
    """Return whether a contraction reads a tensor's channels through columns that can be added."""
    weight = says.node.inputs[says.weight.index]
    assert weight is not None
    # a weight that others share would have to be there twice
    plain = type(says) is Contraction and stored(weight) is None and len(weight.uses()) == 1
    uses = sum(item is value for item in says.node.inputs)
    if not (plain and says.active and says.data is value and uses == 1 and says.weight.groups == 1):
        return False
    return says.kept_inputs(analysis.state).size == analysis.state.mask(value).size


def _behind(analysis: Analysis, node: ir.Node, followed: dict[ir.Value, Channels]) -> Channels | None:
    """Return what a node makes of followed channels; None where it does not treat each by itself."""
    says, out = analysis.statements.get(node), node.outputs[0]
    live = [item for item in node.inputs if item is not None and item in followed]
    channels = followed[live[0]]
    alone = not any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if not alone or not _one_axis(analysis, out, channels.group.size):
        return None
    if isinstance(says, Reshape | Permute):
        return channels
    if isinstance(says, Contraction):
        return _depthwise(says, channels)
    # other kinds of it, such as norms, read several channels at once
    if type(says) not in {Pointwise, Reduction} or node.op_type in _OTHER or not _is_float(out):
        return None
    assert isinstance(says, Pointwise)
    several = len(live) > 1
    return _combined([followed[item] for item in live]) if several else _alone(analysis, says, channels)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _combined(parts: list[Channels]) -> Channels:
    """Return what an operator makes of several tensors: channels are equal where those of all parts are."""
    equal = [part.regrouped("equal").group for part in parts[1:]]
    return parts[0].regrouped("equal", tuple(equal))


def _depthwise(says: Contraction, channels: Channels) -> Channels | None:
    """Return what a convolution of each channel by itself makes: multiples where kernels are multiples."""
    shift, weight = _bias(says, channels.group.size), array_of(says.node.inputs[says.weight.index])
    if says.weight.groups != channels.group.size or shift is None or weight is None:
        return None
    kernels = says.weight.grouped(weight).reshape(channels.group.size, -1).astype(np.float64)
    group, multiple = _parallel(kernels, channels.rounding)
    before = channels.regrouped("any", (group,))
    made = replace(before, scale=before.scale * multiple / multiple[before.group])
    return made.affine(np.ones(shift.size), shift)


def _alone(analysis: Analysis, says: Pointwise, channels: Channels) -> Channels | None:
    """Return what an operator with one computed operand makes of channels."""
    operator, count = says.node.op_type, channels.group.size
    vectors: dict[int, np.ndarray] = {}
    for index in says.maps:
        value = says.node.inputs[index]
        if value is not None and is_parameter(value):
            vector = _vector(analysis, says, index, count)
            if vector is None:
                return None
            vectors[index] = vector
    if operator in _AFFINE:
        affine = _affine(says.node, vectors, count)
        return None if affine is None else channels.affine(*affine)
    if operator in _LINEAR:
        return channels.regrouped("any")
    ratio: Ratio = "positive" if operator in _HOMOGENEOUS else "equal"
    return channels.regrouped(ratio, tuple(vectors.values()))


def _vector(analysis: Analysis, says: Pointwise, index: int, count: int) -> np.ndarray | None:
    """Return a constant operand by channel; None where it differs along other axes."""
    array, structure = array_of(says.node.inputs[index]), analysis.state.structure(says.out)
    if array is None or structure is None:
        return None
    known, values = says.operand(analysis.state, index, structure)
    if not known.all() or values.size not in {1, count}:
        return None
    return np.broadcast_to(values.astype(np.float64).reshape(-1), (count,))


def _affine(
    node: ir.Node, vectors: dict[int, np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return an affine operator's scale and shift of each channel."""
    scale, shift, constant_first = np.ones(count), np.zeros(count), 0 in vectors
    other = vectors.get(0 if constant_first else 1, shift)
    match node.op_type:
        case "BatchNormalization":
            return _normalised(node, vectors)
        case "Neg":
            scale = -scale
        case "Add":
            shift = other
        case "Sub":
            scale, shift = (-scale, other) if constant_first else (scale, -other)
        case "Mul":
            scale = other
        case "Div":
            if constant_first or not other.all():
                return None
            scale = 1 / other
    return scale, shift


def _normalised(node: ir.Node, vectors: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the scale and shift of a BatchNormalization."""
    if len(vectors) < 4 or node.attributes.get_int("training_mode", 0) == 1:
        return None
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    scale = vectors[1] / np.sqrt(vectors[4] + epsilon)
    return scale, vectors[2] - scale * vectors[3]


# merging


def _add_columns(
    graph: ir.Graph, says: Contraction, head: np.integer, others: np.ndarray, channels: Channels
) -> None:
    """Add the columns of a channel's multiples to its own, and let them be zero."""
    value = says.node.inputs[says.weight.index]
    array = array_of(value)
    assert value is not None
    assert array is not None
    grouped = says.weight.grouped(array).astype(np.float64)
    columns = says.columns(grouped)
    multiples = channels.scale[others] / channels.scale[head]
    columns[0, :, head] += np.einsum("oi...,i->o...", columns[0][:, others], multiples)
    columns[0][:, others] = 0
    name = value.name or says.node.outputs[0].name or ""
    fresh = constant(graph, says.weight.ungrouped(grouped).astype(array.dtype), name)
    says.node.replace_input_with(says.weight.index, fresh)
    if not value.uses():
        graph.initializers.pop(name)
        fresh.name = name
