"""The comparisons with peers: what is committed keeps its promises, and the commands still run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from etp_deploy.bench.latency import runs_on_cpu_clock, time_runs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script, *arguments):
    """Run a script of the peers' folder."""
    command = [sys.executable, BENCHMARKS / "peers" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_error_rates_of_both_methods():
    """One command shows both methods' rates; ours are within what is promised, on 200 trials of each kind."""
    done = run("error_rates.py")
    assert done.returncode == 0, done.stderr
    for text in ("A/A, 200 trials", "A/B, 200 trials", "ours", "sequential, Welch", "sequential, 2 %"):
        assert text in done.stdout


def test_overhead_runs(tmp_path):
    """The overhead of the timing loop is measured for calls of all lengths; two blocks are no result."""
    done = run("overhead.py", "--blocks", "2", "-o", tmp_path / "overhead.json")
    assert done.returncode in {0, 1}, done.stderr
    found = json.loads((tmp_path / "overhead.json").read_text())
    assert [model["ratio"] > 0 for model in found["models"]] == [True] * 4
    assert found["models"][0]["runs_per_cpu_clock"] > 1


def test_committed_overhead():
    """The committed measurement is within one percent of a bare loop at every length."""
    found = json.loads((BENCHMARKS / "results" / "overhead.json").read_text())
    assert found["passed"]
    assert all(model["ratio"] == pytest.approx(1, abs=0.01) for model in found["models"])


def test_the_processors_clock_is_read_seldom():
    """Short calls share a reading of the processor's clock, long ones have one each."""
    assert runs_on_cpu_clock(1e-5, 400) == 50
    assert runs_on_cpu_clock(1e-7, 400) == 400
    assert runs_on_cpu_clock(1e-2, 1) == 1
    wall, cpu = time_runs(lambda: None, 20, cpu_runs=5)
    assert (len(wall), len(cpu)) == (20, 4)
