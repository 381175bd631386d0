"""The test suite's own networks as rows of the same table."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from zoo.export import export, weight_elements
from zoo.networks import ZOO
from zoo.planting import Planting, plant

from etp_deploy.pipeline import compress


def measure_zoo(name: str) -> dict[str, Any]:
    """Return a row for one of the zoo's networks, planted as its tests do, with everything dynamic."""
    entry = ZOO[name]
    net = entry.build()
    planted = plant(net, Planting(zeros="weights" if entry.constants else "all"))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="zoo-") as folder:
        paths = [Path(folder) / f"{part}.onnx" for part in ("planted", "floor", "small")]
        export(net, entry, paths[0], dynamic=entry.dynamics[-1])
        export(entry.build(planted.widths), entry, paths[1], dynamic=entry.dynamics[-1])
        report = compress(paths[0], paths[2], align="off", simplify=False)
        sizes = [weight_elements(path) for path in paths]
    assert report.verification is not None
    kept: dict[str, int] = {}
    for layer in report.layers:
        for text, count in layer.reasons:
            kept[f"{text} [{layer.kind}]"] = kept.get(f"{text} [{layer.kind}]", 0) + count
    kinds = {site.key: (site.kind, site.groups) for site in entry.build().sites()}
    gone: dict[str, int] = {}
    for key, width in planted.widths.items():
        kind, groups = kinds[key]
        label = kind if kind in {"head", "neuron"} else "channel"
        gone[label] = gone.get(label, 0) + groups * (entry.widths[key] - width)
    return {
        "exporter": "dynamo",
        "outcome": "at the floor" if sizes[2] <= sizes[1] else "pinned",
        "parameters": dict(zip(("planted", "floor", "compressed"), sizes, strict=True)),
        "planted": {kind: count for kind, count in gone.items() if count},
        "removed": report.removed,
        "kept_dead": kept,
        "max_rel_error": report.verification.max_rel_error,
        "samples": report.verification.samples,
        "notes": list(report.verification.notes),
        "compress_seconds": round(time.monotonic() - started, 1),
    }
