"""`etp-deploy verify`: whether two models compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from etp_deploy.cli.options import PATH, as_json, inputs, sizes, tolerance
from etp_deploy.cli.sources import check_model, read_inputs
from etp_deploy.cli.terminal import emit, quiet_stdout, show, stages
from etp_deploy.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Compare what two models compute.")
@click.argument("original", type=PATH, metavar="A.onnx")
@click.argument("other", type=PATH, metavar="B.onnx")
@click.option(
    "--samples", type=click.IntRange(min=1), default=3, show_default=True, help="Inputs to compare."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of drawn inputs.")
@click.option(
    "--rtol",
    type=tolerance,
    metavar="R",
    help="Allowed error relative to each output's scale; 1e-5 by default.",
)
@click.option("--atol", type=tolerance, metavar="R", help="Allowed absolute error; 1e-9 by default.")
@click.option("--ep", default="cpu", show_default=True, help="Execution provider, such as cpu or cuda.")
@sizes
@inputs("npz, json or a folder of images, a batch's samples also alone; drawn by default.")
@as_json
def verify(
    *,
    original: Path,
    other: Path,
    samples: int,
    seed: int,
    rtol: float | None,
    atol: float | None,
    ep: str,
    shapes: tuple[tuple[str, int], ...],
    inputs: Path | None,
    as_json: bool,
) -> int:
    """Run A.onnx and B.onnx on the same inputs, several seeds and sizes; exit 0 when they agree, 1 when not."""
    check_model(original)
    check_model(other)
    if inputs is not None and shapes:
        raise UsageError("given inputs have their sizes", where="--shape", hint="leave out --inputs")
    with quiet_stdout(as_json), stages("verify"):
        from etp_deploy.comparing import ATOL, RTOL  # noqa: PLC0415 - heavy
        from etp_deploy.verification import verify as run  # noqa: PLC0415

        result = run(
            original,
            other,
            samples=samples,
            seed=seed,
            rtol=RTOL if rtol is None else rtol,
            atol=ATOL if atol is None else atol,
            provider=ep,
            dims=dict(shapes) or None,
            inputs=read_inputs(inputs, original),
        )
    from etp_deploy.reports import verification_line  # noqa: PLC0415 - when needed

    document = result.to_json()
    notes = (f"note: {note}" for note in result.notes)
    show(verification_line(document), *notes, as_json=as_json)
    if as_json:
        emit({"schema": "etp-deploy/verify/1", "a": str(original), "b": str(other), **document})
    return 0 if result.passed else 1
