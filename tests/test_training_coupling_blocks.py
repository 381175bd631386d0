"""Groups of blocks beside the zoo's: squeeze and excitation, skips that are joined, tied embeddings, gated units.

Each network is built from a divisor of its widths: half of every group, zeroed, has to leave the network of half
the widths.
"""

import pytest
import torch
from torch import nn
from zoo.export import weight_elements

import etp_deploy as etp
from etp_deploy.pipeline import compress
from etp_deploy.training import Blueprint, TorqueRegularizer, coupled_groups


def convolution(inputs, outputs):
    """A convolution with BatchNorm."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))


class Excitation(nn.Module):
    """A residual block whose branch is weighed channel by channel, by what a bottleneck makes of its means."""

    def __init__(self, by):
        super().__init__()
        width, inner, squeezed = 12 // by, 10 // by, 6 // by
        self.stem = convolution(3, width)
        self.one, self.two = convolution(width, inner), convolution(inner, width)
        self.squeeze, self.excite = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        """Scores of images x, shape (N, 3, H, W)."""
        x = torch.relu(self.stem(x))
        branch = self.two(torch.relu(self.one(x)))
        weights = torch.sigmoid(self.excite(torch.relu(self.squeeze(branch.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(x + branch * weights).mean((2, 3)))


class Skips(nn.Module):
    """An encoder and a decoder that reads the encoder's maps beside its own."""

    def __init__(self, by):
        super().__init__()
        self.down, self.deep = convolution(1, 8 // by), convolution(8 // by, 16 // by)
        self.up = nn.ConvTranspose2d(16 // by, 6 // by, 2, 2)
        self.join, self.head = convolution(14 // by, 10 // by), nn.Conv2d(10 // by, 2, 1)

    def forward(self, x):
        """Maps of images x, shape (N, 1, H, W)."""
        skip = torch.relu(self.down(x))
        deep = torch.relu(self.deep(nn.functional.max_pool2d(skip, 2)))
        return self.head(torch.relu(self.join(torch.cat([self.up(deep), skip], 1))))


class Tied(nn.Module):
    """A transformer block between an embedding and an output of the same weight."""

    def __init__(self, by):
        super().__init__()
        self.heads = 4 // by
        self.table, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.table.weight
        self.first, self.second, self.last = (nn.LayerNorm(16) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(16, 4 * self.heads) for _ in range(3))
        self.out = nn.Linear(4 * self.heads, 16)
        self.wide, self.narrow = nn.Linear(16, 24 // by), nn.Linear(24 // by, 16)

    def forward(self, x):
        """Scores of the next of tokens x, shape (N, T)."""
        x = self.table(x)
        y = self.first(x)
        query, key, value = (
            layer(y).reshape(*y.shape[:2], self.heads, 4).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = torch.softmax(query @ key.transpose(-1, -2) / 2, -1) @ value
        x = x + self.out(mixed.transpose(1, 2).reshape(*y.shape[:2], -1))
        return self.head(self.last(x + self.narrow(torch.relu(self.wide(self.second(x))))))


class Gated(nn.Module):
    """Two layers of gated recurrent units."""

    def __init__(self, by):
        super().__init__()
        self.units, self.head = nn.GRU(6, 10 // by, 2, batch_first=True), nn.Linear(10 // by, 4)

    def forward(self, x):
        """Scores at each time of x, shape (N, T, 6)."""
        return self.head(self.units(x)[0])


def drawn(net):
    """Return a network to export whose norms and biases do not start at what hides a mistake.

    Exporters write equal constants, such as two biases of zeros, only once.
    """
    with torch.no_grad():
        for weight in net.parameters():
            weight.uniform_(0.1, 0.5).mul_(torch.randn_like(weight).sign())
    return net.eval()


IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
# the network, an input, and its groups as (name, kind, modules)
BLOCKS = {
    "excitation": (
        Excitation,
        IMAGE,
        [("stem.0", "channels", 12), ("one.0", "channels", 10), ("squeeze", "channels", 6)],
    ),
    "skips": (
        Skips,
        IMAGE[:, :1],
        [
            ("down.0", "channels", 8),
            ("deep.0", "channels", 16),
            ("up", "channels", 6),
            ("join.0", "channels", 10),
        ],
    ),
    "tied": (Tied, torch.arange(7).reshape(1, 7), [("query", "heads", 4), ("wide", "neurons", 24)]),
    "gated": (
        Gated,
        IMAGE[:, 0, :5, :6],
        [("units.weight_ih_l0", "units", 10), ("units.weight_ih_l1", "units", 10)],
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_all_that_is_zeroed_is_removed(name, tmp_path):
    """Every second module of each group, zeroed, leaves the network of half the widths, with equal outputs."""
    build, example, wanted = BLOCKS[name]
    torch.manual_seed(0)
    net, native = drawn(build(1)), drawn(build(2))
    plan = Blueprint(net, example)
    groups = coupled_groups(net, None, blueprint=plan)
    assert [(group.name, group.kind, group.count(net)) for group in groups] == wanted
    regularizer = TorqueRegularizer(net, groups=groups)
    for group in groups:
        regularizer.kill(group.name, range(0, group.count(net), 2))
    zero = plan.zeros_of(net)
    assert plan.price(zero).parameters == plan.total - zero.sum()
    assert plan.price(zero).parameters == sum(weight.numel() for weight in native.parameters())
    files = [tmp_path / f"{which}.onnx" for which in ("full", "small", "native")]
    for module, file in ((net, files[0]), (native, files[2])):
        etp.export(module, example, file)
    compress(files[0], files[1], align="off", simplify=False)  # verifies the outputs
    assert weight_elements(files[1]) == weight_elements(files[2])
