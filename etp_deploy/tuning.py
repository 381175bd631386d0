"""Which of several files that compute the same is fastest on this machine, measured in a process of its own.

Candidates take turns on one thread of the CPU provider, timed by the processor's own clock, which other processes
cannot lengthen. A candidate that comes earlier (and is smaller) wins against one that is not clearly faster.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from etp_deploy.bench.environment import cpu_flags
from etp_deploy.surgery.policy import HOST, TARGETS, Target, target_named
from etp_deploy.worker import isolated

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

# a candidate must be faster by this share to win against a smaller one
CLEARLY = 0.01
# seconds of timing for each candidate, and how many turns at least and at most
SECONDS_EACH = 0.3
TURNS = (5, 40)
BLOCK_SECONDS = 0.005
TIMEOUT_S = 120.0


def host_target() -> Target:
    """Return the target that this machine's CPU execution provider is."""
    if platform.machine().lower() in {"aarch64", "arm64"}:
        return TARGETS["arm64"]
    return TARGETS["cpu-avx512" if "avx512f" in cpu_flags() else "cpu-avx2"]


def planned_for(target: str) -> Target:
    """Return the target of a name, "host" being this machine's.

    Raises:
        UsageError: where there is none.
    """
    return host_target() if target == HOST else target_named(target)


def measured(candidates: Sequence[Path], inputs: Mapping[str, np.ndarray] | None) -> list[float]:
    """Return each candidate's time against the first one's.

    Args:
        candidates: model files with the same inputs.
        inputs: an array for each input; drawn in their real ranges where not given.

    Raises:
        ModelError: when a candidate does not run.
    """
    paths = [str(path) for path in candidates]
    ratios: list[float] = isolated("etp_deploy.tuning:take_turns", paths, inputs, timeout_s=TIMEOUT_S)
    return ratios


def fastest(ratios: Sequence[float]) -> int:
    """Return the place of the first candidate that none is clearly faster than."""
    best = min(ratios)
    return next(place for place, ratio in enumerate(ratios) if ratio * (1 - CLEARLY) <= best)


def take_turns(paths: Sequence[str], inputs: Mapping[str, np.ndarray] | None) -> list[float]:
    """Time models in turns, forwards and backwards; each one's time against the first's, in the middling turn."""
    from etp_deploy.bench.sessions import Setting, bind_host, open_session  # noqa: PLC0415 - only the child needs it
    from etp_deploy.inputs import draw_inputs, input_specs  # noqa: PLC0415

    given = draw_inputs(input_specs(paths[0]), seed=0) if inputs is None else dict(inputs)
    calls = [bind_host(open_session(Path(path), Setting()), given) for path in paths]
    runs = [_warm(call) for call in calls]
    turns: list[list[float]] = []
    fewest, most = TURNS
    end = time.perf_counter() + SECONDS_EACH * len(calls)
    while len(turns) < fewest or (len(turns) < most and time.perf_counter() < end):
        order = list(range(len(calls)))
        times = [0.0] * len(calls)
        for place in (*order, *reversed(order)):
            times[place] += _seconds(calls[place], runs[place]) / runs[place]
        turns.append(times)
    return [statistics.median(times[place] / times[0] for times in turns) for place in range(len(calls))]


def _warm(call: Callable[[], object]) -> int:
    """Run a few times; return how many runs make a block."""
    call()
    typical = statistics.median(_seconds(call, 1) for _ in range(3))
    return max(1, min(400, round(BLOCK_SECONDS / max(typical, 1e-7))))


def _seconds(call: Callable[[], object], runs: int) -> float:
    """Return the processor time of some runs."""
    start = time.thread_time()
    for _ in range(runs):
        call()
    return time.thread_time() - start
