"""Export of zoo networks, and what the files are measured by."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch

# torch warns of every optional package it does without
logging.getLogger("torch.onnx").setLevel(logging.ERROR)
# pytest would collect thousands of lines of its tracing
logging.getLogger("torch.__trace").disabled = True

if TYPE_CHECKING:
    from pathlib import Path


FLOATS = {
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.DOUBLE,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
}


def export(net, network, path, exporter="dynamo", dynamic="static"):
    """Write a module to `path`.

    Args:
        net: the module, built from `network`.
        network: its entry in the zoo, for the inputs.
        path: the file.
        exporter: "dynamo" (opset 20), "dynamo18", "dynamo23" or "torchscript" (opset 17).
        dynamic: "static", "batch" or "all" (batch and sequence).
    """
    free = {"static": set(), "batch": {"batch"}, "all": {"batch", "sequence"}}[dynamic] & network.symbols()
    shapes = {
        name: {axis: d for axis, d in enumerate(shape) if d in free}
        for name, (shape, _) in network.inputs.items()
    }
    names, inputs = list(network.inputs), network.draw()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "torchscript":
            torch.backends.mha.set_fastpath_enabled(False)
            torch.onnx.export(
                net, inputs, str(path), input_names=names, dynamic_axes=shapes, opset_version=17, dynamo=False
            )
        else:
            sizes = {d: torch.export.Dim(d, min=1, max=64) for d in free}
            dims = tuple({a: sizes[d] for a, d in s.items()} for s in shapes.values())
            torch.onnx.export(
                net,
                inputs,
                str(path),
                input_names=names,
                dynamic_shapes=dims if free else None,
                opset_version=int(exporter.removeprefix("dynamo") or 20),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    return path


def weight_elements(path: Path) -> int:
    """Elements in all floating-point initializers and constants, single numbers and fills aside.

    Single numbers (an epsilon, an attention's scale) are one exporter's initializers, another's constants. A
    constant node of one repeated number (the first state of a recurrence) is a fill, not a weight.
    """
    graph = onnx.load(path).graph
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            found = [a.t for a in node.attribute if a.name == "value" and a.t.data_type in FLOATS]
            tensors += [t for t in found if len(np.unique(onnx.numpy_helper.to_array(t))) > 1]
    sizes = [int(np.prod(t.dims)) for t in tensors if t.data_type in FLOATS]
    return sum(size for size in sizes if size > 1)
