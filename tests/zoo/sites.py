"""What can die in a network: sites, and the tensors that write and read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Widths = dict[str, int]


@dataclass(frozen=True)
class Slot:
    """The entries of a tensor axis that belong to a site's units: `offset + unit * block + range(block)`.

    `only` names the units that have entries in this tensor; None means all.
    """

    tensor: torch.Tensor
    axis: int = 0
    block: int = 1
    offset: int = 0
    only: range | None = None

    def zero(self, units: Iterable[int]) -> None:
        """Set the entries of these units to zero."""
        index = [
            self.offset + u * self.block + k for u in _within(units, self.only) for k in range(self.block)
        ]
        with torch.no_grad():
            self.tensor.index_fill_(self.axis, torch.tensor(index, dtype=torch.long), 0.0)


def _within(units: Iterable[int], only: range | None) -> list[int]:
    return [u for u in units if only is None or u in only]


@dataclass(frozen=True)
class Shift:
    """What stays alive beside zero weights: a bias, a BatchNormalization after it, or both."""

    bias: torch.Tensor | None = None
    norm: nn.modules.batchnorm._BatchNorm | None = None
    block: int = 1
    offset: int = 0
    only: range | None = None

    def zero(self, units: Iterable[int]) -> None:
        """Silence bias and normalisation, so that the units are exactly zero."""
        tensors = [self.bias] if self.bias is not None else []
        if self.norm is not None:
            tensors += [self.norm.weight, self.norm.bias]
        for tensor in tensors:
            Slot(tensor, 0, self.block, self.offset, self.only).zero(units)

    def lift(self, unit: int, sign: float = 1.0) -> None:
        """Make the constant that this unit becomes clearly positive (no activation hides it) or negative."""
        if not _within([unit], self.only):
            return
        with torch.no_grad():
            for k in range(self.block):
                i = self.offset + unit * self.block + k
                if self.norm is not None:
                    norm = self.norm
                    fed = 0.0 if self.bias is None else self.bias[i]
                    gain = norm.weight[i] / torch.sqrt(norm.running_var[i] + norm.eps)
                    norm.bias[i] = sign * (norm.bias[i].abs() + 0.3) - gain * (fed - norm.running_mean[i])
                elif self.bias is not None:
                    self.bias[i] = sign * (self.bias[i].abs() + 0.3)


@dataclass(frozen=True)
class Site:
    """One width of a network: `groups` times `width` units that can die.

    Args:
        key: the name of the width in the network's dictionary of widths.
        width: units in each group; a native network has this number and no other.
        kind: "inner", "stream" (residual), "head" or "neuron".
        writers: weights whose zeros make the units constant.
        shifts: what stays alive beside the writers.
        readers: weights whose zeros make the units unread.
        padded: names of the zero-padded (or phase dependent) convolutions that read the units: each needs one
            constant channel kept, a carrier, when the dead units are non-zero constants.
        groups: units die in equal numbers in each group, at places of the group's own.
    """

    key: str
    width: int
    kind: str
    writers: Sequence[Slot]
    shifts: Sequence[Shift] = ()
    readers: Sequence[Slot] = ()
    padded: Sequence[str] = ()
    groups: int = 1


def rows(*modules: nn.Module, block: int = 1, offset: int = 0) -> list[Slot]:
    """The output axis of convolutions and linear layers."""
    return [Slot(m.weight, 0, block, offset) for m in modules]


def columns(*modules: nn.Module, block: int = 1, offset: int = 0) -> list[Slot]:
    """The input axis of convolutions and linear layers."""
    return [Slot(m.weight, 1, block, offset) for m in modules]


def shift(layer: nn.Module, norm: nn.Module | None = None, block: int = 1, offset: int = 0) -> Shift:
    """The bias of a layer and the normalisation after it."""
    return Shift(layer.bias, norm, block, offset)


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights that keep activations of order one, and biases and statistics that are all non-trivial."""
    gen = torch.Generator().manual_seed(seed)

    def normal(t: torch.Tensor, std: float, mean: float = 0.0) -> None:
        t.copy_(torch.randn(t.shape, generator=gen) * std + mean)

    def uniform(t: torch.Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=gen) * (high - low) + low)

    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() >= 2:
                normal(p, (2.0 / max(1, p[0].numel())) ** 0.5)
            elif name.endswith("weight"):
                uniform(p, 0.5, 1.5)
            else:
                normal(p, 0.3)
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                normal(m.running_mean, 0.3)
                uniform(m.running_var, 0.5, 2.0)
            elif isinstance(m, nn.Embedding):
                normal(m.weight, 1.0)
    return net.eval()
