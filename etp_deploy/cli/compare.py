"""`etp-deploy compare`: benchmarks of many devices side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from etp_deploy.cli.options import PATH, as_json
from etp_deploy.cli.terminal import emit, show
from etp_deploy.errors import BenchmarkError


@click.command(short_help="Put benchmarks of many devices side by side.")
@click.argument("reports", type=PATH, nargs=-1, required=True, metavar="[NAME=]R.json...")
@click.option("--markdown", type=PATH, metavar="FILE", help="Write the table as Markdown.")
@click.option("--html", type=PATH, metavar="FILE", help="Write a page that opens without a network.")
@as_json
def compare(*, reports: tuple[Path, ...], markdown: Path | None, html: Path | None, as_json: bool) -> None:
    """Merge what `bench --json` found on many devices into one table; a device's name is its file's.

    Ratios may be compared across devices, times only read beside each other.
    """
    from etp_deploy.files import check_output, write_text  # noqa: PLC0415 - light, but not for --help

    named = _read(reports)
    for path in (markdown, html):
        if path is not None:
            check_output(path, inputs=reports)
    from etp_deploy.bench.fleet import compare_reports  # noqa: PLC0415 - heavy

    found = compare_reports(named)
    if markdown is not None:
        write_text(markdown, found.markdown())
    if html is not None:
        write_text(html, found.page())
    show(found.table(), as_json=as_json)
    if as_json:
        emit(found.to_json())


def _read(paths: tuple[Path, ...]) -> dict[str, Any]:
    """Read documents by device name.

    Raises:
        BenchmarkError: when a file is missing or no JSON object.
    """
    named: dict[str, Any] = {}
    for given in paths:
        name, equals, rest = str(given).partition("=")
        path = given if given.exists() or not equals else Path(rest)
        label = path.stem if path is given else name
        while label in named:
            label += "'"
        named[label] = read_document(path)
    return named


def read_document(path: Path) -> dict[str, Any]:
    """Read one result of the benchmark.

    Raises:
        BenchmarkError: when the file is missing or no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(
            f"cannot read: {error.strerror}", where=str(path), hint="check the path"
        ) from error
    except ValueError as error:
        raise BenchmarkError("not JSON", where=str(path), hint="save it with bench --json") from error
    if not isinstance(found, dict):
        raise BenchmarkError("not a benchmark result", where=str(path), hint="save it with bench --json")
    return found
