"""From what was measured to the reasons to doubt it."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import psutil

from etp_deploy.bench.cautions import Caution
from etp_deploy.bench.statistics import MIN_SESSIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from etp_deploy.bench.latency import Entrant, Race
    from etp_deploy.bench.results import Cell, ModelFacts
    from etp_deploy.inputs import InputSpec

FEW_SAMPLES = 100
NOISY_CONTROL = 0.05
PREEMPTED = 1.1
DRIFT = 0.05
OVERHEAD_MS = 0.03
COPIES = 2.0


def about_inputs(
    facts: Sequence[ModelFacts], specs: Sequence[Sequence[InputSpec]], entrants: Sequence[Entrant], cell: Cell
) -> list[Caution]:
    """Inputs larger than the model, and a batch that a model does not take."""
    found = []
    for own, spec, entrant in zip(facts, specs, entrants, strict=True):
        size = sum(array.nbytes for array in entrant.inputs.values())
        if size > max(4 * own.weights_bytes, 1 << 20):
            found.append(
                Caution(
                    "inputs_dominate", f"{own.name}: inputs of {size} bytes, weights of {own.weights_bytes}"
                )
            )
        if cell.batch is not None and not any(s.shape and isinstance(s.shape[0], str) for s in spec):
            found.append(Caution("static_batch", f"{own.name}: a batch of {cell.batch} was asked for"))
    return found


def about_outputs(names: Sequence[str], outputs: Sequence[Mapping[str, Any]]) -> list[Caution]:
    """Contenders that take or compute something else, and providers that do."""
    found = []
    for name, result in zip(names, outputs, strict=True):
        if not result["compared"]:
            kind = "inputs_differ" if "inputs" in result["reason"] else "no_contest"
            found.append(Caution(kind, f"{name}: {result['reason']}"))
        elif not result["agree"]:
            found.append(
                Caution("outputs_differ", f"{name}: outputs differ by {result['max_abs_difference']:.3g}")
            )
        reference = result.get("against_cpu")
        if reference and reference.get("agree") is False:
            apart = reference["max_abs_difference"]
            found.append(
                Caution("outputs_differ", f"{name}: outputs differ from the CPU provider's by {apart:.3g}")
            )
    return found


def about_memory(model_bytes: int, available: int) -> list[Caution]:
    """Too little memory to hold all sessions at once."""
    if 2 * model_bytes > available:
        return [Caution("low_memory", f"models of {model_bytes} bytes, {available} bytes available")]
    return []


def about_race(facts: Sequence[ModelFacts], cell: Cell, timed: Race, on_device: Race | None) -> list[Caution]:
    """Noise, drift, few samples and calls too short to time."""
    found = []
    if len(timed.rounds) < MIN_SESSIONS:
        found.append(Caution("few_sessions", f"{cell}: {len(timed.rounds)} sessions in the time given"))
    if cell.threads != 1:
        found.append(Caution("spinning_off", f"{cell}"))
    if len(facts) > 1 and timed.control().spread > NOISY_CONTROL:
        control = timed.control()
        found.append(
            Caution("noisy_control", f"{cell}: {control.low:.3f} to {control.high:.3f} for the same model")
        )
    found += _drift(cell, timed) + _frequency()
    for place, own in enumerate(facts):
        sessions = [r.samples[place] for r in timed.rounds]
        wall = [t / 1e6 for s in sessions for t in s.wall]
        typical = statistics.median(wall)
        if len(wall) < FEW_SAMPLES:
            found.append(Caution("few_samples", f"{own.name} ({cell}): {len(wall)} samples"))
        if typical < OVERHEAD_MS:
            found.append(Caution("overhead_dominates", f"{own.name} ({cell}): {typical * 1e3:.0f} us a run"))
        busy = statistics.median([t / 1e6 for s in sessions for t in s.cpu])
        if timed.clock == "cpu" and typical > PREEMPTED * busy:
            found.append(
                Caution("preempted", f"{own.name}: {typical:.3g} ms on the wall, {busy:.3g} ms of processor")
            )
        if on_device is not None:
            alone = statistics.median([t / 1e6 for r in on_device.rounds for t in r.samples[place].wall])
            if typical > COPIES * alone:
                found.append(
                    Caution("copies_dominate", f"{own.name}: {typical:.3g} ms, {alone:.3g} ms of it compute")
                )
    return found


def _drift(cell: Cell, timed: Race) -> list[Caution]:
    """The baseline's own time at the end against the beginning."""
    levels = [statistics.mean(r.samples[0].levels(timed.clock)) for r in timed.rounds]
    third = len(levels) // 3
    if third < 2:
        return []
    change = statistics.median(levels[-third:]) - statistics.median(levels[:third])
    if abs(change) <= DRIFT:
        return []
    return [Caution("drift", f"{cell}: the baseline changed by {change:+.0%} from beginning to end")]


def _frequency() -> list[Caution]:
    """The processor's frequency just after load, where the system tells it."""
    try:
        now = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return []
    if now is None or not now.max or now.current >= 0.7 * now.max:
        return []
    return [Caution("frequency", f"{now.current:.0f} MHz of {now.max:.0f} right after the measurement")]
