"""What the machine was when the measurement was taken; no host name and no paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import psutil

from etp_deploy.bench.cautions import Caution

PACKAGES = ("etp-deploy", "onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnx", "numpy")
FLAGS = (
    "avx",
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "sve",
)
# What must agree before two reports are compared as if from one machine.
IDENTITY = ("cpu", "cores", "machine", "system", "quota")
_POLICY = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe() -> dict[str, Any]:
    """CPU, memory, load, governor, versions and GPUs, as plain JSON values."""
    memory = psutil.virtual_memory()
    return {
        "cpu": _cpu_model(),
        "flags": cpu_flags(),
        "cores": {"physical": psutil.cpu_count(logical=False), "usable": usable_cores()},
        "quota": cpu_quota(),
        "governor": governor(),
        "machine": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release().split("-")[0],
        "memory_bytes": {"total": memory.total, "available": memory.available},
        "load": load_average(),
        "python": platform.python_version(),
        "versions": versions(),
        "providers": ort.get_available_providers(),
        "gpus": gpus(),
    }


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def load_average() -> float | None:
    """One-minute load average, None where the system has none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def governor() -> str | None:
    """Frequency governor of the first core, None where it cannot be read."""
    try:
        return _POLICY.read_text().strip()
    except OSError:
        return None


def cpu_quota() -> float | None:
    """Cores that the control group grants, None without a limit."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def versions() -> dict[str, str]:
    """Installed versions of what takes part."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def gpus() -> list[str]:
    """Names and driver versions of NVIDIA GPUs."""
    return nvidia_query("name,driver_version")


def nvidia_query(fields: str) -> list[str]:
    """One line per GPU from nvidia-smi; empty where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            command, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def cautions(threads: int, load: float | None) -> list[Caution]:
    """What about the machine makes a measurement with so many threads doubtful."""
    found = []
    cores, quota = usable_cores(), cpu_quota()
    if load is not None and load > 0.5 * cores:
        found.append(Caution("load", f"load average {load} on {cores} cores before the start"))
    if (current := governor()) not in {None, "performance"}:
        found.append(Caution("governor", f"the frequency governor is {current}"))
    if threads > cores:
        found.append(Caution("more_threads_than_cores", f"{threads} threads on {cores} cores"))
    if quota is not None and quota < max(threads, 1):
        found.append(Caution("cpu_quota", f"{threads} threads under a quota of {quota:g} cores"))
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """In which identifying facts two environments differ, in words."""
    found = [
        f"{key}: {first.get(key)} against {second.get(key)}"
        for key in IDENTITY
        if first.get(key) != second.get(key)
    ]
    ours, theirs = (e.get("versions", {}).get("onnxruntime") for e in (first, second))
    if ours != theirs:
        found.append(f"onnxruntime: {ours} against {theirs}")
    return found


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """Return those of the processor's features that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(found.group(1).split()) if found else set()
    return [flag for flag in FLAGS if flag in present]
