"""Results as tables that read at a glance, from their JSON documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from etp_deploy.demo.report import COLUMNS, demo_rows
from etp_deploy.reports import (
    alignment_line,
    kept_dead_rows,
    removed_line,
    size_rows,
    threshold_hint,
    verification_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import RenderableType

# a terminal shows this many reasons; the JSON document and the page have them all
MOST_REASONS = 12


def compression(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield sizes before and after, what went, what stayed although dead, and the verification."""
    yield Text(f"{document['source']} -> {document['destination']}")
    sizes = _table(("", "before", "after", "smaller"))
    for name, before, after, ratio in size_rows(document):
        sizes.add_row(name, before, after, Text(ratio, style="bold"))
    yield sizes
    yield Text(removed_line(document))
    rows = kept_dead_rows(document)
    if rows:
        kept = _table(("kept although dead", "how many", "why"), text=(0, 2))
        for tensor, count, reason in rows[:MOST_REASONS]:
            kept.add_row(Text(tensor), str(count), Text(reason))
        if len(rows) > MOST_REASONS:
            rest = sum(count for _, count, _ in rows[MOST_REASONS:])
            kept.add_row(f"and {len(rows) - MOST_REASONS} more", str(rest), "see --json or --report")
        yield kept
    found = document["verification"]
    yield Text(verification_line(found), style="yellow" if found is None else "green")
    yield Text(alignment_line(document), style="dim")
    hint = threshold_hint(document)
    if hint:
        yield Text(f"hint: {hint}", style="yellow")
    yield Text(f"took {sum(document['seconds'].values()):.1f} s", style="dim")


def inspection(document: Mapping[str, Any], *, everything: bool) -> Iterator[RenderableType]:
    """Yield a row for each layer with something dead, or for all, and the totals by kind."""
    rows = document["layers"]
    shown = [row for row in rows if everything or row["constant"] or row["unread"]]
    columns = (
        "tensor",
        "operator",
        "kind",
        "total",
        "constant",
        "unread",
        "removable",
        "kept dead",
        "why kept",
    )
    found = _table(columns, text=(0, 1, 2, 8))
    for row in shown:
        counts = (row[key] for key in ("total", "constant", "unread", "removable", "kept_dead"))
        reasons = "; ".join(f"{count} {text}" for text, count in row["reasons"])
        found.add_row(
            Text(row["name"]),
            row["operator"],
            row["kind"],
            *(str(n) if n else "-" for n in counts),
            Text(reasons),
        )
    if shown:
        yield found
    hidden = len(rows) - len(shown)
    if hidden:
        yield Text(f"{hidden} layers with nothing dead are left out; --all shows them", style="dim")
    for kind, sums in document["totals"].items():
        dead = sums["constant"] + sums["unread"]
        yield Text(f"{kind}: {dead:,} of {sums['total']:,} dead, {sums['removable']:,} removable")
    if not rows:
        yield Text("no layer of this model could lose channels")
    if document["by_align"]:
        yield Text(
            f"removable in all by --align ({document['target']}): {_pairs(document['by_align'])}", style="dim"
        )
    more = {share: count for share, count in document["nearly_dead"].items() if count}
    if more:
        yield Text(f"more output channels that --zero-below would take for dead: {_pairs(more)}", style="dim")


def _pairs(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items())


def demonstration(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Yield the demo's one table, and its notes."""
    found = _table(("", *COLUMNS), caption=document["caption"])
    for network in document["networks"]:
        found.add_section()
        found.add_row(Text(network["title"], style="bold"))
        for name, *cells in demo_rows(network):
            found.add_row(f"  {name}", *(Text(cell) for cell in cells[:-1]), Text(cells[-1], style="bold"))
    yield found
    for note in document["notes"]:
        yield Text(f"note: {note}", style="yellow")


def _table(
    columns: Sequence[str],
    *,
    text: Sequence[int] = (0,),
    caption: str | None = None,
) -> Table:
    found = Table(
        caption=None if caption is None else Text(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for at, name in enumerate(columns):
        found.add_column(name, justify="left" if at in text else "right", overflow="fold")
    return found
