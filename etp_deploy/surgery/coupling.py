"""Which channels can only go together, asked of the analysis itself.

Two questions are put to the statements, none of which is answered here for an operator:

1. *Which positions are the same?* With all constant weights taken for zero, kept positions spread only along
   links (elementwise, concatenation, depthwise). Positions that keep each other are one **class**; the module of
   a class is all that cannot stay without it.
2. *What goes with a module?* Each module gets a random code word. In round r every module whose word has bit r is
   taken for dead at once, and the fixpoint is run: what dies in exactly the rounds of one word goes with that
   module. Modules that come back (pinned axes, equal counts) are no modules, and are left out with their axis.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from etp_deploy.surgery.analysis import solve
from etp_deploy.surgery.classes import classes_of
from etp_deploy.surgery.lines import Line, code_edits, contraction_lines
from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.state import Cause, Constant
from etp_deploy.surgery.statements.attention import Attention
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.product import Product
from etp_deploy.surgery.statements.recurrent import Recurrent

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis
    from etp_deploy.surgery.classes import Classes
    from etp_deploy.surgery.state import State

# rounds of planting beyond those that tell modules apart: what dies with either of two modules bears both words at
# once, and must not look like a third's; it would have to by chance, once in millions
MARGIN = 16
MOST_ROUNDS = 63
# rounds that find out whether an axis lets go
TRIALS = 3


@dataclass(frozen=True)
class Coupling:
    """The modules of a graph that can go, and what goes with each.

    Attributes:
        kinds: for each module its axis's kind: "channels", "neurons", "heads" or "units".
        axes: for each module the number of the axis that it was found on; modules of one axis may be ranked together.
        words: the code word of each module.
        lines: for each constant that loses something, which word each of its entries bears.
        positions: for each module the positions, as (tensor, flat index into its frame), that it consists of.
    """

    kinds: tuple[str, ...]
    axes: tuple[int, ...]
    words: np.ndarray
    lines: tuple[Line, ...]
    positions: tuple[dict[ir.Value, np.ndarray], ...]


@dataclass
class _Axis:
    """One candidate: classes that are removable one module at a time, or not, in some way of grouping them.

    Attributes:
        kind: see `Coupling.kinds`.
        ways: assignments of classes to modules, best first.
    """

    kind: str
    ways: deque[np.ndarray] = field(default_factory=deque)


def couple(analysis: Analysis) -> Coupling:
    """Find all modules of a graph that can go.

    Args:
        analysis: from `analysis.read`, of a graph in which no weight is zero; its masks are changed.
    """
    classes = classes_of(analysis)
    start = _Start.of(analysis.state)
    axes = list(_candidates(analysis, classes))
    refused = _refused(analysis, classes, axes, start)
    chosen = [axis for number, axis in enumerate(axes) if number not in refused]
    # what comes back may drag innocents along: each refused axis gets its ways tried beside the accepted alone
    pending = [axes[number] for number in refused]
    for axis in [*_joined(classes, pending), *pending]:
        if any((axis.ways[0] >= 0)[other.ways[0] >= 0].any() for other in chosen):
            continue
        while axis.ways and _refused(analysis, classes, [*chosen, axis], start):
            axis.ways.popleft()
        if axis.ways:
            chosen.append(axis)
    while True:
        coupling, back = _plant(analysis, classes, chosen, start)
        if not back:
            return coupling
        # few rounds let a way pass by chance; the axis that was accepted last is the most doubtful
        others = [number for number in back if len(chosen[number].ways) > 1]
        if others:
            chosen[others[-1]].ways.popleft()
        else:
            chosen = [axis for number, axis in enumerate(chosen) if number not in back]


def _refused(analysis: Analysis, classes: Classes, axes: list[_Axis], start: _Start) -> list[int]:
    """Return which axes do not let go when planted, in a few rounds."""
    return _plant(analysis, classes, axes, start, rounds=TRIALS)[1]


def _joined(classes: Classes, axes: list[_Axis]) -> Iterator[_Axis]:
    """Yield axes of heads that need the same classes as one (heads of all blocks that share a position bias)."""
    heads = [axis for axis in axes if axis.kind == "heads"]
    needs = [classes.needs(axis.ways[0] >= 0) for axis in heads]
    taken = [False] * len(heads)
    for first, axis in enumerate(heads):
        together = [
            other
            for other in range(first, len(heads))
            if not taken[other]
            and (needs[first] & needs[other]).any()
            and heads[other].ways[0].max() == axis.ways[0].max()
        ]
        if taken[first] or len(together) < 2:
            continue
        way = np.full(classes.count, -1)
        for other in together:
            taken[other] = True
            own = heads[other].ways[0]
            way[own >= 0] = own[own >= 0]
        yield _Axis("heads", deque([way]))


# candidates


def _candidates(analysis: Analysis, classes: Classes) -> Iterator[_Axis]:
    """Yield an axis for each set of classes that a contraction or a recurrence reads, each class once."""
    multiplied = _multiplied(analysis, classes)
    taken = classes.needs(_pinned(analysis.state, classes))
    for value, kind in _read(analysis):
        if value not in classes.offsets:
            continue
        fresh = np.unique(classes.of(value))
        fresh = fresh[~taken[fresh]]
        if fresh.size < 2:
            continue
        taken[fresh] = True
        heads = bool(multiplied[fresh].any())
        axis = _Axis("heads" if heads else kind)
        for way in _ways(analysis.state, classes, fresh, outermost_first=heads):
            modules = classes.dependents(way)
            if modules is not None:
                axis.ways.append(modules)
        if axis.ways:
            yield axis


def _pinned(state: State, classes: Classes) -> np.ndarray:
    """Return which classes stay whatever happens."""
    result = np.zeros(classes.count, bool)
    for value in state.pins:
        if value in classes.offsets and sum(extent > 1 for extent in state.mask(value).shape) == 1:
            result[classes.of(value)] = True
    return result


def _read(analysis: Analysis) -> Iterator[tuple[ir.Value, str]]:
    """Yield every tensor whose channels a constant weight reads, with what these are called."""
    for says in analysis.statements.values():
        if isinstance(says, Contraction) and says.active:
            yield says.data, "channels" if says.node.op_type in {"Conv", "ConvTranspose"} else "neurons"
        elif isinstance(says, Recurrent) and says.active:
            yield says.data, "channels"
            for value in says.node.outputs:
                yield value, "units"


def _multiplied(analysis: Analysis, classes: Classes) -> np.ndarray:
    """Return which classes are operands or results of a product of activations: those of attention."""
    result = np.zeros(classes.count, bool)
    for says in analysis.statements.values():
        if isinstance(says, Product | Attention):
            for value in (*says.node.inputs, *says.node.outputs):
                if value in classes.offsets:
                    result[classes.of(value)] = True
    return result


def _ways(
    state: State, classes: Classes, fresh: np.ndarray, *, outermost_first: bool
) -> Iterator[np.ndarray]:
    """Yield ways to group classes into modules.

    One by one, by an index of the finest tensor that has them all, or as a shuffle lays them side by side.
    """
    single = np.full(classes.count, -1)
    single[fresh] = np.arange(fresh.size)
    best: tuple[int, ir.Value] | None = None
    for value in classes.offsets:
        own = classes.of(value)
        if own.size == fresh.size and np.array_equal(np.sort(own), fresh):
            dims = sum(extent > 1 for extent in state.mask(value).shape)
            if best is None or dims > best[0]:
                best = dims, value
    ordered = []
    if best is not None:
        shape = state.mask(best[1]).shape
        own = classes.of(best[1])
        single[own] = np.arange(own.size)
        for dim in [dim for dim, extent in enumerate(shape) if extent > 1] if best[0] > 1 else []:
            way = np.full(classes.count, -1)
            way[own] = np.unravel_index(np.arange(own.size), shape)[dim]
            ordered.append(way)
    yield from [*ordered, single] if outermost_first else [single, *ordered[::-1]]
    shuffled = _shuffled(state, classes, fresh)
    if shuffled is not None:
        yield shuffled


def _shuffled(state: State, classes: Classes, fresh: np.ndarray) -> np.ndarray | None:
    """Return modules of classes that shuffles tie; None where none of these do, or they tie others as well.

    Where an axis is split into rows, these have to stay of equal length. A class of each row, one column, can go.
    """
    inside = np.zeros(classes.count, bool)
    inside[fresh] = True
    ties = [np.zeros((2, 0), np.int64)]
    for value in classes.offsets:
        grid = classes.of(value).reshape([extent for extent in state.mask(value).shape if extent > 1])
        if not (_is_split(state, classes, value) and inside[grid].any()):
            continue
        if not inside[grid].all():
            # a column that lies outside as a whole is no matter of these
            columns = inside[grid].reshape(len(grid), -1)
            if (columns.any(axis=0) != columns.all(axis=0)).any():
                return None
        ties.append(np.stack([grid[:-1].reshape(-1), grid[1:].reshape(-1)]))
    tail, head = np.concatenate(ties, axis=1)
    graph = coo_matrix((np.ones(len(tail), bool), (tail, head)), shape=(classes.count, classes.count))
    _, labels = connected_components(graph, directed=False)
    found, modules = np.unique(labels[fresh], return_inverse=True)
    if not 2 <= found.size < fresh.size:
        return None
    result = np.full(classes.count, -1)
    result[fresh] = modules
    return result


def _is_split(state: State, classes: Classes, value: ir.Value) -> bool:
    """Return whether a node lays a tensor's one axis out as several."""
    node = value.producer()
    dims = sum(extent > 1 for extent in state.mask(value).shape)
    return dims > 1 and any(
        source in classes.offsets
        and classes.sizes[source] == classes.sizes[value]
        and sum(extent > 1 for extent in state.mask(source).shape) == 1
        for source in (node.inputs if node is not None else ())
    )


