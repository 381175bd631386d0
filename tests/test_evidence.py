"""The commands behind the evidence tables: crashes are rows, what is done stays done, no registry is one line."""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import rows  # after its folder
import third_party

torch = pytest.importorskip("torch")

from networks.sites import channels, find, native, neurons, plant, removable  # noqa: E402


def test_a_crash_is_a_row():
    """Answers come back; an exception, a dying process and one that hangs each leave a reason."""
    forked = functools.partial(rows.in_fork, timeout_s=30)
    assert forked(lambda: {"outcome": "fine"})["outcome"] == "fine"
    assert "division by zero" in forked(lambda: {"outcome": str(1 / 0)})["reason"]
    assert "ended with 3" in forked(lambda: os._exit(3))["reason"]
    assert "not done" in rows.in_fork(lambda: {"x": __import__("time").sleep(60)}, timeout_s=0.2)["reason"]
    own = functools.partial(rows.in_own_process, timeout_s=30)
    assert own(["-c", "print('x'); print('{\"a\": 1}')"])["a"] == 1
    assert own(["-c", "raise SystemExit('gone')"])["reason"] == "gone"


def test_what_is_done_stays_done(tmp_path):
    """Rows are read back; only missing ones are left to do, unless all are wanted again."""
    results = rows.Results(tmp_path / "r.json", "s", ("numpy",))
    results.add("one", {"outcome": "fine"})
    again = rows.Results(tmp_path / "r.json", "s", ())
    assert list(again.missing(["one", "two"], again=False)) == ["two"]
    assert list(again.missing(["one", "two"], again=True)) == ["one", "two"]


def test_a_registry_that_is_not_reached_is_one_line(tmp_path, monkeypatch, capsys):
    """Exit code 3, one line, and no table."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    arguments = ["third_party", "-k", "ufish", "-o", str(tmp_path / "r.json"), "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(third_party, "be_nice", lambda: None)
    assert third_party.main() == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("third_party: error: ufish==0.1.1: ")
    assert list(tmp_path.iterdir()) == []


def net():
    """A convolution with BatchNormalization, one that pads, and two linear layers."""
    nn = torch.nn
    torch.manual_seed(0)
    parts = {
        "c1": nn.Conv2d(3, 8, 1),
        "n1": nn.BatchNorm2d(8),
        "r1": nn.ReLU(),
        "c2": nn.Conv2d(8, 6, 3, padding=1),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "up": nn.Linear(6, 10),
        "gelu": nn.GELU(),
        "down": nn.Linear(10, 4, bias=False),
    }
    made = nn.Sequential()
    for name, part in parts.items():
        made.add_module(name, part)
    made.n1.bias.data += 1
    return made.eval()


def test_the_floor_computes_the_same():
    """The network cut by hand equals the planted one, constants folded, one carrier kept for the padding."""
    image = torch.randn(2, 3, 5, 5)
    planted = net()
    places = find(planted, (channels("c1", "c2", "n1"), neurons("up", down="down")))
    whole = planted(image)
    plant(planted, places)
    small = native(planted, places, lambda module: module(image))
    torch.testing.assert_close(small(image), planted(image))
    assert (whole - planted(image)).abs().max() > 1e-3
    assert removable(places) == {"channel": 2, "neuron": 4}
    assert (small.c1.out_channels, small.up.out_features) == (6, 6)
    assert small.down.bias is not None


def test_units_that_are_no_constants_are_refused():
    """Control: without planting, the same units move, and nothing is cut."""
    image = torch.randn(2, 3, 5, 5)
    living = net()
    places = find(living, (neurons("up", down="down"),))
    with pytest.raises(ArithmeticError, match="moves by"):
        native(living, places, lambda module: module(image))
