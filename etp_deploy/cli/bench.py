"""`etp-deploy bench`: latency and memory that can be believed, and a gate against regressions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from etp_deploy.cli.compare import read_document
from etp_deploy.cli.options import PATH, as_json, counts, inputs, sizes
from etp_deploy.cli.sources import check_model, read_inputs
from etp_deploy.cli.terminal import emit, finite, quiet_stdout, shares, show
from etp_deploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from etp_deploy.bench import BenchmarkResult
    from etp_deploy.bench.gate import GateOutcome


@click.command(short_help="Measure latency and memory; guard against regressions.")
@click.argument("models", type=PATH, nargs=-1, required=True, metavar="A.onnx [B.onnx...]")
@click.option(
    "--ep", "providers", multiple=True, help="Execution provider, such as cpu, cuda; may be repeated."
)
@click.option(
    "--threads",
    type=counts(0),
    metavar="N[,N...]",
    default="1",
    show_default=True,
    help="Intra-op threads; 0: as many as ONNX Runtime chooses.",
)
@click.option("--batch", type=counts(1), metavar="N[,N...]", help="Batch sizes, where the batch is dynamic.")
@sizes
@inputs("npz, json or a folder of images; drawn by default.")
@click.option("--sessions", type=click.IntRange(min=2), help="Most sessions of each model.")
@click.option("--max-seconds", type=click.FloatRange(min=0, min_open=True), help="Most time in each setting.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of drawn inputs.")
@click.option("--no-memory", is_flag=True, help="Leave the memory of isolated processes out.")
@as_json
@click.option("--output", "-o", type=PATH, metavar="FILE.json", help="Write the JSON document to a file.")
@click.option("--csv", type=PATH, metavar="FILE", help="Write plain numbers, one line a model and setting.")
@click.option("--markdown", type=PATH, metavar="FILE", help="Write the table as Markdown.")
@click.option("--html", type=PATH, metavar="FILE", help="Write a page that opens without a network.")
@click.option("--baseline", type=PATH, metavar="FILE.json", help="A saved result to hold this one against.")
@click.option("--fail-if", "rules", multiple=True, metavar="'p50>5%'", help="Exit 1 when a metric grew more.")
@click.option("--any-environment", is_flag=True, help="Accept a baseline from another machine.")
def bench(
    *, models: tuple[Path, ...], baseline: Path | None, rules: tuple[str, ...], as_json: bool, **options: Any
) -> int:
    """Measure models in ONNX Runtime, the first being what the others are compared with.

    Sessions alternate, each is a sampling unit, and the verdict is faster, slower or undecided.
    """
    for model in models:
        check_model(model)
    files = {kind: options[kind] for kind in ("output", "csv", "markdown", "html") if options[kind]}
    saved = _check(models, files, baseline, rules)
    with quiet_stdout(as_json), shares() as tell:
        tell("loading", 0.0)
        result = _measure(models, options, tell)
    document = finite(result.to_json())
    gate = None
    if saved is not None:
        from etp_deploy.bench.gate import evaluate_gate  # noqa: PLC0415 - heavy

        gate = evaluate_gate(document, saved, rules, allow_other_environment=bool(options["any_environment"]))
        document["gate"] = gate.to_json()
    _write(document, files)
    _show(result, document, gate, as_json=as_json)
    if as_json:
        emit(document)
    return gate.exit_code if gate else 0


def _check(
    models: tuple[Path, ...], files: dict[str, Path], baseline: Path | None, rules: tuple[str, ...]
) -> dict[str, Any] | None:
    """Refuse what cannot be meant before anything is measured; return the saved result to compare with.

    Raises:
        UsageError: when an option makes no sense with the others.
        OutputError: when a file could not be written.
        BenchmarkError: when the saved result cannot be read.
    """
    from etp_deploy.files import check_output  # noqa: PLC0415 - light, but not for --help

    if rules and baseline is None:
        raise UsageError("there is nothing to compare with", where="--fail-if", hint="add --baseline FILE")
    if baseline is not None and not rules:
        raise UsageError(
            "nothing is asked of the baseline", where="--baseline", hint="add --fail-if 'p50>5%'"
        )
    for path in files.values():
        check_output(path, inputs=(*models, *([baseline] if baseline else ())))
    if baseline is None:
        return None
    saved = read_document(baseline)
    from etp_deploy.bench.gate import check_schema, parse_rule  # noqa: PLC0415 - loads ONNX Runtime

    for rule in rules:
        parse_rule(rule)
    check_schema(saved, where=str(baseline))
    return saved


def _measure(models: tuple[Path, ...], options: dict[str, Any], tell: Any) -> BenchmarkResult:
    from etp_deploy.bench import benchmark  # noqa: PLC0415 - heavy

    arrays = read_inputs(options["inputs"], models[0])
    limits = {key: options[key] for key in ("sessions", "max_seconds") if options[key] is not None}
    return benchmark(
        models,
        providers=options["providers"] or ("cpu",),
        threads=options["threads"],
        batch=options["batch"],
        shapes=dict(options["shapes"]),
        inputs=arrays,
        seed=options["seed"],
        memory=not options["no_memory"],
        progress=tell,
        **limits,
    )


def _write(document: dict[str, Any], files: dict[str, Path]) -> None:
    from etp_deploy.bench import page, text  # noqa: PLC0415 - heavy
    from etp_deploy.files import write_text  # noqa: PLC0415

    made: dict[str, Callable[[], str]] = {
        "output": lambda: json.dumps(document, indent=1, allow_nan=False) + "\n",
        "csv": lambda: text.csv_text(document),
        "markdown": lambda: text.markdown(document),
        "html": lambda: page.bench_page(document),
    }
    for kind, path in files.items():
        write_text(path, made[kind]())


def _show(
    result: BenchmarkResult, document: dict[str, Any], gate: GateOutcome | None, *, as_json: bool
) -> None:
    from rich.text import Text  # noqa: PLC0415 - slow

    from etp_deploy.bench.text import dead_lines  # noqa: PLC0415

    warnings: dict[str, Text] = {}
    for warning in result.warnings:
        line = Text.assemble(("doubt ", "yellow"), f"{warning.name}: {warning.message} ({warning.hint})")
        warnings.setdefault(warning.name, line)
    show(result.table(), *dead_lines(document), *warnings.values(), as_json=as_json)
    if gate is not None:
        show(*(str(finding) for finding in gate.findings), gate.message, as_json=as_json)
