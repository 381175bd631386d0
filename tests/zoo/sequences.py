"""Recurrent and graph networks."""

# ruff: noqa: D102  # the class says what `forward` computes, and `sites` are those of zoo.sites

from __future__ import annotations

import torch
from torch import nn

from zoo.sites import Shift, Site, Slot, Widths, columns


class Recurrent(nn.Module):
    """Two stacked LSTM or GRU layers and a classifier of the last step.

    A unit whose weights are zero while its biases live is not constant: it moves with time. Units die when
    all of them is zero, or unread.
    """

    def __init__(self, widths: Widths, cell: str = "LSTM") -> None:
        super().__init__()
        self.widths, self.gates = widths, {"LSTM": 4, "GRU": 3}[cell]
        make = getattr(nn, cell)
        self.first = make(12, widths["h0"], batch_first=True)
        self.second = make(widths["h0"], widths["h1"], batch_first=True)
        self.fc = nn.Linear(widths["h1"], 5)

    def forward(self, x):
        return self.fc(self.second(self.first(x)[0])[0][:, -1])

    def sites(self) -> list[Site]:
        found = []
        following = {"h0": self.second.weight_ih_l0, "h1": self.fc.weight}
        for key, layer in (("h0", self.first), ("h1", self.second)):
            size = layer.hidden_size
            offsets = [g * size for g in range(self.gates)]
            found.append(
                Site(
                    key,
                    size,
                    "neuron",
                    [Slot(w, 0, 1, o) for w in (layer.weight_ih_l0, layer.weight_hh_l0) for o in offsets],
                    [Shift(b, None, 1, o) for b in (layer.bias_ih_l0, layer.bias_hh_l0) for o in offsets],
                    [Slot(layer.weight_hh_l0, 1), Slot(following[key], 1)],
                )
            )
        return found


class GatLayer(nn.Module):
    """Graph attention: a softmax over the edges that end at each node."""

    def __init__(self, cin: int, heads: int, size: int, *, bias: bool) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.lin = nn.Linear(cin, heads * size, bias=bias)
        self.source = nn.Parameter(torch.zeros(1, heads, size))
        self.target = nn.Parameter(torch.zeros(1, heads, size))
        self.bias = nn.Parameter(torch.zeros(heads * size))

    def forward(self, x, source, target):
        nodes = x.shape[0]
        x = self.lin(x).view(nodes, self.heads, self.size)
        score = (x * self.source).sum(-1)[source] + (x * self.target).sum(-1)[target]
        score = torch.exp(nn.functional.leaky_relu(score, 0.2))
        total = x.new_zeros(nodes, self.heads).index_add(0, target, score)
        message = x[source] * (score / total[target]).unsqueeze(-1)
        out = torch.zeros_like(x).index_add(0, target, message)
        return out.reshape(nodes, self.heads * self.size) + self.bias


class Gat(nn.Module):
    """Two graph attentions, the first with many heads."""

    def __init__(self, widths: Widths, size: int = 8) -> None:
        super().__init__()
        self.widths, self.size = widths, size
        self.first = GatLayer(16, widths["heads0"], size, bias=False)
        self.second = GatLayer(widths["heads0"] * size, 1, 5, bias=True)

    def forward(self, x, edges):
        loops = torch.arange(x.shape[0])
        source, target = torch.cat([edges[0], loops]), torch.cat([edges[1], loops])
        return self.second(nn.functional.elu(self.first(x, source, target)), source, target)

    def sites(self) -> list[Site]:
        return [
            Site(
                "heads0",
                self.widths["heads0"],
                "head",
                [Slot(self.first.lin.weight, 0, self.size)],
                [Shift(self.first.bias, None, self.size)],
                columns(self.second.lin, block=self.size),
            )
        ]
