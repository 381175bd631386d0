"""Einsum of two computed tensors with any number of letters in each role, with exact counts."""

from __future__ import annotations

import numpy as np
import pytest
from test_surgery_regressions import Net, gained, shrunk


def projected(equation, *, sizes=(6, 6), read=(), shape=(2, 3, 2, 4), dead=((1, 4), (0,))):
    """Return two projections of an image with channels last, multiplied as an equation says.

    Args:
        equation: of both projections.
        sizes: how many channels each has.
        read: the shape of a matrix that reads the last axis of the product, empty for none.
        shape: of the image.
        dead: which channels of each projection are zero.
    """
    net = Net(x=shape)
    for name, size, gone in zip("pq", sizes, dead, strict=True):
        net.node("MatMul", ["x", net.rand(4, size, dead=gone, axis=1)], name)
    net.node("Einsum", ["p", "q"], "e", equation=equation)
    if read:
        net.node("MatMul", ["e", net.rand(*read)], "z")
    return net.case("z" if read else "e")


@pytest.mark.parametrize("shape", [(2, 3, 2, 4), ("N", "H", "W", 4)], ids=["static", "dynamic"])
def test_two_letters_are_contracted(shape):
    """Channels of a product over height and width: one of q is zero and leaves the matrix that reads them."""
    case = projected("bhwc,bhwd->bcd", sizes=(6, 5), read=(5, 2), shape=shape)
    # the six rows are the output's, so that p stays whole
    assert gained(case) == (24 + 20 + 10, 24 + 16 + 8)


def test_channels_are_contracted_with_space():
    """Channels that either has none of go on both sides: 0, 1 and 4 of six."""
    assert gained(projected("bhwc,bhwc->b")) == (48, 24)
    assert gained(projected("bhwc,bhwc->bw")) == (48, 24)
    assert gained(projected("bhwc,bhwc->bhw")) == (48, 24)


def test_heads_are_contracted():
    """A dead head of both goes with its channels."""
    net = Net(x=(2, 5, 6))
    for name in "qk":
        net.node("Einsum", ["x", net.rand(6, 3, 4, dead=(1,), axis=1)], name, equation="btc,chd->bthd")
    net.node("Einsum", ["q", "k"], "y", equation="bqhd,bkhd->bqk")
    assert gained(net.case("y")) == (144, 96)


def test_several_letters_of_one_operand():
    """Scores of all places for all places of another tensor, as with relative positions."""
    assert gained(projected("bhwc,bklc->bhwkl")) == (48, 24)


def test_two_sizes_that_are_open():
    """Negative control: no Reshape says how two open sizes fall apart again, and the equation is left as it is."""
    case = projected("bhwc,bklc->bhwkl", shape=("N", "H", "W", 4))
    assert gained(case) == (48, 48)
    assert "Einsum" in {node.op_type for node in shrunk(case.model).graph.node}


def test_linear_attention():
    """Keys and values first, summed over all tokens and no head: channels of the keys and of the values go apart."""
    net = Net(x=(2, "S", 8))
    for name, gone in (("q", ()), ("k", (1,)), ("v", (0, 2))):
        net.node("MatMul", ["x", net.rand(8, 2, 4, dead=gone, axis=2).reshape(8, 8)], f"{name}0")
        net.node("Reshape", [f"{name}0", np.array([2, -1, 2, 4])], name)
    net.node("Einsum", ["k", "v"], "m", equation="bnhd,bnhm->bhmd")
    net.node("Einsum", ["q", "m"], "o", equation="bnhd,bhmd->bnhm")
    net.node("Reshape", ["o", np.array([2, -1, 8])], "r")
    net.node("MatMul", ["r", net.rand(8, 3)], "z")
    assert gained(net.case("z")) == (192 + 24, 8 * 6 + 8 * 6 + 8 * 4 + 12)
