"""`etp-deploy demo`: the whole job on real data."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import click

from etp_deploy.cli.options import PATH, as_json
from etp_deploy.cli.terminal import emit, quiet_stdout, shares, show
from etp_deploy.errors import ExportError

# of the extra `train`, and not checked by importing: that takes seconds
NEEDED = ("torch", "onnxscript", "sklearn")


@click.command(short_help="Do the whole job on handwritten digits.")
@click.option(
    "-o",
    "--output",
    type=PATH,
    default=Path("demo-output"),
    show_default=True,
    metavar="DIR",
    help="The folder to make; one of a demo before is replaced.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the training.")
@as_json
def demo(*, output: Path, seed: int, as_json: bool) -> int:
    """Train two networks on handwritten digits with ETP, compress, verify, benchmark and bundle them.

    Takes a few minutes; exit 1 when the networks did not become as small, or stay as accurate, as they should.
    """
    from etp_deploy.demo.folder import check_folder  # noqa: PLC0415 - light, but not for --help

    check_folder(output)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        what = f"not installed: {', '.join(missing)}"
        raise ExportError(what, where="demo", hint="pip install 'etp-deploy[train]'")
    with quiet_stdout(as_json), shares() as tell:
        tell("loading PyTorch", 0.0)
        from etp_deploy.demo.run import run_demo  # noqa: PLC0415 - heavy

        result = run_demo(output, seed=seed, progress=tell)
    from etp_deploy.cli.tables import demonstration  # noqa: PLC0415 - loads rich

    document = result.to_json()
    show(*demonstration(document), as_json=as_json)
    show(f"open {output / 'report.html'} for the details", as_json=as_json)
    if as_json:
        emit(document)
    for missed in result.missed:
        sys.stderr.write(f"etp-deploy: the demo missed its goal: {missed}\n")
    return 1 if result.missed else 0
