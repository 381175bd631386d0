"""Memory of one model: weights, exact activation peak, and resident memory by phase in isolated processes."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from etp_deploy.bench.isolation import run_child

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np

    from etp_deploy.bench.sessions import Setting

REPEATS = 3


def measure(
    model: Path,
    setting: Setting,
    inputs: Mapping[str, np.ndarray],
    *,
    weights_bytes: int,
    probe: Mapping[str, Any],
    repeats: int = REPEATS,
) -> dict[str, Any]:
    """Repeat the measurement in fresh processes and give medians with their spread.

    Args:
        model: the model's file.
        setting: how to open its session.
        inputs: what to run it on.
        weights_bytes: from the file.
        probe: ONNX Runtime's profile, for the exact counters.
        repeats: how many processes.

    Raises:
        BenchmarkError: when a process crashed.
    """
    answers = [run_child("memory", model, setting, inputs) for _ in range(repeats)]
    return {
        "weights_bytes": weights_bytes,
        "activation_peak_bytes": probe["activation_peak"],
        "arena_peak_bytes": probe["arena_peak"],
        "arena_held_bytes": probe["arena_held"],
        **summarize(answers),
    }


def summarize(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over processes; `above_idle` is what a session and its runs added to a process that has none.

    Peaks are None where the system does not tell them, and so are `pss`, `anonymous` and `file`.
    """
    idle = _middle([a["idle"]["rss"] for a in answers])
    found = {
        "idle_rss_bytes": idle,
        "load_peak_rss_bytes": _middle([a["load_peak"] for a in answers]),
        "loaded_rss_bytes": _middle([a["loaded"]["rss"] for a in answers]),
        "first_run_rss_bytes": _middle([_at("first run", a["timeline"]) for a in answers]),
        "run_peak_rss_bytes": _middle([a["run_peak"] for a in answers]),
        "steady_rss_bytes": _middle([a["steady"]["rss"] for a in answers]),
        "steady_pss_bytes": _middle([a["steady"].get("pss") for a in answers]),
        "steady_anonymous_bytes": _middle([a["steady"].get("anonymous") for a in answers]),
        "steady_file_bytes": _middle([a["steady"].get("file") for a in answers]),
        "device_bytes": _middle([a.get("device") for a in answers]),
    }
    peaks = [v for v in (found["load_peak_rss_bytes"], found["run_peak_rss_bytes"]) if v is not None]
    steady = [a["steady"]["rss"] for a in answers]
    assert idle is not None
    return {
        **found,
        "peak_rss_bytes": max(peaks) if peaks else None,
        "peak_above_idle_bytes": max(peaks) - idle if peaks else None,
        "steady_above_idle_bytes": (found["steady_rss_bytes"] or 0) - idle,
        "repeats": len(answers),
        "spread": round((max(steady) - min(steady)) / max(steady), 6),
        "timeline": [list(point) for point in answers[0]["timeline"]],
    }


def phases(used: Mapping[str, Any]) -> dict[str, int]:
    """Resident bytes in the order in which a process goes through them, those left out that are not known."""
    found = {
        "imported": used["idle_rss_bytes"],
        "load peak": used["load_peak_rss_bytes"],
        "loaded": used["loaded_rss_bytes"],
        # documents of before it was measured lack it
        "first run": used.get("first_run_rss_bytes"),
        "steady": used["steady_rss_bytes"],
        "run peak": used["run_peak_rss_bytes"],
        "peak": used["peak_rss_bytes"],
    }
    return {phase: size for phase, size in found.items() if size is not None}


def _at(phase: str, timeline: Sequence[tuple[float, str, int]]) -> int | None:
    return next((size for _, name, size in timeline if name == phase), None)


def _middle(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return int(statistics.median(known)) if known else None
