"""Interleaved timing: baseline and contenders in mirrored blocks, all in fresh sessions, until decided.

One *round* opens a session for the baseline, one for every contender and a second one for the baseline,
warms them up and runs short blocks in passes of the order A B C A' A' C B A: whatever drifts slowly hits all
alike, and what disturbs one pass is outvoted by the others. A' against A is the control: the same model
against itself, measured at the same time in the same way.

With one thread on the CPU the primary clock is the processor time of the calling thread, which other
processes cannot lengthen; wall time stands beside it.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from math import log
from typing import TYPE_CHECKING

from etp_deploy.bench.sessions import Setting, bind_device, bind_host, open_session
from etp_deploy.bench.statistics import (
    MIN_SESSIONS,
    Interval,
    equal,
    log_ratio_interval,
    verdict,
)
from etp_deploy.sessions import CPU, DEVICES, check_provider

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np

BLOCK_SECONDS = 0.008
BLOCK_RUNS = (1, 400)
# The processor's clock is a system call, which leaves a visible mark on a call of microseconds: it is read once
# for as many runs as take this long together.
CPU_CLOCK_SECONDS = 0.0005
ROUND_SECONDS = 0.5
PASSES = (2, 6)
WARM_UP_RUNS = (3, 30)
WARM_UP_SECONDS = 1.0
STEADY_WITHIN = 0.05
PATIENCE = 3


@dataclasses.dataclass(frozen=True)
class Entrant:
    """A model with what it is run on.

    Args:
        path: the model's file.
        inputs: arrays by input name.
    """

    path: Path
    inputs: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SessionSample:
    """Raw times of one session, in nanoseconds.

    Args:
        wall: wall-clock time of each run, block by block, two blocks to a pass.
        cpu: processor time of a run by the calling thread's clock, one value for every `cpu_runs` runs.
        passes: how many passes there were.
        creation: wall-clock time to create the session.
        first: wall-clock time of the first run.
        cpu_runs: over how many runs each value of `cpu` is the mean; more than one where runs are short.
    """

    wall: tuple[int, ...]
    cpu: tuple[int, ...]
    passes: int
    creation: int
    first: int
    cpu_runs: int = 1

    def levels(self, clock: str) -> tuple[float, ...]:
        """Log of the typical time in each pass: the mean over its two blocks of the log median."""
        times = self.cpu if clock == "cpu" else self.wall
        runs = len(times) // (2 * self.passes)
        logs = [
            log(max(statistics.median(times[start : start + runs]), 1))
            for start in range(0, len(times), runs)
        ]
        return tuple((first + second) / 2 for first, second in zip(logs[::2], logs[1::2], strict=True))


@dataclasses.dataclass(frozen=True)
class Round:
    """One sampling unit: a session of each model, and a second one of the baseline."""

    samples: tuple[SessionSample, ...]
    control: SessionSample | None

    def log_ratio(self, contender: int, clock: str) -> float:
        """Contender against the baseline's two sessions, in the middling pass."""
        base = self.samples[0].levels(clock)
        again = self.control.levels(clock) if self.control is not None else base
        levels = self.samples[contender].levels(clock)
        return statistics.median(c - (a + b) / 2 for c, a, b in zip(levels, base, again, strict=True))

    def control_log_ratio(self, clock: str) -> float:
        """The baseline against itself."""
        assert self.control is not None
        pairs = zip(self.samples[0].levels(clock), self.control.levels(clock), strict=True)
        return statistics.median(again - base for base, again in pairs)


@dataclasses.dataclass(frozen=True)
class Limits:
    """When to stop.

    Args:
        sessions: most rounds.
        seconds: no round starts later than this; thrice as late while there are too few for any verdict.
    """

    sessions: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Race:
    """All rounds of one baseline and its contenders in one setting.

    Args:
        clock: "cpu" or "wall": what the verdict rests on.
        rounds: the raw samples.
        stopped: "decided", "equal", "sessions" or "time".
    """

    clock: str
    rounds: tuple[Round, ...]
    stopped: str

    def ratio(self, contender: int, clock: str | None = None) -> Interval:
        """Contender time over baseline time."""
        return log_ratio_interval([r.log_ratio(contender, clock or self.clock) for r in self.rounds])

    def control(self, clock: str | None = None) -> Interval:
        """Baseline time over baseline time."""
        return log_ratio_interval(
            [r.control_log_ratio(clock or self.clock) for r in self.rounds if r.control]
        )

    def verdict(self, contender: int) -> str:
        """Say "faster", "slower" or "undecided" of the contender."""
        return verdict(self.ratio(contender), self.control())


