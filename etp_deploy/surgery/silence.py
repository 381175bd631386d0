"""Channels that nothing reads need not read anything.

A tensor that lost all its channels is given one back. If nothing reads that channel, what it holds does not matter,
as long as it is a number: its weights are taken for zeros, so that it keeps nothing in front of it, and what was
in front can go as if the channel were not there.

This comes before anything is kept for a reason other than being read (equal counts, rows that must not be empty): what
is kept for such a reason reads nothing either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.statements.body import bodies
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.product import Product
from etp_deploy.surgery.statements.recurrent import Recurrent
from etp_deploy.surgery.statements.stacked import Stacked

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis

# operators that give finite numbers for whatever finite numbers they are given: what they make of another value
# than the original's cannot be a NaN, which no weight of zero would take away
_FINITE = frozenset((
    "Abs", "Add", "Atan", "AveragePool", "BatchNormalization", "Ceil", "Clip", "Concat", "Conv",
    "ConvTranspose", "Cos", "DepthToSpace", "Dropout", "Elu", "Erf", "Expand", "Flatten", "Floor", "Gather",
    "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "If",
    "LeakyRelu", "Loop", "MatMul", "Max", "MaxPool", "Mean", "Min", "Mul", "Neg", "PRelu", "Pad",
    "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "Resize", "Round", "Scan",
    "Selu", "Sigmoid", "Sign", "Sin", "Slice", "Softplus", "Softsign", "SpaceToDepth", "Split", "Squeeze",
    "Sub", "Sum", "Tanh", "ThresholdedRelu", "Tile", "Transpose", "Unsqueeze", "Where",
))  # fmt: skip


def silence(analysis: Analysis) -> bool:
    """Take for zeros, once, the weights of channels that nothing reads; say whether anything became known by that."""
    state = analysis.state
    if state.proved is not None or all(mask.any() or not mask.size for mask in state.keep.values()):
        return False
    state.proved = dict(state.constants)
    found = [
        says.silence(state)
        for says in analysis.statements.values()
        if isinstance(says, Contraction | Recurrent | Stacked)
        and all(_stays_finite(analysis, value) for value in _held(says))
    ]
    if not any(found):
        return False
    for says in analysis.statements.values():
        says.constants(state)
    state.touched.extend(value for value in state.keep if state.keep[value].any())
    return True


def _held(says: Contraction | Recurrent | Stacked) -> Sequence[ir.Value]:
    """Return what holds the channels that a node makes."""
    return says.node.outputs if isinstance(says, Recurrent) else (says.out,)


def _stays_finite(analysis: Analysis, value: ir.Value) -> bool:
    """Return whether all that is computed of a tensor is finite, up to the next contractions.

    What is multiplied by another computed tensor is left alone.
    """
    pending, seen = [value], {value}
    while pending:
        at = pending.pop()
        users = [user for user, _ in at.uses()]
        for node in (*users, *analysis.boundaries.get(at, ())):
            says = analysis.statements.get(node)
            if isinstance(says, Contraction | Recurrent | Stacked) and says.active and says.data is at:
                continue
            if node.op_type not in _FINITE or node.domain not in {"", "ai.onnx"} or isinstance(says, Product):
                return False
            for made in _made(node):
                if made not in seen:
                    seen.add(made)
                    pending.append(made)
    return True


def _made(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what may hold what a node is given: its outputs, and its bodies' inputs."""
    yield from node.outputs
    for body in bodies(node):
        yield from body.inputs
