"""Graph networks of torch_geometric: two convolutions each, the units between them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from networks.entries import Entry
from networks.sites import End, Site, neurons

if TYPE_CHECKING:
    from collections.abc import Callable

FEATURES, WIDTH, HEADS, SIZE, CLASSES = 12, 24, 4, 8, 5


class Two(nn.Module):
    """Two graph convolutions with an activation between."""

    def __init__(
        self, first: nn.Module, second: nn.Module, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.conv1, self.conv2, self.activation = first, second, activation

    def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """Run both."""
        out: torch.Tensor = self.conv2(self.activation(self.conv1(x, edges)), edges)
        return out


def _inputs() -> dict[str, torch.Tensor]:
    """Return a random graph in which every node has a neighbour."""
    random = torch.Generator().manual_seed(5)
    ring = torch.stack([torch.arange(10), torch.roll(torch.arange(10), 1)])
    more = torch.randint(0, 10, (2, 8), generator=random)
    edges = torch.cat([ring, ring.flip(0), more], 1)
    return {"x": torch.randn((10, FEATURES), generator=random), "edges": edges}


def _graph(
    name: str, site: Site, *, heads: bool = False, activation: Any = torch.relu, **settings: Any
) -> Entry:
    def build() -> nn.Module:
        from torch_geometric import nn as geometric  # noqa: PLC0415 - slow, and optional

        make = getattr(geometric, name)
        if heads:
            return Two(
                make(FEATURES, SIZE, heads=HEADS, **settings),
                make(HEADS * SIZE, CLASSES, **settings),
                activation,
            )
        return Two(make(FEATURES, WIDTH, **settings), make(WIDTH, CLASSES, **settings), activation)

    return Entry(build, _inputs, (site,), ("x.0=nodes", "edges.1=edges"), real=True)


def _gin() -> nn.Module:
    from torch_geometric.nn import GINConv  # noqa: PLC0415 - slow, and optional

    parts = [
        GINConv(nn.Sequential(nn.Linear(size, WIDTH), nn.ReLU(), nn.Linear(WIDTH, out)))
        for size, out in ((FEATURES, WIDTH), (WIDTH, CLASSES))
    ]
    return Two(*parts, torch.relu)


def _heads(
    written: tuple[str, ...], others: tuple[End, ...], read: tuple[str, ...], *, silent: bool = False
) -> Site:
    ends = (
        *(End(f"conv1.{name}", unit=SIZE, zero=(0,)) for name in written),
        *others,
        *(End(f"conv2.{name}", "in", unit=SIZE) for name in read),
    )
    return Site("head", ends, SIZE, silent=silent)


def _neurons(written: tuple[str, ...], read: tuple[str, ...], *others: str, silent: bool = False) -> Site:
    ends = (
        *(End(f"conv1.{name}", zero=(0,)) for name in written),
        *(End(f"conv1.{name}") for name in others),
        *(End(f"conv2.{name}", "in") for name in read),
    )
    return Site("neuron", ends, silent=silent)


ALL = ("lin_value", "lin_key", "lin_query", "lin_skip")
elu = nn.functional.elu

GRAPHS: dict[str, Entry] = {
    "GCN": _graph("GCNConv", _neurons(("lin",), ("lin",), "bias")),
    "GraphSAGE": _graph("SAGEConv", _neurons(("lin_l", "lin_r"), ("lin_l", "lin_r"), silent=True)),
    "GraphConv": _graph("GraphConv", _neurons(("lin_rel", "lin_root"), ("lin_rel", "lin_root"), silent=True)),
    "GIN": Entry(_gin, _inputs, (neurons("nn.0", down="nn.2"),), ("x.0=nodes", "edges.1=edges"), real=True),
    "GAT": _graph(
        "GATConv",
        _heads(
            ("lin",),
            (End("conv1.att_src", axis=1), End("conv1.att_dst", axis=1), End("conv1.bias", unit=SIZE)),
            ("lin",),
        ),
        heads=True,
        activation=elu,
    ),
    "GATv2": _graph(
        "GATv2Conv",
        _heads(
            ("lin_l",),
            (End("conv1.lin_r", unit=SIZE), End("conv1.att", axis=1), End("conv1.bias", unit=SIZE)),
            ("lin_l", "lin_r"),
            silent=True,
        ),
        heads=True,
        activation=elu,
    ),
    "TransformerConv": _graph(
        "TransformerConv",
        _heads(
            ("lin_value", "lin_skip"), tuple(End(f"conv1.{n}", unit=SIZE) for n in ALL[1:3]), ALL, silent=True
        ),
        heads=True,
    ),
    "ResGatedGraphConv": _graph(
        "ResGatedGraphConv",
        _neurons(("lin_value", "lin_skip"), ALL, "lin_key", "lin_query", "bias", silent=True),
    ),
}
