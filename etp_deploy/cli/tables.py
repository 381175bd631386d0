"""Results as tables that read at a glance, from their JSON documents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.measure import Measurement
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

    from rich.console import Console, ConsoleOptions, RenderableType

# a terminal shows this many reasons; the JSON document and the page have them all
MOST_REASONS = 12
# a name is not made shorter than this
LEAST_NAME = 12
# beside reasons there is this much room for names
WIDEST_KEPT = 36
# what torch's exporter adds to the name of each node for that of its first output
USUAL_END = "_output_0"
ELLIPSIS = "…"


class Name:
    """A name of a model's in one line: whole where it fits, else without its middle."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the name in the width there is."""
        yield Text(shortened(self.name, options.max_width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Give way to columns that cannot."""
        return Measurement(min(len(self.name), LEAST_NAME), len(self.name))


def shortened(name: str, width: int) -> str:
    """Return a name in at most `width` characters: first without the exporter's ending, then without its middle."""
    if len(name) <= width:
        return name
    ending = ELLIPSIS if name.endswith(USUAL_END) else ""
    rest = name.removesuffix(USUAL_END)
    if len(rest + ending) <= width:
        return rest + ending
    room = max(width - len(ELLIPSIS + ending), 2)
    return rest[: room // 2] + ELLIPSIS + rest[len(rest) - (room - room // 2) :] + ending


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
        yield _kept_dead(rows, most=MOST_REASONS)
    found = document["verification"]
    yield Text(verification_line(found), style="yellow" if found is None else "green")
    yield Text(alignment_line(document), style="dim")
    hint = threshold_hint(document)
    if hint:
        yield Text(f"hint: {hint}", style="yellow")
    yield Text(f"took {sum(document['seconds'].values()):.1f} s", style="dim")


def inspection(document: Mapping[str, Any], *, everything: bool) -> Iterator[RenderableType]:
    """Yield a row for each layer with something dead, or for all, the reasons, and the totals by kind."""
    rows = document["layers"]
    shown = [row for row in rows if everything or row["constant"] or row["unread"]]
    if shown:
        yield _layers(shown)
    reasons = [(row["name"], count, text) for row in shown for text, count in row["reasons"]]
    if reasons:
        yield _kept_dead(reasons)
    hidden = len(rows) - len(shown)
    if hidden:
        what = "layer with nothing dead is" if hidden == 1 else "layers with nothing dead are"
        yield Text(f"{hidden:,} {what} left out; --all shows all", style="dim")
    for kind, sums in document["totals"].items():
        yield Text(
            f"{kind}: {sums['total']:,}, of which {sums['constant'] + sums['unread']:,} dead "
            f"({sums['constant']:,} constant, {sums['unread']:,} unread); "
            f"{sums['removable']:,} removable, {sums['total'] - sums['removable']:,} kept"
        )
    if not rows:
        yield Text("no layer of this model could lose channels")
    for line in alternatives(document):
        yield Text(line, style="dim")


def alternatives(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was merged, and what another alignment or threshold would change."""
    if document["merged_duplicates"]:
        yield f"merged as multiples of others: {document['merged_duplicates']:,}"
    if document["by_align"] and document["align"] == "auto":
        yield f"--align auto is here what the rule for {document['target']} says; nothing was measured"
    if document["by_align"]:
        yield f"removable in all by --align: {_pairs(document['by_align'])}"
    nearly = document["nearly_dead"]
    if any(nearly.values()):
        yield f"more output channels that --zero-below would take for dead: {_pairs(nearly)}"
    elif nearly:
        yield f"--zero-below, up to {max(nearly, key=float)}, would take no more output channels for dead"


def _layers(rows: Sequence[Mapping[str, Any]]) -> Table:
    counts = ("total", "constant", "unread", "removable", "kept")
    found = _table(("tensor", "operator", "kind", *counts), text=(0, 1, 2))
    found.padding = (0, 1, 0, 0)
    # names give way, so that no number and no kind breaks over lines
    for column in found.columns[1:]:
        column.no_wrap = True
    for row in rows:
        cells = (f"{row[key]:,}" if row[key] else "-" for key in counts)
        found.add_row(Name(row["name"]), Text(row["operator"]), row["kind"], *cells)
    return found


def _kept_dead(rows: Sequence[tuple[str, int, str]], most: int | None = None) -> Table:
    """Return one line for each tensor and reason, `most` of them at most."""
    found = _table(("kept although dead", "how many", "why"), text=(0, 2))
    found.columns[0].max_width = WIDEST_KEPT
    for column in found.columns[:2]:
        column.no_wrap = True
    for tensor, count, reason in rows[:most]:
        found.add_row(Name(tensor), f"{count:,}", Text(reason))
    if most is not None and len(rows) > most:
        rest = sum(count for _, count, _ in rows[most:])
        found.add_row(f"and {len(rows) - most} more", f"{rest:,}", "see --json or --report")
    return found


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
