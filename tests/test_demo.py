"""The demo: its whole path with short training, its folder, its goals."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from etp_deploy.cli import main
from etp_deploy.demo.folder import MARKER, SCHEMA, check_folder, demo_folder
from etp_deploy.errors import OutputError

SAMPLE = Path(__file__).parents[1] / "samples" / "classify_folder.py"
torch = pytest.importorskip("torch")
run = pytest.importorskip("etp_deploy.demo.run", reason="needs the extra train")
train = importlib.import_module("etp_deploy.demo.train")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Run the demo with one network and one epoch; return its folder and exit code."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SUBJECTS", (run.Subject("vgg", "VGG-style", 4.0, 1.0),))
        patch.setattr(run, "BENCH_SECONDS", 0.5)
        patch.setitem(train.RECIPES, "vgg", train.Recipe(2e-3, 0.1, pruning=1, tuning=0))
        code = main(["demo", "-o", str(folder)])
    return folder, code


def test_every_stage_leaves_its_files(short):
    """Models, JSON, page, pictures and bundle are there, and no temporary folder."""
    folder, _ = short
    names = {path.name for path in folder.iterdir()}
    models = {f"vgg-{kind}.onnx" for kind in ("dense", "etp", "compressed")}
    documents = {"demo.json", "vgg-compress.json", "vgg-bench-cpu.json"}
    assert names == models | documents | {"report.html", "bundle", "digits"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_document_agrees_with_its_parts(short):
    """Accuracies, sizes and times are those of the files; the compressed file answers as PyTorch does."""
    folder, _ = short
    document = json.loads((folder / MARKER).read_text())
    (network,) = document["networks"]
    assert document["schema"] == SCHEMA
    assert network["mismatches"] == 0
    assert network["accuracy"]["etp"] == network["accuracy"]["compressed_onnx"]
    assert network["bytes"]["compressed"] == (folder / "vgg-compressed.onnx").stat().st_size
    assert network["parameters"]["etp"] > network["parameters"]["compressed"]
    assert network["compression"]["verification"]["passed"]
    assert network["benchmarks"]["cpu"]["comparisons"]
    assert str(folder) not in (folder / MARKER).read_text()


def test_missed_goals_are_exit_one(short):
    """After one epoch four times fewer parameters are out of reach, and the exit code says so."""
    folder, code = short
    missed = json.loads((folder / MARKER).read_text())["missed"]
    assert code == 1
    assert any("fewer parameters, wanted 4x" in line for line in missed)


def test_goals_are_held_one_by_one(short):
    """A network that meets all goals misses none, and each broken one is named."""
    (network,) = json.loads((short[0] / MARKER).read_text())["networks"]
    good = network | {
        "parameters": {"etp": 400, "compressed": 100},
        "accuracy": {"dense": 0.99, "compressed_onnx": 0.975},
    }
    assert list(run._missed(good)) == []
    broken = {
        "wanted 4x": {"parameters": {"etp": 399, "compressed": 100}},
        "points less accurate": {"accuracy": {"dense": 0.99, "compressed_onnx": 0.973}},
        "not verified": {"compression": {"verification": None}},
        "differ from PyTorch's": {"mismatches": 1},
    }
    for words, change in broken.items():
        (line,) = run._missed(good | change)
        assert words in line


def test_the_page_stands_alone(short):
    """The page shows every part and refers to nothing outside."""
    text = (short[0] / "report.html").read_text()
    assert "same answer to all 450 images" in text
    assert "goal missed" in text
    assert text.count("<svg") >= 4
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|url\(", text)


def test_the_sample_pipeline_reads_the_bundle(short):
    """From picture files, the sample gives the classes that the compressed file gives the test images."""
    pytest.importorskip("PIL.Image")
    spec = importlib.util.spec_from_file_location("classify_folder", SAMPLE)
    sample = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sample)
    model = sample.EdgeModel(short[0] / "bundle")
    model.self_test()
    pictures = sample.images(short[0] / "digits")
    answers = [sample.classify(model, path)["index"] for path in pictures]
    images = run.load_digits().test_images[: len(pictures)]
    assert len(pictures) == 50
    assert np.mean(answers == run._answers_onnx(short[0] / "vgg-compressed.onnx", images)) > 0.95


def test_an_earlier_demo_is_replaced_whole(tmp_path):
    """The new folder takes the old one's place; when the run fails, the old one stays."""
    place = tmp_path / "out"
    for round_ in ("first", "second"):
        with demo_folder(place) as folder:
            (folder / MARKER).write_text(json.dumps({"schema": SCHEMA}))
            (folder / round_).touch()
        assert {path.name for path in place.iterdir()} == {MARKER, round_}
    with pytest.raises(KeyboardInterrupt), demo_folder(place):
        raise KeyboardInterrupt
    assert {path.name for path in place.iterdir()} == {MARKER, "second"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_other_folders_are_left_alone(tmp_path):
    """What holds other files, is a file or a link, or has no parent is refused; an empty folder will do."""
    (tmp_path / "mine").mkdir()
    check_folder(tmp_path / "mine")
    (tmp_path / "mine" / MARKER).write_text('{"schema": "something else"}')
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for name in ("mine", "file", "link", "none/out"):
        with pytest.raises(OutputError):
            check_folder(tmp_path / name)
