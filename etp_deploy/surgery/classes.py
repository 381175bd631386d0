"""Which positions of a graph's tensors are the same channel, asked of the statements.

With all constant weights taken for zero, kept positions spread only along links (elementwise, concatenation,
depthwise). Positions that keep each other are one class.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from etp_deploy.surgery.shapes import has_labels
from etp_deploy.surgery.state import Cause
from etp_deploy.surgery.statements.contraction import Contraction

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis
    from etp_deploy.surgery.state import State
    from etp_deploy.surgery.statements.base import Statement


@dataclass
class Classes:
    """Positions of all tensors that may lose channels, numbered, and their classes.

    Attributes:
        offsets: the first number of each tensor's positions.
        sizes: how many each has.
        labels: the class of each position.
        tails: classes that cannot stay without `heads`' (pairs of a directed graph over classes).
        heads: see `tails`.
        count: number of classes.
    """

    offsets: dict[ir.Value, int]
    sizes: dict[ir.Value, int]
    labels: np.ndarray
    tails: np.ndarray
    heads: np.ndarray
    count: int

    def of(self, value: ir.Value) -> np.ndarray:
        """Return the classes of a tensor's positions, flat."""
        start = self.offsets[value]
        return self.labels[start : start + self.sizes[value]]

    def needs(self, start: np.ndarray) -> np.ndarray:
        """Return which classes stay wherever one of some classes does, these included.

        Args:
            start: whether each class is one of them.
        """
        result = start.copy()
        while True:
            before = result.sum()
            result[self.heads[result[self.tails]]] = True
            if result.sum() == before:
                return result

    def dependents(self, start: np.ndarray) -> np.ndarray | None:
        """Spread module numbers from classes to all classes that cannot stay without them.

        Args:
            start: for each class its module, -1 for none.

        Returns:
            The same for all dependents; None where a class depends on two modules.
        """
        modules = start.copy()
        while True:
            known = modules[self.heads]
            moved = (known >= 0) & (modules[self.tails] != known)
            if not moved.any():
                return modules
            if (modules[self.tails[moved]] >= 0).any():
                return None
            modules[self.tails[moved]] = known[moved]


def classes_of(analysis: Analysis) -> Classes:
    """Find the classes of a graph's positions.

    Args:
        analysis: from `analysis.read`.
    """
    state = analysis.state
    sizes = {
        value: mask.size for value, mask in state.keep.items() if mask.size > 1 and _removable(state, value)
    }
    ends = np.cumsum([0, *sizes.values()])
    offsets = dict(zip(sizes, ends.tolist(), strict=False))
    tails, heads = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for says in analysis.statements.values():
        says.rewind(read=False)
        near = {
            value: offsets[value] for value in (*says.node.inputs, *says.node.outputs) if value in offsets
        }
        for value in near:
            for other, own, reached in _links(says, state, value, list(near)):
                tails.append(own + offsets[value])
                heads.append(reached + offsets[other])
        for value, groups in _tied(says):
            if value in offsets:
                tails.append(groups.reshape(-1) + offsets[value])
                heads.append(np.roll(groups, 1, axis=0).reshape(-1) + offsets[value])
        says.rewind()
    tail, head = np.concatenate(tails), np.concatenate(heads)
    total = int(ends[-1])
    graph = coo_matrix((np.ones(len(tail), bool), (tail, head)), shape=(total, total))
    count, labels = connected_components(graph, directed=True, connection="strong")
    pairs = np.unique(np.stack([labels[tail], labels[head]]), axis=1)
    pairs = pairs[:, pairs[0] != pairs[1]]
    return Classes(offsets, sizes, labels, pairs[0], pairs[1], int(count))


def _removable(state: State, value: ir.Value) -> bool:
    structure = state.structure(value)
    return structure is not None and any(has_labels(axis) for axis in structure)


