"""A bundle runs where only numpy and onnxruntime are, and is refused when anything in it changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from etp_deploy.bundling import bundle
from etp_deploy.errors import (
    BundleError,
    ModelError,
    OutputError,
    ProviderError,
    UsageError,
    VerificationError,
)
from etp_deploy.runtime import EdgeModel, TensorInfo


def classifier(path, element=TensorProto.FLOAT, external=""):
    """Save scores = image @ w, and the best class."""
    weights = np.random.default_rng(0).normal(size=(4, 3))
    dtype = helper.tensor_dtype_to_np_dtype(element)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["image", "w"], ["scores"]),
            helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0),
        ],
        "g",
        [helper.make_tensor_value_info("image", element, ["batch", 4])],
        [
            helper.make_tensor_value_info("scores", element, ["batch", 3]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(weights.astype(dtype), "w")],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    arguments = {"save_as_external_data": True, "location": external, "size_threshold": 0} if external else {}
    onnx.save(model, path, **arguments)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a bundle of the classifier, made once; it is not to be changed."""
    place = tmp_path_factory.mktemp("made")
    model = classifier(place / "model.onnx")
    return bundle(model, place / "bundle", labels=["a", "b", "c"], preprocessing={"scale": 0.5})


@pytest.fixture
def folder(made, tmp_path):
    """Return a bundle of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def edit_manifest(folder, change):
    """Change the manifest in place."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_bundle_holds_model_manifest_and_example(folder):
    """The folder has three files and the manifest says what they are and what the model is."""
    assert sorted(file.name for file in folder.iterdir()) == ["example.npz", "manifest.json", "model.onnx"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"example.npz", "model.onnx"}
    assert manifest["inputs"] == [{"name": "image", "dtype": "float32", "shape": ["batch", 4]}]
    assert manifest["summary"]["parameters"] == 12
    assert manifest["summary"]["opsets"] == {"": 17}
    assert manifest["summary"]["ir_version"] == 8


def test_an_edge_model_runs_by_name_and_by_position(folder):
    """Both ways of calling give what numpy gives, and the descriptions are there."""
    model = EdgeModel(folder, threads=1)
    image = np.arange(8, dtype=np.float32).reshape(2, 4)
    expected = image @ np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    outputs = model.run({"image": image})
    assert np.allclose(outputs["scores"], expected, rtol=1e-5)
    scores, best = model(image)
    assert np.array_equal(best, expected.argmax(1))
    assert scores.shape == (2, 3)
    assert model.inputs == (TensorInfo("image", "float32", ("batch", 4)),)
    assert [tensor.name for tensor in model.outputs] == ["scores", "best"]
    assert model.labels == ("a", "b", "c")
    assert model.preprocessing == {"scale": 0.5}
    assert model(image.tolist())[0].shape == (2, 3)


def test_the_self_test_passes_where_the_bundle_was_made(folder):
    """The stored example gives the stored outputs."""
    assert EdgeModel(folder).self_test().max_abs_error <= 1e-6


def test_the_self_test_fails_when_the_outputs_are_others(folder, monkeypatch):
    """The negative control: a provider that is wrong by a thousandth is found, and so is another class."""
    model = EdgeModel(folder)
    right = model.run
    for name, factor in (("scores", np.float32(1.001)), ("best", 2)):
        wrong = {name: right(model.example()[0])[name] * factor + (name == "best")}
        monkeypatch.setattr(model, "run", lambda feeds, wrong=wrong: {**right(feeds), **wrong})
        with pytest.raises(VerificationError, match=f"output '{name}' differs"):
            model.self_test()


def test_needs_only_numpy_and_onnxruntime(folder):
    """With every other dependency blocked, a bundle loads, tests itself and runs."""
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        blocked = "torch onnx onnx_ir onnxsim click rich scipy psutil ml_dtypes google sklearn".split()
        if name.partition(".")[0] in blocked:
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
from etp_deploy.runtime import EdgeModel
model = EdgeModel(sys.argv[1])
model.self_test()
loaded = [name for name in sys.modules if name.startswith("etp_deploy")]
print(sorted(loaded))
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['etp_deploy', 'etp_deploy.errors', 'etp_deploy.runtime']"


def test_an_altered_file_is_refused(folder):
    """One flipped bit in the model, a file cut short, a file missing: each is named."""
    model = folder / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    with pytest.raises(BundleError, match="not the one that was bundled") as caught:
        EdgeModel(folder)
    assert caught.value.where == str(model)
    model.write_bytes(whole[:-1])
    with pytest.raises(BundleError, match="bytes instead of"):
        EdgeModel(folder)
    model.unlink()
    with pytest.raises(BundleError, match="missing"):
        EdgeModel(folder)


