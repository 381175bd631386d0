"""Heads of the Attention operator (opset 23) go when their values or their out-projection are dead."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from etp_deploy.pipeline import compress

HEADS, SIZE, WIDTH, TOKENS = 6, 8, 16, 5


def attention_model(weights: dict[str, np.ndarray], groups: int, masked: bool) -> onnx.ModelProto:
    """One block: projections with biases, the operator, an out-projection."""
    nodes, inputs = [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])]
    constants = dict(weights)
    for name, heads in (("q", HEADS), ("k", groups), ("v", groups)):
        constants[f"{name}_shape"] = np.array([0, TOKENS, heads, SIZE], np.int64)
        nodes += [
            helper.make_node("MatMul", ["x", f"{name}_w"], [f"{name}_m"]),
            helper.make_node("Add", [f"{name}_m", f"{name}_b"], [f"{name}_a"]),
            helper.make_node("Reshape", [f"{name}_a", f"{name}_shape"], [f"{name}_r"]),
            helper.make_node("Transpose", [f"{name}_r"], [f"{name}_t"], perm=[0, 2, 1, 3]),
        ]
    reads = ["q_t", "k_t", "v_t"]
    if masked:
        inputs.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, [TOKENS, TOKENS]))
        reads.append("mask")
    constants["out_shape"] = np.array([0, TOKENS, HEADS * SIZE], np.int64)
    nodes += [
        helper.make_node("Attention", reads, ["y_t"]),
        helper.make_node("Transpose", ["y_t"], ["y_p"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["y_p", "out_shape"], ["y_r"]),
        helper.make_node("MatMul", ["y_r", "o_w"], ["y"]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", TOKENS, WIDTH])
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "attention", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def random_weights(groups: int) -> dict[str, np.ndarray]:
    """Weights of a block in which nothing is dead."""
    rng = np.random.default_rng(7)
    weights = {}
    for name, heads in (("q", HEADS), ("k", groups), ("v", groups)):
        weights[f"{name}_w"] = rng.standard_normal((WIDTH, heads * SIZE)) / math.sqrt(WIDTH)
        weights[f"{name}_b"] = rng.standard_normal(heads * SIZE)
    weights["o_w"] = rng.standard_normal((HEADS * SIZE, WIDTH)) / math.sqrt(HEADS * SIZE)
    return {name: array.astype(np.float32) for name, array in weights.items()}


def shrink(model: onnx.ModelProto, folder, masked: bool) -> onnx.ModelProto:
    """Compress, and check that both files compute the same."""
    before, after = folder / "before.onnx", folder / "after.onnx"
    onnx.save(model, before)
    compress(before, after, align="off", simplify=False, verify=False)
    feeds = {"x": np.random.default_rng(1).standard_normal((3, TOKENS, WIDTH)).astype(np.float32)}
    if masked:
        feeds["mask"] = np.tril(np.ones((TOKENS, TOKENS), bool))
    one, other = (ort.InferenceSession(path).run(None, feeds)[0] for path in (before, after))
    assert np.abs(one - other).max() <= 1e-5 * np.abs(one).max()
    return onnx.load(after)


def sizes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of the weights, by name."""
    return {item.name: list(item.dims) for item in model.graph.initializer}


def block(name: str, head: int) -> tuple[slice, slice]:
    """Where a head's columns (or the out-projection's rows) lie."""
    span = slice(head * SIZE, (head + 1) * SIZE)
    return (span, slice(None)) if name == "o_w" else (slice(None), span)


@pytest.mark.parametrize("name", ["v_w", "o_w"])
def test_dead_heads_go_with_their_queries_and_keys(name, tmp_path):
    """Two heads dead, by constant values or by the out-projection, leave four."""
    weights = random_weights(HEADS)
    for head in (1, 4):
        weights[name][block(name, head)] = 0
    after = sizes(shrink(attention_model(weights, HEADS, masked=False), tmp_path, masked=False))
    for projection in ("q_w", "k_w", "v_w"):
        assert after[projection] == [WIDTH, 4 * SIZE]
    assert after["o_w"] == [4 * SIZE, WIDTH]


def test_dimensions_inside_heads_keep_the_scale_that_was_meant(tmp_path):
    """Query and key dimensions at different places from head to head go; the default scale is written out."""
    weights = random_weights(HEADS)
    for head in range(HEADS):
        for name in ("q_w", "q_b"):
            weights[name][..., head * SIZE + np.array([head, (head + 3) % SIZE])] = 0
    model = shrink(attention_model(weights, HEADS, masked=False), tmp_path, masked=False)
    assert sizes(model)["q_w"] == sizes(model)["k_w"] == [WIDTH, HEADS * (SIZE - 2)]
    assert sizes(model)["v_w"] == [WIDTH, HEADS * SIZE]
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    assert helper.get_node_attr_value(node, "scale") == pytest.approx(1 / math.sqrt(SIZE))


def test_query_heads_of_groups_go_in_equal_numbers(tmp_path):
    """With three query heads to a key and value head, one dead in each group leaves two to each."""
    weights = random_weights(2)
    for head in (0, 5):
        weights["o_w"][block("o_w", head)] = 0
    after = sizes(shrink(attention_model(weights, 2, masked=False), tmp_path, masked=False))
    assert after["q_w"] == [WIDTH, 4 * SIZE]
    assert after["k_w"] == [WIDTH, 2 * SIZE]


def test_constant_values_under_a_mask_stay(tmp_path):
    """A mask may hide every key, and then the constant does not come out: such heads stay, zero ones go."""
    weights = random_weights(HEADS)
    weights["v_w"][block("v_w", 1)] = 0
    kept = sizes(shrink(attention_model(weights, HEADS, masked=True), tmp_path, masked=True))
    assert kept["v_w"] == [WIDTH, HEADS * SIZE]
    weights["v_b"][SIZE : 2 * SIZE] = 0
    gone = sizes(shrink(attention_model(weights, HEADS, masked=True), tmp_path, masked=True))
    assert gone["v_w"] == [WIDTH, (HEADS - 1) * SIZE]
