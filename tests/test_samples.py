"""The sample pipeline classifies real image files with a bundle, and fails in one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from etp_deploy.bundling import bundle

Image = pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).parents[1] / "samples" / "classify_folder.py"
LABELS = ("left", "right", "top", "bottom")


def halves(path, shape=("batch", 1, 8, 8)):
    """Save a classifier of 8x8 pictures: which half is brightest."""
    weights = np.zeros((8, 8, 4), np.float32)
    weights[:, :4, 0] = weights[:, 4:, 1] = weights[:4, :, 2] = weights[4:, :, 3] = 1.0
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["scores"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [shape[0], 4])],
        [numpy_helper.from_array(weights.reshape(64, 4), "w")],
    )
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def pictures(folder):
    """Write one picture of each class, in several formats and sizes."""
    folder.mkdir()
    for label, suffix, size, mode in zip(
        LABELS, (".png", ".pgm", ".bmp", ".JPG"), (8, 8, 32, 64), ("L", "L", "RGB", "L"), strict=True
    ):
        pixels = np.zeros((size, size), np.uint8)
        half = {"left": np.s_[:, : size // 2], "right": np.s_[:, size // 2 :]}
        half |= {"top": np.s_[: size // 2], "bottom": np.s_[size // 2 :]}
        pixels[half[label]] = 255
        Image.fromarray(pixels).convert(mode).save(folder / f"{label}{suffix}")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a bundle of the classifier and a folder of pictures; they are not to be changed."""
    place = tmp_path_factory.mktemp("samples")
    preprocessing = {"scale": 1 / 255, "mean": 0.5, "std": 0.5}
    model = halves(place / "m.onnx")
    return bundle(model, place / "bundle", labels=LABELS, preprocessing=preprocessing), pictures(
        place / "images"
    )


@pytest.fixture(scope="module")
def sample():
    """Return the sample as a module."""
    spec = importlib.util.spec_from_file_location("classify_folder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments):
    """Run the sample as a user does."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_images_in_a_folder_are_classified(made):
    """Every picture, whatever its format and size, gets its class, one JSON object a line."""
    done = run(*made, "--json", "--self-test")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(answer["file"]).stem for answer in answers] == sorted(LABELS)
    assert all(answer["label"] == Path(answer["file"]).stem for answer in answers)
    assert all(answer["score"] > 0.99 for answer in answers)


def test_the_table_has_a_row_for_each_image(made, sample, capsys):
    """Without --json the rows are file, label and score."""
    assert sample.main([str(part) for part in made]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows] == sorted(LABELS)


def test_preprocessing_follows_the_manifest(made, sample, tmp_path):
    """Scale, mean and inversion reach the pixels; a picture of 255s becomes 1, inverted -1."""
    white = Image.new("L", (8, 8), 255)
    model = sample.EdgeModel(made[0])
    assert np.all(sample.preprocess(model, white) == 1.0)
    model.manifest["preprocessing"]["invert"] = True
    assert np.all(sample.preprocess(model, white) == -1.0)
    model.manifest["preprocessing"]["mean"] = "much"
    with pytest.raises(sample.BundleError, match="not made of numbers"):
        sample.preprocess(model, white)
    nhwc = bundle(halves(tmp_path / "m.onnx", ("batch", 8, 8, 1)), tmp_path / "nhwc")
    assert sample.preprocess(sample.EdgeModel(nhwc), white).shape == (1, 8, 8, 1)


def test_a_file_that_is_no_image_is_named_and_the_others_classified(made, sample, tmp_path, capsys):
    """A broken picture is reported on stderr, the exit code says so, and the rest is done."""
    folder = Path(shutil.copytree(made[1], tmp_path / "images"))
    (folder / "broken.png").write_bytes(b"no picture")
    assert sample.main([str(made[0]), str(folder)]) == 1
    captured = capsys.readouterr()
    assert "broken.png: not an image" in captured.err
    assert len(captured.out.splitlines()) == 4


def test_errors_are_one_line_with_their_exit_code(made, sample, tmp_path, capsys):
    """No images, no folder, no bundle, an altered bundle."""
    altered = Path(shutil.copytree(made[0], tmp_path / "altered"))
    (altered / "model.onnx").write_bytes(b"x" * (altered / "model.onnx").stat().st_size)
    (tmp_path / "empty").mkdir()
    for arguments, code, text in (
        ((made[0], tmp_path / "empty"), 2, "holds no images"),
        ((made[0], tmp_path / "none"), 2, "no such folder"),
        ((tmp_path / "none", made[1]), 3, "no such bundle"),
        ((altered, made[1]), 3, "not the one that was bundled"),
    ):
        assert sample.main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        assert text in captured.err
        assert len(captured.err.splitlines()) == 1
        assert captured.out == ""
