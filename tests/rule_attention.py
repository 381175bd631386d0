"""Attention graphs for mutants of its rules: what the trials of one node seldom show; with exact counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from attention_blocks import MICROSOFT, TOKENS, WIDTH, Block, Widths, case
from graphs import opsets, weight_elements
from onnx import numpy_helper
from test_surgery_regressions import Net

if TYPE_CHECKING:
    from graphs import Case

HEADS, SIZE = 4, 16


def _attending(given: Case) -> onnx.NodeProto:
    return next(node for node in given.model.graph.node if node.op_type.endswith("Attention"))


def changed(given: Case, inputs: dict[int, np.ndarray]) -> Case:
    """Give the attention of a graph further inputs, which are initializers."""
    node = _attending(given)
    for place, array in inputs.items():
        node.input.extend([""] * (place + 1 - len(node.input)))
        node.input[place] = f"further{place}"
        given.model.graph.initializer.append(numpy_helper.from_array(array, node.input[place]))
    return given


def scored() -> Case:
    """Return an attention with a dead head whose scores are an output of the model."""
    block = Block(Widths())
    block.w["o"][1] = 0
    given = case("standard4", block)
    _attending(given).output.extend(["", "", "scores"])
    given.model.graph.output.append(onnx.ValueInfoProto(name="scores"))
    return given


def of_constant_values(form: str, mask: np.ndarray | None = None) -> Case:
    """Return an attention whose values of two heads are a bias alone."""
    block = Block(Widths())
    block.w["v"][:, [0, 3]] = 0
    return case(form, block, mask)


def of_dead_heads(form: str) -> tuple[Case, int]:
    """Return an attention of which two heads are dead, and what the block without them has."""
    block = Block(Widths())
    block.w["o"][[1, 2]] = 0
    return case(form, block), weight_elements(case(form, Block(Widths(groups=2))).model)


def cached(operator: str) -> Case:
    """Return an attention over a cache, of which one key and value head is dead."""
    net = Net(x=(1, 4, WIDTH), pk=(1, HEADS, 3, SIZE), pv=(1, HEADS, 3, SIZE))
    for name in "qkv":
        net.node("MatMul", ["x", net.rand(WIDTH, HEADS * SIZE)], name)
    names = ["y", "present_k", "present_v"]
    if operator == "MultiHeadAttention":
        given = ["q", "k", "v", "", "", "", "pk", "pv"]
        net.node(operator, given, names, domain=MICROSOFT, num_heads=HEADS)
    else:
        given = ["q", "k", "v", "pk", "pv", np.full(1, 6, np.int32), np.array(7, np.int32)]
        net.node(operator, given, names, domain=MICROSOFT, num_heads=HEADS, kv_num_heads=HEADS)
    net.node("MatMul", ["y", net.rand(HEADS * SIZE, WIDTH, dead=range(SIZE))], "out")
    return _with_microsoft(net.case("out", "present_k", "present_v", opset=23))


def _with_microsoft(given: Case) -> Case:
    del given.model.opset_import[:]
    given.model.opset_import.extend(opsets(23))
    return given


def attentions() -> dict[str, tuple[tuple[Case, int], ...]]:
    """Return, for each function, graphs and how many elements stay of each."""
    random = np.random.default_rng(5)
    whole = weight_elements(case("standard3", Block(Widths())).model)
    late = np.tri(TOKENS, TOKENS, -1, dtype=bool)
    projections = 4 * WIDTH * HEADS * SIZE
    dead, left = of_dead_heads("grouped")
    bias = random.standard_normal((1, 4, TOKENS, TOKENS)).astype(np.float32)
    sinks = random.standard_normal(4).astype(np.float32)
    masked = ((of_constant_values("standard3", late), whole),)
    grouped = (
        (of_constant_values("grouped"), whole),
        (changed(dead, {10: bias}), left + 2 * TOKENS * TOKENS),
        (changed(of_dead_heads("grouped")[0], {11: sinks}), left + 2),
        (cached("GroupQueryAttention"), projections),
    )
    return {
        "_check": ((scored(), whole),),
        "attention": masked,
        "_may_mask_all": masked,
        "group_query_attention": grouped,
        "multi_head_attention": ((cached("MultiHeadAttention"), projections),),
    }
