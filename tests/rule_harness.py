"""One node between synthetic producers and consumers: what a rule says of it, held against ONNX Runtime.

A trial takes an example of a rule and a seed. The seed decides which axes of the computed operands are labelled (as
a producer would have labelled them), which of their channels hold planted constants, in which order kept channels
stand, where the weights hold zeros, and which output channels are asked for. The analysis runs on the three-part
graph of source, node and sink; the node is then cut and compared with the original.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import onnx
import onnx_ir as ir
from graphs import difference, run
from onnx import helper, numpy_helper
from rule_ends import (
    FIRST_DYNAMIC,
    MODES,
    ORDERS,
    Sink,
    Source,
    factor_sizes,
    kept_slice,
    planted_weight,
    tensors,
)

from etp_deploy.errors import PlanError
from etp_deploy.surgery.analysis import Analysis, read, solve
from etp_deploy.surgery.boundaries import open_bodies
from etp_deploy.surgery.prepare import infer_shapes
from etp_deploy.surgery.rewrite import Rewriter
from etp_deploy.surgery.rules import registry

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from etp_deploy.surgery.examples import Example, Operand
    from etp_deploy.surgery.shapes import Axis
    from etp_deploy.surgery.state import State
    from etp_deploy.surgery.statements.base import Statement

SEEDS = range(3 * len(MODES))
HARNESS = "harness"  # the domain of the operators at both ends
# what half precision's own rounding does to a sum of a few terms, of the largest entry
HALF = 4e-3


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        failure: which property does not hold and how, None where all do.
        lost: how many positions of operands and outputs go.
        claimed: how many output positions are said to be constant, and axes to sum to one.
    """

    failure: str | None
    lost: int = 0
    claimed: int = 0


# trials


