"""Random valid ONNX graphs with planted dead structure, and what is needed to compare and shrink them.

A graph grows node by node: every node is run in ONNX Runtime as it is added, so that shapes are the runtime's own
and activations stay of order one; a node that the runtime refuses is left out. Choices come from a chooser, which
is either a seeded generator (the nightly command) or hypothesis (the test suite).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.policy import TARGETS, alignment, multiple_fill
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.rounds import carry_out

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WEIGHT_TYPES = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
)
# A weight that is larger than this tells nothing more and costs time.
LARGEST_TENSOR = 20_000
LARGEST_VALUE = 50.0
TOLERANCE = 1e-5
# What the runtime's own rounding does to an output is measured with inputs moved by this share.
NUDGE = 1e-6


class Chooser(Protocol):
    """Where the generator's decisions come from."""

    def integer(self, low: int, high: int) -> int:
        """Return a whole number between two, both included."""

    def one_of(self, options: Sequence[Any]) -> Any:
        """Return one of several things."""

    def chance(self, share: float) -> bool:
        """Return True in about this share of all calls."""


class SeededChooser:
    """Decisions from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        """See `Chooser`."""
        return int(self._random.integers(low, high + 1))

    def one_of(self, options: Sequence[Any]) -> Any:
        """See `Chooser`."""
        return options[int(self._random.integers(len(options)))]

    def chance(self, share: float) -> bool:
        """See `Chooser`."""
        return bool(self._random.random() < share)


class DrawnChooser:
    """Decisions drawn by hypothesis; the simplest one is no."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        """See `Chooser`."""
        return int(self._draw(st.integers(low, high)))

    def one_of(self, options: Sequence[Any]) -> Any:
        """See `Chooser`."""
        return options[self._draw(st.integers(0, len(options) - 1))]

    def chance(self, share: float) -> bool:
        """See `Chooser`."""
        return bool(self._draw(st.integers(0, 99)) >= 100 * (1 - share))


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph and an input for it."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]


# running


@functools.lru_cache(maxsize=4096)
def _node_session(data: bytes) -> onnxruntime.InferenceSession | None:
    return session(data, optimised=False)


def session(data: bytes, *, optimised: bool) -> onnxruntime.InferenceSession:
    """Open a model on one thread, with all graph optimisations or none."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    # else the optimiser quantises what is multiplied by dequantised weights, where it recognises them
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimised else level.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], *, optimised: bool = False) -> list[np.ndarray]:
    """Return a model's outputs."""
    opened = session(model.SerializeToString(), optimised=optimised)
    wanted = {value.name for value in opened.get_inputs()}
    return list(opened.run(None, {name: array for name, array in feeds.items() if name in wanted}))


