"""One setting of a benchmark: probe every model in isolation, compare outputs, measure memory, then race."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

from etp_deploy.bench import doubts, energy, kernels, memory, roofline
from etp_deploy.bench.cautions import Caution
from etp_deploy.bench.facts import compare_outputs
from etp_deploy.bench.isolation import run_child
from etp_deploy.bench.latency import Entrant, Limits, Race, SessionSample, race
from etp_deploy.bench.results import Cell, Comparison, Measurement, ModelFacts, RawSessions
from etp_deploy.bench.sessions import Setting
from etp_deploy.bench.statistics import summary
from etp_deploy.errors import ProviderError
from etp_deploy.inputs import InputSpec, draw_inputs, dynamic_dims, given_inputs
from etp_deploy.sessions import CPU, DEVICES, check_provider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

# How often compared models are profiled, in turn, so that one bad moment does not decide an operator's time.
PROFILES = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same for all settings.

    Args:
        paths: the models, baseline first.
        facts: what their files hold.
        specs: their inputs.
        shapes: sizes of dynamic dimensions.
        given: arrays to run on; None to draw them.
        seed: for drawn inputs.
        limits: when timing stops.
        memory_repeats: processes for each model; 0 measures no memory.
        tell: called with a step and the share of all work that is done.
    """

    paths: tuple[Path, ...]
    facts: tuple[ModelFacts, ...]
    specs: tuple[tuple[InputSpec, ...], ...]
    shapes: Mapping[str, int]
    given: Mapping[str, np.ndarray] | None
    seed: int
    limits: Limits
    memory_repeats: int
    tell: Callable[[str, float], None]


@dataclasses.dataclass(frozen=True)
class CellResult:
    """What one setting gave."""

    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    samples: tuple[RawSessions, ...]
    cautions: tuple[Caution, ...]


@dataclasses.dataclass(frozen=True)
class _Observed:
    """Everything seen of all models in one setting, by place."""

    cell: Cell
    facts: Sequence[ModelFacts]
    entrants: Sequence[Entrant]
    probes: Sequence[Mapping[str, Any]]
    outputs: Sequence[Mapping[str, Any]]
    memories: Sequence[Mapping[str, Any] | None]
    timed: Race
    on_device: Race | None
    joules: Sequence[Mapping[str, Any]]
    roof: roofline.Roof


def measure_cell(plan: Plan, cell: Cell, start: float, share: float) -> CellResult:
    """Measure all models in one setting.

    Args:
        plan: what is the same for all settings.
        cell: the setting.
        start: share of all work done before.
        share: share of all work that this setting is.

    Raises:
        UsageError: when given inputs do not fit.
        ProviderError: when the work is not on the provider asked for.
        BenchmarkError: when ONNX Runtime cannot run a model.
    """

    def tell(step: str, done: float) -> None:
        plan.tell(f"{step} ({cell})", start + share * done)

    setting = Setting(cell.provider, cell.threads)
    entrants = _entrants(plan, cell)
    tell("checking outputs", 0.0)
    probes = _probes(entrants, setting)
    partial = _check_partitions(cell, probes)
    outputs = _compare_all(entrants, probes, cell)
    memories = [
        _memory(plan, setting, entrants[at], probes[at], at, tell=tell) for at in range(len(entrants))
    ]
    available = psutil.virtual_memory().available
    timed = race(entrants, setting, plan.limits, tell=lambda done: tell("timing", 0.4 + 0.4 * done))
    on_device = None
    if check_provider(cell.provider) in DEVICES:
        alone = dataclasses.replace(setting, on_device=True)
        on_device = race(
            entrants, alone, plan.limits, tell=lambda done: tell("timing compute", 0.8 + 0.15 * done)
        )
    tell("limits of the machine", 0.95)
    roof = roofline.measure(setting)
    tell("energy", 0.97)
    joules = [energy.measure(entrant, setting) for entrant in entrants]
    seen = _Observed(cell, plan.facts, entrants, probes, outputs, memories, timed, on_device, joules, roof)
    cautions = [
        *doubts.about_inputs(plan.facts, plan.specs, entrants, cell),
        *partial,
        *doubts.about_outputs([facts.name for facts in plan.facts], outputs),
        *doubts.about_memory(sum(facts.bytes for facts in plan.facts), available),
        *doubts.about_race(plan.facts, cell, timed, on_device),
    ]
    return CellResult(
        measurements=tuple(_measurement(seen, place) for place in range(len(entrants))),
        comparisons=tuple(_comparison(seen, place) for place in range(1, len(entrants))),
        samples=tuple(_raw(plan.facts, cell, timed)),
        cautions=tuple(cautions),
    )


