"""A benchmark's document as a page that opens without a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etp_deploy import html, plots
from etp_deploy.bench import memory
from etp_deploy.bench.dead import strips
from etp_deploy.bench.text import (
    COLUMNS,
    bytes_text,
    caption,
    comparison_of,
    milliseconds_text,
    ratio_text,
    rows,
    setting,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from etp_deploy.html import Html

BADGES = {"faster": "good", "slower": "bad", "undecided": "open"}
LARGEST_KERNELS = 8
LARGEST_NODES = 20
LARGEST_MAP = 48
_CLOCKS = {"cpu": "processor time of the only thread", "wall": "wall time"}


def bench_page(document: Mapping[str, Any], *, title: str = "Benchmark") -> Html:
    """Make the page of one benchmark; the document itself travels along, without its raw samples."""
    parts = [_summary(document), *_warnings(document)]
    for where in _settings(document):
        parts += [_latency(document, where), _memory(document, where)]
        parts += [_operators(c) for c in document["comparisons"] if setting(c) == where]
        parts += [_nodes(document, where), *_layout(document, where)]
    parts += [*_dead(document), _environment(document)]
    lean = {key: value for key, value in document.items() if key != "samples"}
    return html.page(
        title, parts, subtitle=f"{document['created']}, {document['environment']['cpu']}", data=lean
    )


def summary_table(document: Mapping[str, Any]) -> Html:
    """Make the terminal's table for a page; other reports use it too."""
    verdict = COLUMNS.index("verdict")
    cells = []
    for row in rows(document):
        marked = html.badge(row[verdict], BADGES[row[verdict]]) if row[verdict] else ""
        cells.append((*row[:verdict], marked, *row[verdict + 1 :]))
    return html.table(
        COLUMNS, cells, text_columns=(0, 1, verdict), raw_columns=(verdict,), caption=caption(document)
    )


def latency_plot(document: Mapping[str, Any], where: str) -> Html:
    """Draw the distribution of every model's latencies in one setting."""
    samples = {
        raw["model"]: [t / 1e6 for session in raw["sessions"] for t in session["wall_ns"]]
        for raw in document.get("samples", ())
        if setting(raw) == where and raw["role"] == "model"
    }
    return plots.distribution(samples, caption="wall time of single runs, the slowest percent left out")


def _settings(document: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(setting(m) for model in document["models"] for m in model["measurements"]))


def _measured(document: Mapping[str, Any], where: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(m["name"], x) for m in document["models"] for x in m["measurements"] if setting(x) == where]


def _summary(document: Mapping[str, Any]) -> Html:
    entries = [
        (f"{c['contender']}, {setting(c)}", ratio_text(c).split(" ")[0], _sentence(c))
        for c in document["comparisons"]
    ]
    return html.section("Result", *([html.cards(entries)] if entries else []), summary_table(document))


def _sentence(comparison: Mapping[str, Any]) -> str:
    """Say the verdict with what it rests on."""
    control = comparison["control"]
    noise = (
        f"the same model against itself {control['ratio']:.3f}"
        if control["ratio"] is not None
        else "no control"
    )
    outputs = comparison["outputs"]
    apart = f"outputs differ by {outputs.get('max_abs_difference', 0):.2g}"
    same = (
        "outputs not compared" if not outputs["compared"] else "outputs agree" if outputs["agree"] else apart
    )
    ended = ", any difference below 1 %" if comparison["stopped"] == "equal" else ""
    return (
        f"{comparison['verdict']}{ended}; {comparison['sessions']} sessions by "
        f"{_CLOCKS[comparison['clock']]}; {noise}; {same}"
    )


def _warnings(document: Mapping[str, Any]) -> list[Html]:
    messages: dict[str, list[str]] = {}
    for warning in document["warnings"]:
        messages.setdefault(warning["name"], []).append(warning["message"])
    hints = {w["name"]: w["hint"] for w in document["warnings"]}
    entries = [(name, "; ".join(seen), hints[name]) for name, seen in messages.items()]
    return [html.section("Doubts", html.notices(entries))] if entries else []


def _latency(document: Mapping[str, Any], where: str) -> Html:
    table_rows = []
    for name, measured in _measured(document, where):
        times = measured["latency_ms"]
        table_rows.append(
            (
                name,
                *(milliseconds_text(times[key]) for key in ("p50", "p90", "p95", "p99", "mean", "min")),
                milliseconds_text((measured["cpu_time_ms"] or {}).get("p50")),
                milliseconds_text((measured["compute_ms"] or {}).get("p50")),
                milliseconds_text(measured["session_creation_ms"]),
                milliseconds_text(measured["first_run_ms"]),
                ratio_text(comparison_of(document, name, measured)),
            )
        )
    headers = (
        "model",
        "p50",
        "p90",
        "p95",
        "p99",
        "mean",
        "min",
        "CPU p50",
        "compute",
        "creation",
        "first run",
        "speed-up",
    )
    return html.section(
        f"Latency: {where}",
        latency_plot(document, where),
        html.table(
            headers,
            table_rows,
            caption="milliseconds of wall time; CPU: processor time of the calling thread; "
            "compute: inputs and outputs on the device",
        ),
    )


