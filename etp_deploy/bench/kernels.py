"""Why one model is faster: time by kernel, and which convolutions left the blocked layout.

On x86 ONNX Runtime runs convolutions in a channel-blocked layout (NCHWc). One whose input channel count is no
multiple of four drops out of it, which can cost more than the removed channels saved.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BLOCKED_SUFFIX = "_nchwc"
CONVOLUTIONS = frozenset({"Conv", "FusedConv"})
_PRODUCTS = frozenset({"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "TransposeMatMul"})


def label(record: Mapping[str, Any]) -> str:
    """Kernel name, with the layout it worked in."""
    return (
        f"{record['kernel']} (blocked)" if record["node"].endswith(BLOCKED_SUFFIX) else str(record["kernel"])
    )


def macs(record: Mapping[str, Any]) -> int | None:
    """Multiply-accumulates of one node, from the shapes that it ran with; None where they do not tell."""
    inputs = [dims for _, dims in record["inputs"]]
    outputs = [dims for _, dims in record["outputs"]]
    if not inputs or not outputs:
        return None
    produced = math.prod(outputs[0])
    if record["kernel"] in CONVOLUTIONS and len(inputs) > 1 and len(inputs[1]) >= 3:
        return int(produced * math.prod(inputs[1][1:]))
    if record["kernel"] == "ConvTranspose" and len(inputs) > 1:
        return int(math.prod(inputs[0]) * math.prod(inputs[1][1:]))
    if record["kernel"] in _PRODUCTS and inputs[0]:
        # a transposed first operand shows in the output having its last axis as rows
        transposed = len(inputs[0]) == 2 and inputs[0][0] != outputs[0][0] == inputs[0][1]
        return int(produced * inputs[0][0 if transposed else -1])
    return None


def moved_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of weights, inputs and outputs that the node has to touch at least once."""
    return int(record["parameter_bytes"] + record["activation_bytes"] + record["output_bytes"])


def by_kernel(
    baseline: Sequence[Mapping[str, Any]], contender: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Nodes and microseconds for each kernel before and after, largest change first."""
    table: dict[str, dict[str, Any]] = {}
    for side, records in (("baseline", baseline), ("contender", contender)):
        for record in records:
            empty = {"kernel": label(record)} | {
                f"{s}_{what}": 0
                for s in ("baseline", "contender")
                for what in ("nodes", "us", "macs", "bytes")
            }
            row = table.setdefault(label(record), empty)
            row[f"{side}_nodes"] += 1
            row[f"{side}_us"] = round(row[f"{side}_us"] + record["us"], 3)
            row[f"{side}_macs"] += macs(record) or 0
            row[f"{side}_bytes"] += moved_bytes(record)
    return sorted(table.values(), key=lambda row: -abs(row["contender_us"] - row["baseline_us"]))


def layout(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many nodes work in the blocked layout, and each convolution that does not, with the reason."""
    blocked = sum(1 for record in records if record["node"].endswith(BLOCKED_SUFFIX))
    left = [
        {"node": record["node"], "kernel": record["kernel"], "us": round(record["us"], 3), "reason": reason}
        for record in records
        if (reason := _exit_reason(record))
    ]
    reorders = sum(1 for record in records if record["kernel"] in {"ReorderInput", "ReorderOutput"})
    return {"blocked": blocked, "left": left, "reorders": reorders}


def _exit_reason(record: Mapping[str, Any]) -> str:
    """Why a two-dimensional float convolution on the CPU is not blocked; empty for anything else."""
    if record["kernel"] not in CONVOLUTIONS or record["node"].endswith(BLOCKED_SUFFIX):
        return ""
    if record["provider"] != "CPUExecutionProvider" or len(record["inputs"]) < 2:
        return ""
    kind, image = record["inputs"][0]
    weight = record["inputs"][1][1]
    if kind != "float" or len(image) != 4 or len(weight) != 4:
        return ""
    channels, each = image[1], weight[1]
    groups = channels // each if each else 1
    if groups > 1 and each == 1:
        return (
            f"depthwise over {channels} channels, no multiple of 4"
            if channels % 4
            else "a neighbour left first"
        )
    if each % 4:
        per = f" in each of {groups} groups" if groups > 1 else ""
        return f"{each} input channels{per}, no multiple of 4"
    return "this processor or its neighbours do not use it"
