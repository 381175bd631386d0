"""What commands share: where words, tables and JSON go, progress.

Results go to stdout. Under `--json` stdout carries one JSON document and everything else goes to stderr;
progress goes there always, and only to a terminal.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, RenderableType

# columns where no terminal says how many it has
WIDTH = 120


class ReaderGoneError(Exception):
    """Whoever read stdout has closed it."""


def console(*, stderr: bool) -> Console:
    """Make a console that keeps brackets in file names as they are."""
    from rich.console import Console  # noqa: PLC0415 - slow, and only for those who print

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


def show(*parts: RenderableType, as_json: bool = False) -> None:
    """Print a result for a reader: on stdout, or on stderr where stdout is for JSON.

    Raises:
        ReaderGoneError: when stdout is closed.
    """
    from rich.table import Table  # noqa: PLC0415 - slow, and only for those who print

    out = console(stderr=as_json)
    with out.capture() as captured:
        for part in parts:
            # prose keeps its lines whole for other programs to read
            out.print(part, soft_wrap=not out.is_terminal and not isinstance(part, Table))
    # tables pad their lines; nobody wants that in a file
    text = "\n".join(line.rstrip() for line in captured.get().split("\n"))
    _write(sys.stderr if as_json else sys.stdout, text)


def emit(document: Any) -> None:
    """Print the one JSON document; what is not finite becomes null, as JSON has no words for it.

    Raises:
        ReaderGoneError: when stdout is closed.
    """
    _write(sys.stdout, json.dumps(finite(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _write(stream: Any, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError as error:
        raise ReaderGoneError from error


def finite(value: Any) -> Any:
    """Return JSON values with null in place of NaN and infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


@contextlib.contextmanager
def quiet_stdout(active: bool) -> Iterator[None]:
    """While work is done under `--json`, send to stderr what libraries and other people's modules print."""
    if not active:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def stages(verb: str) -> Iterator[Callable[[str], None]]:
    """Show what is being done, one name after the other, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _name: None
        return
    from rich.text import Text  # noqa: PLC0415 - slow, and only for terminals

    with console(stderr=True).status(Text(verb)) as status:
        yield lambda name: status.update(Text(f"{verb}: {name}"))


@contextlib.contextmanager
def shares() -> Iterator[Callable[[str, float], None]]:
    """Show what is being done and how much of all work is done, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda _name, _share: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=1.0)
        yield lambda name, share: bars.update(task, description=name, completed=share)
