"""onnxsim on a written model, in a process of its own, its result kept only if it is no worse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.errors import EtpError
from etp_deploy.modelfile import read_model, write_model
from etp_deploy.sizes import constants
from etp_deploy.worker import isolated

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

# onnxsim copies all weights several times; a larger model is left as it is
LARGEST_BYTES = 1 << 30
TIMEOUT_S = 300.0


def simplified(path: Path) -> bool:
    """Simplify a model file in place if that removes nodes without adding weights; return whether it did."""
    if path.stat().st_size > LARGEST_BYTES or any(path.parent.glob(f"{path.name}*.data")):
        return False
    candidate = path.with_name(f"{path.stem}.simplified.onnx")
    try:
        isolated("etp_deploy.simplify:run_onnxsim", str(path), str(candidate), timeout_s=TIMEOUT_S)
        before, after = read_model(path), read_model(candidate)
    except EtpError:
        return False  # a simplifier that fails costs nothing but the simplification
    if not _better(before, after):
        return False
    after.metadata_props.clear()
    after.metadata_props.update(before.metadata_props)
    write_model(after, path)
    return True


def run_onnxsim(source: str, destination: str) -> None:
    """Run onnxsim from file to file; called in a process of its own."""
    import onnx  # noqa: PLC0415 - heavy, and only this child process needs them
    import onnxsim  # noqa: PLC0415

    model, _ = onnxsim.simplify(onnx.load(source))
    onnx.save(model, destination)


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
