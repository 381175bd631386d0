"""Large models: weights are streamed, never all in memory, and come out as those of small ones do."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from etp_deploy import modelfile, simplify, tensors
from etp_deploy.modelfile import move_model, read_model
from etp_deploy.pipeline import compress
from etp_deploy.surgery.statements.weights import Reads

WIDTH, HIDDEN, DEAD = 24, 32, 12


def network(path, *, blocks: int = 2, width: int = WIDTH, hidden: int = HIDDEN, detour: bool = False):
    """Write a stack of residual perceptrons, `DEAD` of each one's neurons constant, its weights beside it."""
    random = np.random.default_rng(0)
    nodes, weights, x = [], [], "x"
    for block in range(blocks):
        first = random.standard_normal((width, hidden)).astype(np.float32) / 5
        first[:, random.permutation(hidden)[:DEAD]] = 0
        second = random.standard_normal((hidden, width)).astype(np.float32) / 5
        bias = random.standard_normal(hidden).astype(np.float32)
        weights += [
            numpy_helper.from_array(a, f"{n}{block}") for a, n in ((first, "v"), (second, "w"), (bias, "b"))
        ]
        nodes += [
            helper.make_node("MatMul", [x, f"v{block}"], [f"h{block}"]),
            helper.make_node("Add", [f"h{block}", f"b{block}"], [f"g{block}"]),
            helper.make_node("Relu", [f"g{block}"], [f"r{block}"]),
            helper.make_node("MatMul", [f"r{block}", f"w{block}"], [f"o{block}"]),
            helper.make_node("Add", [f"o{block}", x], [f"y{block}"]),
        ]
        x = f"y{block}"
    if detour:
        nodes += [
            helper.make_node("Transpose", [x], ["t"], perm=[1, 0]),
            helper.make_node("Transpose", ["t"], ["z"], perm=[1, 0]),
            helper.make_node("Relu", ["z"], ["last"]),
        ]
        x = "last"
    info = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width]) for name in ("x", x)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], weights),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)
    return path


def outputs(path):
    """What a model computes of one batch."""
    x = np.random.default_rng(1).standard_normal((5, WIDTH)).astype(np.float32)
    return ort.InferenceSession(path).run(None, {"x": x})[0]


def elements(path) -> int:
    """How many elements the initializers have."""
    return sum(value.const_value.size for value in read_model(path).graph.initializers.values())


@pytest.fixture
def _everything_streamed(monkeypatch):
    """What is done with gigabytes is done with bytes."""
    monkeypatch.setattr(tensors, "_DEFERRED_FROM_BYTES", 0)
    monkeypatch.setattr(modelfile, "STREAMED_FROM_BYTES", 1)
    monkeypatch.setattr(simplify, "WEIGHTLESS_FROM_BYTES", 0)
    monkeypatch.setattr(simplify, "LARGEST_SHOWN_BYTES", 0)


@pytest.mark.usefixtures("_everything_streamed")
@pytest.mark.parametrize("zero_below", [0.0, 1e-6])
def test_streamed_weights_are_cut_as_others_are(tmp_path, zero_below):
    """The result keeps its weights outside, as many as a small network has, and computes the same."""
    source = network(tmp_path / "source.onnx")
    before = source.with_name("source.onnx.data").read_bytes()
    report = compress(source, tmp_path / "small.onnx", zero_below=zero_below)
    kept = HIDDEN - DEAD
    # the second product of each block gets a bias for what the constants contributed
    assert elements(tmp_path / "small.onnx") == 2 * (2 * WIDTH * kept + kept + WIDTH)
    np.testing.assert_allclose(
        outputs(tmp_path / "small.onnx"), outputs(source), rtol=0, atol=1e-5 * np.abs(outputs(source)).max()
    )
    assert report.verification.passed
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        *("small.onnx", "small.onnx.data", "source.onnx", "source.onnx.data"),
    ]
    assert source.with_name("source.onnx.data").read_bytes() == before


@pytest.mark.usefixtures("_everything_streamed")
def test_onnxsim_sees_the_graph_without_its_weights(tmp_path):
    """Nodes that cancel out go although onnxsim never sees a weight."""
    source = network(tmp_path / "source.onnx", detour=True)
    report = compress(source, tmp_path / "small.onnx", align="off")
    assert report.simplified
    assert report.before.nodes == 13
    assert "Transpose" not in [node.op_type for node in read_model(tmp_path / "small.onnx").graph]
    assert np.abs(outputs(tmp_path / "small.onnx") - outputs(source)).max() < 1e-4


def test_memory_follows_the_largest_tensor(tmp_path):
    """400 MB of weights, 25 MB each: the peak stays far below what they take together."""
    network(tmp_path / "large.onnx", blocks=8, width=1600, hidden=4000)
    code = (
        "import resource, sys; from etp_deploy.pipeline import compress;"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10; start = peak();"
        "compress('large.onnx', 'small.onnx', verify=False, simplify=False); print(peak() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 160
    assert tmp_path.joinpath("large.onnx.data").stat().st_size > 400e6


def test_a_model_is_moved_with_its_data_and_replaces_an_older_one(tmp_path):
    """The moved model reads its data under the new name; the older model's data is gone, nothing else is."""
    compressed = tmp_path / "work"
    compressed.mkdir()
    for folder, detour in ((tmp_path, True), (compressed, False)):
        model = read_model(network(folder / "raw.onnx", detour=detour))
        modelfile.write_model(model, folder / "model.onnx", external_data=True)
    expected = outputs(compressed / "model.onnx")
    move_model(compressed / "model.onnx", tmp_path / "model.onnx")
    np.testing.assert_array_equal(outputs(tmp_path / "model.onnx"), expected)
    assert [file.name for file in sorted(tmp_path.glob("model*"))] == ["model.onnx", "model.onnx.1.data"]
    assert [file.name for file in sorted(compressed.iterdir())] == ["raw.onnx", "raw.onnx.data"]


@pytest.mark.parametrize("shape", [(1, 9, 17), (3, 4, 5), (12, 1, 1), (1, 1, 30), (2, 20, 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_bit_for_each_weight_says_what_reads_what(shape, turned):
    """Both questions are answered as by a boolean array, whichever way the weight lies in memory."""
    random = np.random.default_rng(2)
    nonzero = random.random(shape) < 0.3
    if turned:
        nonzero = np.ascontiguousarray(np.swapaxes(nonzero, 1, 2)).swapaxes(1, 2)
    reads = Reads(nonzero)
    for share in (0.0, 0.3, 1.0):
        outs, ins = random.random(shape[:2]) < share, random.random((shape[0], shape[2])) < share
        np.testing.assert_array_equal(reads.inputs(outs), (nonzero & outs[:, :, None]).any(axis=1))
        np.testing.assert_array_equal(reads.outputs(ins), (nonzero & ins[:, None, :]).any(axis=2))
