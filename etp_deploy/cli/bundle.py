"""`etp-deploy bundle`: a folder with all that an edge pipeline needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from etp_deploy.cli.options import PATH, as_json
from etp_deploy.cli.sources import check_model
from etp_deploy.cli.terminal import emit, quiet_stdout, show, stages
from etp_deploy.errors import OutputError, UsageError


@click.command(short_help="Make a folder for the edge: model, manifest, example.")
@click.argument("model", type=PATH, metavar="MODEL.onnx")
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="The folder to make.")
@click.option("--labels", metavar="A,B,...", help="Names of the classes in order, or a file with one a line.")
@click.option(
    "--preprocessing", type=PATH, metavar="FILE.json", help="How pipelines make inputs of raw data."
)
@click.option("--example", type=PATH, metavar="FILE", help="npz, json or folder of images; drawn by default.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of a drawn example.")
@as_json
def bundle(
    *,
    model: Path,
    output: Path,
    labels: str | None,
    preprocessing: Path | None,
    example: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Write model, manifest with hashes, and an example with its expected outputs.

    `etp_deploy.runtime.EdgeModel`, which needs numpy and onnxruntime only, loads and checks the folder.
    """
    check_model(model)
    if not output.parent.is_dir():
        what = "the output's parent folder does not exist"
        raise OutputError(what, where=str(output), hint="create it first")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        hint = "remove it or choose another name"
        raise OutputError("the output folder exists already", where=str(output), hint=hint)
    named = None if labels is None else _labels(labels)
    settings = None if preprocessing is None else _settings(preprocessing)
    with quiet_stdout(as_json), stages("bundle"):
        from etp_deploy.bundling import bundle as run  # noqa: PLC0415 - heavy

        arrays = None
        if example is not None:
            from etp_deploy.input_files import load_inputs  # noqa: PLC0415 - heavy
            from etp_deploy.inputs import input_specs  # noqa: PLC0415

            arrays = load_inputs(example, input_specs(model))
        run(model, output, example=arrays, seed=seed, labels=named, preprocessing=settings)
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    files = ", ".join(f"{name} {entry['bytes']:,} bytes" for name, entry in manifest["files"].items())
    show(f"{output}: {files}", as_json=as_json)
    if as_json:
        emit({**manifest, "folder": str(output)})


def _labels(text: str) -> list[str]:
    """Return names from a list or a file.

    Raises:
        UsageError: when there is none, or an empty one.
    """
    path = Path(text)
    found = path.read_text(encoding="utf-8").splitlines() if path.is_file() else text.split(",")
    names = [name.strip() for name in found]
    if not all(names):
        raise UsageError("a label is empty", where=f"--labels {text}", hint="one name for each class")
    return names


def _settings(path: Path) -> dict[str, Any]:
    """Read the pipeline's settings.

    Raises:
        UsageError: when the file is no JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(found, dict):
        raise UsageError("not a JSON object", where=str(path), hint='such as {"scale": 0.0039}')
    return found