def runs_optimised(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> bool:
    """Return whether the runtime runs a model after its own optimisation."""
    try:
        run(model, feeds, optimised=True)
    except Exception:  # noqa: BLE001 - the runtime's refusal is the answer
        return False
    return True


def shrunk(model: onnx.ModelProto, align: str | int = "off") -> onnx.ModelProto:
    """Prepare, plan and rewrite in this process: what `compress` does before it simplifies and verifies."""
    original = ir.from_proto(model)
    prepared = prepare(original)
    fill = multiple_fill(alignment(align, TARGETS["cpu-avx512"]))
    removal, _ = plan(prepared.graph, fill)
    rest = carry_out(prepared, removal, original, fill)
    return model if rest.model is original else ir.to_proto(rest.model)


def weight_elements(model: onnx.ModelProto) -> int:
    """Return how many elements the initializers and constants of a model hold."""
    return sum(_graph_elements(graph) for graph in _graphs(model.graph))


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _graphs(attribute.g)
    return found


def read_by(node: onnx.NodeProto) -> set[str]:
    """Return the names that a node reads, those that its bodies capture included."""
    names = {name for name in node.input if name}
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            names |= captured(attribute.g)
    return names


def captured(graph: onnx.GraphProto) -> set[str]:
    """Return the outer names that a body reads."""
    own = {item.name for item in (*graph.input, *graph.initializer)}
    own |= {name for node in graph.node for name in node.output}
    read = {item.name for item in graph.output}.union(*(read_by(node) for node in graph.node))
    return read - own


def _graph_elements(graph: onnx.GraphProto) -> int:
    tensors = list(graph.initializer)
    tensors += [a.t for n in graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    return sum(int(np.prod(item.dims)) for item in tensors if item.data_type in WEIGHT_TYPES)


def bias_allowance(model: onnx.ModelProto) -> int:
    """Return how many elements folding may add: a bias for each contraction that has none."""
    graphs = _graphs(model.graph)
    tensors = {item.name: item for graph in graphs for item in graph.initializer}
    nodes = [node for graph in graphs for node in graph.node]
    tensors.update((node.output[0], node.attribute[0].t) for node in nodes if node.op_type == "Constant")
    total = 0
    for node in nodes:
        weights = [tuple(tensors[name].dims) for name in node.input if name in tensors and tensors[name].dims]
        if node.op_type in {"Conv", "ConvTranspose", "Gemm", "MatMul"} and weights:
            total += max(max(shape) for shape in weights)
    return total


def difference(
    expected: Sequence[np.ndarray], got: Sequence[np.ndarray], slack: Sequence[float] = ()
) -> str | None:
    """Return how two sets of outputs differ, or None where they agree within the tolerance.

    Args:
        expected: the original's outputs.
        got: the result's.
        slack: for each output, a further absolute difference to allow.
    """
    if len(expected) != len(got):
        return f"{len(expected)} outputs became {len(got)}"
    for index, (one, other) in enumerate(zip(expected, got, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"output {index} is {other.dtype}{other.shape}, was {one.dtype}{one.shape}"
        if one.size == 0:
            continue
        if one.dtype.kind != "f":
            if not np.array_equal(one, other):
                return f"output {index} of type {one.dtype} differs"
            continue
        odd, odd_too = ~np.isfinite(one), ~np.isfinite(other)
        if not np.array_equal(one[odd], other[odd_too], equal_nan=True) or not np.array_equal(odd, odd_too):
            return f"output {index}: NaN or infinities differ"
        wide, wide_too = np.where(odd, 0, one).astype(np.float64), np.where(odd, 0, other).astype(np.float64)
        scale = max(float(np.abs(wide).max()), 1e-3)
        worst = float(np.abs(wide - wide_too).max())
        if worst > TOLERANCE * scale + (slack[index] if slack else 0.0):
            return f"output {index} differs by {worst / scale:.2e} of its largest entry"
    return None


def rounding(model: onnx.ModelProto, feeds: dict[str, np.ndarray], expected: list[np.ndarray]) -> list[float]:
    """Return how much each output moves when inputs move by a rounding error or so, or the kernels change."""
    nudged = {
        name: (array * np.float32(1 + NUDGE)) if array.dtype == np.float32 else array
        for name, array in feeds.items()
    }
    slack = [0.0] * len(expected)
    others = [run(model, nudged)]
    if runs_optimised(model, feeds):
        others.append(run(model, feeds, optimised=True))
    for other in others:
        for index, (one, two) in enumerate(zip(expected, other, strict=True)):
            if one.dtype.kind == "f" and one.shape == two.shape and one.size:
                gap = np.abs(one.astype(np.float64) - two.astype(np.float64))
                slack[index] = max(slack[index], 3 * float(np.nanmax(np.where(np.isfinite(gap), gap, 0))))
    return slack


def failure(  # noqa: PLR0911 - a list of ways to fail
    case: Case, align: str | int = "off", *, floor: bool = True
) -> str | None:
    """Return what is wrong with the compressed graph, or None: crash, difference, growth or a second gain.

    Args:
        case: the graph.
        align: as for `compress`.
        floor: whether a gain by a second compression (without alignment) counts.
    """
    try:
        expected = run(case.model, case.feeds)
    except Exception as error:  # noqa: BLE001 - every failure is what this looks for
        return f"the original does not run: {str(error)[:200]}"
    try:
        result = shrunk(case.model, align)
    except Exception as error:  # noqa: BLE001 - every failure is what this looks for
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    slack = rounding(case.model, case.feeds, expected)
    # the runtime's own rewrites break some valid graphs: such a graph is compared without them
    for optimised in (False, True) if runs_optimised(case.model, case.feeds) else (False,):
        try:
            got = run(result, case.feeds, optimised=optimised)
        except Exception as error:  # noqa: BLE001 - as above
            return f"result does not run: {str(error)[:300]}"
        # integers are the same under the same optimisations; these round what is quantised in other places
        reference = run(case.model, case.feeds, optimised=True) if optimised else expected
        wrong = difference(reference, got, slack)
        if wrong is not None:
            return f"wrong: {wrong}"
    before, after = weight_elements(case.model), weight_elements(result)
    if after > before + bias_allowance(case.model):
        return f"grew: {before} elements became {after}"
    if align == "off" and floor:
        again = weight_elements(shrunk(result))
        if again != after:
            return f"not at its floor: {before} elements became {after}, and {again} when compressed again"
    return None


# shrinking


def reduced(case: Case, fails: Callable[[Case], bool], budget: int = 400) -> Case:
    """Return a smaller case that still fails: outputs dropped, later outputs cut off, nodes bypassed."""
    changed = True
    while changed and budget > 0:
        changed = False
        for candidate in _smaller(case):
            budget -= 1
            if budget <= 0:
                break
            if runs(candidate) and fails(candidate):
                case, changed = candidate, True
                break
    return case


def runs(case: Case) -> bool:
    """Return whether ONNX Runtime runs a case."""
    try:
        run(case.model, case.feeds)
    except Exception:  # noqa: BLE001 - the runtime's refusal is the answer
        return False
    return True


def _smaller(case: Case) -> Any:  # noqa: C901 - three ways, each a few lines
    graph = case.model.graph
    if len(graph.output) > 1:
        for output in graph.output:
            yield _with_graph(case, graph.node, [output])
    for node in graph.node[:-1]:
        for name in node.output:
            if name:
                yield _with_graph(case, graph.node, [onnx.ValueInfoProto(name=name)])
    for index in range(len(graph.node) - 1, -1, -1):
        node = graph.node[index]
        for source in node.input:
            if source and not any(item.name == source for item in graph.initializer):
                nodes = [onnx.NodeProto.FromString(item.SerializeToString()) for item in graph.node]
                del nodes[index]
                for item in nodes:
                    for place, name in enumerate(item.input):
                        if name == node.output[0]:
                            item.input[place] = source
                outputs = [
                    onnx.ValueInfoProto(name=source if value.name == node.output[0] else value.name)
                    for value in graph.output
                ]
                yield _with_graph(case, nodes, outputs)


def _with_graph(case: Case, nodes: Sequence[onnx.NodeProto], outputs: Sequence[onnx.ValueInfoProto]) -> Case:
    needed = {value.name for value in outputs}
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.insert(0, node)
            needed |= read_by(node)
    source = case.model.graph
    graph = helper.make_graph(
        kept,
        "reduced",
        [value for value in source.input if value.name in needed],
        outputs,
        [item for item in source.initializer if item.name in needed],
    )
    model = helper.make_model(
        graph, opset_imports=list(case.model.opset_import), ir_version=case.model.ir_version
    )
    return Case(model, case.feeds)


# growing


def opsets(default: int) -> list[onnx.OperatorSetIdProto]:
    """Return the operator sets of a random graph: the default one, and ONNX Runtime's own."""
    return [helper.make_opsetid("", default), helper.make_opsetid("com.microsoft", 1)]


class Builder:
    """A graph that grows, with the value that each tensor has for one input."""

    def __init__(self, choose: Chooser, seed: int, opset: int) -> None:
        self.choose = choose
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.values: dict[str, np.ndarray] = {}
        self.inputs: dict[str, tuple[int | str, ...]] = {}
        self.pool: list[str] = []
        self.dynamic = False
        self._count = 0

    # pieces

    def name(self, prefix: str) -> str:
        """Return a name not used yet."""
        self._count += 1
        return f"{prefix}{self._count}"

    def initializer(self, array: np.ndarray, prefix: str = "w") -> str:
        """Add an initializer, or take one that holds the same."""
        name = self.name(prefix)
        self.initializers[name] = np.asarray(array)
        self.values[name] = self.initializers[name]
        return name

    def ints(self, *entries: int) -> str:
        """Add a vector of integers."""
        return self.initializer(np.array(entries, np.int64), "k")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape for the input at hand."""
        return tuple(self.values[name].shape)

    def rank(self, name: str) -> int:
        """Return a tensor's rank."""
        return self.values[name].ndim

    def emit(self, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str | None:
        """Add a node if ONNX Runtime runs it and its values are usable; return its first output's name."""
        names = [self.name("t") for _ in range(outputs)]
        node = helper.make_node(operator, list(inputs), names, **attributes)
        results = self.evaluated(node)
        if results is None:
            return None
        for result in results:
            sound = result.dtype.kind != "f" or (
                np.isfinite(result).all() and np.abs(result).max(initial=0) < LARGEST_VALUE
            )
            if not sound or result.size > LARGEST_TENSOR or result.size == 0:
                return None
        self.nodes.append(node)
        self.values.update(zip(names, results, strict=True))
        return names[0]

    def evaluated(self, node: onnx.NodeProto) -> list[np.ndarray] | None:
        """Run one node on the values at hand, or return None where the runtime refuses it."""
        names = sorted(read_by(node))
        feeds = {name: self.values[name] for name in names}
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                for name, array in feeds.items()
                if name not in self.initializers
            ],
            [onnx.ValueInfoProto(name=name) for name in node.output if name],
            [numpy_helper.from_array(self.initializers[n], n) for n in feeds if n in self.initializers],
        )
        model = helper.make_model(graph, opset_imports=opsets(self.opset), ir_version=8)
        try:
            return run(model, feeds)
        except Exception:  # noqa: BLE001 - the runtime's refusal is the answer
            return None

    def add(self, *names: str | None) -> bool:
        """Put tensors at the disposal of later nodes; say whether there were any."""
        good = [name for name in names if name is not None and self.values[name].dtype == np.float32]
        self.pool += good
        return bool(good)

    def pick(self, *ranks: int) -> str | None:
        """Return a tensor of one of some ranks, a late one more often."""
        fits = [name for name in self.pool if not ranks or self.rank(name) in ranks]
        if not fits:
            return None
        recent = fits[-3:]
        return str(self.choose.one_of(recent if self.choose.chance(0.7) else fits))

    # weights

    def weight(
        self, shape: tuple[int, ...], fan: int, out: int | None = None, column: int | None = None
    ) -> str:
        """Add a weight with planted zeros along its output and input axes, or share an earlier one."""
        choose = self.choose
        same = [
            name
            for name, array in self.initializers.items()
            if array.shape == shape and name.startswith("w") and array.dtype == np.float32
        ]
        if same and choose.chance(0.15):
            return str(choose.one_of(same))
        array = (self.random.standard_normal(shape) / np.sqrt(max(fan, 1))).astype(np.float32)
        for axis, share in ((out, 0.5), (column, 0.3)):
            if axis is not None and choose.chance(share):
                array[(slice(None),) * axis + (self.dead(shape[axis]),)] = 0
        return self.initializer(array)

    def dead(self, size: int) -> np.ndarray:
        """Return which of some channels die: a few, many, all or all but one."""
        kind = self.choose.one_of(("few", "half", "most", "all", "block"))
        mask = self.random.random(size) < {"few": 0.2, "half": 0.5, "most": 0.85}.get(kind, 0.0)
        if kind == "all":
            mask[:] = True
        if kind == "block":
            mask[: self.choose.integer(1, size)] = True
        return np.flatnonzero(mask)

    def vector(self, size: int, zero: float = 0.25) -> np.ndarray:
        """Return a bias or scale, zero in places."""
        array = self.random.standard_normal(size).astype(np.float32)
        if self.choose.chance(zero):
            array[self.dead(size)] = 0
        return array

    def biased(self, name: str | None, axis: int, *, share: float = 0.6) -> str | None:
        """Add a bias along an axis, as an Add node of its own."""
        if name is None or not self.choose.chance(share):
            return name
        shape = [1] * (self.rank(name) - axis)
        shape[0] = self.shape(name)[axis]
        bias = self.initializer(self.vector(shape[0]).reshape(shape), "b")
        return self.emit("Add", [name, bias] if self.choose.chance(0.5) else [bias, name])

    def linear(self, name: str, width: int) -> str | None:
        """Multiply the last axis by a weight."""
        size = self.shape(name)[-1]
        made = self.emit("MatMul", [name, self.weight((size, width), size, out=1, column=0)])
        return made if made is None else self.biased(made, self.rank(made) - 1)

    def target(self, *sizes: int) -> str:
        """Return a Reshape's target, which leaves the batch open where that is dynamic."""
        entries = list(sizes)
        if self.dynamic or self.choose.chance(0.3):
            entries[0] = -1
        return self.ints(*entries)