def _links(
    says: Statement, state: State, value: ir.Value, near: list[ir.Value]
) -> Iterator[tuple[ir.Value, np.ndarray, np.ndarray]]:
    """Yield pairs of positions (own, other's): keeping the own keeps the other.

    The own coordinate along each dimension is found bit by bit; where an answer fits several, all of them count.
    """
    shape = state.mask(value).shape
    dims = [dim for dim, extent in enumerate(shape) if extent > 1]
    reached: dict[ir.Value, np.ndarray] = {}
    found: dict[ir.Value, dict[int, np.ndarray]] = {other: {} for other in near if other is not value}
    for dim in dims:
        bits = max(1, int(shape[dim] - 1).bit_length())
        coordinate = np.arange(shape[dim]).reshape([-1 if d == dim else 1 for d in range(len(shape))])
        answers: dict[ir.Value, list[np.ndarray]] = {other: [] for other in found}
        for bit in range(bits):
            for side in (0, 1):
                masks = _one_step(
                    says, state, value, np.broadcast_to((coordinate >> bit) & 1 == side, shape), near
                )
                for other in found:
                    answers[other].append(masks[other])
        for other, taken in answers.items():
            zero, one = np.stack(taken[0::2]), np.stack(taken[1::2])
            weights = (1 << np.arange(bits)).reshape([-1] + [1] * (zero.ndim - 1))
            certain = (zero ^ one).all(axis=0)
            found[other][dim] = np.where(certain, (one * weights).sum(axis=0), -1)
            reached[other] = reached.get(other, np.ones((), bool)) & (zero | one).all(axis=0)
    for other, coordinates in found.items():
        places = np.flatnonzero(reached[other])
        if places.size:
            yield _pairs(other, places, {dim: c.reshape(-1)[places] for dim, c in coordinates.items()}, shape)


def _pairs(
    other: ir.Value, places: np.ndarray, coordinates: dict[int, np.ndarray], shape: tuple[int, ...]
) -> tuple[ir.Value, np.ndarray, np.ndarray]:
    """Expand coordinates, -1 for all along a dimension, into pairs of positions."""
    own = np.zeros(places.size, np.int64)
    reached = places
    strides = np.cumprod([1, *shape[::-1]])[-2::-1]
    for dim, values in coordinates.items():
        here = values[np.searchsorted(places, reached)]
        open_ = here < 0
        fixed = own[~open_] + here[~open_] * strides[dim]
        spread = own[open_][:, None] + np.arange(shape[dim]) * strides[dim]
        own = np.concatenate([fixed, spread.reshape(-1)])
        reached = np.concatenate([reached[~open_], np.repeat(reached[open_], shape[dim])])
    return other, own, reached


def _one_step(
    says: Statement, state: State, value: ir.Value, seed: np.ndarray, near: list[ir.Value]
) -> dict[ir.Value, np.ndarray]:
    """Spread kept positions of one tensor over one node and return what the others keep then."""
    keep = dict(state.keep)
    for other in near:
        keep[other] = np.array(seed) if other is value else np.zeros_like(state.keep[other])
    why = {other: np.zeros_like(state.why[other]) for other in near}
    says.spread(_scratch(state, keep, {**state.why, **why}))
    return {other: keep[other] for other in near}


def _scratch(state: State, keep: dict[ir.Value, np.ndarray], why: dict[ir.Value, np.ndarray]) -> State:
    return replace(state, keep=keep, why=why, causes=[Cause("")], touched=deque(), product=set(), layouts={})


def _tied(says: Statement) -> Iterator[tuple[ir.Value, np.ndarray]]:
    """Yield channels of grouped convolutions that can only go together, groups being of equal size: one a column."""
    if not isinstance(says, Contraction) or not says.active or says.weight.groups == 1:
        return
    groups, outputs, inputs = says.nonzero.shape
    if inputs > 1:
        yield says.data, np.arange(groups * inputs).reshape(groups, inputs)
        yield says.out, np.arange(groups * outputs).reshape(groups, outputs)
    else:
        yield says.out, np.arange(groups * outputs).reshape(groups, outputs).T
