"""`etp-deploy inspect`: what is dead, what could go, and why the rest stays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from etp_deploy.cli.options import (
    PATH,
    align,
    as_json,
    merge_duplicates,
    partial_residuals,
    target,
    zero_below,
)
from etp_deploy.cli.sources import check_model
from etp_deploy.cli.terminal import emit, quiet_stdout, show, stages
from etp_deploy.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from etp_deploy.inspection import Explanation


@click.command(short_help="Show what is dead, and why the rest stays.")
@click.argument("source", type=PATH, metavar="IN.onnx")
@click.option("--explain", metavar="TENSOR[:AXIS]", help="Say why the indices along this axis stay or go.")
@click.option("--all", "everything", is_flag=True, help="Show layers with nothing dead as well.")
@align
@target
@zero_below
@merge_duplicates
@partial_residuals
@as_json
def inspect(
    *,
    source: Path,
    explain: str | None,
    everything: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show, layer by layer, what compress would remove and why the rest stays; nothing is written."""
    check_model(source)
    if explain is not None:
        with quiet_stdout(as_json), stages("inspect"):
            found = _explain(source, explain, options)
        axis = "" if found.axis is None else f", axis {found.axis}"
        show(f"{found.tensor}{axis}", *(f"  {line}" for line in found.lines), as_json=as_json)
        if as_json:
            emit(found.to_json())
        return
    with quiet_stdout(as_json), stages("inspect"):
        from etp_deploy.inspection import inspect as run  # noqa: PLC0415 - heavy

        result = run(source, **options)
    from etp_deploy.cli.tables import inspection  # noqa: PLC0415 - loads rich

    document = result.to_json()
    show(*inspection(document, everything=everything), as_json=as_json)
    if as_json:
        emit(document)


def _explain(source: Path, text: str, options: dict[str, Any]) -> Explanation:
    """Explain a tensor; names may themselves end in a colon and a number."""
    from etp_deploy.inspection import explain  # noqa: PLC0415 - heavy

    name, colon, axis = text.rpartition(":")
    if not (colon and name and axis.removeprefix("-").isdecimal()):
        return explain(source, text, **options)
    try:
        return explain(source, name, int(axis), **options)
    except UsageError as refused:
        try:
            return explain(source, text, **options)
        except UsageError:
            raise refused from None
