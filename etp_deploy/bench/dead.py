"""What dead channels still cost: their share of weights and work by the surgery's own plan, and of the time.

The analysis runs in a worker, on the file alone; the time is an estimate, each node's measured time multiplied
by the share of its work that removing what is dead would take away. Kernels rarely shrink in proportion, so it
says what there is to gain, not what will be gained.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from etp_deploy.bench.cautions import Caution
from etp_deploy.bench.kernels import BLOCKED_SUFFIX
from etp_deploy.errors import EtpError
from etp_deploy.worker import isolated

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import onnx_ir as ir

    from etp_deploy.bench.results import Measurement
    from etp_deploy.surgery.analysis import Analysis
    from etp_deploy.surgery.plan import Layer

TIMEOUT_S = 120.0
# kinds of rows that count channels once: a head's projections are counted by the head
COUNTED = frozenset({"channels", "neurons", "heads"})
_CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# how many nodes ONNX Runtime fuses behind a contraction at most: bias, addition, activation
_LONGEST_FUSION = 4


def find(path: Path, name: str) -> tuple[dict[str, Any] | None, list[Caution]]:
    """Analyse a model in a worker.

    Returns:
        What is dead in it, see `analyse`; None with a warning where the analysis fails, which is no reason to
        measure nothing.
    """
    try:
        found: dict[str, Any] = isolated("etp_deploy.bench.dead:analyse", path, timeout_s=TIMEOUT_S)
    except EtpError as error:
        return None, [Caution("dead_unknown", f"{name}: {error.message}")]
    return found, []


def analyse(path: Path) -> dict[str, Any]:
    """Say what is dead in a model and what share of each node's work would go with it.

    Meant for a worker: the analysis takes memory and imports that the measuring process should not have.

    Raises:
        EtpError: when the model cannot be read or analysed.
    """
    # heavy, and only for the worker
    from etp_deploy.modelfile import read_model  # noqa: PLC0415
    from etp_deploy.surgery.plan import plan  # noqa: PLC0415
    from etp_deploy.surgery.prepare import prepare  # noqa: PLC0415
    from etp_deploy.surgery.rounds import carry_out  # noqa: PLC0415

    model = read_model(path)
    prepared = prepare(model)
    before = _work(prepared.graph)
    weights = _weights(prepared.graph)
    removal, analysis = plan(prepared.graph)
    rows = [
        {
            "tensor": row.name,
            "operator": row.operator,
            "kind": row.kind,
            "total": row.total,
            "dead": row.constant + row.unread,
            "removable": row.removed,
            "kept": _kept(analysis, row),
        }
        for row in removal.layers
    ]
    links = _links(prepared.graph)
    after, weights_after = before, weights
    if removal.edits:
        again = prepare(carry_out(prepared, removal, model, None).model).graph
        after, weights_after = _work(again), _weights(again)
    nodes = {tensor: _gone(count, after.get(tensor)) for tensor, count in before.items()}
    known = all(count is not None for count, _ in (*before.values(), *after.values()))
    total, left = (sum(count or 0 for count, _ in side.values()) for side in (before, after))
    counted = [row for row in rows if row["kind"] in COUNTED]
    return {
        "channels": sum(row["total"] for row in counted),
        "dead": sum(row["dead"] for row in counted),
        "removable": sum(row["removable"] for row in counted),
        "weights": max(weights - weights_after, 0),
        "weights_share": round(max(1 - weights_after / weights, 0.0), 6) if weights else 0.0,
        "macs_share": (round(1 - left / total, 6) if total else 0.0) if known else None,
        "layers": rows,
        "nodes": {tensor: share for tensor, share in nodes.items() if share},
        "links": links,
    }


def cost(found: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Estimate the time that dead channels take, from one setting's profile.

    Args:
        found: from `analyse`.
        records: the measured nodes of a setting, see `Measurement.nodes`.

    Returns:
        Microseconds in a run, their share of all nodes' time, and the share of time by nodes that the file's
        own names were found for; contractions among the others count with the model's share of work.
    """
    total = dead = placed = 0.0
    for record in records:
        total += record["us"]
        tensor = _tensor(record, found["links"])
        if tensor is not None:
            placed += record["us"]
            dead += record["us"] * found["nodes"].get(tensor, 0.0)
        elif record["macs"] is not None:
            dead += record["us"] * (found["macs_share"] or 0.0)
    return {
        "us": round(dead, 3),
        "time_share": round(dead / total, 6) if total else 0.0,
        "placed_share": round(placed / total, 6) if total else 0.0,
    }


def to_json(found: Mapping[str, Any], measurements: Iterable[Measurement]) -> dict[str, Any]:
    """What `analyse` found as it stands in the document, with the time in each setting."""
    facts = {key: value for key, value in found.items() if key not in {"nodes", "links"}}
    return {**facts, "time": [{**m.cell.to_json(), **cost(found, m.nodes)} for m in measurements]}


