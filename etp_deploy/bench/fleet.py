"""Results from many devices in one table and one page: how a fleet is surveyed.

Each device runs the benchmark and sends its JSON; nothing of ours stands in between. Ratios may be compared
across devices, times only read beside each other.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from etp_deploy import html, plots
from etp_deploy.bench.gate import check_schema
from etp_deploy.bench.page import BADGES
from etp_deploy.bench.text import STYLES, bytes_text, comparison_of, milliseconds_text, ratio_text, setting
from etp_deploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from etp_deploy.html import Html

SCHEMA = "etp-deploy/bench-compare/1"
COLUMNS = (
    "device",
    "model",
    "setting",
    "p50 ms",
    "p95 ms",
    "against baseline",
    "verdict",
    "memory",
    "doubts",
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model in one setting on one device.

    Args:
        device: the report's name.
        cpu: the device's processor.
        model: the model's name.
        sha256: the model's hash; equal names with other hashes are other models.
        setting: provider, threads and batch in words.
        latency_ms: percentiles of wall time.
        comparison: against the device's own baseline; None for the baseline itself.
        memory: bytes by phase; None when not measured.
        warnings: names of the device's warnings.
    """

    device: str
    cpu: str
    model: str
    sha256: str
    setting: str
    latency_ms: Mapping[str, float]
    comparison: Mapping[str, Any] | None
    memory: Mapping[str, Any] | None
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FleetComparison:
    """All entries, device by device, and what makes them hard to compare."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values, schema `etp-deploy/bench-compare/1`."""
        entries = []
        for entry in self.entries:
            fields = dataclasses.asdict(entry)
            for key in ("comparison", "memory"):
                found = fields[key] or {}
                fields[key] = {k: v for k, v in found.items() if k not in {"kernels", "timeline"}} or None
            entries.append(fields)
        return {"schema": SCHEMA, "entries": entries, "notes": list(self.notes)}

    def table(self) -> Table:
        """Render for the terminal."""
        found = Table(caption="; ".join(self.notes) or None, caption_justify="left", pad_edge=False)
        for at, name in enumerate(COLUMNS):
            found.add_column(name, justify="right" if at in {3, 4, 5, 7} else "left", overflow="fold")
        for row in self._rows():
            found.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        return found

    def markdown(self) -> str:
        """Render as a Markdown table."""
        lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self._rows()]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def page(self, *, title: str = "Benchmarks by device") -> Html:
        """Make a page with speed-ups and times by device."""
        cells = [
            (*row[:6], html.badge(row[6], BADGES[row[6]]) if row[6] else "", *row[7:]) for row in self._rows()
        ]
        parts = [
            html.section(
                "All devices",
                html.table(COLUMNS, cells, text_columns=(0, 1, 2, 6, 8), raw_columns=(6,), wrap_columns=(8,)),
                *(html.paragraph(note, quiet=True) for note in self.notes),
            )
        ]
        speedups = [
            (f"{e.device}: {e.model}, {e.setting}", {"speed-up": 1 / e.comparison["ratio"]})
            for e in self.entries
            if e.comparison and e.comparison["ratio"]
        ]
        if speedups:
            parts.append(html.section("Speed-up over each device's baseline", plots.bars(speedups, unit="x")))
        times = [(f"{e.device}: {e.model}, {e.setting}", {"p50": e.latency_ms["p50"]}) for e in self.entries]
        parts.append(html.section("Median latency", plots.bars(times, unit="ms")))
        return html.page(title, parts, data=self.to_json())

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                entry.device,
                entry.model,
                entry.setting,
                milliseconds_text(entry.latency_ms["p50"]),
                milliseconds_text(entry.latency_ms["p95"]),
                ratio_text(entry.comparison),
                entry.comparison["verdict"] if entry.comparison else "",
                bytes_text((entry.memory or {}).get("peak_above_idle_bytes")),
                ", ".join(entry.warnings),
            )
            for entry in self.entries
        ]


def compare_reports(
    documents: Mapping[str, Mapping[str, Any]] | Sequence[Mapping[str, Any]],
) -> FleetComparison:
    """Merge results of the benchmark.

    Args:
        documents: by device name, or a list, whose devices are then named by their processors.

    Raises:
        UsageError: when there is none.
        BenchmarkError: when one is no result of this version.
    """
    named = dict(documents) if hasattr(documents, "keys") else _by_processor(list(documents))
    if not named:
        raise UsageError("there is no report to compare", where="reports", hint="give at least one JSON file")
    for name, document in named.items():
        check_schema(document, where=name)
    entries = tuple(entry for name, document in named.items() for entry in _entries(name, document))
    return FleetComparison(entries, tuple(_notes(named, entries)))


def _by_processor(documents: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    named: dict[str, Mapping[str, Any]] = {}
    for document in documents:
        name = str(document.get("environment", {}).get("cpu", "device"))
        count = sum(known == name or known.startswith(f"{name} (") for known in named)
        named[name if not count else f"{name} ({count + 1})"] = document
    return named


def _entries(name: str, document: Mapping[str, Any]) -> list[Entry]:
    return [
        Entry(
            device=name,
            cpu=document["environment"]["cpu"],
            model=model["name"],
            sha256=model["sha256"],
            setting=setting(measured),
            latency_ms=measured["latency_ms"],
            comparison=comparison_of(document, model["name"], measured),
            memory=measured["memory"],
            warnings=tuple(sorted({warning["name"] for warning in document["warnings"]})),
        )
        for model in document["models"]
        for measured in model["measurements"]
    ]


def _notes(named: Mapping[str, Mapping[str, Any]], entries: Sequence[Entry]) -> list[str]:
    """Files of one name that differ, and versions of ONNX Runtime that do."""
    hashes: dict[str, set[str]] = {}
    for entry in entries:
        hashes.setdefault(entry.model, set()).add(entry.sha256)
    found = [f"{model}: not the same file on all devices" for model, seen in hashes.items() if len(seen) > 1]
    versions = {str(d["environment"]["versions"].get("onnxruntime")) for d in named.values()}
    if len(versions) > 1:
        found.append(f"ONNX Runtime differs: {', '.join(sorted(versions))}")
    return found
