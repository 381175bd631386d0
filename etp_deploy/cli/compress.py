"""`etp-deploy compress`: the main job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from etp_deploy.cli.options import (
    PATH,
    align,
    as_json,
    inputs,
    merge_duplicates,
    partial_residuals,
    target,
    zero_below,
)
from etp_deploy.cli.sources import check_model, read_inputs
from etp_deploy.cli.terminal import emit, quiet_stdout, show, stages
from etp_deploy.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


@click.command(short_help="Remove what is dead, verify, write.")
@click.argument("source", type=PATH, metavar="IN.onnx")
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT.onnx", help="The file to write.")
@align
@target
@zero_below
@merge_duplicates
@partial_residuals
@inputs("npz, json or a folder of images to verify on, a batch's samples also alone; drawn by default.")
@click.option("--no-verify", is_flag=True, help="Write the result without comparing it with the original.")
@click.option("--no-simplify", is_flag=True, help="Leave onnxsim out.")
@click.option("--report", type=PATH, metavar="FILE.html", help="Write a page that opens without a network.")
@as_json
def compress(
    *,
    source: Path,
    output: Path,
    align: str | int,
    target: str,
    zero_below: float,
    merge_duplicates: bool,
    partial_residuals: str,
    inputs: Path | None,
    no_verify: bool,
    no_simplify: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Remove every dead channel, head and neuron exactly, verify, and write the result.

    IN.onnx is never changed, and OUT.onnx appears only when both agree.
    """
    from etp_deploy.files import check_output, write_text  # noqa: PLC0415 - light, but not for --help

    check_model(source)
    check_output(output, inputs=(source,))
    if report is not None:
        if report.resolve() == output.resolve():
            raise UsageError("the report is the output", where=str(report), hint="choose another name")
        check_output(report, inputs=(source,))
    if no_verify and inputs is not None:
        raise UsageError("nothing runs on the inputs", where="--inputs", hint="leave out --no-verify")
    with quiet_stdout(as_json), stages("compress") as tell:
        tell("loading")
        from etp_deploy.pipeline import compress as run  # noqa: PLC0415 - heavy

        arrays = read_inputs(inputs, source)
        result = run(
            source,
            output,
            align=align,
            target=target,
            zero_below=zero_below,
            merge_duplicates=merge_duplicates,
            partial_residuals=partial_residuals,
            verify=not no_verify,
            simplify=not no_simplify,
            inputs=arrays,
            progress=tell,
        )
    from etp_deploy.cli.tables import compression  # noqa: PLC0415 - loads rich
    from etp_deploy.reports import compression_page  # noqa: PLC0415

    document = result.to_json()
    show(*compression(document), as_json=as_json)
    if report is not None:
        write_text(report, compression_page(document))
        show(f"report: {report}", as_json=as_json)
    if as_json:
        emit(document)
