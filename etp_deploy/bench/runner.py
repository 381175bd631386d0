"""The benchmark from the models' files to the result, one setting after the other."""

from __future__ import annotations

import datetime as dt
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etp_deploy.bench import dead, environment
from etp_deploy.bench.cautions import Caution, distinct
from etp_deploy.bench.cells import Plan, measure_cell
from etp_deploy.bench.facts import names, read_facts
from etp_deploy.bench.latency import Limits
from etp_deploy.bench.memory import REPEATS
from etp_deploy.bench.results import BenchmarkResult, Cell
from etp_deploy.errors import UsageError
from etp_deploy.inputs import InputSpec, dynamic_dims, input_specs
from etp_deploy.sessions import check_provider

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

DEFAULT_SESSIONS = 20
DEFAULT_SECONDS = 12.0


def benchmark(
    models: Sequence[Path | str],
    *,
    providers: Sequence[str] = ("cpu",),
    threads: int | Sequence[int] = 1,
    batch: int | Sequence[int] | None = None,
    shapes: Mapping[str, int] | None = None,
    inputs: Mapping[str, np.ndarray] | None = None,
    sessions: int = DEFAULT_SESSIONS,
    max_seconds: float = DEFAULT_SECONDS,
    seed: int = 0,
    memory: bool = True,
    memory_repeats: int = REPEATS,
    dead_channels: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> BenchmarkResult:
    """Measure latency and memory of models, the first being the baseline that the others are compared with.

    Args:
        models: ONNX files.
        providers: by name ("cpu", "cuda", "openvino", ...) or class name.
        threads: intra-op threads, or several numbers for a grid.
        batch: size of axis 0 where it is dynamic, or several for a grid.
        shapes: sizes of other dynamic dimensions, by name or as "input.axis".
        inputs: arrays to run on, by input name; drawn in their real ranges where not given.
        sessions: most sessions of each model in each setting.
        max_seconds: timing in each setting stops after this, decided or not; where sessions take so long that
            there are too few for any verdict by then, after thrice this.
        seed: for drawn inputs.
        memory: whether to measure resident memory in isolated processes.
        memory_repeats: how many processes for each model and setting.
        dead_channels: whether to find out what each model's dead channels cost.
        progress: called with what is being done and the share of all work that is done.

    Raises:
        UsageError: when the settings cannot be meant.
        ModelError: when a file is no model.
        ProviderError: when a session is not on the provider asked for.
        BenchmarkError: when ONNX Runtime cannot run a model.
    """
    paths, specs = _read_inputs(models, shapes or {})
    plan = Plan(
        paths=paths,
        facts=tuple(read_facts(path, name) for path, name in zip(paths, names(paths), strict=True)),
        specs=specs,
        shapes=shapes or {},
        given=inputs,
        seed=seed,
        limits=_limits(sessions, max_seconds),
        memory_repeats=memory_repeats if memory else 0,
        tell=progress or (lambda _step, _share: None),
    )
    cells = _cells(providers, threads, batch)
    before = environment.describe()
    done = [measure_cell(plan, cell, at / len(cells), 1 / len(cells)) for at, cell in enumerate(cells)]
    analyses, about_dead = _analyse(plan) if dead_channels else ({}, [])
    measurements = tuple(m for cell in done for m in cell.measurements)
    plan.tell("done", 1.0)
    machine = [c for cell in cells for c in environment.cautions(cell.threads, before["load"])]
    return BenchmarkResult(
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        settings={
            "providers": list(providers),
            "threads": sorted({cell.threads for cell in cells}),
            "batch": sorted({cell.batch for cell in cells if cell.batch is not None}),
            "shapes": dict(shapes or {}),
            "inputs": "given" if inputs else "drawn",
            "sessions": sessions,
            "max_seconds": max_seconds,
            "seed": seed,
        },
        environment=before,
        models=plan.facts,
        measurements=measurements,
        comparisons=tuple(c for cell in done for c in cell.comparisons),
        warnings=distinct([*machine, *(c for cell in done for c in cell.cautions), *about_dead]),
        samples=tuple(s for cell in done for s in cell.samples),
        dead={
            name: dead.to_json(found, [m for m in measurements if m.model == name])
            for name, found in analyses.items()
        },
    )


def _analyse(plan: Plan) -> tuple[dict[str, dict[str, Any]], list[Caution]]:
    """What is dead in each model, a file that comes twice analysed once."""
    by_hash: dict[str, dict[str, Any] | None] = {}
    cautions: list[Caution] = []
    for path, facts in zip(plan.paths, plan.facts, strict=True):
        if facts.sha256 not in by_hash:
            plan.tell(f"dead channels of {facts.name}", 1.0)
            by_hash[facts.sha256], seen = dead.find(path, facts.name)
            cautions += seen
    known = ((facts.name, by_hash[facts.sha256]) for facts in plan.facts)
    return {name: found for name, found in known if found is not None}, cautions


def _limits(sessions: int, max_seconds: float) -> Limits:
    """Check when to stop.

    Raises:
        UsageError: when nothing could be measured within the limits.
    """
    if sessions < 2:
        raise UsageError(f"{sessions} sessions give no interval", where="sessions", hint="ask for 2 or more")
    if not max_seconds > 0:
        raise UsageError(
            f"{max_seconds} s is no time limit", where="max_seconds", hint="give a positive number"
        )
    return Limits(sessions, max_seconds)


def _read_inputs(
    models: Sequence[Path | str], shapes: Mapping[str, int]
) -> tuple[tuple[Path, ...], tuple[tuple[InputSpec, ...], ...]]:
    """Read what the models take, and check that every size asked for is one of theirs.

    Raises:
        UsageError: when there is no model, or a size is of no dimension.
        ModelError: when a file is no model.
    """
    if not models:
        raise UsageError("there is no model to measure", where="models", hint="give at least one ONNX file")
    paths = tuple(Path(model) for model in models)
    specs = tuple(input_specs(path) for path in paths)
    places = {f"{s.name}.{axis}" for own in specs for s in own for axis in range(len(s.shape))}
    dims = {name for own in specs for name in dynamic_dims(own)}
    if unknown := sorted(set(shapes) - dims - places):
        hint = f"there are: {', '.join(sorted(dims)) or 'none'}"
        raise UsageError("no model has a dynamic dimension of this name", where=unknown[0], hint=hint)
    return paths, specs


def _cells(
    providers: Sequence[str], threads: int | Sequence[int], batch: int | Sequence[int] | None
) -> list[Cell]:
    """All combinations, each provider checked before anything is measured.

    Raises:
        ProviderError: when one is absent.
        UsageError: when a number cannot be meant.
    """
    for provider in providers:
        check_provider(provider)
    counts = [threads] if isinstance(threads, int) else list(threads)
    batches: list[int | None] = [batch] if batch is None or isinstance(batch, int) else list(batch)
    if bad := [n for n in counts if n < 0] or [n for n in batches if n is not None and n < 1]:
        raise UsageError(
            f"{bad[0]} is no number of threads or batch size", where="settings", hint="give 1 or more"
        )
    if not (providers and counts and batches):
        raise UsageError("a list of settings is empty", where="settings", hint="give one value at least")
    return [Cell(*setting) for setting in itertools.product(dict.fromkeys(providers), counts, batches)]
