"""Pairs of models whose true ratio of times is known by construction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path


def equal_layers(path: Path, layers: int, *, channels: int = 16, size: int = 24) -> Path:
    """Write a chain of equal convolutions: eleven of them take 1.1 times as long as ten."""
    rng = np.random.default_rng(0)
    shape = (1, channels, size, size)
    nodes, weights, last = [], [], "x"
    for layer in range(layers):
        kernel = rng.standard_normal((channels, channels, 3, 3)) / np.sqrt(9 * channels)
        weights.append(numpy_helper.from_array(kernel.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "equal_layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path
