"""onnxsim on a written model, in a process of its own, its result kept only if it is no worse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from etp_deploy.errors import EtpError
from etp_deploy.modelfile import keeps_weights_outside, read_model, write_model
from etp_deploy.sizes import constants
from etp_deploy.worker import Waiting

if TYPE_CHECKING:
    from pathlib import Path

# onnxsim copies all weights several times: of a model of this size and more it sees the graph without them
WEIGHTLESS_FROM_BYTES = 32 << 20
# an initializer that onnxsim may need for its structure (shapes, axes, scales) is smaller than this
LARGEST_SHOWN_BYTES = 1 << 16
TIMEOUT_S = 300.0


class Simplifier(Waiting):
    """onnxsim, imported in a child process while there is other work to do: the import takes seconds."""

    def __init__(self) -> None:
        super().__init__("etp_deploy.onnxsim_child:run", preload=("etp_deploy.onnxsim_child",))

    def simplified(self, path: Path) -> bool:
        """Simplify a model file in place if that removes nodes without adding weights; return whether it did."""
        candidate = path.with_name(f"{path.stem}.simplified.onnx")
        before = read_model(path)
        weights = _large_initializers(before)
        shown = path
        if weights:
            shown = path.with_name(f"{path.stem}.weightless.onnx")
            write_model(_without(before, weights), shown)
        try:
            self.call(str(shown), str(candidate), limits={"timeout_s": TIMEOUT_S})
            after = read_model(candidate)
        except EtpError:
            return False  # a simplifier that fails costs nothing but the simplification
        _put_back(after, weights)
        if not _better(before, after):
            return False
        after.metadata_props.clear()
        after.metadata_props.update(before.metadata_props)
        write_model(after, path, external_data=keeps_weights_outside(before))
        return True


def _large_initializers(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Return the tensors to hide from onnxsim: none of a small model, the large ones of a large one."""
    tensors = {
        str(value.name): value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    if sum(tensor.nbytes for tensor in tensors.values()) < WEIGHTLESS_FROM_BYTES:
        return {}
    return {name: tensor for name, tensor in tensors.items() if tensor.nbytes >= LARGEST_SHOWN_BYTES}


def _without(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> ir.Model:
    """Return a model in which some initializers are inputs instead."""
    model = model.clone()
    for name, tensor in weights.items():
        value = model.graph.initializers.pop(name)
        value.const_value = None
        value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
        model.graph.inputs.append(value)
    return model


def _put_back(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> None:
    """Make the inputs that stand for weights initializers again, in place; those that nothing reads go."""
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        if value.uses() or value.is_graph_output():
            value.const_value = weights[str(value.name)]
            model.graph.register_initializer(value)


def _better(before: ir.Model, after: ir.Model) -> bool:
    """No more nodes, no more weights, and fewer of one of them; the interface unchanged."""
    nodes = [sum(1 for _ in model.graph.all_nodes()) for model in (before, after)]
    weights = [sum(constants(model)) for model in (before, after)]
    interface = [
        [(value.name, value.type) for value in (*model.graph.inputs, *model.graph.outputs)]
        for model in (before, after)
    ]
    smaller = nodes[1] < nodes[0] or weights[1] < weights[0]
    return interface[0] == interface[1] and nodes[1] <= nodes[0] and weights[1] <= weights[0] and smaller
