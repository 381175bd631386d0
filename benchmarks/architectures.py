"""Many architectures, built small with random weights and planted dead structure: does the surgery reach the floor?

Each network is planted (hidden neurons, attention heads, filters, at scattered places, with biases that live on),
exported, compared with its module, compressed without alignment and without onnxsim, and verified in ONNX Runtime.
The floor is the size of the network exported after its dead units were cut out of the modules themselves, which is
shown to compute the same. A row says "at the floor", "pinned" with the reasons from the report, or "not exportable"
with the exporter's.

    python benchmarks/architectures.py -o benchmarks/results/architectures.json
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rows import Results, be_nice, in_fork, table

from etp_deploy.errors import EtpError, ExportError
from etp_deploy.files import write_text

if TYPE_CHECKING:
    import torch
    from networks.entries import Entry
    from networks.sites import Place

RESULTS = Path(__file__).parent / "results/architectures.json"
PACKAGES = (
    "etp-deploy",
    "torch",
    "transformers",
    "torch_geometric",
    "onnxscript",
    "onnx",
    "onnxruntime",
    "onnxsim",
)
TIMEOUT_S = 900.0
# the planted module and the one cut by hand sum in another order
SAME = 1e-4


def measure(name: str) -> dict[str, Any]:
    """Return an architecture's row."""
    import torch  # noqa: PLC0415 - a row's own process loads it
    from networks import ENTRIES  # noqa: PLC0415

    if name.startswith("zoo: "):
        from networks.zoo import measure_zoo  # noqa: PLC0415

        return measure_zoo(name.removeprefix("zoo: "))
    entry = ENTRIES[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    example = entry.inputs()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="architecture-") as folder:
        warnings.simplefilter("ignore")
        net, places, small = _built(entry, example)
        before, after, floor = (Path(folder) / f"{part}.onnx" for part in ("planted", "small", "floor"))
        try:
            how = _export(net, entry, example, before)
            _export(small, entry, example, floor, exporter=how, check=False)
        except ExportError as error:
            return {"outcome": "not exportable", "reason": error.message}
        return {"exporter": how, **_compressed(entry, example, places, (before, after, floor))}


def _built(entry: Entry, example: dict[str, Any]) -> tuple[torch.nn.Module, list[Place], torch.nn.Module]:
    """Return the planted network, where what died, and the network without it, shown to compute the same.

    Raises:
        ArithmeticError: when the two differ: the entry does not describe the network.
    """
    import torch  # noqa: PLC0415
    from networks.sites import find, native, plant  # noqa: PLC0415
    from zoo.sites import randomise  # noqa: PLC0415

    net = entry.build().eval()
    if entry.drawn:
        randomise(net)
    places = find(net, entry.sites)
    plant(net, places)
    small = native(net, places, lambda module: module(**example))
    with torch.no_grad():
        one, other = net(**example), small(**example)
    error = float((one - other).abs().max() / one.abs().max())
    if not error <= SAME:
        raise ArithmeticError(f"the network cut by hand differs from the planted one by {error:.1e}")
    return net, places, small


def _export(
    net: Any, entry: Entry, example: dict[str, Any], path: Path, exporter: str = "", *, check: bool = True
) -> str:
    """Export with the first way that works, and say which.

    Raises:
        ExportError: the first one's, when none does.
    """
    from etp_deploy.exporting import export  # noqa: PLC0415 - heavy

    ways = [("dynamo", entry.dynamic), ("dynamo", ()), ("torchscript", entry.dynamic), ("torchscript", ())]
    names = {way: f"{way[0]}{'' if way[1] or not entry.dynamic else ', static'}" for way in ways}
    first: ExportError | None = None
    for way in ways:
        if exporter and names[way] != exporter:
            continue
        opset = 20 if way[0] == "dynamo" else 17
        try:
            export(net, example, path, dynamic=way[1], exporter=way[0], opset=opset, check=check)
        except ExportError as error:
            first = first or error
        else:
            return names[way]
    assert first is not None
    raise first


