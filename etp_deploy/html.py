"""Self-contained HTML pages: text, tables, notices and plots in one file that needs no network and no script.

Every function here returns `Html`, a string that is safe to put into a page; whatever comes from a model or a
file is escaped on the way in. Pages follow the reader's light or dark mode and fit a phone.

    page("Report", [section("Sizes", table(("model", "bytes"), [("a.onnx", "1 MB")]))])
"""

from __future__ import annotations

import html
import json
from typing import TYPE_CHECKING, Any, NewType

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Html = NewType("Html", str)

_STYLE = """
:root { color-scheme: light dark; --ground: #fbfbfa; --paper: #ffffff; --ink: #1d2126; --quiet: #5c6570;
  --line: #dfe3e7; --good: #1c7a4a; --bad: #b3261e; --open: #8a6100; --good-ground: #e3f4ea;
  --bad-ground: #fbe6e4; --open-ground: #fdf1d4; --s0: #2f6db3; --s1: #cf6f1b; --s2: #2f8f63; --s3: #97458a;
  --s4: #8a6d2f; --s5: #5f6b78; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --paper: #1c2024; --ink: #e6e9ec;
  --quiet: #9ba5b0; --line: #333a41; --good: #6fd39b; --bad: #ff8f85; --open: #f0c35b; --good-ground: #173726;
  --bad-ground: #45201d; --open-ground: #3d3114; --s0: #6ea8ea; --s1: #f0a04f; --s2: #63c796; --s3: #d187c4;
  --s4: #cdb06a; --s5: #a2adb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.25rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 0.5rem; } h3 { font-size: 1rem; margin: 1.25rem 0 0.4rem; }
p { margin: 0.4rem 0; overflow-wrap: anywhere; } .quiet { color: var(--quiet); font-size: 0.9rem; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 1rem;
  margin: 1rem 0; }
.scroll { overflow-x: auto; margin: 0.5rem 0; } table { border-collapse: collapse; font-size: 0.9rem;
  font-variant-numeric: tabular-nums; min-width: 60%; }
caption { text-align: left; color: var(--quiet); font-size: 0.85rem; caption-side: bottom;
  padding-top: 0.35rem; }
th, td { padding: 0.35rem 0.7rem 0.35rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: nowrap; } th { color: var(--quiet); font-weight: 600; }
td.number, th.number { text-align: right; } td.wrap { white-space: normal; min-width: 14rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 0.75rem; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 0.6rem 0.75rem; }
.card b { display: block; font-size: 1.35rem; line-height: 1.25; overflow-wrap: anywhere; }
.badge { border-radius: 999px; padding: 0.1rem 0.6rem; font-size: 0.85rem; font-weight: 600;
  white-space: nowrap; background: var(--line); }
.good { color: var(--good); background: var(--good-ground); }
.bad { color: var(--bad); background: var(--bad-ground); }
.open { color: var(--open); background: var(--open-ground); }
.notice { border-left: 4px solid var(--open); padding: 0.25rem 0 0.25rem 0.75rem; margin: 0.6rem 0; }
figure { margin: 0.75rem 0; } figcaption { color: var(--quiet); font-size: 0.85rem; margin-top: 0.25rem; }
svg { width: 100%; max-width: 34rem; height: auto; display: block; font: 12px system-ui, sans-serif;
  fill: var(--ink); }
svg .quiet { fill: var(--quiet); font-size: 11px; } svg .line { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 0.85rem; margin: 0.25rem 0; }
.legend i { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin-right: 0.4em; }
.legend span { overflow-wrap: anywhere; }
details { margin: 0.5rem 0; } summary { cursor: pointer; color: var(--quiet); }
code { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    title: str, parts: Sequence[Html], *, subtitle: str = "", data: Mapping[str, Any] | None = None
) -> Html:
    """Make a whole document.

    Args:
        title: its heading.
        parts: sections, or anything else made here.
        subtitle: one quiet line below the heading.
        data: a JSON document to carry along, in a script element that browsers do not run.
    """
    carried = ""
    if data is not None:
        # the one way out of a script element is its closing tag
        text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
        carried = f'<script type="application/json" id="data">{text}</script>'
    below = f'<p class="quiet">{_escape(subtitle)}</p>' if subtitle else ""
    return Html(
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{_escape(title)}</h1>{below}\n"
        + "\n".join(parts)
        + f"\n</main>{carried}</body></html>\n"
    )


def section(title: str, *parts: Html, note: str = "") -> Html:
    """Make a titled box, with an optional quiet line below its title."""
    quiet = f'<p class="quiet">{_escape(note)}</p>' if note else ""
    return Html(f"<section><h2>{_escape(title)}</h2>{quiet}{''.join(parts)}</section>")


def heading(text: str) -> Html:
    """Make a heading inside a section."""
    return Html(f"<h3>{_escape(text)}</h3>")


def paragraph(text: str, *, quiet: bool = False) -> Html:
    """Make a paragraph of plain text."""
    return Html(f"<p{' class=quiet' if quiet else ''}>{_escape(text)}</p>")


def badge(text: str, kind: str = "") -> Html:
    """Make a short word on a coloured ground; `kind` is "good", "bad", "open" or nothing."""
    return Html(f'<span class="badge {_escape(kind)}">{_escape(text)}</span>')


def code(text: str) -> Html:
    """Make a name as the machine knows it."""
    return Html(f"<code>{_escape(text)}</code>")


def cards(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Make a row of large numbers, each given as its label, its value and a note."""
    boxes = (
        f'<div class="card"><span class="quiet">{_escape(label)}</span><b>{_escape(value)}</b>'
        f'<span class="quiet">{_escape(note)}</span></div>'
        for label, value, note in entries
    )
    return Html(f'<div class="cards">{"".join(boxes)}</div>')


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text_columns: Sequence[int] = (0,),
    wrap_columns: Sequence[int] = (),
    caption: str = "",
    raw_columns: Sequence[int] = (),
) -> Html:
    """Make a table that scrolls sideways on its own where the screen is narrow.

    Args:
        headers: column names.
        rows: cells as text.
        text_columns: columns aligned to the left; the others hold numbers.
        wrap_columns: columns of long text, which may break lines.
        caption: what the numbers mean.
        raw_columns: columns whose cells are `Html` already, from `badge` or `code`.
    """

    def cell(tag: str, at: int, value: str) -> str:
        kind = "wrap" if at in wrap_columns else "" if at in text_columns else "number"
        inner = value if at in raw_columns and tag == "td" else _escape(value)
        return f"<{tag}{f' class={kind}' if kind else ''}>{inner}</{tag}>"

    head = "".join(cell("th", at, name) for at, name in enumerate(headers))
    body = "".join("<tr>" + "".join(cell("td", at, v) for at, v in enumerate(row)) + "</tr>" for row in rows)
    below = f"<caption>{_escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table>{below}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def facts(entries: Mapping[str, str]) -> Html:
    """Make a two-column table of names and values."""
    rows = "".join(
        f"<tr><th>{_escape(k)}</th><td class=wrap>{_escape(v)}</td></tr>" for k, v in entries.items()
    )
    return Html(f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>')


def notices(entries: Iterable[tuple[str, str, str]]) -> Html:
    """Make a list of warnings, each given as its name, what was seen and what to do."""
    return Html(
        "".join(
            f'<div class="notice"><b>{_escape(name)}</b> {_escape(message)}'
            f'<p class="quiet">{_escape(hint)}</p></div>'
            for name, message, hint in entries
        )
    )


def details(summary: str, *parts: Html) -> Html:
    """Make a part that opens on demand."""
    return Html(f"<details><summary>{_escape(summary)}</summary>{''.join(parts)}</details>")


def _escape(text: str) -> str:
    return html.escape(str(text), quote=True)
