"""What of an attention has to stay, and why; weights that several share; files that ONNX Runtime's optimiser wrote."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from attention_blocks import MICROSOFT, WIDTH, Block, Widths, case
from graphs import Case, difference, failure, opsets, run, shrunk, weight_elements
from onnx import helper, numpy_helper
from test_surgery_regressions import Net

from etp_deploy.surgery.analysis import read
from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.prepare import prepare

FLOAT = onnx.TensorProto.FLOAT


def reasons(model: onnx.ModelProto) -> set[str]:
    """Why tensors of a model are pinned."""
    state = read(prepare(ir.from_proto(model)).graph).state
    return {cause.text for axes in state.pins.values() for cause in axes.values()}


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of the initializers, by name."""
    return {item.name: tuple(item.dims) for item in model.graph.initializer}


# caches and scores


def cached(operator: str) -> Case:
    """Six query heads over two cached key and value heads, one query head of each dead."""
    heads, groups, size, past = 6, 2, 8, 3
    net = Net(x=(1, 4, WIDTH), pk=(1, groups, past, size), pv=(1, groups, past, size))
    net.node("MatMul", ["x", net.rand(WIDTH, heads * size)], "q")
    net.node("MatMul", ["x", net.rand(WIDTH, groups * size)], "k")
    net.node("MatMul", ["x", net.rand(WIDTH, groups * size)], "v")
    names = ["y", "present_k", "present_v"]
    if operator == "Attention":
        net.node("Attention", ["q", "k", "v", "", "pk", "pv"], names, q_num_heads=heads, kv_num_heads=groups)
    else:
        tail = [np.full(1, 6, np.int32), np.array(7, np.int32)]
        counts = {"num_heads": heads, "kv_num_heads": groups}
        net.node(operator, ["q", "k", "v", "pk", "pv", *tail], names, domain=MICROSOFT, **counts)
    dead = [*range(size, 2 * size), *range(3 * size, 4 * size)]
    net.node("MatMul", ["y", net.rand(heads * size, WIDTH, dead=dead)], "out")
    return with_microsoft(net.case("out", "present_k", "present_v", opset=23))


def with_microsoft(given: Case) -> Case:
    """Add the operator set of ONNX Runtime's own."""
    del given.model.opset_import[:]
    given.model.opset_import.extend(opsets(23))
    return given


@pytest.mark.parametrize("operator", ["Attention", "GroupQueryAttention"])
def test_caches_keep_keys_and_values(operator):
    """The caches are inputs of the model: keys and values stay, a query head of each goes."""
    before = cached(operator)
    assert failure(before) is None
    after = list(shapes(shrunk(before.model)).values())
    assert after.count((WIDTH, 2 * 8)) == 2
    assert (WIDTH, 4 * 8) in after
    assert (4 * 8, WIDTH) in after


def test_a_projecting_attention_with_a_cache_stays():
    """Its one cache holds all heads."""
    net = Net(x=(2, 4, WIDTH), past=(2, 2, 4, 3, 8))
    given = ["x", net.rand(WIDTH, 96), net.rand(96), "", "past"]
    net.node("Attention", given, ["y", "present"], domain=MICROSOFT, num_heads=4)
    net.node("MatMul", ["y", net.rand(32, WIDTH, dead=range(8))], "out")
    before = with_microsoft(net.case("out", "present", opset=23))
    assert failure(before) is None
    assert weight_elements(shrunk(before.model)) == weight_elements(before.model)
    assert "an Attention with a cache" in reasons(with_open_input(before.model))


