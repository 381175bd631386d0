"""Evaluate one node on constants, with ONNX Runtime's own kernels.

The constants that dead channels hold must be what the runtime would have computed, so it computes them: one
node, one session, cached by what the node is (operator, attributes, opset, types), not by its place. What it has no
kernel for in a type stays unknown; only bfloat16, which it hardly computes in, is evaluated in float32 and rounded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Sequence


def evaluate(
    node: ir.Node, arrays: Sequence[np.ndarray | None], imports: dict[str, int] | None = None
) -> np.ndarray | None:
    """Return the first output of a node on the given inputs, or None where the runtime refuses it.

    Args:
        node: the node; its own inputs are not looked at.
        arrays: one array for each input, None for an omitted one.
        imports: operator sets by domain; those of the node's graph by default.
    """
    if any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
        return None
    if imports is None:
        imports = {} if node.graph is None else dict(node.graph.opset_imports)
    if _brain(node, arrays):
        return _widened(node, arrays, imports)
    proto = onnx.NodeProto(op_type=node.op_type, domain=node.domain)
    for attribute in sorted(node.attributes.values(), key=lambda item: item.name):
        proto.attribute.append(ir.to_proto(attribute))
    kinds = tuple(
        None if array is None else (ir.DataType.from_numpy(array.dtype).value, array.ndim) for array in arrays
    )
    session = _session(proto.SerializeToString(deterministic=True), tuple(sorted(imports.items())), kinds)
    if session is None:
        return None
    try:
        result: np.ndarray = session.run(
            ["o"], {f"i{index}": array for index, array in enumerate(arrays) if array is not None}
        )[0]
    except Exception:  # noqa: BLE001 - ONNX Runtime raises classes of its own; "cannot be evaluated" is an answer
        return None
    return result


def _brain(node: ir.Node, arrays: Sequence[np.ndarray | None]) -> bool:
    """Return whether a node reads or makes bfloat16, for which the runtime's CPU kernels are few."""
    made = node.op_type == "Cast" and node.attributes.get_int("to", 0) == ir.DataType.BFLOAT16
    return made or any(array is not None and array.dtype == ml_dtypes.bfloat16 for array in arrays)


def _widened(
    node: ir.Node, arrays: Sequence[np.ndarray | None], imports: dict[str, int]
) -> np.ndarray | None:
    """Evaluate a node in float32 and round once to bfloat16, which is what a kernel for bfloat16 does."""
    if node.op_type == "Cast":
        return (
            None
            if arrays[0] is None
            else arrays[0].astype(ir.DataType(node.attributes["to"].as_int()).numpy())
        )
    wide = [
        array.astype(np.float32) if array is not None and array.dtype == ml_dtypes.bfloat16 else array
        for array in arrays
    ]
    result = evaluate(node, wide, imports)
    return result.astype(ml_dtypes.bfloat16) if result is not None and result.dtype == np.float32 else result


@lru_cache(maxsize=512)
def _session(
    template: bytes, imports: tuple[tuple[str, int], ...], kinds: tuple[tuple[int, int] | None, ...]
) -> onnxruntime.InferenceSession | None:
    node = onnx.NodeProto.FromString(template)
    node.input.extend("" if kind is None else f"i{index}" for index, kind in enumerate(kinds))
    node.output.append("o")
    inputs = [
        onnx.helper.make_tensor_value_info(f"i{index}", kind[0], [None] * kind[1])
        for index, kind in enumerate(kinds)
        if kind is not None
    ]
    graph = onnx.helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name="o")])
    opsets = [onnx.helper.make_opsetid(*entry) for entry in imports]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception:  # noqa: BLE001 - as above
        return None