def _memory(document: Mapping[str, Any], where: str) -> Html:
    known = [(name, m["memory"]) for name, m in _measured(document, where) if m["memory"]]
    if not known:
        return html.section(f"Memory: {where}", html.paragraph("not measured", quiet=True))
    columns = {
        "weights": "weights_bytes",
        "activations": "activation_peak_bytes",
        "load peak": "load_peak_rss_bytes",
        "run peak": "run_peak_rss_bytes",
        "steady": "steady_rss_bytes",
        "steady PSS": "steady_pss_bytes",
        "above idle": "peak_above_idle_bytes",
        "device": "device_bytes",
    }
    cells = [(name, *(bytes_text(used[key]) for key in columns.values())) for name, used in known]
    timeline = {name: [(at, size / 1e6) for at, _, size in used["timeline"]] for name, used in known}
    sizes = {name: memory.phases(used) for name, used in known}
    passed_through = [
        (phase, {name: own[phase] / 1e6 for name, own in sizes.items() if phase in own})
        for phase in dict.fromkeys(phase for own in sizes.values() for phase in own)
    ]
    largest = [
        (
            name,
            {
                "weights": used["weights_bytes"] / 1e6,
                "activations": (used["activation_peak_bytes"] or 0) / 1e6,
            },
        )
        for name, used in known
    ]
    return html.section(
        f"Memory: {where}",
        plots.bars(largest, unit="MB", caption="weights in the file, and ONNX Runtime's peak of activations"),
        plots.bars(
            passed_through, unit="MB", caption="resident memory of an isolated process, phase by phase"
        ),
        plots.lines(
            timeline, y_unit="MB", caption="the same over time: imported, loaded, first run, more runs"
        ),
        html.table(
            ("model", *columns), cells, caption="activations: exact, by ONNX Runtime's own accounting"
        ),
    )


def _operators(comparison: Mapping[str, Any]) -> Html:
    found = comparison["kernels"]
    largest = sorted(found, key=lambda row: -max(row["baseline_us"], row["contender_us"]))[:LARGEST_KERNELS]
    series = [
        (row["kernel"], {"baseline": row["baseline_us"] / 1e3, "contender": row["contender_us"] / 1e3})
        for row in largest
    ]
    cells = [
        (
            row["kernel"],
            *(f"{row[f'{side}_nodes']}" for side in ("baseline", "contender")),
            *(f"{row[f'{side}_us']:.0f}" for side in ("baseline", "contender")),
            *(f"{row[f'{side}_macs'] / 1e6:.3g}" for side in ("baseline", "contender")),
            *(_speed(row, side) for side in ("baseline", "contender")),
        )
        for row in found
    ]
    sides = [f"{what} {side}" for what in ("nodes", "us", "MMACs", "GMACs/s") for side in ("before", "after")]
    headers = ("kernel", *sides)
    return html.section(
        f"Why: {comparison['contender']}, {setting(comparison)}",
        plots.bars(series, unit="ms", caption="time by kernel in one run, by ONNX Runtime's profile"),
        html.details("All kernels", html.table(headers, cells)),
        note=f"against {comparison['baseline']}",
    )


def _speed(row: Mapping[str, Any], side: str) -> str:
    time, work = row[f"{side}_us"], row[f"{side}_macs"]
    return f"{work / time / 1e3:.3g}" if time and work else "-"


def _nodes(document: Mapping[str, Any], where: str) -> Html:
    """The longest nodes of every model, with how near they come to what the machine can do."""
    parts = []
    for name, measured in _measured(document, where):
        total = sum(node["us"] for node in measured["nodes"]) or 1.0
        longest = sorted(measured["nodes"], key=lambda node: -node["us"])[:LARGEST_NODES]
        cells = [
            (
                node["node"],
                node["kernel"],
                f"{node['us']:.0f}",
                f"{node['us'] / total:.0%}",
                "-" if node["macs"] is None else f"{node['macs'] / 1e6:.3g}",
                bytes_text(node["parameter_bytes"]),
                "-" if node["roofline_share"] is None else f"{node['roofline_share']:.0%}",
            )
            for node in longest
        ]
        headers = ("node", "kernel", "us", "of all", "MMACs", "weights", "of the possible")
        parts.append(html.details(name, html.table(headers, cells, text_columns=(0, 1))))
    roof = next(m["roof"] for _, m in _measured(document, where))
    rates = f"{roof['macs_per_s'] / 1e9:.3g} GMACs and {roof['bytes_per_s'] / 1e9:.3g} GB a second"
    return html.section(
        f"Longest nodes: {where}", *parts, note=f"the machine reached {rates} in this setting"
    )