def with_open_input(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put a projection in front of the input, so that there is something to pin."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    for node in changed.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = "x_projected" if name == "x" else name
    square = np.eye(WIDTH, dtype=np.float32)
    changed.graph.initializer.append(numpy_helper.from_array(square, "square"))
    changed.graph.node.insert(0, helper.make_node("MatMul", ["x", "square"], ["x_projected"]))
    return changed


def test_scores_that_are_used_keep_all():
    """An attention whose scores are an output keeps heads and indices."""
    block = Block(Widths())
    block.w["o"][1] = 0
    before = case("standard4", block)
    node = next(node for node in before.model.graph.node if node.op_type == "Attention")
    node.output.extend(["", "", "scores"])
    before.model.graph.output.append(onnx.ValueInfoProto(name="scores"))
    assert failure(before) is None
    assert weight_elements(shrunk(before.model)) == weight_elements(before.model)
    assert "the scores of an attention are used" in reasons(before.model)


def test_constant_keys_and_values_are_pinned():
    """Keys that are an initializer keep the queries."""
    block = Block(Widths())
    block.w["o"][1] = 0
    before = case("standard4", block)
    node = next(node for node in before.model.graph.node if node.op_type == "Attention")
    array = np.random.default_rng(0).standard_normal((2, 4, 5, 8)).astype(np.float32)
    before.model.graph.initializer.append(numpy_helper.from_array(array, "keys"))
    node.input[1] = "keys"
    assert failure(before) is None
    after = list(shapes(shrunk(before.model)).values())
    assert after.count((WIDTH, 32)) == 3 - 1  # the keys' own projection is unused
    assert "constant queries, keys or values of an attention" in reasons(before.model)


def test_a_computed_bias_of_each_head_goes_with_them():
    """Position biases that a table computes lose the heads that the attention loses."""
    block = Block(Widths())
    block.w["o"][[0, 2]] = 0
    mask = np.random.default_rng(3).standard_normal((1, 4, 5, 5)).astype(np.float32)
    before = case("multihead", block, mask)
    node = next(node for node in before.model.graph.node if node.op_type == "MultiHeadAttention")
    gain = np.random.default_rng(4).standard_normal((4, 1, 1)).astype(np.float32)
    before.model.graph.initializer.append(numpy_helper.from_array(gain, "gain"))
    before.model.graph.node.insert(0, helper.make_node("Mul", [node.input[5], "gain"], ["bias"]))
    node.input[5] = "bias"
    assert failure(before) is None
    assert shapes(shrunk(before.model))["gain"] == (2, 1, 1)


# packed tensors, which ONNX Runtime runs on GPUs alone: their equal in separate ones is run


def packed(block: Block, roles: int) -> Case:
    """Queries, keys and values (or the latter two) of each head side by side in one tensor of five axes."""
    net = Net(x=(2, 5, WIDTH))
    joint = np.stack([block.w[name] for name in "qkv"[-roles:]], axis=2)
    net.node("MatMul", ["x", joint.reshape(WIDTH, -1)], "flat")
    net.node("Reshape", ["flat", np.array([0, 0, 4, roles, 8])], "heads")
    net.node("MatMul", ["x", block.w["q"].reshape(WIDTH, -1)], "q")
    given = ["heads"] if roles == 3 else ["q", "heads"]
    net.node("MultiHeadAttention", given, "y", domain=MICROSOFT, num_heads=4)
    net.node("MatMul", ["y", block.w["o"].reshape(-1, WIDTH)], "out")
    return with_microsoft(net.case("out", opset=23))


def separate(model: onnx.ModelProto) -> onnx.ModelProto:
    """Take a packed tensor apart in front of the attention."""
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    place = next(i for i, node in enumerate(changed.graph.node) if node.op_type == "MultiHeadAttention")
    node = changed.graph.node[place]
    parts = [f"part{index}" for index in range(4 - len(node.input))]
    made = [helper.make_node("Split", [node.input[-1]], parts, axis=3, num_outputs=len(parts))]
    made += [helper.make_node("Reshape", [part, "merged"], [f"{part}_flat"]) for part in parts]
    changed.graph.initializer.append(numpy_helper.from_array(np.array([2, 5, -1]), "merged"))
    flat = [*node.input[:-1], *(f"{part}_flat" for part in parts)]
    del node.input[:]
    node.input.extend(flat)
    for item in reversed(made):
        changed.graph.node.insert(place, item)
    return changed


@pytest.mark.parametrize("roles", [2, 3])
def test_packed_heads(roles):
    """Heads go from a packed tensor, and as many indices of queries and keys as of values."""
    block = Block(Widths())
    block.w["o"][1] = 0
    for head in range(4):
        block.w["q"][:, head, head] = 0
        block.w["v"][:, head, 7 - head] = 0
    before = packed(block, roles)
    after = shrunk(before.model)
    expected, got = (run(separate(model), before.feeds) for model in (before.model, after))
    assert difference(expected, got) is None
    sizes = list(shapes(after).values())
    assert (WIDTH, 3 * roles * 7) in sizes
    assert (3 * 7, WIDTH) in sizes


def test_projections_in_front_of_an_attention_are_called_so():
    """The report tells them from neurons."""
    removal, _ = plan(prepare(ir.from_proto(case("projecting", Block(Widths())).model)).graph)
    assert [layer.kind for layer in removal.layers] == ["projections"] * 3 + ["neurons"]


# shared weights


@pytest.mark.parametrize(("dead", "width"), [((1, 2), 2 * 8), ((1,), 4 * 8)])
def test_attentions_that_share_their_weights(dead, width):
    """Where all that share a weight lose the same heads it stays one; where one alone could, nothing goes."""
    net = Net(x=(2, 5, 32))
    weight, bias = net.rand(32, 96), net.rand(96)
    net.weights |= {"weight": weight, "bias": bias}
    name = "x"
    for number in (1, 2):
        net.node("Attention", [name, "weight", "bias"], f"y{number}", domain=MICROSOFT, num_heads=4)
        rows = [*range(8), *range(16, 24)] if number in dead else None
        net.node("MatMul", [f"y{number}", net.rand(32, 32, dead=rows)], f"z{number}")
        name = f"z{number}"
    before = with_microsoft(net.case(name, opset=23))
    assert failure(before) is None
    after = shapes(shrunk(before.model))
    assert after["weight"] == (32, 3 * width)
    assert after["bias"] == (3 * width,)
    assert len(after) == len(shapes(before.model))


# repetition


def test_keys_that_a_tile_repeats():
    """TorchScript repeats shared keys and values by a Tile along an axis of one."""
    block = Block(Widths(groups=3, per_group=2))
    block.w["o"][[0, 3, 4, 5]] = 0
    before = case("decomposed", block)
    for node in before.model.graph.node:
        node.op_type = "Tile" if node.op_type == "Expand" else node.op_type
    tiled = {node.input[1] for node in before.model.graph.node if node.op_type == "Tile"}
    for item in before.model.graph.initializer:
        if item.name in tiled:
            item.CopyFrom(numpy_helper.from_array(np.array([1, 1, 2, 1, 1]), item.name))
    assert failure(before) is None
    native = case("decomposed", Block(Widths(groups=2, per_group=1))).model
    assert weight_elements(shrunk(before.model)) == weight_elements(native)


# ONNX Runtime's optimiser


@pytest.mark.parametrize(("side", "zeros"), [("reader", "all"), ("writer", "all"), ("writer", "weights")])
def test_an_optimised_bert_loses_what_the_plain_one_loses(side, zeros, tmp_path):
    """Heads go from the operators that the optimiser wrote, down to the native network's weights."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from onnxruntime.transformers.fusion_options import FusionOptions  # noqa: PLC0415 - slow
    from onnxruntime.transformers.optimizer import optimize_model  # noqa: PLC0415 - slow
    from zoo.export import export  # noqa: PLC0415 - after the check for torch
    from zoo.export import weight_elements as file_elements  # noqa: PLC0415
    from zoo.networks import ZOO  # noqa: PLC0415
    from zoo.planting import Planting, plant  # noqa: PLC0415

    from etp_deploy.pipeline import compress  # noqa: PLC0415

    entry = ZOO["bert-eager"]
    net = entry.build()
    planted = plant(net, Planting("scattered", zeros, side=side, kinds=("head",)))
    paths = {name: tmp_path / f"{name}.onnx" for name in ("plain", "optimised", "small", "native")}
    export(net, entry, paths["plain"], exporter="torchscript", dynamic="batch")
    options = FusionOptions("bert")
    optimised = optimize_model(
        str(paths["plain"]), "bert", num_heads=4, hidden_size=32, opt_level=0, optimization_options=options
    )
    optimised.save_model_to_file(str(paths["optimised"]))
    model = onnx.load(paths["optimised"])
    assert sum(node.op_type == "Attention" and node.domain == MICROSOFT for node in model.graph.node) == 2
    compress(paths["optimised"], paths["small"], align="off", simplify=False, verify=False)
    feeds = {n: t.numpy() for n, t in zip(entry.inputs, entry.draw(2, 12, 1), strict=True)}
    small = onnx.load(paths["small"])
    assert difference(run(model, feeds), run(small, feeds)) is None
    export(entry.build(planted.widths), entry, paths["native"], exporter="torchscript", dynamic="batch")
    assert file_elements(paths["small"]) == file_elements(paths["native"]) < file_elements(paths["plain"])
