"""Constants of each row of an axis that a second product passes over, with exact counts."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained


def mixed(*between, weight=None, tokens=()):
    """Return a net that makes eight tokens of six, two of them zero, and then multiplies along the channels.

    Args:
        between: nodes between the two products, as (operator, further inputs).
        weight: the second product's, (4, 5) left out.
        tokens: which of the eight tokens the end does not read.
    """
    net = Net(x=("N", 6, 4))
    net.node("MatMul", [net.rand(8, 6, dead=(2, 5)), "x"], "last")
    for number, (operator, *inputs) in enumerate(
        (*between, ("MatMul", net.rand(4, 5) if weight is None else weight))
    ):
        net.node(operator, ["last" if number == 0 else f"b{number}", *inputs], f"b{number + 1}")
    net.node("MatMul", [net.rand(3, 8, dead=tokens, axis=1), f"b{len(between) + 1}"], "z")
    return net.case("z")


def test_zero_tokens_stay_zero_behind_a_product_along_channels():
    """Two of eight tokens leave both matrices that mix tokens; the matrix along the channels stays."""
    assert gained(mixed()) == (48 + 20 + 24, 36 + 20 + 18)


@pytest.mark.parametrize("offset", ["one", "each"])
def test_constant_tokens(offset):
    """A token that holds one number everywhere is known behind the product, and folded where that is one number too."""
    added = (
        np.full((8, 1), 0.5, np.float32) if offset == "one" else np.arange(32, dtype=np.float32).reshape(8, 4)
    )
    weight = np.random.default_rng(1).standard_normal((4, 1)).astype(np.float32) * np.ones((4, 5), np.float32)
    gone = 2 if offset == "one" else 0
    before, after = gained(mixed(("Add", added), weight=weight))
    assert before == 48 + added.size + 20 + 24
    assert after == (8 - gone) * 6 + (8 - gone) * added.shape[1] + 20 + 3 * (8 - gone) + (3 if gone else 0)


def test_tokens_that_the_product_makes_different_stay():
    """Negative control: a constant token becomes one constant a channel, which no bias of the next product holds."""
    added = np.full((8, 1), 0.5, np.float32)
    assert gained(mixed(("Add", added))) == (48 + 8 + 20 + 24,) * 2


def test_a_stack_passes_rows_of_constants():
    """The same through one matrix for each head, which passes over the tokens."""
    net = Net(x=(2, 6, 4))
    net.node("MatMul", [net.rand(8, 6, dead=(2, 5)), "x"], "t")
    net.node("Unsqueeze", ["t", np.array([1])], "u")
    net.node("MatMul", ["u", net.rand(3, 4, 5)], "h")
    net.node("MatMul", [net.rand(2, 8), "h"], "z")
    assert gained(net.case("z")) == (48 + 60 + 16, 36 + 60 + 12)


def test_zero_rows_meet_a_grouped_convolution_batch_by_batch():
    """Dead entries of the batch axis, made by a matrix, stay known behind a padded depthwise convolution."""
    net = Net(x=(6, 12))
    net.node("MatMul", [net.rand(8, 6, dead=(2, 5)), "x"], "t")
    net.node("Reshape", ["t", np.array([8, 3, 4])], "u")
    net.node("Conv", ["u", net.rand(3, 1, 3)], "c", group=3, pads=[1, 1])
    net.node("Reshape", ["c", np.array([8, 12])], "v")
    net.node("MatMul", [net.rand(2, 8), "v"], "z")
    assert gained(net.case("z")) == (48 + 9 + 16, 36 + 9 + 12)