def _probes(entrants: Sequence[Entrant], setting: Setting) -> list[dict[str, Any]]:
    """Profile all models in turn, several times, and keep each node's shortest typical time."""
    times = PROFILES if len(entrants) > 1 else 1
    turns = [[run_child("profile", e.path, setting, e.inputs) for e in entrants] for _ in range(times)]
    probes = turns[0]
    for later in turns[1:]:
        for probe, again in zip(probes, later, strict=True):
            if len(probe["nodes"]) != len(again["nodes"]):
                continue
            for node, repeated in zip(probe["nodes"], again["nodes"], strict=True):
                node["us"] = min(node["us"], repeated["us"])
    return probes


def _memory(
    plan: Plan,
    setting: Setting,
    entrant: Entrant,
    probe: Mapping[str, Any],
    place: int,
    *,
    tell: Callable[[str, float], None],
) -> dict[str, Any] | None:
    facts = plan.facts[place]
    if not plan.memory_repeats:
        return None
    tell(f"memory of {facts.name}", 0.1 + 0.3 * place / len(plan.facts))
    return memory.measure(
        entrant.path,
        setting,
        entrant.inputs,
        weights_bytes=facts.weights_bytes,
        probe=probe,
        repeats=plan.memory_repeats,
    )


def _entrants(plan: Plan, cell: Cell) -> list[Entrant]:
    """Inputs for every model: the baseline's own arrays wherever a contender can take them.

    Raises:
        UsageError: when given inputs do not fit.
    """
    drawn: list[dict[str, np.ndarray]] = []
    for specs in plan.specs:
        if plan.given is not None:
            drawn.append(given_inputs(specs, plan.given))
            continue
        own = {*dynamic_dims(specs), *(f"{s.name}.{axis}" for s in specs for axis in range(len(s.shape)))}
        dims = {name: size for name, size in plan.shapes.items() if name in own}
        arrays = draw_inputs(specs, seed=plan.seed, dims=dims, batch=cell.batch)
        for name, array in (drawn[0] if drawn else {}).items():
            if name in arrays and (arrays[name].shape, arrays[name].dtype) == (array.shape, array.dtype):
                arrays[name] = array
        drawn.append(arrays)
    return [Entrant(path, arrays) for path, arrays in zip(plan.paths, drawn, strict=True)]


def _check_partitions(cell: Cell, probes: Sequence[Mapping[str, Any]]) -> list[Caution]:
    """Refuse a provider that took no node at all.

    Raises:
        ProviderError: the session was on the provider, the work was not.
    """
    wanted = check_provider(cell.provider)
    found = []
    for probe in probes:
        partitions = probe["partitions"]
        total, taken = sum(partitions.values()), partitions.get(wanted, 0)
        if wanted != CPU and total and not taken:
            raise ProviderError(
                f"asked for {wanted}, but it took none of {total} nodes",
                where=f"provider {cell.provider!r}",
                hint="the provider supports none of the model's operators or types",
            )
        if wanted != CPU and taken < total:
            found.append(Caution("partial_provider", f"{wanted} took {taken} of {total} nodes"))
    return found


