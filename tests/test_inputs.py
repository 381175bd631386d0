"""Inputs are drawn in the ranges that the graph's own uses allow."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from etp_deploy.errors import InputError, ModelError, UsageError
from etp_deploy.input_files import load_inputs
from etp_deploy.inputs import InputSpec, draw_inputs, dynamic_dims, input_specs

if TYPE_CHECKING:
    from pathlib import Path

BERT_LIKE = """
<ir_version: 8, opset_import: ["" : 17]>
g (int64[batch, seq] input_ids, int64[batch, seq] attention_mask, int64[batch, seq] token_type_ids,
   int64[batch, seq] position_ids) => (float[batch, seq, 4] y)
<float one = {1.0}, int64 two = {2}, int64[1] axis = {2}>
{
  words = Gather(word_table, input_ids)
  kinds = Gather(kind_table, token_type_ids)
  moved = Add(position_ids, two)
  places = Gather(place_table, moved)
  some = Add(words, kinds)
  all = Add(some, places)
  numbers = Cast <to = 1> (attention_mask)
  wide = Unsqueeze(numbers, axis)
  inverse = Sub(one, wide)
  y = Sub(all, inverse)
}
"""


def bert_like() -> onnx.ModelProto:
    """Embed three kinds of ids, one of them shifted, and read an attention mask."""
    model = parser.parse_model(BERT_LIKE)
    for name, rows in (("word_table", 7), ("kind_table", 2), ("place_table", 40)):
        model.graph.initializer.append(numpy_helper.from_array(np.zeros((rows, 4), np.float32), name))
    return model


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    """Write the model and say where."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return path


def parsed(text: str, folder: Path) -> Path:
    """Write the model that ONNX text describes and say where."""
    return saved(parser.parse_model('<ir_version: 8, opset_import: ["" : 17]>\n' + text), folder)


def test_ranges_of_a_transformer(tmp_path):
    """Ids stay in their tables, shifted positions too, and what is taken from one is an attention mask."""
    specs = {spec.name: spec for spec in input_specs(saved(bert_like(), tmp_path))}
    assert {name: (s.kind, s.low, s.high) for name, s in specs.items()} == {
        "input_ids": ("ids", 0, 6),
        "token_type_ids": ("ids", 0, 1),
        "position_ids": ("ids", 0, 37),
        "attention_mask": ("mask", 0, 1),
    }
    assert dynamic_dims(tuple(specs.values())) == ("batch", "seq")


@pytest.mark.parametrize("seed", range(5))
def test_drawn_inputs_run(tmp_path, seed):
    """ONNX Runtime accepts what is drawn, at chosen sizes, and every attention mask's row holds a one."""
    path = saved(bert_like(), tmp_path)
    drawn = draw_inputs(input_specs(path), seed=seed, dims={"seq": 9}, batch=3)
    assert {array.shape for array in drawn.values()} == {(3, 9)}
    assert drawn["attention_mask"].any(axis=-1).all()
    ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, drawn)


def test_ids_out_of_range_fail(tmp_path):
    """Negative control: an id beyond its table is refused by ONNX Runtime, so the ranges matter."""
    path = saved(bert_like(), tmp_path)
    drawn = draw_inputs(input_specs(path), seed=0)
    drawn["position_ids"] = np.full_like(drawn["position_ids"], 38)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument):
        ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, drawn)


def test_same_seed_same_arrays(tmp_path):
    """Arrays depend on the seed and the input's name, not on the order of the inputs."""
    specs = input_specs(saved(bert_like(), tmp_path))
    first, again, other = (draw_inputs(s, seed=n) for s, n in ((specs, 1), (specs[::-1], 1), (specs, 2)))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", [k for k in TensorProto.DataType.values() if k not in {0, 14, 15}])
def test_every_type_can_be_drawn(tmp_path, kind):
    """Each ONNX tensor type gives an array of the declared type and shape."""
    value = helper.make_tensor_value_info("x", kind, [2, 3])
    output = helper.make_tensor_value_info("y", kind, [2, 3])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [output])
    (spec,) = input_specs(saved(helper.make_model(graph), tmp_path))
    drawn = draw_inputs((spec,), seed=0)["x"]
    assert drawn.shape == (2, 3)
    assert drawn.dtype == helper.tensor_dtype_to_np_dtype(kind)


def test_dynamic_sizes(tmp_path):
    """Unnamed dimensions get a stable name, sums follow from their parts, images can be halved."""
    shapes = {
        "image": ["N", 3, "H", "W"],
        "other": [None, 5],
        "cache": ["N", "past + seq"],
        "x": ["N", "seq"],
    }
    values = [helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("y", 1, shapes["image"])
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["y"])], "g", values, [output])
    specs = input_specs(saved(helper.make_model(graph), tmp_path))
    assert dynamic_dims(specs) == ("N", "H", "W", "other.0", "past", "seq")
    drawn = draw_inputs(specs, seed=0, dims={"past": 4})
    assert {name: array.shape for name, array in drawn.items()} == {
        "image": (1, 3, 64, 64),
        "other": (1, 5),
        "cache": (1, 20),
        "x": (1, 16),
    }
    assert draw_inputs(specs, seed=0, dims={"image.2": 8, "N": 2}, batch=5)["image"].shape == (2, 3, 8, 64)
    assert draw_inputs(specs, seed=0, batch=5)["other"].shape == (5, 5)