# planting


@dataclass(frozen=True)
class _Start:
    """A state's masks before any fixpoint, to begin again from."""

    keep: dict[ir.Value, np.ndarray]
    product: set[ir.Value]
    constants: dict[ir.Value, Constant]

    @staticmethod
    def of(state: State) -> _Start:
        return _Start(
            {value: mask.copy() for value, mask in state.keep.items()},
            set(state.product),
            dict(state.constants),
        )

    def restore(self, analysis: Analysis) -> None:
        state = analysis.state
        for value, mask in self.keep.items():
            state.keep[value] = mask.copy()
            state.why[value] = np.zeros(mask.shape, np.int32)
        state.product.clear()
        state.product.update(self.product)
        state.constants.clear()
        state.constants.update(self.constants)
        state.causes[:] = [Cause("")]
        state.touched.clear()
        state.layouts.clear()
        for says in analysis.statements.values():
            says.rewind()


def _plant(
    analysis: Analysis, classes: Classes, axes: list[_Axis], start: _Start, rounds: int | None = None
) -> tuple[Coupling, list[int]]:
    """Take modules for dead, in rounds; return what went with each, and the axes that did not let go."""
    first, total = [], 0
    for axis in axes:
        first.append(total)
        total += int(axis.ways[0].max()) + 1
    if rounds is None:
        rounds = min(MOST_ROUNDS, 2 * total.bit_length() + MARGIN) if axes else 0
    words = _words([int(axis.ways[0].max()) + 1 for axis in axes], rounds)
    modules = np.full(classes.count, -1)
    for axis, offset in zip(axes, first, strict=True):
        inside = axis.ways[0] >= 0
        modules[inside] = axis.ways[0][inside] + offset
    bits = np.append(words, np.uint64(0))[modules]
    back = np.zeros(total, bool)
    codes = {value: np.zeros(mask.shape, np.uint64) for value, mask in analysis.state.keep.items()}
    lines: dict[tuple[ir.Value, tuple[int, ...], ir.Node], Line] = {}
    for number in range(rounds):
        start.restore(analysis)
        dead = (bits >> np.uint64(number)) & np.uint64(1) == 1
        _take_for_zero(analysis.state, classes, dead)
        solve(analysis)
        for value, mask in analysis.state.keep.items():
            codes[value] |= (~mask).astype(np.uint64) << np.uint64(number)
            if value in classes.offsets:
                own = classes.of(value)
                back[modules[own[mask.reshape(-1) & dead[own]]]] = True
        code_edits(analysis, number, lines)
    start.restore(analysis)
    numbers = np.repeat(np.arange(len(axes)), np.diff([*first, total]))
    coupling = Coupling(
        kinds=tuple(axes[number].kind for number in numbers),
        axes=tuple(int(number) for number in numbers),
        words=words,
        lines=(*lines.values(), *contraction_lines(analysis, codes)),
        positions=_positions(classes, modules, total),
    )
    return coupling, sorted({int(number) for number in numbers[back]})