def strips(document: Mapping[str, Any], baseline: str, contender: str) -> list[tuple[str, list[bool]]]:
    """Channels of each layer before and after, where the contender is the baseline with less in it.

    It is when all its layers are the baseline's by name, none wider and some narrower; else there are none.
    """
    by_name = {model["name"]: model.get("dead") for model in document["models"]}
    before, after = by_name.get(baseline), by_name.get(contender)
    if not before or not after or not after["layers"]:
        return []
    wide = {(row["tensor"], row["kind"]): row for row in before["layers"]}
    narrow = {(row["tensor"], row["kind"]): row for row in after["layers"]}
    if not narrow.keys() <= wide.keys() or any(
        row["total"] > wide[key]["total"] for key, row in narrow.items()
    ):
        return []
    found: list[tuple[str, list[bool]]] = []
    for key, row in wide.items():
        rest = narrow.get(key)
        if rest is not None and rest["total"] == row["total"] and not row["removable"]:
            continue
        found.append((f"{row['tensor']}, before", _strip(row)))
        found.append((f"{row['tensor']}, after", _strip(rest) if rest else []))
    return found if any(row["total"] < wide[key]["total"] for key, row in narrow.items()) else []


def _strip(row: Mapping[str, Any]) -> list[bool]:
    return [letter == "1" for letter in row["kept"]]


def _work(graph: ir.Graph) -> dict[str, tuple[int | None, int | None]]:
    """Multiply-accumulates and elements made by each node, by the name of its first output."""
    from etp_deploy.sizes import concrete, counting_sizes, node_macs  # noqa: PLC0415 - only for the worker

    bindings = counting_sizes(graph)
    found = {}
    for node in graph:
        shape = concrete(node.outputs[0], bindings)
        made = None if shape is None else math.prod(shape)
        found[node.outputs[0].name or ""] = (node_macs(node, bindings), made)
    return found


def _gone(before: tuple[int | None, int | None], after: tuple[int | None, int | None] | None) -> float:
    """Which share of a node's work goes: of its multiply-accumulates, of its output where it has none."""
    if after is None:
        return 1.0
    kind = 0 if before[0] else 1
    was, left = before[kind], after[kind]
    return 0.0 if not was or left is None else round(max(1 - left / was, 0.0), 6)


def _weights(graph: ir.Graph) -> int:
    from etp_deploy.sizes import elements  # noqa: PLC0415 - only for the worker
    from etp_deploy.surgery.stored import is_weight_type  # noqa: PLC0415

    return sum(
        elements(value)
        for value in graph.initializers.values()
        if is_weight_type(value.dtype) and value.uses()
    )


def _kept(analysis: Analysis, row: Layer) -> str:
    """Channels of a layer in order, "1" for one that stays; empty where the layer's axis cannot be told."""
    for says in analysis.statements.values():
        value = says.node.outputs[0]
        if value.name != row.name:
            continue
        mask = analysis.state.mask(value)
        for dim in range(mask.ndim):
            kept = np.asarray(mask.any(axis=tuple(other for other in range(mask.ndim) if other != dim)))
            if kept.size == row.total and int(kept.sum()) == row.kept:
                return "".join("1" if stays else "0" for stays in kept)
    return ""


def _links(graph: ir.Graph) -> dict[str, tuple[str, str]]:
    """From what a profile may call a node to the tensor that it makes and to that of the contraction before it.

    ONNX Runtime calls a node by its name, and a blocked one by the last tensor of what was fused into it.
    """
    found: dict[str, tuple[str, str]] = {}
    for node in graph:
        pair = (node.outputs[0].name or "", _contraction(node))
        for key in (node.name, *(value.name for value in node.outputs)):
            if key:
                found.setdefault(key, pair)
    return found


def _contraction(node: ir.Node) -> str:
    """What the nearest contraction makes that could have taken a node in; the node's own output without one."""
    at = node
    for _ in range(_LONGEST_FUSION):
        if at.op_type in _CONTRACTIONS:
            return at.outputs[0].name or ""
        makers = [
            maker for value in at.inputs if value is not None and (maker := value.producer()) is not None
        ]
        if not makers:
            break
        at = next((maker for maker in makers if maker.op_type in _CONTRACTIONS), makers[0])
    return node.outputs[0].name or ""


def _tensor(record: Mapping[str, Any], links: Mapping[str, tuple[str, str]]) -> str | None:
    """The tensor that a profiled node makes in the file, None where its name says nothing."""
    name = str(record["node"]).removesuffix(BLOCKED_SUFFIX)
    while name and name not in links:
        name = name.rpartition("/")[0]
    return links[name][record["macs"] is not None] if name else None
