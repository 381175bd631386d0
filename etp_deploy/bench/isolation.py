"""Measurements in a fresh process each, with a heap that gives back what is freed.

Without the fixed environment two and a half times a model's weights stay resident after loading, most of it
freed heap. The first of these processes also shows, before anything runs in ours, whether ONNX Runtime
survives the model.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import etp_deploy
from etp_deploy import errors
from etp_deploy.errors import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from etp_deploy.bench.sessions import Setting

HEAP = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
TIMEOUT_S = 600.0


def run_child(
    mode: str,
    model: Path,
    setting: Setting,
    inputs: Mapping[str, np.ndarray],
    *,
    timeout_s: float = TIMEOUT_S,
) -> dict[str, Any]:
    """Measure one model in a process of its own.

    Args:
        mode: "memory" or "profile", see `etp_deploy.bench.child`.
        model: the model's file.
        setting: how to open its session.
        inputs: what to run it on.
        timeout_s: seconds after which the process is killed.

    Raises:
        EtpError: the error that the process met, kind and hint unchanged.
        BenchmarkError: when it crashed or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="etp-deploy-") as folder:
        request, response, log = (Path(folder, name) for name in ("request", "response", "log"))
        task = {"mode": mode, "model": str(model.resolve()), "setting": setting, "inputs": dict(inputs)}
        request.write_bytes(pickle.dumps(task))
        command = [sys.executable, "-m", "etp_deploy.bench.child", str(request), str(response)]
        with log.open("wb") as stderr:
            try:
                done = subprocess.run(  # noqa: S603 - our own interpreter and module
                    command, env=_environment(), stdout=stderr, stderr=stderr, timeout=timeout_s, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise BenchmarkError(
                    f"the {mode} measurement took more than {timeout_s:g} s",
                    where=model.name,
                    hint="use smaller inputs",
                ) from error
        if done.returncode or not response.exists():
            raise BenchmarkError(
                f"ONNX Runtime {_death(done.returncode)} on the model", where=model.name, hint=_last_line(log)
            )
        answer: dict[str, Any] = pickle.loads(response.read_bytes())  # noqa: S301 - written by our own child
    if "error" in answer:
        name, message, where, hint = answer["error"]
        raise getattr(errors, name)(message, where=where, hint=hint)
    return answer


def _environment() -> dict[str, str]:
    root = str(Path(etp_deploy.__file__).parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **HEAP, "PYTHONPATH": os.pathsep.join(paths)}


def _death(status: int) -> str:
    if status < 0:
        try:
            return f"died of {signal.Signals(-status).name}"
        except ValueError:
            return f"died of signal {-status}"
    return f"stopped with status {status}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
