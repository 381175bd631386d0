"""Joules per run where the machine tells them: Intel's RAPL counters, or an NVIDIA GPU's power."""

from __future__ import annotations

import contextlib
import os
import statistics
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etp_deploy.bench.environment import nvidia_query
from etp_deploy.bench.sessions import bind_host, open_session
from etp_deploy.sessions import CPU, DEVICES, check_provider

if TYPE_CHECKING:
    from etp_deploy.bench.latency import Entrant
    from etp_deploy.bench.sessions import Setting

SECONDS = 1.0
_ZONES = Path("/sys/class/powercap")


def measure(entrant: Entrant, setting: Setting) -> dict[str, Any]:
    """Energy of one run of the model, the idle package included, or why it cannot be read."""
    wanted = check_provider(setting.provider)
    if wanted in DEVICES and nvidia_query("power.draw"):
        return _gpu(entrant, setting)
    zones = [zone for zone in sorted(_ZONES.glob("intel-rapl:?")) if os.access(zone / "energy_uj", os.R_OK)]
    if wanted != CPU or not zones:
        return {"available": False, "reason": "no readable RAPL counters and no NVIDIA GPU"}
    before = [_read(zone / "energy_uj") for zone in zones]
    runs, _ = _run(entrant, setting)
    used = 0.0
    for zone, start in zip(zones, before, strict=True):
        end = _read(zone / "energy_uj")
        used += (end - start if end >= start else end - start + _read(zone / "max_energy_range_uj")) / 1e6
    return {"available": True, "source": "RAPL", "joules_per_run": used / runs, "runs": runs}


def _gpu(entrant: Entrant, setting: Setting) -> dict[str, Any]:
    """Mean power while the model runs, read over and over beside it."""
    watts: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            watts.extend(_numbers(nvidia_query("power.draw")[:1]))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        runs, seconds = _run(entrant, setting)
    finally:
        over.set()
        watcher.join()
    if not watts:
        return {"available": False, "reason": "the GPU tells no power"}
    joules = statistics.mean(watts) * seconds / runs
    return {"available": True, "source": "nvidia-smi", "joules_per_run": joules, "runs": runs}


def _numbers(lines: list[str]) -> list[float]:
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(float(line))
    return found


def _run(entrant: Entrant, setting: Setting) -> tuple[int, float]:
    call = bind_host(open_session(entrant.path, setting), entrant.inputs)
    call()
    begin, runs = time.monotonic(), 0
    while time.monotonic() - begin < SECONDS:
        call()
        runs += 1
    return runs, time.monotonic() - begin


def _read(path: Path) -> int:
    return int(path.read_text())
