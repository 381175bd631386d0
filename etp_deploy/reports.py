"""What a compression did, in words and as a page, from its JSON document."""

from __future__ import annotations

import html as escaping
from typing import TYPE_CHECKING, Any

from etp_deploy import html

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from etp_deploy.html import Html

WIDTH = 400
# more layers than this make a picture that nobody reads; the table below it has them all
MOST_BARS = 80
_SIZES = {"parameters": "parameters", "bytes": "file size", "macs": "MACs", "nodes": "nodes"}


def bytes_text(count: float | None) -> str:
    """Return a number of bytes as people read it."""
    value, unit = float(count or 0), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return "-" if count is None else f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"


def count_text(count: float | None) -> str:
    """Return a number with its thousands apart."""
    return "unknown" if count is None else f"{count:,.0f}"


def ratio_text(before: float | None, after: float | None) -> str:
    """Return how many times smaller something became."""
    return f"{before / after:.2f}x" if before and after else "-"


def size_rows(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, before, after and ratio of each size."""
    for key, name in _SIZES.items():
        before, after = document[key]["before"], document[key]["after"]
        shown = bytes_text if key == "bytes" else count_text
        yield name, shown(before), shown(after), ratio_text(before, after)


def removed_line(document: Mapping[str, Any]) -> str:
    """Say what went, by kind, each out of how many."""
    parts = []
    for kind in ("channels", "heads", "neurons"):
        total = sum(row["total"] for row in document["layers"] if row["kind"] == kind)
        if total:
            parts.append(f"{document['removed'][kind]:,} of {total:,} {kind}")
    if not parts:
        return "nothing could be removed: no layer has channels to lose"
    merged = document["merged_duplicates"]
    multiples = f"; merged as multiples of others: {merged:,}" if merged else ""
    return "removed " + ", ".join(parts) + multiples


def kept_dead_rows(document: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Return tensor, count and reason of what is dead and stays."""
    return [(entry["tensor"], entry["count"], entry["reason"]) for entry in document["kept_dead"]]


def alignment_line(document: Mapping[str, Any]) -> str:
    """Say which alignment was used, for what, and what was measured."""
    found = document["alignment"]
    used = "no alignment" if found["used"] == "off" else f"channel counts at multiples of {found['used']}"
    line = f"{used}, for {found['target']}"
    if found["times"]:
        times = ", ".join(f"{name}: {time:.2f}" for name, time in found["times"].items())
        line += f"; measured here, time against exact counts: {times}"
    return line


def verification_line(found: Mapping[str, Any] | None) -> str:
    """Say whether the two models agree and what that rests on."""
    if found is None:
        return "not verified, as asked"
    if not found["passed"]:
        return f"the models do not agree: {found['reason']}"
    shapes = len({str(sorted(shape.items())) for shape in found["shapes"]})
    return (
        f"verified on {found['samples']} inputs of {shapes} shape{'s' if shapes != 1 else ''}: "
        f"largest difference {_error(found['max_rel_error'])} of the output's scale, "
        f"the original against itself {_error(found['noise_rel'])}, allowed {_error(found['rtol'])}"
    )


def threshold_hint(document: Mapping[str, Any]) -> str:
    """Say what a small threshold would remove; empty when that is nothing."""
    found = document["zero_below"]
    more = found["at_1e-6_more_dead_channels"]
    if not more or found["used"] >= 1e-6:
        return ""
    what = "channel has" if more == 1 else "channels have"
    return (
        f"{more:,} more output {what} only weights below a millionth of their layer's largest: "
        "--zero-below 1e-6 takes them for dead"
    )


def compression_page(document: Mapping[str, Any]) -> Html:
    """Make the page of one compression; the document itself travels along."""
    title = f"{document['source'].rpartition('/')[2]}, compressed"
    return html.page(title, compression_sections(document), subtitle=document["destination"], data=document)


def compression_sections(document: Mapping[str, Any]) -> list[Html]:
    """Make the sections of one compression."""
    entries = [(name, ratio, f"{before} to {after}") for name, before, after, ratio in size_rows(document)]
    found = document["verification"]
    word = html.badge("not verified", "open") if found is None else html.badge("verified", "good")
    hint = threshold_hint(document)
    result = html.section(
        "Result",
        html.cards(entries),
        html.paragraph(removed_line(document)),
        word,
        html.paragraph(verification_line(found), quiet=True),
        html.paragraph(alignment_line(document), quiet=True),
        *(
            [html.notices([("close to dead", hint, "the result then differs by what those weights did")])]
            if hint
            else []
        ),
    )
    return [result, _layers(document), *_reasons(document), _times(document)]


def layer_plot(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Html:
    """Draw for each layer one bar of what is kept alive, kept although dead, and removed."""
    parts = ("kept", "kept although dead", "removed")
    fills = ("var(--s0)", "var(--s1)", "var(--line)")
    drawn, y = [], 0
    for row in rows:
        counts = _split(row)
        text = escaping.escape(f"{row['name'][-40:]} ({row['kind']})")
        drawn.append(f'<text x="0" y="{y + 12}">{text}</text>')
        note = f"{row['kept']} of {row['total']}"
        drawn.append(f'<text class="quiet" x="{WIDTH}" y="{y + 12}" text-anchor="end">{note}</text>')
        x = 0.0
        for count, fill in zip(counts, fills, strict=True):
            length = WIDTH * count / max(row["total"], 1)
            if count:
                drawn.append(
                    f'<rect x="{x:.2f}" y="{y + 17}" width="{length:.2f}" height="11" style="fill:{fill}"/>'
                )
            x += length
        y += 36
    legend = "".join(
        f'<span><i style="background:{fill}"></i>{name}</span>'
        for fill, name in zip(fills, parts, strict=True)
    )
    below = f"<figcaption>{escaping.escape(caption)}</figcaption>" if caption else ""
    return html.Html(
        f'<figure><div class="legend">{legend}</div><svg viewBox="0 0 {WIDTH} {max(y, 1)}" role="img" '
        f'aria-label="layers">{"".join(drawn)}</svg>{below}</figure>'
    )


def _split(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return how many of a layer are kept alive, kept although dead, and removed."""
    removed = row["total"] - row["kept"]
    dead = row["constant"] + row["unread"] - removed
    return row["kept"] - dead, dead, removed


def _layers(document: Mapping[str, Any]) -> Html:
    rows = document["layers"]
    cells = [
        (row["name"], row["operator"], row["kind"], *map(str, (row["total"], *_split(row)))) for row in rows
    ]
    headers = ("tensor", "operator", "kind", "total", "kept", "kept although dead", "removed")
    touched = [row for row in rows if row["constant"] or row["unread"]][:MOST_BARS]
    picture = layer_plot(touched) if touched else html.paragraph("no layer has anything dead", quiet=True)
    table = html.details("All layers", html.table(headers, cells, text_columns=(0, 1, 2)))
    return html.section("Layers", picture, table, note="layers that hold something dead")


def _reasons(document: Mapping[str, Any]) -> list[Html]:
    rows = [(tensor, f"{count:,}", reason) for tensor, count, reason in kept_dead_rows(document)]
    if not rows:
        return []
    table = html.table(("tensor", "how many", "why"), rows, text_columns=(0, 2), wrap_columns=(2,))
    note = "dead, and kept: as the carrier of a constant, or because the target is faster with round counts"
    return [html.section("Kept although dead", table, note=note)]


def _times(document: Mapping[str, Any]) -> Html:
    entries = {name: f"{seconds:.2f} s" for name, seconds in document["seconds"].items()}
    return html.section("Time by stage", html.facts(entries))


def _error(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1e}"
