"""What a benchmark found: immutable, with its raw samples, as one versioned JSON document."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.table import Table

    from etp_deploy.bench.cautions import Caution
    from etp_deploy.bench.statistics import Interval

SCHEMA = "etp-deploy/bench/1"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One setting in which all models were measured.

    Args:
        provider: as asked for, "cpu" or "cuda" or another.
        threads: intra-op threads.
        batch: the batch asked for, None for what the models fix or one.
    """

    provider: str
    threads: int
    batch: int | None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        batch = "" if self.batch is None else f", batch {self.batch}"
        return f"{self.provider}, {self.threads} thread{'s' if self.threads != 1 else ''}{batch}"


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """What a model file holds, without running it."""

    name: str
    sha256: str
    bytes: int
    weights_bytes: int
    parameters: int
    nodes: int
    opset: int
    ir_version: int


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One model in one cell.

    Args:
        model: the model's name.
        cell: the setting.
        shapes: the input shapes it ran with.
        latency_ms: wall-clock percentiles, mean, least and number of samples.
        cpu_time_ms: the same on the calling thread's clock; None where that is not all of the work.
        compute_ms: the same with inputs and outputs kept on the device; None on the CPU.
        throughput_per_s: items (batch times runs) in a second, one session alone.
        session_creation_ms: median over sessions.
        first_run_ms: median over sessions.
        memory: bytes by phase, see `etp_deploy.bench.memory`; None when not measured.
        nodes: ONNX Runtime's own profile by node.
        roof: the machine's own best rates in this setting, which the nodes' `roofline_share` refers to.
        partitions: nodes by provider.
        layout: what works in the blocked layout and what does not, and why.
        energy: joules per run, or why they are unavailable.
    """

    model: str
    cell: Cell
    shapes: Mapping[str, list[int]]
    latency_ms: Mapping[str, float]
    cpu_time_ms: Mapping[str, float] | None
    compute_ms: Mapping[str, float] | None
    throughput_per_s: float
    session_creation_ms: float
    first_run_ms: float
    memory: Mapping[str, Any] | None
    nodes: tuple[Mapping[str, Any], ...]
    roof: Mapping[str, float]
    partitions: Mapping[str, int]
    layout: Mapping[str, Any]
    energy: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain values, the cell's fields beside the others."""
        fields = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in {"cell", "model"}
        }
        return {**self.cell.to_json(), **fields, "nodes": [dict(node) for node in self.nodes]}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A contender against the baseline in one cell.

    Args:
        baseline: the baseline's name.
        contender: the contender's name.
        cell: the setting.
        clock: "cpu" (processor time of the only thread) or "wall": what `interval` and the verdict rest on.
        interval: contender time over baseline time.
        wall: the same on the wall clock.
        control: the baseline against itself, measured in between.
        verdict: "faster", "slower" or "undecided", said of the contender.
        stopped: "decided", "equal" (any difference is below one percent), "sessions" or "time".
        outputs: whether outputs were compared, and how far they are apart.
        kernels: nodes and time by kernel, before and after.
        compute: the ratio with inputs and outputs on the device; None on the CPU.
    """

    baseline: str
    contender: str
    cell: Cell
    clock: str
    interval: Interval
    wall: Interval
    control: Interval
    verdict: str
    stopped: str
    outputs: Mapping[str, Any]
    kernels: tuple[Mapping[str, Any], ...]
    compute: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values; `ratio` is contender time over baseline time, `speedup` its inverse."""
        return {
            "baseline": self.baseline,
            "contender": self.contender,
            **self.cell.to_json(),
            "clock": self.clock,
            **_bounds(self.interval),
            "speedup": _number(1 / self.interval.ratio),
            "verdict": self.verdict,
            "stopped": self.stopped,
            "wall": _bounds(self.wall),
            "control": _bounds(self.control),
            "compute": None if self.compute is None else _bounds(self.compute),
            "outputs": dict(self.outputs),
            "kernels": [dict(row) for row in self.kernels],
        }


@dataclasses.dataclass(frozen=True)
class RawSessions:
    """Raw times of every session of one model in one cell, in nanoseconds.

    Args:
        model: the model's name.
        cell: the setting.
        role: "model" or "control", the baseline's second session.
        sessions: each with `wall_ns` of every run, `cpu_ns` of every `cpu_runs` runs (their mean),
            `creation_ns` and `first_run_ns`.
    """

    model: str
    cell: Cell
    role: str
    sessions: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "model": self.model,
            **self.cell.to_json(),
            "role": self.role,
            "sessions": list(self.sessions),
        }


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """Everything that one call of `benchmark` found.

    Args:
        created: when, in UTC.
        settings: what was asked for.
        environment: the machine.
        models: the files.
        measurements: one for each model and cell.
        comparisons: one for each contender and cell.
        warnings: every reason for doubt.
        samples: the raw times.
        dead: what is dead in each model and what it costs, by the model's name, see `etp_deploy.bench.dead`.
    """

    created: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    models: tuple[ModelFacts, ...]
    measurements: tuple[Measurement, ...]
    comparisons: tuple[Comparison, ...]
    warnings: tuple[Caution, ...]
    samples: tuple[RawSessions, ...]
    dead: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Give the whole document as plain JSON values, schema `etp-deploy/bench/1`."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "settings": dict(self.settings),
            "environment": dict(self.environment),
            "models": [
                {
                    **dataclasses.asdict(facts),
                    "dead": self.dead.get(facts.name),
                    "measurements": [m.to_json() for m in self.measurements if m.model == facts.name],
                }
                for facts in self.models
            ],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "warnings": [warning.to_json() for warning in self.warnings],
            "samples": [raw.to_json() for raw in self.samples],
        }

    def table(self) -> Table:
        """One row for each model and cell, to be read at a glance."""
        from etp_deploy.bench.text import table  # noqa: PLC0415 - rich, only for those who print

        return table(self.to_json())


def _bounds(interval: Interval) -> dict[str, Any]:
    return {
        "ratio": _number(interval.ratio),
        "low": _number(interval.low),
        "high": _number(interval.high),
        "sessions": interval.sessions,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, 6)
