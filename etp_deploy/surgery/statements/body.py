"""Nodes with bodies: what stands outside and what stands inside are the same channels, index by index.

A body is a graph of its own. Its nodes are read, kept and cut like any others; this statement ties the body's
inputs and outputs to the node's. What no tie names stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import axis_size, frame, frame_dims, has_labels, plain, unlabelled
from etp_deploy.surgery.state import Cause, ConflictError, Constant, coordinates
from etp_deploy.surgery.statements.base import Edit, FreeShape, Statement, default_layout, set_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.shapes import Structure
    from etp_deploy.surgery.state import State


def bodies(node: ir.Node) -> list[ir.Graph]:
    """Return a node's bodies."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type.name == "GRAPH":
            found.append(attribute.as_graph())
        elif attribute.type.name == "GRAPHS":
            found.extend(attribute.as_graphs())
    return found


@dataclass(frozen=True)
class End:
    """One tensor of a tie.

    Attributes:
        value: the tensor.
        iterated: the axis that it has and the other ends lack: one entry for each time that the body runs.
    """

    value: ir.Value
    iterated: int | None = None

    def axis(self, shared: int) -> int:
        """Return where an axis that all ends share lies in this tensor."""
        return shared if self.iterated is None or shared < self.iterated else shared + 1


@dataclass(frozen=True)
class Tie:
    """Tensors that hold the same channels.

    Attributes:
        source: what the body's input is given first (a state) or piece by piece (a sequence).
        inner: the body's input.
        results: the body's outputs: one, or one for each branch.
        out: the node's output.
    """

    source: End | None = None
    inner: End | None = None
    results: tuple[End, ...] = ()
    out: End | None = None

    @property
    def ends(self) -> tuple[End, ...]:
        """All of them, in the order in which the data flows."""
        return tuple(end for end in (self.source, self.inner, *self.results, self.out) if end is not None)


class Ties(Statement):
    """A node with bodies.

    Args:
        node: the node.
        ties: which tensors hold the same channels.
        whole: why everything else stays.
    """

    def __init__(self, node: ir.Node, ties: Sequence[Tie], *, whole: str) -> None:
        super().__init__(node)
        self.whole = whole
        self.graphs = bodies(node)
        self.tied = [_Tied(node, tie) for tie in ties]
        ends = {end.value for tie in ties for end in tie.ends}
        self.inputs = [value for graph in self.graphs for value in graph.inputs if value not in ends]
        self.outputs = [value for value in node.outputs if value not in ends]
        results = {end.value for tie in ties for end in tie.results}
        sources = {tie.source.value for tie in ties if tie.source is not None}
        self.read = [value for value in node.inputs if value is not None and value not in sources]
        self.read += [value for graph in self.graphs for value in graph.outputs if value not in results]

    def enter(self, state: State) -> None:
        """The bodies' inputs take over what is known of what they are given."""
        for value in self.inputs:
            set_plain(state, value)
        for tied in self.tied:
            tied.enter(state)

    def holds(self, state: State) -> bool:
        """Say whether what was assumed of a state is true of what the body makes of it."""
        held = [tied.holds(state) for tied in self.tied]
        return all(held)

    def structure(self, state: State) -> None:
        """Tied axes stay tied; all others are pinned."""
        for value in self.read:
            state.pin(value, None, self.whole, self.node)
        for value in self.outputs:
            set_plain(state, value)
        for tied in self.tied:
            tied.leave(state)

    def constants(self, state: State) -> None:
        """What a body makes on every way is known."""
        for tied in self.tied:
            tied.constants(state)

    def spread(self, state: State) -> None:
        """Kept positions are the same at all ends."""
        for tied in self.tied:
            tied.spread(state)

    def enter_layout(self, state: State) -> None:
        """The bodies' inputs stand in the order of what they are given."""
        for value in self.inputs:
            default_layout(state, value)
        for tied in self.tied:
            tied.enter_layout(state)

    def layout(self, state: State) -> None:
        """All ends stand in one order."""
        for value in self.outputs:
            default_layout(state, value)
        for tied in self.tied:
            tied.layout(state)

    def edits(self, state: State) -> Iterator[Edit]:
        """The bodies' inputs and outputs declare their shapes: forget those that changed."""
        for tied in self.tied:
            for end in (tied.tie.inner, *tied.tie.results):
                if end is not None and not state.mask(end.value).all():
                    yield FreeShape(end.value)