def _compare_all(
    entrants: Sequence[Entrant], probes: Sequence[Mapping[str, Any]], cell: Cell
) -> list[dict[str, Any]]:
    """Each contender's outputs against the baseline's, and on other providers against the CPU's as well."""
    base = entrants[0].inputs
    found: list[dict[str, Any]] = []
    for entrant, probe in zip(entrants, probes, strict=True):
        same = entrant.inputs.keys() == base.keys() and all(
            entrant.inputs[name].shape == base[name].shape
            and bool(np.all(entrant.inputs[name] == base[name]))
            for name in base
        )
        if same:
            found.append(compare_outputs(probes[0]["outputs"], probe["outputs"]))
        else:
            found.append({"compared": False, "reason": "the models take different inputs"})
        if check_provider(cell.provider) != CPU:
            reference = run_child("profile", entrant.path, Setting(), entrant.inputs)["outputs"]
            found[-1]["against_cpu"] = compare_outputs(reference, probe["outputs"])
    return found


def _measurement(seen: _Observed, place: int) -> Measurement:
    samples = _sessions_of(seen.timed, place)
    wall = summary([t / 1e6 for s in samples for t in s.wall])
    cpu = summary([t / 1e6 for s in samples for t in s.cpu]) if seen.timed.clock == "cpu" else None
    compute = None
    if seen.on_device is not None:
        compute = summary([t / 1e6 for s in _sessions_of(seen.on_device, place) for t in s.wall])
    shapes = {name: list(array.shape) for name, array in seen.entrants[place].inputs.items()}
    items = next((shape[0] for shape in shapes.values() if len(shape) > 1), 1)
    probe = seen.probes[place]
    return Measurement(
        model=seen.facts[place].name,
        cell=seen.cell,
        shapes=shapes,
        latency_ms=_rounded(wall),
        cpu_time_ms=None if cpu is None else _rounded(cpu),
        compute_ms=None if compute is None else _rounded(compute),
        throughput_per_s=round(items / wall["mean"] * 1e3, 3),
        session_creation_ms=round(statistics.median(s.creation for s in samples) / 1e6, 4),
        first_run_ms=round(statistics.median(s.first for s in samples) / 1e6, 4),
        memory=seen.memories[place],
        nodes=tuple(_node(record, seen.roof) for record in probe["nodes"]),
        roof=seen.roof.to_json(),
        partitions=probe["partitions"],
        layout=kernels.layout(probe["nodes"]),
        energy=seen.joules[place],
    )


def _comparison(seen: _Observed, place: int) -> Comparison:
    timed, nodes = seen.timed, [probe["nodes"] for probe in seen.probes]
    return Comparison(
        baseline=seen.facts[0].name,
        contender=seen.facts[place].name,
        cell=seen.cell,
        clock=timed.clock,
        interval=timed.ratio(place),
        wall=timed.ratio(place, "wall"),
        control=timed.control(),
        verdict=timed.verdict(place),
        stopped=timed.stopped,
        outputs=seen.outputs[place],
        kernels=tuple(kernels.by_kernel(nodes[0], nodes[place])),
        compute=None if seen.on_device is None else seen.on_device.ratio(place),
    )


def _raw(facts: Sequence[ModelFacts], cell: Cell, timed: Race) -> Iterable[RawSessions]:
    for place, own in enumerate(facts):
        yield RawSessions(
            own.name, cell, "model", tuple(_raw_session(r.samples[place]) for r in timed.rounds)
        )
    control = [r.control for r in timed.rounds if r.control is not None]
    if control:
        yield RawSessions(facts[0].name, cell, "control", tuple(_raw_session(s) for s in control))


def _raw_session(sample: SessionSample) -> dict[str, Any]:
    return {
        "passes": sample.passes,
        "creation_ns": sample.creation,
        "first_run_ns": sample.first,
        "wall_ns": list(sample.wall),
        "cpu_ns": list(sample.cpu),
        "cpu_runs": sample.cpu_runs,
    }


def _sessions_of(timed: Race, place: int) -> list[SessionSample]:
    return [r.samples[place] for r in timed.rounds]


def _node(record: Mapping[str, Any], roof: roofline.Roof) -> dict[str, Any]:
    facts = {key: record[key] for key in ("node", "kernel", "provider", "parameter_bytes", "output_bytes")}
    share = roof.share(record)
    return {**facts, "us": round(record["us"], 3), "macs": kernels.macs(record), "roofline_share": share}


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {key: value if key == "samples" else round(value, 6) for key, value in numbers.items()}
