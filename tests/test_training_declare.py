"""Declared modules: what a dead one zeroes, and that the surgery removes it where it can be exported."""

import pytest
import torch
from torch import nn

from etp_deploy.errors import ModelError
from etp_deploy.training import TorqueRegularizer, removable_share
from etp_deploy.training.declare import (
    embedding_columns,
    gated_neurons,
    graph_heads,
    head_dimensions,
    key_value_groups,
    recurrent_units,
    transposed_filters,
    transposed_heads,
)


def zeroed(model, group, modules):
    """Kill modules of a group in a network of ones and return, by parameter, which weights are zero."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0)
    TorqueRegularizer(model, groups=[group]).kill(group.name, modules)
    return {name: weight.detach() == 0 for name, weight in model.named_parameters()}


def rows(shape, indices, axis=0):
    """A mask that is True at indices of an axis."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.index_fill_(axis, torch.tensor(indices), True)
    return mask


def test_gated_neurons():
    """A row of both gates and a column."""
    model = nn.ModuleDict({"gate": nn.Linear(3, 4), "up": nn.Linear(3, 4), "down": nn.Linear(4, 3)})
    zero = zeroed(model, gated_neurons("mlp", ["gate", "up"], "down"), [1, 3])
    assert torch.equal(zero["gate.weight"], rows((4, 3), [1, 3]))
    assert torch.equal(zero["up.weight"], rows((4, 3), [1, 3]))
    assert torch.equal(zero["down.weight"], rows((3, 4), [1, 3], 1))
    assert not zero["up.bias"].any()


def test_key_value_groups():
    """A key and a value head with all of its queries."""
    model = nn.ModuleDict(
        {"q": nn.Linear(5, 12), "k": nn.Linear(5, 4), "v": nn.Linear(5, 4), "o": nn.Linear(12, 5)}
    )
    group = key_value_groups("attention", ["q", "k", "v"], "o", groups=2, queries=3, head_dim=2)
    zero = zeroed(model, group, [1])
    assert torch.equal(zero["q.weight"], rows((12, 5), [6, 7, 8, 9, 10, 11]))
    assert torch.equal(zero["k.weight"], rows((4, 5), [2, 3]))
    assert torch.equal(zero["v.weight"], rows((4, 5), [2, 3]))
    assert torch.equal(zero["o.weight"], rows((5, 12), [6, 7, 8, 9, 10, 11], 1))
    with pytest.raises(ModelError):
        key_value_groups("attention", ["q", "k"], "o", groups=2, queries=3, head_dim=2)


def test_transposed_heads():
    """Columns of a packed weight of shape (in, out), rows of the output."""
    model = nn.ModuleDict({"qkv": nn.Linear(12, 5), "out": nn.Linear(5, 4)})
    zero = zeroed(model, transposed_heads("attention", "qkv", "out", heads=2, head_dim=2), [0])
    assert torch.equal(zero["qkv.weight"], rows((5, 12), [0, 1, 4, 5, 8, 9], 1))
    assert torch.equal(zero["out.weight"], rows((4, 5), [0, 1]))


def test_head_dimensions():
    """The same dimension of every head."""
    model = nn.ModuleDict({"v": nn.Linear(5, 6), "out": nn.Linear(6, 5)})
    zero = zeroed(model, head_dimensions("dims", "v", "out", heads=2, head_dim=3), [2])
    assert torch.equal(zero["v.weight"], rows((6, 5), [2, 5]))
    assert torch.equal(zero["out.weight"], rows((5, 6), [2, 5], 1))


def test_graph_heads():
    """Rows of the projection and the attention vectors of the head."""
    model = nn.ModuleDict({"lin": nn.Linear(4, 6, bias=False)})
    model.source = nn.Parameter(torch.ones(1, 3, 2))
    zero = zeroed(model, graph_heads("gat", "lin", [("source", 1)], heads=3, channels=2), [1])
    assert torch.equal(zero["lin.weight"], rows((6, 4), [2, 3]))
    assert torch.equal(zero["source"], rows((1, 3, 2), [1], 1))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_units(bidirectional):
    """Gate rows, biases, the recurrence's column and the next layer's, in both directions."""
    model = nn.ModuleDict({"net": nn.LSTM(3, 4, num_layers=2, bidirectional=bidirectional)})
    zero = zeroed(model, recurrent_units("units", model, "net"), [1])
    gates = [1, 5, 9, 13]
    for suffix in ("", "_reverse") if bidirectional else ("",):
        assert torch.equal(zero[f"net.weight_ih_l0{suffix}"], rows((16, 3), gates))
        assert torch.equal(zero[f"net.weight_hh_l0{suffix}"], rows((16, 4), gates) | rows((16, 4), [1], 1))
        assert torch.equal(zero[f"net.bias_ih_l0{suffix}"], rows((16,), gates))
        width = 8 if bidirectional else 4
        assert torch.equal(
            zero[f"net.weight_ih_l1{suffix}"], rows((16, width), [1, 5] if bidirectional else [1], 1)
        )
        assert not zero[f"net.weight_hh_l1{suffix}"].any()
    with pytest.raises(ModelError):
        recurrent_units("units", model, "net", 2)


class Sequence(nn.Module):
    """Two recurrent layers and a classifier of the last step."""

    def __init__(self, cell):
        super().__init__()
        self.net = cell(3, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        """Scores of a series, shape (N, T, 3)."""
        return self.head(self.net(x)[0][:, -1])


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_dead_units_are_removed(cell):
    """What the declaration zeroes the surgery removes, all of it."""
    model = Sequence(cell)
    regularizer = TorqueRegularizer(model, groups=[recurrent_units("units", model, "net")])
    regularizer.kill("units", [0, 4])
    assert removable_share(model, torch.randn(2, 5, 3)) == 1.0
    assert regularizer.dead()["units"].tolist() == [True, False, False, False, True, False]


def test_embedding_columns():
    """A column of all tables with the readers' columns; zero in one of two tables is not dead."""
    model = nn.ModuleDict({"word": nn.Embedding(7, 4), "place": nn.Embedding(5, 4), "read": nn.Linear(4, 3)})
    group = embedding_columns("width", ["word", "place"], ["read"])
    zero = zeroed(model, group, [2])
    assert torch.equal(zero["word.weight"], rows((7, 4), [2], 1))
    assert torch.equal(zero["place.weight"], rows((5, 4), [2], 1))
    assert torch.equal(zero["read.weight"], rows((3, 4), [2], 1))
    with torch.no_grad():
        model["word"].weight[:, 0] = 0
        model["read"].weight[:, 1] = 0
    assert TorqueRegularizer(model, groups=[group]).dead()["width"].tolist() == [False, True, True, False]


def test_transposed_filters_of_all_groups():
    """The same filter of every group."""
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 6, 2, groups=2)})
    zero = zeroed(model, transposed_filters("up", "up"), [1])
    assert torch.equal(zero["up.weight"], rows((4, 3, 2, 2), [1], 1))
