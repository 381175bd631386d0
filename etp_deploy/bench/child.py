"""What runs in an isolated process: one model, one measurement, one answer.

Started by `isolation.run_child` with a fixed heap environment. Nothing is imported here that a deployment
would not import, so that what is measured above the idle process is ONNX Runtime and the model.
"""

from __future__ import annotations

import collections
import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etp_deploy.bench.sessions import Setting, bind_host, open_session, run_outputs
from etp_deploy.errors import EtpError
from etp_deploy.sessions import DEVICES, provider_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

STEADY_RUNS = 5
PROFILE_SECONDS = 1.0
PROFILE_RUNS = (5, 40)


def measure_memory(model: Path, setting: Setting, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Resident memory idle, while loading, after loading, while running and steady, in bytes.

    The timeline holds (seconds, phase, resident bytes) so that a report can draw it.
    """
    device_before = _device_used(setting)
    start = time.monotonic()
    idle = _resident()
    timeline = [(0.0, "idle", idle["rss"])]
    _reset_peak()
    session = open_session(model, setting)
    load_peak, loaded = _peak(), _resident()
    timeline.append((time.monotonic() - start, "loaded", loaded["rss"]))
    _reset_peak()
    call = bind_host(session, inputs)
    for run in range(STEADY_RUNS):
        call()
        phase = "run" if run else "first run"
        timeline.append((time.monotonic() - start, phase, _resident()["rss"]))
    run_peak, steady = _peak(), _resident()
    device = _device_used(setting)
    return {
        "device": None if device is None or device_before is None else device - device_before,
        "idle": idle,
        "load_peak": load_peak,
        "loaded": loaded,
        "run_peak": run_peak,
        "steady": steady,
        "timeline": timeline,
    }


def profile(model: Path, setting: Setting, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Outputs of one run, time and memory of each node by ONNX Runtime's own profile, and partitions."""
    outputs = run_outputs(open_session(model, setting), inputs)
    with tempfile.TemporaryDirectory(prefix="etp-deploy-") as folder:
        prefix = str(Path(folder, "profile"))
        session = open_session(model, Setting(setting.provider, setting.threads, profile_prefix=prefix))
        call = bind_host(session, inputs)
        begin, runs = time.monotonic(), 0
        least, most = PROFILE_RUNS
        while runs < least or (runs < most and time.monotonic() - begin < PROFILE_SECONDS):
            call()
            runs += 1
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return {"outputs": outputs, **read_profile(events)}


def read_profile(events: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Turn ONNX Runtime's profile events into one record for each node, and memory counters.

    Raises:
        KeyError: never; counters that this version of ONNX Runtime lacks are None.
    """
    nodes: dict[tuple[str, str], dict[str, Any]] = {}
    times: dict[tuple[str, str], collections.Counter[int]] = {}
    peak: int | None = None
    held: int | None = None
    # in use before the first node of the first run: weights that were packed or converted while loading
    loaded: int | None = None
    run = 0
    for event in events:
        if event.get("name") == "model_run":
            run += 1
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        facts = event["args"]
        key = (facts.get("node_index", ""), event["name"])
        times.setdefault(key, collections.Counter())[run] += event["dur"]
        nodes.setdefault(key, _node_record(event["name"].removesuffix("_kernel_time"), facts))
        if "mem_in_use_peak" in facts:
            peak = max(peak or 0, int(facts["mem_in_use_peak"]))
            held = max(held or 0, int(facts["mem_arena_held"]))
            if loaded is None:
                loaded = int(facts["mem_bytes_in_use"]) - int(facts["mem_in_use_delta"])
    for key, record in nodes.items():
        record["us"] = _typical([times[key][r] for r in range(1, run)] or [times[key][0]])
    return {
        "nodes": list(nodes.values()),
        "runs": run,
        "activation_peak": None if peak is None or loaded is None else peak - loaded,
        "arena_peak": peak,
        "arena_held": held,
        "partitions": dict(collections.Counter(record["provider"] for record in nodes.values())),
    }


def _node_record(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    def shapes(key: str) -> list[list[Any]]:
        return [[kind, dims] for entry in facts.get(key, ()) for kind, dims in entry.items()]

    return {
        "node": name,
        "kernel": facts.get("op_name", ""),
        "provider": facts.get("provider", ""),
        "inputs": shapes("input_type_shape"),
        "outputs": shapes("output_type_shape"),
        "parameter_bytes": int(facts.get("parameter_size", 0)),
        "activation_bytes": int(facts.get("activation_size", 0)),
        "output_bytes": int(facts.get("output_size", 0)),
    }


def _typical(durations: list[int]) -> float:
    """Mean of the faster half: the slower one waited, and whole microseconds make medians too coarse."""
    kept = sorted(durations)[: max(1, len(durations) // 2)]
    return sum(kept) / len(kept)


def _resident() -> dict[str, int]:
    """Resident, proportional, anonymous and file-backed bytes of this process."""
    try:
        status = _fields(Path("/proc/self/status"))
        rollup = _fields(Path("/proc/self/smaps_rollup"))
    except OSError:
        import psutil  # noqa: PLC0415 - not on Linux

        return {"rss": psutil.Process(os.getpid()).memory_info().rss}
    return {
        "rss": status["VmRSS"],
        "pss": rollup.get("Pss", 0),
        "anonymous": status.get("RssAnon", 0),
        "file": status.get("RssFile", 0),
    }


def _device_used(setting: Setting) -> int | None:
    """Bytes in use on the first NVIDIA GPU, by anyone; None for other providers."""
    if provider_class(setting.provider) not in DEVICES:
        return None
    from etp_deploy.bench.environment import nvidia_query  # noqa: PLC0415 - not on the CPU

    lines = nvidia_query("memory.used")
    return int(float(lines[0])) * 1024 * 1024 if lines else None


def _peak() -> int | None:
    try:
        return _fields(Path("/proc/self/status"))["VmHWM"]
    except (OSError, KeyError):
        return None


def _reset_peak() -> None:
    """Let the peak start again from what is resident now, where the kernel can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _fields(path: Path) -> dict[str, int]:
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * 1024
    return found


def main(request: Path, response: Path) -> None:
    """Do what the request file asks and write the answer, an error of ours as its parts."""
    # both files belong to the parent process, in a folder that only it can write to
    task = pickle.loads(request.read_bytes())  # noqa: S301
    action = {"memory": measure_memory, "profile": profile}[task["mode"]]
    try:
        answer: dict[str, Any] = action(Path(task["model"]), task["setting"], task["inputs"])
    except EtpError as error:
        answer = {"error": (type(error).__name__, error.message, error.where, error.hint)}
    response.write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
