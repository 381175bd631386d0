"""Energy from counters and from a GPU's power, on counters made by hand."""

from __future__ import annotations

import itertools
import threading

import pytest

from etp_deploy.bench import energy
from etp_deploy.bench.sessions import Setting
from etp_deploy.sessions import CPU, DEVICES


def test_counters(tmp_path, monkeypatch):
    """The difference of the counters over the runs, across a wrap to zero."""
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "energy_uj").write_text("900")
    (zone / "max_energy_range_uj").write_text("1000")

    def run(*_):
        (zone / "energy_uj").write_text("100")
        return 4, 1.0

    monkeypatch.setattr(energy, "_ZONES", tmp_path)
    monkeypatch.setattr(energy, "_run", run)
    found = energy.measure(None, Setting())
    assert found["available"]
    assert found["joules_per_run"] == pytest.approx(200e-6 / 4)


def test_gpu_power(monkeypatch):
    """Mean power times the time of a run; lines that hold no number are left out."""
    monkeypatch.setitem(DEVICES, CPU, "cpu")
    lines = itertools.chain([["50"], ["[N/A]"]], itertools.repeat(["100"]))
    read_enough = threading.Event()

    def query(_):
        line = next(lines)
        if line == ["100"]:
            read_enough.set()
        return line

    def run(*_):
        assert read_enough.wait(10)
        return 10, 2.0

    monkeypatch.setattr(energy, "nvidia_query", query)
    monkeypatch.setattr(energy, "_run", run)
    found = energy.measure(None, Setting())
    assert found["source"] == "nvidia-smi"
    assert found["joules_per_run"] == pytest.approx(100 * 2 / 10)


def test_unavailable(tmp_path, monkeypatch):
    """Without counters the reason is given instead of a number."""
    monkeypatch.setattr(energy, "_ZONES", tmp_path)
    found = energy.measure(None, Setting())
    assert found == {"available": False, "reason": "no readable RAPL counters and no NVIDIA GPU"}