def test_a_manifest_that_is_not_ours_is_refused(folder):
    """Another schema, a later version, missing sections, no JSON, no manifest, no folder."""
    for change, match in (
        (lambda m: m.update(schema="other"), "not the manifest of a bundle"),
        (lambda m: m.update(schema="etp-deploy/bundle", schema_version=99), "version is 99, known is 1"),
        (lambda m: m.update(schema_version=1, model="other.onnx"), "names no model"),
        (lambda m: m.update(model="model.onnx", inputs=3), "does not describe the inputs"),
        (lambda m: m.update(inputs=[], files=None), "no section 'files'"),
        (lambda m: m.update(files={"../model.onnx": {}, "model.onnx": {}}), "is not valid"),
    ):
        edit_manifest(folder, change)
        with pytest.raises(BundleError, match=match):
            EdgeModel(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(BundleError, match="no JSON"):
        EdgeModel(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(BundleError, match="no manifest"):
        EdgeModel(folder)
    with pytest.raises(BundleError, match="no such bundle"):
        EdgeModel(folder / "none")


def test_wrong_inputs_are_named(folder):
    """Unknown and missing names, another type, rank, size and count: one line each, with what is right."""
    model = EdgeModel(folder)
    image = np.zeros((1, 4), np.float32)
    for feeds, match in (
        ({"picture": image}, "no input 'picture'.*its inputs are: image"),
        ({}, "nothing is given for input 'image'"),
        ({"image": image.astype(np.float64)}, "type is float64, not float32"),
        ({"image": image[0]}, r"shape is \[4\].*batchx4"),
        ({"image": image[:, :3]}, r"shape is \[1, 3\]"),
        ({"image": "text"}, "not an array"),
    ):
        with pytest.raises(UsageError, match=match) as caught:
            model.run(feeds)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="2 arrays given where the model takes 1"):
        model(image, image)


def test_a_provider_that_is_not_there_is_an_error(folder):
    """Asking for a provider this build lacks does not fall back silently."""
    with pytest.raises(ProviderError, match="not available"):
        EdgeModel(folder, providers=["NoSuchExecutionProvider", "CPUExecutionProvider"])


def test_external_data_is_bundled(tmp_path):
    """Weights that lay beside the model are in the bundle, which works without the original."""
    model = classifier(tmp_path / "model.onnx", external="weights.bin")
    folder = bundle(model, tmp_path / "bundle")
    model.unlink()
    (tmp_path / "weights.bin").unlink()
    EdgeModel(folder).self_test()


def test_half_precision_and_text_are_bundled(tmp_path):
    """Examples of float16 and of text survive storing without pickles."""
    EdgeModel(bundle(classifier(tmp_path / "a.onnx", TensorProto.FLOAT16), tmp_path / "a")).self_test()
    text = helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])
    out = helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [text], [out])
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "b.onnx")
    loaded = EdgeModel(bundle(model=tmp_path / "b.onnx", out_dir=tmp_path / "b"))
    loaded.self_test()
    assert list(loaded(np.array(["é", "b"]))) == ["é", "b"]


def test_an_example_of_ones_own_is_stored(tmp_path):
    """A given example is what the self-test runs; one that does not fit is refused."""
    model = classifier(tmp_path / "model.onnx")
    image = np.full((5, 4), 2.0, np.float32)
    stored, _ = EdgeModel(bundle(model, tmp_path / "a", example={"image": image})).example()
    assert np.array_equal(stored["image"], image)
    for example in ({"other": image}, {"image": image.astype(int)}, {"image": image[:, :2]}):
        with pytest.raises(UsageError, match="example"):
            bundle(model, tmp_path / "b", example=example)
    assert not (tmp_path / "b").exists()


def test_bundling_is_whole_or_not_at_all(tmp_path):
    """A folder in use, a model that does not run, entries that are no JSON: no folder appears."""
    model = classifier(tmp_path / "model.onnx")
    before = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(OutputError, match="exists already"):
        bundle(model, tmp_path)
    with pytest.raises(UsageError, match="JSON"):
        bundle(model, tmp_path / "b", summary={"x": object()})
    with pytest.raises(UsageError, match="labels"):
        bundle(model, tmp_path / "b", labels=[1])
    proto = onnx.load(model)
    proto.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(proto, tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match="ONNX Runtime refuses"):
        bundle(tmp_path / "bad.onnx", tmp_path / "b")
    with pytest.raises(ModelError, match="No such file"):
        bundle(tmp_path / "none.onnx", tmp_path / "b")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*before, "bad.onnx"])
    assert Path(model).exists()


def test_types_numpy_does_not_have_are_refused(tmp_path):
    """A bfloat16 input cannot be fed at the edge: bundling says so."""
    x = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, [2])
    y = helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=8), tmp_path / "a.onnx")
    with pytest.raises(BundleError, match="bfloat16"):
        bundle(tmp_path / "a.onnx", tmp_path / "b")
