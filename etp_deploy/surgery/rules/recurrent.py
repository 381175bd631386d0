"""Recurrent layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, indices, weight
from etp_deploy.surgery.rules.common import attribute, constant_at, input_at
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.recurrent import Recurrent

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

# the default activations, all of which but the sigmoid gates map zero to zero
_ACTIVATIONS = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}


def _check(node: ir.Node) -> None:
    for index, what in ((1, "its weight is"), (2, "its recurrence weight is")):
        constant_at(node, index, what)
    for index, what in (
        (3, "its bias is"),
        (5, "its initial state is"),
        (6, "its initial cell is"),
        (7, "its peepholes are"),
    ):
        if input_at(node, index) is not None:
            constant_at(node, index, what)
    if attribute(node, "layout", 0):
        raise RefusedError("a batch-first recurrent layer")
    default = _ACTIVATIONS[node.op_type]
    given = [str(name).lower() for name in attribute(node, "activations", ())]
    wanted = [name.lower() for name in default] * (
        2 if attribute(node, "direction", "forward") == "bidirectional" else 1
    )
    relus = ["relu"] * len(wanted) if node.op_type == "RNN" else wanted
    if given and given not in (wanted, relus):
        raise RefusedError("activations other than the default ones")


@rule(
    "LSTM",
    examples=(
        example(computed(5, 2, 4), weight(1, 12, 4), weight(1, 12, 3), weight(1, 24), hidden_size=3),
        example(computed(5, 2, 4), weight(1, 12, 4), weight(1, 12, 3), hidden_size=3, outputs=3),
        example(
            computed(5, 2, 4),
            weight(2, 12, 4),
            weight(2, 12, 3),
            weight(2, 24),
            None,
            weight(2, 2, 3),
            weight(2, 2, 3),
            weight(2, 9),
            hidden_size=3,
            direction="bidirectional",
            outputs=2,
        ),
        example(
            computed(5, 2, 4),
            weight(2, 12, 4),
            weight(2, 12, 3),
            hidden_size=3,
            direction="bidirectional",
            activations=["Sigmoid", "Tanh", "Tanh"] * 2,
        ),
        example(
            computed(5, 2, 4),
            weight(1, 12, 4),
            weight(1, 12, 3),
            hidden_size=3,
            activations=["Relu", "Tanh", "Tanh"],
            removable=False,
        ),
        example(
            computed(5, 2, 4),
            weight(1, 12, 4),
            weight(1, 12, 3),
            None,
            None,
            computed(1, 2, 3),
            hidden_size=3,
            removable=False,
        ),
        example(
            computed(5, 2, 4),
            weight(1, 12, 4),
            weight(1, 12, 3),
            None,
            None,
            None,
            computed(1, 2, 3),
            hidden_size=3,
            removable=False,
        ),
        example(
            computed(5, 2, 4),
            weight(1, 12, 4),
            weight(1, 12, 3),
            None,
            None,
            None,
            None,
            computed(1, 9),
            hidden_size=3,
            removable=False,
        ),
        example(
            computed(2, 5, 4), weight(1, 12, 4), weight(1, 12, 3), hidden_size=3, layout=1, removable=False
        ),
    ),
)
def lstm(node: ir.Node) -> Statement:
    """c = f * c + i * tanh(w x + r h + b); h = o * tanh(c), gates in the order i, o, f, c"""
    _check(node)
    return Recurrent(node, gates=4, candidate=3)


@rule(
    "GRU",
    examples=(
        example(computed(5, 2, 4), weight(1, 9, 4), weight(1, 9, 3), weight(1, 18), hidden_size=3),
        example(
            computed(5, 2, 4),
            weight(1, 9, 4),
            weight(1, 9, 3),
            weight(1, 18),
            None,
            weight(1, 2, 3),
            hidden_size=3,
            linear_before_reset=1,
            direction="reverse",
            outputs=2,
        ),
        example(computed(5, 2, 4), computed(1, 9, 4), weight(1, 9, 3), hidden_size=3, removable=False),
        example(computed(5, 2, 4), weight(1, 9, 4), computed(1, 9, 3), hidden_size=3, removable=False),
        example(
            computed(5, 2, 4),
            weight(1, 9, 4),
            weight(1, 9, 3),
            computed(1, 18),
            hidden_size=3,
            removable=False,
        ),
    ),
)
def gru(node: ir.Node) -> Statement:
    """h = (1 - z) * tanh(w x + r h + b) + z * h, gates in the order z, r, h"""
    _check(node)
    return Recurrent(node, gates=3, candidate=2)


@rule(
    "RNN",
    examples=(
        example(computed(5, 2, 4), weight(1, 3, 4), weight(1, 3, 3), weight(1, 6), hidden_size=3),
        example(
            computed(5, 2, 4),
            weight(1, 3, 4),
            weight(1, 3, 3),
            weight(1, 6),
            indices(2, below=5, dtype="int32"),
            hidden_size=3,
            activations=["Relu"],
            outputs=2,
        ),
        example(
            computed(5, 2, 4),
            weight(1, 3, 4),
            weight(1, 3, 3),
            hidden_size=3,
            activations=["Sigmoid"],
            removable=False,
        ),
    ),
)
def rnn(node: ir.Node) -> Statement:
    """h = tanh(w x + r h + b)"""
    _check(node)
    return Recurrent(node, gates=1, candidate=0)