def _layout(document: Mapping[str, Any], where: str) -> list[Html]:
    cells = [
        (name, left["node"], left["kernel"], f"{left['us']:.0f}", left["reason"])
        for name, measured in _measured(document, where)
        for left in measured["layout"]["left"]
    ]
    if not cells:
        return []
    headers = ("model", "node", "kernel", "us", "reason")
    return [
        html.section(
            f"Outside the blocked layout: {where}",
            html.table(headers, cells, text_columns=(0, 1, 2, 4), wrap_columns=(4,)),
            note="convolutions that ONNX Runtime's fastest CPU kernels could not take",
        )
    ]


def _dead(document: Mapping[str, Any]) -> list[Html]:
    """What dead channels hold and cost, and where a contender is the baseline without them, both side by side."""
    analysed = [(model["name"], model["dead"]) for model in document["models"] if model.get("dead")]
    if not any(found["removable"] for _, found in analysed):
        return []
    cells = [
        (
            name,
            setting(cost),
            f"{found['dead']} of {found['channels']}",
            str(found["removable"]),
            f"{found['weights_share']:.0%}",
            "-" if found["macs_share"] is None else f"{found['macs_share']:.0%}",
            milliseconds_text(cost["us"] / 1e3),
            f"{cost['time_share']:.0%}",
        )
        for name, found in analysed
        for cost in found["time"]
    ]
    headers = ("model", "setting", "dead", "could go", "weights", "MACs", "ms a run", "of the time")
    about = "weights, MACs and time of what could go; time by estimate: each node's, by the share of its work"
    parts = [html.table(headers, cells, text_columns=(0, 1), caption=about)]
    pairs = dict.fromkeys((c["baseline"], c["contender"]) for c in document["comparisons"])
    mapped = {pair: rows for pair in pairs if (rows := strips(document, *pair))}
    for (baseline, contender), rows in mapped.items():
        parts += [html.heading(f"{baseline} and {contender}"), _channel_map(rows)]
    shown = {baseline for baseline, _ in mapped}
    for name, found in analysed:
        rows = [
            (row["tensor"], [letter == "1" for letter in row["kept"]])
            for row in found["layers"]
            if row["removable"] and row["kept"]
        ]
        if name not in shown and rows:
            parts += [html.heading(name), _channel_map(rows)]
    return [html.section("Dead channels", *parts)]


def _channel_map(rows: Sequence[tuple[str, Sequence[bool]]]) -> Html:
    about = "channels of each layer, those that could go faint"
    rest = len(rows) - LARGEST_MAP
    if rest > 0:
        about += f"; {rest} more are in the data that this page carries"
    return plots.channel_map(rows[:LARGEST_MAP], caption=about)


def _environment(document: Mapping[str, Any]) -> Html:
    machine = document["environment"]
    entries = {
        "processor": machine["cpu"],
        "instructions": ", ".join(machine["flags"]) or "-",
        "cores": f"{machine['cores']['usable']} usable, {machine['cores']['physical'] or 'unknown'} physical",
        "governor": machine["governor"] or "not readable",
        "memory": bytes_text(machine["memory_bytes"]["total"]),
        "load at start": str(machine["load"]),
        "system": f"{machine['system']} {machine['kernel']}, Python {machine['python']}",
        "versions": ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
        "GPUs": ", ".join(machine["gpus"]) or "none",
    }
    hashes = [
        (m["name"], m["sha256"], str(m["parameters"]), bytes_text(m["bytes"])) for m in document["models"]
    ]
    energy = _energy(document)
    return html.section(
        "Machine and models",
        html.facts(entries | ({"energy": energy} if energy else {})),
        html.table(("model", "SHA-256", "parameters", "file"), hashes, text_columns=(0, 1)),
    )


def _energy(document: Mapping[str, Any]) -> str:
    found: Sequence[str] = [
        f"{model['name']}, {setting(m)}: {m['energy']['joules_per_run']:.3g} J a run"
        if m["energy"]["available"]
        else f"unavailable ({m['energy']['reason']})"
        for model in document["models"]
        for m in model["measurements"]
    ]
    return "; ".join(dict.fromkeys(found))