class Trial:
    """One example of a rule under one seed."""

    def __init__(self, domain: str, operator: str, example: Example, seed: int) -> None:
        self.seed = seed
        self.tensors = tensors(example, seed)
        self.order = ORDERS[int(np.random.default_rng([seed, 3]).integers(len(ORDERS)))]
        rng = np.random.default_rng([seed, 4])
        names, weights = [], []
        for index, operand in enumerate(example.operands):
            names.append("" if operand is None else f"x{index}")
            if operand is not None and operand.role in {"weight", "literal"}:
                weights.append(numpy_helper.from_array(planted_weight(operand, rng), f"x{index}"))
        self.outputs = [f"y{index}" for index in range(example.outputs)]
        attributes = {
            name: numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
            for name, value in example.attributes.items()
        }
        self.node = helper.make_node(operator, names, self.outputs, domain=domain, **attributes)
        self.weights = weights
        self.imports = {"": example.opset, HARNESS: 1, **({domain: 1} if domain else {})}

    def feeds(self, number: int) -> dict[str, np.ndarray]:
        """Return random data for the computed operands."""
        rng = np.random.default_rng([self.seed, 5, number])
        return {tensor.name: tensor.draw(rng) for tensor in self.tensors}

    def original(self, shapes: Mapping[str, Sequence[int | str]]) -> onnx.ModelProto:
        """Return the node alone, its computed operands being inputs."""
        infos = [
            helper.make_tensor_value_info(t.name, _element_type(t.operand), shapes[t.name])
            for t in self.tensors
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.outputs]
        return self._model([self.node], infos, outputs, self.weights)

    def _model(self, nodes: Sequence[onnx.NodeProto], *parts: Any) -> onnx.ModelProto:
        graph = helper.make_graph(nodes, "one", *parts)
        opsets = [helper.make_opsetid(*entry) for entry in self.imports.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def between_ends(self) -> ir.Model:
        """Return source, node and sink, with the shapes that inference knows."""
        declared = {
            t.name: [_dimension(axis, size) for axis, size in zip(t.structure, t.operand.shape, strict=True)]
            for t in self.tensors
        }
        inferred = ir.from_proto(self.original(declared))
        infer_shapes(inferred)
        sources = [helper.make_node("Source", [], [t.name], domain=HARNESS) for t in self.tensors]
        sink = helper.make_node("Sink", self.outputs, [], domain=HARNESS)
        model = ir.from_proto(self._model([*sources, self.node, sink], [], [], self.weights))
        open_bodies(model)
        known = {value.name: value for value in (*inferred.graph.inputs, *inferred.graph.outputs)}
        if self.seed < FIRST_DYNAMIC:
            self._declare([known[name] for name in self.outputs if known[name].shape is None])
        for value in (value for node in model.graph for value in node.outputs):
            value.shape, value.type = known[value.name].shape, known[value.name].type
        return model

    def _declare(self, outputs: Sequence[ir.Value]) -> None:
        """Give outputs that inference knows nothing of the shapes that a file may declare for them."""
        feeds = self.feeds(0)
        proto = self.original({name: array.shape for name, array in feeds.items()})
        try:
            shapes = (
                {name: a.shape for name, a in zip(self.outputs, run(proto, feeds), strict=True)}
                if outputs
                else {}
            )
        except Exception:  # noqa: BLE001 - the runtime raises classes of its own
            return
        for value in outputs:
            value.shape = ir.Shape(shapes.get(str(value.name), ()))

    def ends(self) -> dict[tuple[str, str], Callable[[ir.Node], Statement]]:
        """Return the rules of both ends."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        return {
            (HARNESS, "Source"): lambda node: Source(
                node, by_name[str(node.outputs[0].name)], self.order, self.seed
            ),
            (HARNESS, "Sink"): lambda node: Sink(node, self.seed),
        }

    def outcome(self) -> Outcome:
        """Analyse, cut, run, compare."""
        model = self.between_ends()
        with mock.patch.dict(registry._RULES, self.ends()):
            analysis = read(model.graph)
        try:
            solve(analysis)
        except PlanError as error:
            return Outcome(f"no plan: {error}")
        node = next(node for node in model.graph if node.domain != HARNESS)
        state = analysis.state
        values = [value for value in state.keep if value.producer() is not None]
        lost = sum(int((~state.keep[value]).sum()) for value in values)
        claims = {value: state.constants[value] for value in node.outputs if value in state.constants}
        claimed = sum(int(claim.known.sum()) for claim in claims.values())
        claimed += sum(value in state.stochastic for value in node.outputs)
        failure = self._failure(model, analysis, node, lost=lost, claimed=claimed)
        return Outcome(failure, lost, claimed)

    def _failure(
        self, model: ir.Model, analysis: Analysis, node: ir.Node, *, lost: int, claimed: int
    ) -> str | None:
        feeds = self.feeds(0)
        proto = self.original({name: array.shape for name, array in feeds.items()})
        edits = tuple(analysis.statements[node].edits(analysis.state))
        try:
            expected = run(proto, feeds)
        except Exception as error:  # noqa: BLE001 - the runtime raises classes of its own
            # a form that the runtime does not run is a form of which nothing may be said
            return f"the example does not run: {error}" if lost or claimed or edits else None
        wrong = self._wrong_claim(analysis.state, node, expected)
        if wrong or not (lost or edits):
            return wrong
        state, outputs = analysis.state, node.outputs[: len(self.outputs)]
        kept = _kept(state, outputs, expected)
        other = run(proto, self._with_unread_changed(state, model, feeds))
        wrong = _compared(kept, _kept(state, outputs, other))
        if wrong:
            return f"what is not read matters: {wrong}"
        return self._wrong_cut(model, state, [(node, edits)], feeds, kept)

    def _wrong_claim(self, state: State, node: ir.Node, got: Sequence[np.ndarray]) -> str | None:
        """Return which claim about the outputs does not hold."""
        for value, array in zip(node.outputs, got, strict=False):
            structure = state.structure(value)
            if structure is None:
                continue
            split = array.reshape(factor_sizes(structure, array.shape))
            claim = state.constants.get(value)
            if claim is not None:
                where = np.broadcast_to(claim.known, split.shape)
                said = np.broadcast_to(claim.value, split.shape).astype(array.dtype)
                wrong = _compared([np.where(where, said, split)], [split])
                if wrong:
                    return f"a claimed constant does not hold: {wrong}"
            if value in state.stochastic:
                sums = array.sum(axis=state.stochastic[value], dtype=np.float64)
                if not np.allclose(sums, 1, atol=1e-5):
                    return "entries that are said to sum to one do not"
        return None

    def _with_unread_changed(
        self, state: State, model: ir.Model, feeds: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return the data with other entries wherever a channel is neither kept nor a known constant."""
        fresh = self.feeds(1)
        values = {value.name: value for node in model.graph for value in node.outputs}
        changed = {}
        for tensor in self.tensors:
            old, new = feeds[tensor.name], fresh[tensor.name]
            split = factor_sizes(tensor.structure, old.shape)
            stays = state.mask(values[tensor.name]) | tensor.known
            changed[tensor.name] = np.where(
                np.broadcast_to(stays, split), old.reshape(split), new.reshape(split)
            ).reshape(old.shape)
        return changed

    def _wrong_cut(
        self,
        model: ir.Model,
        state: State,
        edits: Sequence[tuple[ir.Node, Any]],
        feeds: dict[str, np.ndarray],
        kept: list[np.ndarray],
    ) -> str | None:
        """Return how the cut node's outputs differ from the kept slices of the original's."""
        values = {value.name: value for node in model.graph for value in node.outputs}
        cut = {
            t.name: kept_slice(feeds[t.name], t.structure, state.layouts[values[t.name]])
            for t in self.tensors
        }
        Rewriter(model.graph).apply(edits)
        proto = ir.to_proto(model)
        nodes = [node for node in proto.graph.node if node.domain != HARNESS]
        sink = next(node for node in proto.graph.node if node.op_type == "Sink")
        infos = [
            helper.make_tensor_value_info(t.name, _element_type(t.operand), cut[t.name].shape)
            for t in self.tensors
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in sink.input]
        result = self._model(nodes, infos, outputs, list(proto.graph.initializer))
        try:
            got = run(result, cut)
        except Exception as error:  # noqa: BLE001 - as above
            return f"the cut node does not run: {error}"
        wrong = _compared(kept, got)
        return f"slicing does not commute: {wrong}" if wrong else None


def _kept(state: State, outputs: Sequence[ir.Value], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [
        kept_slice(array, state.structure(value), state.layouts[value])
        for value, array in zip(outputs, arrays, strict=True)
    ]


def _compared(expected: list[np.ndarray], got: list[np.ndarray]) -> str | None:
    slack = [
        HALF * float(np.abs(array, dtype=np.float64).max(initial=0)) if array.dtype == np.float16 else 0.0
        for array in expected
    ]
    return difference(expected, got, slack)


def _dimension(axis: Axis, size: int) -> int | str:
    return size if all(factor.size.static is not None for factor in axis) else str(axis[0].size)


def _element_type(operand: Operand) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(operand.dtype))


def outcomes(domain: str, operator: str, example: Example, seeds: Sequence[int] = SEEDS) -> list[Outcome]:
    """Return what the trials of an example find, with the rule that is registered now."""
    return [Trial(domain, operator, example, seed).outcome() for seed in seeds]


def verdict(found: Sequence[Outcome], *, removable: bool) -> str | None:
    """Return what is wrong with an example's outcomes, or None."""
    for seed, item in zip(SEEDS, found, strict=False):
        if item.failure is not None:
            return f"seed {seed}: {item.failure}"
    lost = sum(item.lost for item in found)
    if removable and not lost:
        return "nothing can be removed, though the example says so"
    if not removable and lost:
        return "something is removed, though the example says that nothing can be"
    return None