def test_lengths_and_positive_values(tmp_path):
    """Sequence lengths are at least one and at most the sequence, a logarithm gets positive numbers."""
    path = parsed(
        "g (float[6,2,3] x, int32[2] lens, float[4] amount) => (float[6,2,3] y, float[4] z)"
        "{ y = ReverseSequence(x, lens) z = Log(amount) }",
        tmp_path,
    )
    drawn = draw_inputs(input_specs(path), seed=3)
    assert drawn["lens"].min() >= 1
    assert drawn["lens"].max() <= 2
    assert drawn["amount"].min() > 0


def test_uses_in_subgraphs_count(tmp_path):
    """An input read only inside a branch still gets the range of the table it is looked up in."""
    path = parsed(
        "g (bool c, int64[3] ids) => (float[3] y) <float[4] table = {1, 2, 3, 4}> {"
        " y = If (c) <then_branch = t () => (float[3] a) { a = Gather(table, ids) },"
        " else_branch = e () => (float[3] b) { w = Gather(table, ids) b = Neg(w) }> }",
        tmp_path,
    )
    assert input_specs(path)[1].high == 3


def test_external_data_is_not_needed(tmp_path):
    """Ranges come from the graph alone: the weights' file may be absent."""
    model = bert_like()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (tmp_path / "weights.bin").unlink()
    assert input_specs(path)[0].high == 6


def test_wrong_files_and_sizes(tmp_path):
    """What is no model is a ModelError with its path, a size that cannot be meant a UsageError."""
    with pytest.raises(ModelError, match="cannot read"):
        input_specs(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("hello, world: not a model")
    with pytest.raises(ModelError, match=r"text\.onnx: not an ONNX model"):
        input_specs(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match="no outputs"):
        input_specs(tmp_path / "empty.onnx")
    specs = input_specs(saved(bert_like(), tmp_path))
    with pytest.raises(UsageError, match="there are: batch, seq"):
        draw_inputs(specs, seed=0, dims={"sequence": 3})
    with pytest.raises(UsageError, match="size of 0"):
        draw_inputs(specs, seed=0, dims={"seq": 0})
    with pytest.raises(UsageError, match="batch of 0"):
        draw_inputs(specs, seed=0, batch=0)


def test_inputs_from_files(tmp_path):
    """Arrays come from npz and json in the model's types; what is missing or misshapen is named."""
    specs = input_specs(saved(bert_like(), tmp_path))
    ids = np.ones((2, 5))
    np.savez(tmp_path / "in.npz", **{spec.name: ids for spec in specs})
    (tmp_path / "in.json").write_text(json.dumps({spec.name: ids.tolist() for spec in specs}))
    for name in ("in.npz", "in.json"):
        found = load_inputs(tmp_path / name, specs)
        assert {(array.shape, str(array.dtype)) for array in found.values()} == {((2, 5), "int64")}
    np.savez(tmp_path / "short.npz", input_ids=ids)
    with pytest.raises(UsageError, match="it holds input_ids"):
        load_inputs(tmp_path / "short.npz", specs)
    np.savez(tmp_path / "flat.npz", **{spec.name: ids[0] for spec in specs})
    with pytest.raises(UsageError, match="the model takes"):
        load_inputs(tmp_path / "flat.npz", specs)
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    (tmp_path / "bad.json").write_text("[1")
    (tmp_path / "wrong.txt").touch()
    for name, kind in (
        ("bad.npz", InputError),
        ("bad.json", InputError),
        ("absent.npz", InputError),
        ("wrong.txt", UsageError),
    ):
        with pytest.raises(kind, match=name.replace(".", r"\.")):
            load_inputs(tmp_path / name, specs)


def test_pickled_inputs_are_refused(tmp_path):
    """An npz file cannot smuggle in objects that run code."""
    specs = input_specs(saved(bert_like(), tmp_path))
    np.savez(tmp_path / "in.npz", input_ids=np.array([print], dtype=object))
    with pytest.raises(InputError, match="cannot read"):
        load_inputs(tmp_path / "in.npz", specs)


def test_inputs_from_images(tmp_path):
    """Images are resized to the input, in its order of axes and its scale, as many as the batch takes."""
    image = pytest.importorskip("PIL.Image")
    for at in range(3):
        image.new("RGB", (10, 7), (255, 0, 51 * at)).save(tmp_path / f"{at}.png")
    spec = InputSpec("x", np.dtype(np.float32), ("batch", 3, 8, 6), -1, 1, "float")
    found = load_inputs(tmp_path, (spec,))["x"]
    assert found.shape == (3, 3, 8, 6)
    assert found[:, :, 0, 0].tolist() == pytest.approx(np.array([[1, 0, 0], [1, 0, 0.2], [1, 0, 0.4]]))
    grey = InputSpec("x", np.dtype(np.uint8), (4, 5, 6, 1), 0, 255, "int")
    assert load_inputs(tmp_path, (grey,))["x"].shape == (4, 5, 6, 1)
    free = InputSpec("x", np.dtype(np.float32), ("n", 3, "h", "w"), -1, 1, "float")
    assert load_inputs(tmp_path, (free,))["x"].shape == (3, 3, 7, 10)
    with pytest.raises(UsageError, match="four axes"):
        load_inputs(tmp_path, ())
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no images"):
        load_inputs(tmp_path / "none", (spec,))