class _Tied:
    """What is found out about one tie: the axes whose indices are the same channels at all ends."""

    def __init__(self, node: ir.Node, tie: Tie) -> None:
        self.node = node
        self.tie = tie
        self.shared: Structure | None = None
        """The structure that all ends have, the iterated axis left out."""
        self.assumed: Constant | None = None
        self._entered = False

    # structure

    def enter(self, state: State) -> None:
        """Assume at first that the body's input is all that its source is."""
        source, inner = self.tie.source, self.tie.inner
        if source is None or inner is None:
            return
        if not self._entered:
            self._entered = True
            self.shared = self._meeting(state, [source], inner)
            if self.shared is not None and self._labelled():
                self.assumed = self._agreed(state, [source])
        state.constants.pop(inner.value, None)
        if self.shared is None:
            set_plain(state, inner.value)
            return
        state.set_structure(inner.value, self.shared)
        if self.assumed is not None:
            state.constants[inner.value] = self.assumed

    def holds(self, state: State) -> bool:
        """Give up what the body does not keep to, and say whether nothing was given up."""
        tie = self.tie
        if tie.source is None or not tie.results or self.shared is None or tie.out is None:
            return True
        before = self.shared, self.assumed
        self.shared = self._meeting(state, [tie.source, *tie.results], tie.out, self.shared)
        if self.shared != before[0]:
            # another structure, another frame: what is constant is asked anew
            self.assumed = (
                self._agreed(state, [tie.source]) if self.shared is not None and self._labelled() else None
            )
            return False
        if self.assumed is None:
            return True
        result = self._agreed(state, tie.results)
        known = np.zeros_like(self.assumed.known)
        if result is not None:
            known = self.assumed.known & result.known & (self.assumed.value == result.value)
        if np.array_equal(known, self.assumed.known):
            return True
        self.assumed = Constant(known, self.assumed.value) if known.any() else None
        return False

    def leave(self, state: State) -> None:
        """Give the node's output its structure, and pin what is not the same everywhere."""
        tie = self.tie
        if tie.source is None and tie.out is not None:
            self.shared = self._meeting(state, tie.results, tie.out)
        if tie.out is not None:
            self._set_out(state, tie.out)
        for end in (tie.source, *tie.results):
            structure = None if end is None else state.structure(end.value)
            if end is None or structure is None:
                continue
            tied = {end.axis(axis) for axis in self._labelled()}
            for axis in range(len(structure)):
                if axis == end.iterated:
                    state.pin(end.value, axis, "the body runs once for each index along it", self.node)
                elif axis not in tied:
                    state.pin(end.value, axis, "it differs inside and outside of the body of", self.node)

    def _set_out(self, state: State, out: End) -> None:
        if self.shared is None or out.value.shape is None:
            set_plain(state, out.value)
            return
        axes = list(self.shared)
        if out.iterated is not None:
            axes.insert(out.iterated, plain(out.value.shape)[out.iterated])
        state.set_structure(out.value, tuple(axes))

    def _meeting(
        self, state: State, ends: Sequence[End], to: End, within: Structure | None = None
    ) -> Structure | None:
        """Return the target's structure, labelled where all ends are labelled alike; None where ranks differ.

        Args:
            state: the structures.
            ends: the ends that must be alike.
            to: where the channels arrive.
            within: what was assumed before; nothing is labelled that was not.
        """
        shape = to.value.shape
        structures = [self._without_iterated(end, state.structure(end.value)) for end in ends]
        structures += [] if within is None else [within]
        base = self._without_iterated(to, None if shape is None else plain(shape))
        if base is None or not structures or any(s is None or len(s) != len(base) for s in structures):
            return None
        known = [structure for structure in structures if structure is not None]
        axes = []
        for axis, own in enumerate(base):
            first = known[0][axis]
            same = has_labels(first) and all(structure[axis] == first for structure in known)
            axes.append(first if same and axis_size(first) == axis_size(own) else unlabelled(own))
        return tuple(axes)

    def _without_iterated(self, end: End, structure: Structure | None) -> Structure | None:
        if structure is None or end.iterated is None:
            return structure
        if end.iterated >= len(structure):
            return None
        return structure[: end.iterated] + structure[end.iterated + 1 :]

    def _labelled(self) -> list[int]:
        return [axis for axis, factors in enumerate(self.shared or ()) if has_labels(factors)]

    # frames

    def _dims(self, state: State, end: End) -> tuple[int, ...]:
        """Return an end's frame dimensions along the shared labelled axes, in order."""
        structure = state.structure(end.value)
        assert structure is not None
        return tuple(dim for axis in self._labelled() for dim in frame_dims(structure, end.axis(axis)))

    def _spread_out(self, array: np.ndarray, dims: tuple[int, ...], rank: int) -> np.ndarray:
        """Bring an array over the shared dimensions into a frame of a rank."""
        return np.expand_dims(array, tuple(dim for dim in range(rank) if dim not in dims))

    def _others(self, dims: tuple[int, ...], rank: int) -> tuple[int, ...]:
        return tuple(dim for dim in range(rank) if dim not in dims)

    # constants

    def _agreed(self, state: State, ends: Sequence[End]) -> Constant | None:
        """Return, in the shared frame, what all ends are known to hold."""
        assert self.shared is not None
        found: Constant | None = None
        for end in ends:
            constant = state.constant(end.value)
            if constant is None:
                return None
            dims = self._dims(state, end)
            others = self._others(dims, constant.known.ndim)
            value = np.broadcast_to(constant.value, constant.known.shape)
            low, high = value.min(axis=others), value.max(axis=others)
            known = constant.known.all(axis=others) & (low == high)
            if found is not None:
                known = known & found.known & (low == found.value)
            found = Constant(known, low)
        if found is None or not found.known.any():
            return None
        shape = frame(self.shared)
        return Constant(found.known.reshape(shape), found.value.reshape(shape))

    def constants(self, state: State) -> None:
        """The node's output holds what every way to it holds."""
        tie = self.tie
        if tie.out is None or self.shared is None or not self._labelled():
            return
        held = self.assumed if tie.source is not None else self._agreed(state, tie.results)
        if held is not None:
            shape = state.mask(tie.out.value).shape
            state.set_constant(tie.out.value, held.known.reshape(shape), held.value.reshape(shape))

    # masks and layouts

    def spread(self, state: State) -> None:
        """Keep at every end what is kept at any."""
        if not self._labelled():
            return
        for source in self.tie.ends:
            mask = state.mask(source.value)
            dims = self._dims(state, source)
            kept = np.asarray(mask.any(axis=self._others(dims, mask.ndim)))
            for end in self.tie.ends:
                if end is not source:
                    own = state.mask(end.value).ndim
                    state.grow(
                        end.value,
                        self._spread_out(kept, self._dims(state, end), own),
                        Cause("the same inside and outside of the body of", self.node, source.value),
                    )

    def enter_layout(self, state: State) -> None:
        """Lay out the body's input."""
        if self.tie.inner is None:
            return
        if self.tie.source is None or not self._labelled():
            default_layout(state, self.tie.inner.value)
            return
        self._set_layout(state, self.tie.inner, self._order(state, self.tie.source))

    def layout(self, state: State) -> None:
        """Lay out the node's output; what a body returns must stand in the same order."""
        tie = self.tie
        if not self._labelled():
            if tie.out is not None:
                default_layout(state, tie.out.value)
            return
        orders = [self._order(state, end) for end in (tie.source, *tie.results) if end is not None]
        if any(not np.array_equal(order, orders[0]) for order in orders[1:]):
            raise ConflictError([end.value for end in tie.ends])
        if tie.out is not None:
            self._set_layout(state, tie.out, orders[0])

    def _set_layout(self, state: State, end: End, order: np.ndarray) -> None:
        rank = state.mask(end.value).ndim
        state.layouts[end.value] = self._spread_out(order, self._dims(state, end), rank)

    def _order(self, state: State, end: End) -> np.ndarray:
        """Return in which order the shared channels stand at an end."""
        mask = state.mask(end.value)
        dims = self._dims(state, end)
        coords = coordinates(state.layouts[end.value], mask.shape)
        lines = []
        for dim in dims:
            others = self._others(dims, mask.ndim)
            low, high = coords[dim].min(axis=others), coords[dim].max(axis=others)
            if not np.array_equal(low, high):
                raise ConflictError([item.value for item in self.tie.ends])
            lines.append(low)
        return np.asarray(np.ravel_multi_index(tuple(lines), tuple(mask.shape[dim] for dim in dims)))
