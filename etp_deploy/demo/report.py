"""The demo's results as rows of one table and as a page, from its JSON document; needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etp_deploy import html
from etp_deploy.reports import (
    alignment_line,
    bytes_text,
    count_text,
    layer_plot,
    ratio_text,
    removed_line,
    verification_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from etp_deploy.html import Html

CAPTION = (
    "test accuracy on held-out images; MACs for one image; latency: median of one image, one thread, with the "
    "speed-up's 99 % interval; memory: peak above an idle process; activations: ONNX Runtime's exact peak"
)
COLUMNS = ("dense", "ETP", "compressed ONNX", "gain")
_BADGES = {"faster": "good", "slower": "bad", "undecided": "open"}


def demo_rows(network: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield for a network the rows of the table: name, dense, ETP, compressed ONNX, gain."""
    accuracy, images = network["accuracy"], network["test_images"]
    wrong = network["mismatches"]
    same = f"same answer to all {images} images" if not wrong else f"{wrong} of {images} answers differ"
    yield ("accuracy", *(f"{accuracy[key]:.2%}" for key in ("dense", "etp", "compressed_onnx")), same)
    for key, name, shown in (
        ("parameters", "parameters", count_text),
        ("macs", "MACs", count_text),
        ("bytes", "file size", bytes_text),
    ):
        sizes = network[key]
        cells = (shown(sizes[stage]) for stage in ("dense", "etp", "compressed"))
        yield (name, *cells, f"{ratio_text(sizes['etp'], sizes['compressed'])} smaller")
    for provider, found in network["benchmarks"].items():
        before, after = (model["measurements"][0] for model in found["models"])
        times = (f"{m['latency_ms']['p50']:.3f} ms" for m in (before, after))
        yield (f"median latency, {provider}", "-", *times, speedup(found["comparisons"][0]))
        for name, key in (("peak memory", "peak_above_idle_bytes"), ("activations", "activation_peak_bytes")):
            pair = [(m["memory"] or {}).get(key) for m in (before, after)]
            if all(pair):
                yield (f"{name}, {provider}", "-", *map(bytes_text, pair), f"{ratio_text(*pair)} smaller")


def speedup(comparison: Mapping[str, Any]) -> str:
    """Say the verdict with the speed-up and its interval."""
    ratio, low, high = (comparison[key] for key in ("ratio", "low", "high"))
    if not ratio:
        return str(comparison["verdict"])
    interval = "" if not (low and high) else f" ({1 / high:.2f} to {1 / low:.2f})"
    return f"{1 / ratio:.2f}x{interval}, {comparison['verdict']}"


def demo_page(document: Mapping[str, Any], raw: Mapping[str, Mapping[str, Any]]) -> Html:
    """Make the page.

    Args:
        document: the demo's JSON document.
        raw: benchmark documents by network and provider, "vgg cpu", with their raw samples.
    """
    missed = [("goal missed", line, "this run is not as it should be") for line in document["missed"]]
    notes = [("note", line, "") for line in document["notes"]]
    total = html.section(
        "Result",
        html.notices([*missed, *notes]),
        *(part for network in document["networks"] for part in _summary(network)),
        html.paragraph(document["caption"], quiet=True),
    )
    parts = [total]
    for network in document["networks"]:
        parts += _sections(network, raw)
    machine = document["environment"]
    where = f"{machine['cpu']}, {machine['cores']['usable']} cores"
    return html.page("Pruned with ETP, compressed, verified", parts, subtitle=where, data=document)


def _summary(network: Mapping[str, Any]) -> tuple[Html, Html, Html]:
    sizes, accuracy = network["parameters"], network["accuracy"]
    lost = (accuracy["compressed_onnx"] - accuracy["dense"]) * 100
    fewer = f"{ratio_text(sizes['etp'], sizes['compressed'])} fewer"
    entries = [
        ("parameters", fewer, f"{count_text(sizes['etp'])} to {count_text(sizes['compressed'])}"),
        ("accuracy", f"{accuracy['compressed_onnx']:.2%}", f"{lost:+.2f} points against dense"),
    ]
    for provider, found in network["benchmarks"].items():
        value, _, rest = speedup(found["comparisons"][0]).partition(" ")
        entries.append((f"speed-up, {provider}", value.rstrip(","), rest))
    # what matters most comes first: a phone shows three columns
    rows = [(name, small, etp, dense, gain) for name, dense, etp, small, gain in demo_rows(network)]
    headers = ("", "compressed", "ETP", "dense", "gain")
    table = html.table(headers, rows, text_columns=(0, 4))
    return html.heading(network["title"]), html.cards(entries), table


def _sections(network: Mapping[str, Any], raw: Mapping[str, Mapping[str, Any]]) -> Iterator[Html]:
    from etp_deploy import plots  # noqa: PLC0415 - the terminal's table needs no numpy
    from etp_deploy.bench.page import latency_plot, summary_table  # noqa: PLC0415
    from etp_deploy.bench.text import setting  # noqa: PLC0415

    compression = network["compression"]
    curves = {
        name: [(epoch["number"], epoch["accuracy"] * 100) for epoch in network["training"][key]]
        for name, key in (("dense", "dense"), ("with ETP", "etp"))
    }
    left = {"with ETP": [(e["number"], e["remaining"] / 1e3) for e in network["training"]["etp"]]}
    yield html.section(
        network["title"],
        plots.lines(curves, x_unit="epoch", y_unit="%", caption="test accuracy while training"),
        plots.lines(left, x_unit="epoch", y_unit="thousand", caption="parameters once the dead are removed"),
        html.paragraph(removed_line(compression)),
        html.paragraph(verification_line(compression["verification"]), quiet=True),
        html.paragraph(alignment_line(compression), quiet=True),
        layer_plot(
            [row for row in compression["layers"] if row["constant"] or row["unread"]],
            "what compression did to each layer",
        ),
    )
    for provider, found in network["benchmarks"].items():
        verdict = found["comparisons"][0]["verdict"]
        document = raw.get(f"{network['name']} {provider}", found)
        where = setting(found["comparisons"][0])
        yield html.section(
            f"{network['title']}: {provider}",
            html.badge(verdict, _BADGES[verdict]),
            latency_plot(document, where),
            summary_table(found),
            html.details(
                "Doubts", html.notices([(w["name"], w["message"], w["hint"]) for w in found["warnings"]])
            ),
        )
