"""The test suite's own networks as rows of the same table."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.export import export
from zoo.networks import ZOO
from zoo.planting import Planting, plant

from etp_deploy.pipeline import compress
from networks.outcome import elements, outcome

if TYPE_CHECKING:
    from zoo.networks import Network


def _real(entry: Network) -> dict[str, Any] | None:
    """Return the network's own example where drawn integers may not suit it: those that are below a size."""
    if not any(isinstance(below, str) for _, below in entry.inputs.values()):
        return None
    return {name: tensor.numpy() for name, tensor in zip(entry.inputs, entry.draw(), strict=True)}


def measure_zoo(name: str) -> dict[str, Any]:
    """Return a row for one of the zoo's networks, planted as its tests do, with everything dynamic."""
    entry = ZOO[name]
    net = entry.build()
    planted = plant(net, Planting(zeros="weights" if entry.constants else "all"))
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        paths = [Path(folder) / f"{part}.onnx" for part in ("planted", "floor", "small")]
        export(net, entry, paths[0], dynamic=entry.dynamics[-1])
        export(entry.build(planted.widths), entry, paths[1], dynamic=entry.dynamics[-1])
        report = compress(paths[0], paths[2], align="off", simplify=False, inputs=_real(entry))
        sizes = [elements(path) for path in paths]
    kinds = {site.key: (site.kind, site.groups) for site in entry.build().sites()}
    gone: dict[str, int] = {}
    for key, width in planted.widths.items():
        kind, groups = kinds.get(key, ("inner", 1))
        label = kind if kind in {"head", "neuron"} else "channel"
        gone[label] = gone.get(label, 0) + groups * (entry.widths[key] - width)
    planted_units = {kind: count for kind, count in gone.items() if count}
    return {"exporter": "dynamo", **outcome(report, sizes, planted_units)}
