"""The pruning samples do what they say, in small."""

import importlib.util
import re
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[1] / "samples"
PRUNING = sorted(path.stem for path in SAMPLES.glob("prune_*.py"))


def load(name):
    """Return a sample as a module."""
    spec = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def counts(text, what):
    """Return two numbers that a sample prints, before and after."""
    found = re.search(rf"{what} ([\d,]+) -> ([\d,]+)", text)
    return [int(number.replace(",", "")) for number in found.groups()]


@pytest.mark.parametrize("name", PRUNING)
def test_a_sample_explains_itself(name, capsys):
    """--help names every option, with a default that needs no path of anybody's machine."""
    with pytest.raises(SystemExit) as exit_of:
        load(name).main(["--help"])
    assert exit_of.value.code == 0
    text = capsys.readouterr().out
    assert {"--output", "--target", "--epochs"} <= set(re.findall(r"--\w+", text))
    assert "/work" not in (SAMPLES / f"{name}.py").read_text()


def test_a_wrong_target_is_one_line(capsys, tmp_path):
    """A target that cannot be meant, or met, is said before any training, with the code of a usage error."""
    for target, text in (("macs:2", "no target"), ("params:0.001", "out of reach")):
        assert load("prune_cnn").main(["--target", target, "-o", str(tmp_path)]) == 2
        captured = capsys.readouterr()
        assert text in captured.err
        assert captured.err.count("\n") == 1


def test_a_cnn_reaches_its_share_of_multiply_accumulates(capsys, tmp_path):
    """Trained, pruned, exported, compressed, verified and timed by one call."""
    options = ["--epochs=3", "--width=8", "--target=macs:0.4", "--bench-seconds=0.5"]
    assert load("prune_cnn").main([*options, "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    before, after = counts(text, "multiply-accumulates")
    assert 0.2 * before < after <= 0.4 * before
    assert "same outputs: True" in text
    assert "speed-up in ONNX Runtime" in text
    assert {path.name for path in tmp_path.iterdir()} == {"full.onnx", "small.onnx"}


def test_a_transformer_loses_heads_and_neurons(capsys, tmp_path):
    """Half of its parameters, as whole heads and neurons."""
    options = ["--epochs=2", "--depth=1", "--target=params:0.5"]
    assert load("prune_transformer").main([*options, "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    before, after = counts(text, "parameters")
    assert 0.3 * before < after <= 0.5 * before
    assert int(re.search(r"'heads': (\d+)", text)[1]) > 0
    assert int(re.search(r"'neurons': (\d+)", text)[1]) > 0
    assert "same outputs: True" in text


def test_a_trained_network_loses_what_its_loss_can_do_without(capsys, tmp_path):
    """The order names every module's place, and the target is met with the outputs proved equal."""
    options = ["--epochs=2", "--dense-epochs=1", "--width=4", "--target=macs:0.3"]
    assert load("prune_trained").main([*options, "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    before, after = counts(text, "multiply-accumulates")
    assert 0.15 * before < after <= 0.3 * before
    assert re.search(r"first to go at 0\b", text)
    assert "same outputs: True" in text


def test_an_order_has_no_latency(capsys, tmp_path):
    """Said before any training, in one line, with the code of a usage error."""
    assert load("prune_trained").main(["--target=latency:0.5", "-o", str(tmp_path / "none")]) == 2
    captured = capsys.readouterr()
    assert "latency:0.5" in captured.err
    assert not captured.out
    assert not (tmp_path / "none").exists()


def test_a_latency_is_reached_as_measured(capsys, tmp_path):
    """The controller's last measurement is at or below the target, and the files are faster."""
    options = ["--epochs=1", "--images=64", "--width=24", "--target=latency:0.6", "--bench-seconds=0.5"]
    assert load("prune_to_latency").main([*options, "-o", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert 0 < float(re.search(r"while training: ([\d.]+)", text)[1]) <= 0.6
    assert 0 < float(re.search(r"the files: ([\d.]+)", text)[1]) < 0.9


def test_the_distributed_sample_asks_for_torchrun(capsys, monkeypatch):
    """Started without it, it says how."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as exit_of:
        load("prune_distributed").main([])
    assert exit_of.value.code == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
