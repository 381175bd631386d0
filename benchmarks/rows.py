"""Results of many runs, one row each: a run has its own process, a crash is a row, and what is done stays done."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from etp_deploy.files import write_text
from etp_deploy.worker import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

NICENESS = 10


class Results:
    """A JSON file of rows by name, written whole after each."""

    def __init__(self, path: Path, schema: str, packages: Sequence[str]) -> None:
        self.path, self.schema, self.packages = path, schema, packages
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row, in place of the one that had its name."""
        self.rows[name] = row
        document = {
            "schema": self.schema,
            "python": platform.python_version(),
            "packages": {package: found for package in self.packages if (found := _version(package))},
            "rows": dict(sorted(self.rows.items())),
        }
        write_text(self.path, json.dumps(document, indent=1, allow_nan=False) + "\n")

    def missing(self, names: Sequence[str], *, again: bool) -> Iterator[str]:
        """Yield the names whose rows are not there, or all."""
        yield from (name for name in names if again or name not in self.rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def be_nice() -> None:
    """Let others on the machine go first; children inherit it."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def in_own_process(arguments: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
    """Run Python on arguments and return the JSON document that it prints last.

    Where there is none the row says how the process ended: its last line on stderr, a signal, or the time limit.
    """
    started = time.monotonic()
    child = subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return {"outcome": "crashed", "reason": f"not done within {timeout_s:g} s"}
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        raise
    seconds = round(time.monotonic() - started, 1)
    try:
        found: dict[str, Any] = json.loads(out[out.index("{") :])
    except ValueError:
        last = next((line for line in reversed(err.splitlines()) if line.strip()), "nothing on stderr")
        died = f"signal {-child.returncode}: " if child.returncode < 0 else ""
        return {"outcome": "crashed", "reason": died + last.strip()[:400], "seconds": seconds}
    return {**found, "seconds": seconds}


def in_fork(function: Callable[[], dict[str, Any]], *, timeout_s: float) -> dict[str, Any]:
    """As `in_own_process`, of a function in a copy of this process: what is imported here is not imported again."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    started = time.monotonic()
    child = context.Process(target=_answer, args=(function, sender))
    child.start()
    sender.close()
    found: dict[str, Any] = {"outcome": "crashed", "reason": f"not done within {timeout_s:g} s"}
    if receiver.poll(timeout_s):
        try:
            found = receiver.recv()
        except EOFError:
            child.join()
            found = {"outcome": "crashed", "reason": f"the process ended with {child.exitcode}"}
    else:
        child.kill()
    child.join()
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def _answer(function: Callable[[], dict[str, Any]], sender: Any) -> None:
    try:
        found = function()
    except Exception as error:  # noqa: BLE001 - whatever a row meets is its outcome
        line = first_line(error)
        found = {"outcome": "crashed", "reason": f"{type(error).__name__}: {line}"[:400]}
    sender.send(found)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; the first column is text, the others are numbers or text."""
    rule = ["---", *("---:" for _ in header[1:])]
    lines = [header, rule, *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
