"""Evaluate one node on constants, with ONNX Runtime's own kernels.

The constants that dead channels hold must be what the runtime would have computed, so it computes them: one
node, one session, cached by what the node is (operator, attributes, opset, types), not by its place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
import onnxruntime

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np


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
