"""`etp-deploy export`: from a PyTorch module to an ONNX file that is shown to compute the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from etp_deploy.cli.options import PATH, as_json, tolerance
from etp_deploy.cli.terminal import emit, quiet_stdout, show, stages
from etp_deploy.errors import ExportError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from etp_deploy.exporting import ExportReport
    from etp_deploy.factories import DynamicAxis, InputDeclaration


@click.command(short_help="Export a PyTorch module, and compare the file with it.")
@click.argument("factory", metavar="MODULE:FACTORY")
@click.option("-o", "--output", type=PATH, required=True, metavar="OUT.onnx", help="The file to write.")
@click.option(
    "--weights", type=PATH, metavar="FILE", help="torch.save of a state_dict, or safetensors; runs no code."
)
@click.option(
    "--input",
    "inputs",
    multiple=True,
    required=True,
    metavar="NAME=1x3x224x224[:dtype]",
    help="An input with its shape; may be repeated.",
)
@click.option(
    "--dynamic", multiple=True, metavar="NAME.AXIS=DIM", help="An axis of free size; may be repeated."
)
@click.option("--opset", type=click.IntRange(7, 30), default=20, show_default=True)
@click.option("--exporter", type=click.Choice(["dynamo", "torchscript"]), default="dynamo", show_default=True)
@click.option("--no-check", is_flag=True, help="Do not compare the file with the module.")
@click.option(
    "--samples", type=click.IntRange(min=1), default=3, show_default=True, help="Inputs to compare."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of drawn inputs.")
@click.option(
    "--rtol", type=tolerance, metavar="R", help="Allowed difference relative to each output's scale."
)
@as_json
def export(
    *,
    factory: str,
    output: Path,
    weights: Path | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    opset: int,
    exporter: str,
    no_check: bool,
    samples: int,
    seed: int,
    rtol: float | None,
    as_json: bool,
) -> None:
    """Call MODULE:FACTORY, load weights into the module it returns, and export it.

    The file appears only when it computes what the module computes.
    """
    declared, axes = _check(factory, output, weights, inputs, dynamic)
    with quiet_stdout(as_json), stages("export") as tell:
        tell("loading PyTorch")
        from etp_deploy.exporting import EXPORT_RTOL  # noqa: PLC0415 - heavy
        from etp_deploy.exporting import export as run  # noqa: PLC0415
        from etp_deploy.factories import build_module  # noqa: PLC0415

        tell("building the module")
        module = build_module(factory, weights)
        tell("exporting")
        report = run(
            module,
            declared,
            output,
            dynamic=axes,
            opset=opset,
            exporter=exporter,
            check=not no_check,
            samples=samples,
            seed=seed,
            rtol=EXPORT_RTOL if rtol is None else rtol,
        )
    show(*_words(report), as_json=as_json)
    if as_json:
        emit({"schema": "etp-deploy/export/1", **report.to_json()})


def _check(
    factory: str, output: Path, weights: Path | None, inputs: tuple[str, ...], dynamic: tuple[str, ...]
) -> tuple[list[InputDeclaration], list[DynamicAxis]]:
    """Read inputs and axes, and refuse what cannot be meant before PyTorch is loaded.

    Raises:
        UsageError: when a text has another form, or an axis is of no input.
        ExportError: when there is no such file of weights.
        OutputError: when the output could not be written.
    """
    from etp_deploy.factories import parse_dynamic, parse_input  # noqa: PLC0415 - light, but not for --help
    from etp_deploy.files import check_output  # noqa: PLC0415

    declared = [parse_input(text) for text in inputs]
    axes = [parse_dynamic(text) for text in dynamic]
    known = {entry.name: len(entry.shape) for entry in declared}
    for axis in axes:
        if axis.axis >= known.get(axis.name, 0):
            hint = "there are: " + ", ".join(f"{name} with {n} axes" for name, n in known.items())
            raise UsageError("no input has this axis", where=f"{axis.name}.{axis.axis}", hint=hint)
    if ":" not in factory:
        raise UsageError("not a factory", where=factory, hint="write package.module:function")
    if weights is not None and not weights.is_file():
        raise ExportError("there is no such file of weights", where=str(weights), hint="check the path")
    check_output(output, inputs=() if weights is None else (weights,))
    return declared, axes


def _words(report: ExportReport) -> list[str]:
    """Say what was written and how near it is to the module."""
    names = f"{', '.join(report.inputs)} -> {', '.join(report.outputs)}"
    checked = (
        f"compared with the module on {report.samples} inputs: largest difference "
        f"{report.max_rel_error:.2g} of the output's scale"
    )
    return [
        f"{report.path}: {report.bytes:,} bytes, opset {report.opset}, {names}",
        checked if report.samples else "not compared with the module",
        *(f"note: {note}" for note in report.notes),
    ]