def _words(counts: list[int], rounds: int) -> np.ndarray:
    """Draw a code word for each module, all different; in every round each axis keeps a module and loses about half.

    Args:
        counts: how many modules each axis has.
        rounds: bits of a word.
    """
    generator = np.random.default_rng(0)
    total = sum(counts)
    while True:
        words = np.zeros(total, np.uint64)
        for number in range(rounds):
            gone = [_half(count, generator) for count in counts]
            words |= np.concatenate(gone).astype(np.uint64) << np.uint64(number)
        if rounds <= TRIALS or np.unique(words[words > 0]).size == total:
            return words


def _half(count: int, generator: np.random.Generator) -> np.ndarray:
    """Choose half of an axis's modules, the smaller or the larger half where they are an odd number."""
    size = count // 2 + (int(generator.integers(2)) if count % 2 and count > 1 else 0)
    return np.asarray(generator.permutation(count) < size)


def _take_for_zero(state: State, classes: Classes, dead: np.ndarray) -> None:
    """Let dead positions hold the known constant zero."""
    for value in classes.offsets:
        gone = dead[classes.of(value)]
        if gone.any() and not is_parameter(value):
            shape = state.keep[value].shape
            state.constants[value] = Constant(gone.reshape(shape), np.zeros(shape, np.float32))


def _positions(classes: Classes, modules: np.ndarray, total: int) -> tuple[dict[ir.Value, np.ndarray], ...]:
    result: list[dict[ir.Value, np.ndarray]] = [{} for _ in range(total)]
    for value in classes.offsets:
        own = modules[classes.of(value)]
        for module in np.unique(own[own >= 0]):
            result[module][value] = np.flatnonzero(own == module)
    return tuple(result)