def _compressed(
    entry: Entry, example: dict[str, Any], places: list[Place], paths: tuple[Path, Path, Path]
) -> dict[str, Any]:
    from networks.outcome import elements, outcome  # noqa: PLC0415
    from networks.sites import removable  # noqa: PLC0415

    from etp_deploy.pipeline import compress  # noqa: PLC0415

    before, after, floor = paths
    inputs = {name: tensor.numpy() for name, tensor in example.items()} if entry.real else None
    try:
        report = compress(before, after, align="off", simplify=False, inputs=inputs)
    except EtpError as error:
        return {"outcome": "refused", "reason": str(error)}
    sizes = [elements(path) for path in (before, floor, after)]
    sizes[1] -= sum(place.counted for place in places)
    return outcome(report, sizes, removable(places))


def _import_once() -> None:
    """Load what every row needs, before its process is split off; on one thread, as threads do not survive that."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for module in ("etp_deploy.exporting", "etp_deploy.pipeline", "torch.onnx", "onnxscript"):
        importlib.import_module(module)


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table of all architectures."""
    header = ("architecture", "planted", "floor", "compressed", "dead units", "max error", "outcome")
    lines = []
    for name, row in rows.items():
        sizes = row.get("parameters")
        numbers = [f"{sizes[key]:,}" for key in ("planted", "floor", "compressed")] if sizes else [""] * 3
        dead = ", ".join(
            f"{count} {kind}{'s' * (count != 1)}" for kind, count in row.get("planted", {}).items()
        )
        error = f"{row['max_rel_error']:.1e}" if "max_rel_error" in row else ""
        lines.append((name, *numbers, dead, error, _outcome(row)))
    return _summary(rows) + table(header, lines)


def _summary(rows: dict[str, dict[str, Any]]) -> str:
    """Return how many of each outcome there are, and which, where it is not the floor."""
    named: dict[str, list[str]] = {}
    for name, row in rows.items():
        named.setdefault(row["outcome"], []).append(name)
    counts = [
        f"- {len(names)} {outcome}{'' if outcome == 'at the floor' else ': ' + ', '.join(names)}\n"
        for outcome, names in sorted(named.items(), key=lambda item: -len(item[1]))
    ]
    return (
        f"{len(rows)} architectures with planted dead structure, compressed without alignment:\n\n"
        f"{''.join(counts)}\n"
        "Sizes are elements of floating-point constants in the exported files, counted in one way within a row; the "
        "floor is the file of the network without its dead units. The last column has the reasons of what is not "
        "at the floor. The seconds in the JSON were measured on a machine that was busy with other work.\n\n"
    )


def _outcome(row: dict[str, Any]) -> str:
    if row["outcome"] == "at the floor":
        return (
            "at the floor"
            if row.get("exporter", "dynamo") == "dynamo"
            else f"at the floor ({row['exporter']})"
        )
    if row["outcome"] == "pinned":
        most = sorted(row["kept_dead"].items(), key=lambda item: -item[1])[:2]
        return f"pinned: {'; '.join(f'{text} ({count})' for text, count in most) or 'no reason given'}"
    return f"{row['outcome']}: {row['reason']}"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("-k", "--only", default="", help="only architectures whose name holds this")
    parser.add_argument("--again", action="store_true", help="run what has a row, too")
    parser.add_argument("--row", help="print one architecture's row as JSON, in this process")
    options = parser.parse_args()
    from networks import NAMES  # noqa: PLC0415 - loads torch

    if options.row:
        print(json.dumps(measure(options.row)))
        return 0
    be_nice()
    _import_once()
    results = Results(options.output, "etp-deploy/architectures/1", PACKAGES)
    for name in results.missing([name for name in NAMES if options.only in name], again=options.again):
        row = in_fork(functools.partial(measure, name), timeout_s=TIMEOUT_S)
        results.add(name, row)
        print(f"{name}: {_outcome(row)}", flush=True)
    write_text(options.output.with_suffix(".md"), markdown(results.rows))
    bad = [name for name, row in results.rows.items() if row["outcome"] in {"crashed", "refused"}]
    print(f"{len(results.rows)} architectures, {len(bad)} failed{': ' + ', '.join(bad) if bad else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