class _Runner:
    """An open session with its call, its number of runs in a block, and the times so far."""

    def __init__(self, entrant: Entrant, setting: Setting) -> None:
        start = time.perf_counter_ns()
        session = open_session(entrant.path, setting)
        self.creation = time.perf_counter_ns() - start
        device = DEVICES.get(check_provider(setting.provider), "")
        if setting.on_device and device:
            self.call: Callable[[], object] = bind_device(session, entrant.inputs, device)
        else:
            self.call = bind_host(session, entrant.inputs)
        start = time.perf_counter_ns()
        self.call()
        self.first = time.perf_counter_ns() - start
        self.wall: list[int] = []
        self.cpu: list[int] = []
        self.runs = 0
        self.cpu_runs = 1
        self.seconds = 0.0

    def warm_up(self) -> None:
        """Run until the time of a run is steady, and choose how many runs make a block."""
        least, most = WARM_UP_RUNS
        times: list[int] = []
        begin = time.perf_counter()
        while len(times) < most and (len(times) < least or time.perf_counter() - begin < WARM_UP_SECONDS):
            times += time_runs(self.call, 3, cpu_runs=3)[0]
            if len(times) >= 6:
                before, now = statistics.mean(times[-6:-3]), statistics.mean(times[-3:])
                if abs(now - before) <= STEADY_WITHIN * before:
                    break
        fewest, largest = BLOCK_RUNS
        typical = max(statistics.median(times[-3:]), 1) / 1e9
        runs = min(max(round(BLOCK_SECONDS / typical), fewest), largest)
        self.cpu_runs = runs_on_cpu_clock(typical, runs)
        self.runs = runs - runs % self.cpu_runs
        self.seconds = self.runs * typical

    def block(self) -> None:
        """Time one block of runs."""
        wall, cpu = time_runs(self.call, self.runs, cpu_runs=self.cpu_runs)
        self.wall += wall
        self.cpu += cpu

    def sample(self, passes: int) -> SessionSample:
        """What was measured, immutable."""
        return SessionSample(
            wall=tuple(self.wall),
            cpu=tuple(self.cpu),
            passes=passes,
            creation=self.creation,
            first=self.first,
            cpu_runs=self.cpu_runs,
        )


def race(
    entrants: Sequence[Entrant],
    setting: Setting,
    limits: Limits,
    *,
    tell: Callable[[float], None] | None = None,
) -> Race:
    """Time the first entrant against the others until every verdict is clear or a limit is met.

    Args:
        entrants: the baseline, then its contenders; a baseline alone is timed alone.
        setting: how sessions are opened.
        limits: when to stop.
        tell: called after each round with the share of the limits used.

    Raises:
        ProviderError: when a session is not on the provider asked for.
        BenchmarkError: when a model cannot be loaded.
    """
    clock = "cpu" if check_provider(setting.provider) == CPU and setting.threads == 1 else "wall"
    rounds: list[Round] = []
    begin = time.monotonic()
    stopped = "sessions"
    while len(rounds) < limits.sessions:
        rounds.append(_round(entrants, setting, backwards=len(rounds) % 2 == 1))
        used = (time.monotonic() - begin) / limits.seconds
        if tell is not None:
            tell(min(max(used, len(rounds) / limits.sessions), 1.0))
        if reason := _enough(Race(clock, tuple(rounds), ""), len(entrants), used):
            stopped = reason
            break
    return Race(clock, tuple(rounds), stopped)


def _enough(so_far: Race, entrants: int, used: float) -> str:
    """Why to stop; empty to go on."""
    contenders = range(1, entrants)
    if len(so_far.rounds) >= MIN_SESSIONS:
        open_questions = [c for c in contenders if so_far.verdict(c) == "undecided"]
        if not open_questions:
            return "decided"
        if all(equal(so_far.ratio(c)) for c in open_questions):
            return "equal"
    patience = 1 if len(so_far.rounds) >= MIN_SESSIONS or entrants == 1 else PATIENCE
    # without a second session there is not even an interval
    return "time" if used >= patience and len(so_far.rounds) >= 2 else ""


def _round(entrants: Sequence[Entrant], setting: Setting, *, backwards: bool) -> Round:
    """Open everything, run mirrored blocks, close everything; the order turns from round to round."""
    line_up = [*entrants, entrants[0]] if len(entrants) > 1 else list(entrants)
    order = list(range(len(line_up)))
    if backwards:
        order.reverse()
    opened: dict[int, _Runner] = {}
    for place in order:
        opened[place] = _Runner(line_up[place], setting)
        opened[place].warm_up()
    fewest, most = PASSES
    passes = min(max(int(ROUND_SECONDS / (2 * sum(r.seconds for r in opened.values()))), fewest), most)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for place in (*order, *reversed(order)) * passes:
            opened[place].block()
    finally:
        if enabled:
            gc.enable()
    samples = tuple(opened[place].sample(passes) for place in range(len(entrants)))
    control = opened[len(entrants)].sample(passes) if len(line_up) > len(entrants) else None
    return Round(samples, control)


def runs_on_cpu_clock(typical: float, most: int) -> int:
    """Over how many runs of so many seconds the processor's clock is read once: at least one, at most all."""
    return min(max(round(CPU_CLOCK_SECONDS / typical), 1), most)


def time_runs(call: Callable[[], object], count: int, *, cpu_runs: int = 1) -> tuple[list[int], list[int]]:
    """Time so many calls: nanoseconds of each on the wall, and of the calling thread's processor.

    The wall clock is read innermost and the other outside, so that it lengthens no call.

    Args:
        call: what to time.
        count: how often, a multiple of `cpu_runs`.
        cpu_runs: the processor time is the mean over this many calls.
    """
    wall, cpu = [], []
    wall_clock, cpu_clock = time.perf_counter_ns, time.thread_time_ns
    for _ in range(count // cpu_runs):
        cpu_start = cpu_clock()
        for _ in range(cpu_runs):
            start = wall_clock()
            call()
            wall.append(wall_clock() - start)
        cpu.append((cpu_clock() - cpu_start) // cpu_runs)
    return wall, cpu
