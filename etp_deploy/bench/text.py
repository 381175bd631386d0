"""A result as a table for the terminal, as Markdown and as CSV, all from the JSON document."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

STYLES = {"faster": "bold green", "slower": "bold red", "undecided": "yellow"}
COLUMNS = (
    "model",
    "setting",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "per s",
    "against baseline",
    "verdict",
    "memory",
    "activations",
)


def rows(document: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Cells of the table, one row for each model and setting, settings together."""
    settings: dict[str, None] = {}
    for model in document["models"]:
        settings.update(dict.fromkeys(setting(m) for m in model["measurements"]))
    for where in settings:
        for model in document["models"]:
            for measured in model["measurements"]:
                if setting(measured) == where:
                    yield _row(document, model, measured)


def setting(entry: Mapping[str, Any]) -> str:
    """Provider, threads and batch in words."""
    parts = [entry["provider"], f"{entry['threads']} thr"]
    if entry["batch"] is not None:
        parts.append(f"batch {entry['batch']}")
    return " ".join(parts)


def comparison_of(
    document: Mapping[str, Any], name: str, entry: Mapping[str, Any]
) -> Mapping[str, Any] | None:
    """Find the comparison in which a model is the contender in an entry's setting."""
    for found in document["comparisons"]:
        if found["contender"] == name and setting(found) == setting(entry):
            result: Mapping[str, Any] = found
            return result
    return None


def ratio_text(comparison: Mapping[str, Any] | None) -> str:
    """Speed-up with its interval: 2.00x (1.95 to 2.06)."""
    if comparison is None or comparison["ratio"] is None:
        return "-"
    middle = f"{1 / comparison['ratio']:.2f}x"
    if comparison["low"] is None:
        return middle
    return f"{middle} ({1 / comparison['high']:.2f} to {1 / comparison['low']:.2f})"


def bytes_text(count: float | None) -> str:
    """A number of bytes as people read it."""
    if count is None:
        return "-"
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def milliseconds_text(value: float | None) -> str:
    """Milliseconds with three digits that count."""
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def table(document: Mapping[str, Any]) -> Table:
    """Render the terminal's table, without columns that hold nothing, with what the numbers mean as its caption."""
    found = Table(
        caption=caption(document), caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    lines = [_in_two_lines(dict(zip(COLUMNS, row, strict=True))) for row in rows(document)]
    # the verdict stands beside the ratio
    held = [
        name for name in COLUMNS if name != "verdict" and any(row[name].plain.strip(" -") for row in lines)
    ]
    for name in held:
        # names may break, numbers and verdicts may not
        left = name in {"model", "setting"}
        found.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "model")
    for row in lines:
        found.add_row(*(row[name] for name in held))
    return found


def _in_two_lines(row: Mapping[str, str]) -> dict[str, Text]:
    """Return a row's cells, those that are long broken where they mean two things."""
    cells = {name: Text(cell) for name, cell in row.items()}
    cells["setting"] = Text(row["setting"].replace(" batch ", "\nbatch "))
    if row["verdict"]:
        ratio, _, interval = row["against baseline"].partition(" ")
        verdict = Text(row["verdict"], style=STYLES.get(row["verdict"], ""))
        cells["against baseline"] = Text.assemble(ratio, " ", verdict, f"\n{interval}" if interval else "")
    return cells


def caption(document: Mapping[str, Any]) -> str:
    """Say what the table's numbers are."""
    parts = []
    if document["comparisons"]:
        clocks = {"cpu": "processor time of one thread", "wall": "wall time"}
        used = sorted({c["clock"] for c in document["comparisons"]})
        parts.append(f"against baseline: speed-up by {' and '.join(clocks[c] for c in used)}, 99 % interval")
    if any(measured["memory"] for model in document["models"] for measured in model["measurements"]):
        parts.append("memory: peak resident above an idle process; activations: exact peak")
    return "; ".join(parts)


def dead_lines(document: Mapping[str, Any]) -> list[str]:
    """Say of each model what its dead channels hold and, by estimate, cost; nothing of those that have none."""
    lines = []
    for model in document["models"]:
        found = model.get("dead")
        if not found or not found["removable"]:
            continue
        work = "" if found["macs_share"] is None else f" and {found['macs_share']:.0%} of the MACs"
        times = [
            f"about {milliseconds_text(cost['us'] / 1e3)} ms a run ({cost['time_share']:.0%}, {setting(cost)})"
            for cost in found["time"]
        ]
        lines.append(
            f"dead in {model['name']}: {found['removable']} of {found['channels']} channels, heads and neurons, "
            f"with {found['weights_share']:.0%} of the weights{work}; {', '.join(times)}; "
            "etp-deploy compress --align off takes them out"
        )
    return lines


def markdown(document: Mapping[str, Any]) -> str:
    """Render a Markdown table with the warnings below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(document)]
    lines += ["", f"{caption(document)}."] if caption(document) else [""]
    lines += [f"- {line}" for line in dead_lines(document)]
    lines += [f"- **{w['name']}**: {w['message']} ({w['hint']})" for w in document["warnings"]]
    return "\n".join(lines) + "\n"


def csv_text(document: Mapping[str, Any]) -> str:
    """Give one line for each model and setting with plain numbers: times in ms, memory in bytes."""
    lines = [_flat(document, model, m) for model in document["models"] for m in model["measurements"]]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(lines[0]) if lines else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def _row(
    document: Mapping[str, Any], model: Mapping[str, Any], measured: Mapping[str, Any]
) -> tuple[str, ...]:
    latency, used = measured["latency_ms"], measured["memory"] or {}
    comparison = comparison_of(document, model["name"], measured)
    return (
        model["name"],
        setting(measured),
        milliseconds_text(latency["p50"]),
        milliseconds_text(latency["p95"]),
        milliseconds_text(latency["p99"]),
        f"{measured['throughput_per_s']:.3g}"
        if measured["throughput_per_s"] < 1e3
        else f"{measured['throughput_per_s']:.0f}",
        ratio_text(comparison) if comparison else "baseline" if document["comparisons"] else "-",
        comparison["verdict"] if comparison else "",
        bytes_text(used.get("peak_above_idle_bytes")),
        bytes_text(used.get("activation_peak_bytes")),
    )


def _flat(
    document: Mapping[str, Any], model: Mapping[str, Any], measured: Mapping[str, Any]
) -> dict[str, Any]:
    comparison = comparison_of(document, model["name"], measured) or {}
    used = measured["memory"] or {}
    return {
        "model": model["name"],
        "sha256": model["sha256"],
        "file_bytes": model["bytes"],
        "parameters": model["parameters"],
        **{key: measured[key] for key in ("provider", "threads", "batch")},
        **{f"latency_{key}": value for key, value in measured["latency_ms"].items()},
        **{key: measured[key] for key in ("throughput_per_s", "session_creation_ms", "first_run_ms")},
        **{key: used.get(key) for key in MEMORY_KEYS},
        **{
            key: comparison.get(key)
            for key in ("baseline", "ratio", "low", "high", "speedup", "verdict", "clock")
        },
    }


MEMORY_KEYS = (
    "weights_bytes",
    "activation_peak_bytes",
    "load_peak_rss_bytes",
    "run_peak_rss_bytes",
    "steady_rss_bytes",
    "steady_pss_bytes",
    "peak_above_idle_bytes",
    "steady_above_idle_bytes",
    "device_bytes",
)
