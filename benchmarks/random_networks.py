"""Small torch networks of several families, with random sizes and planted dead structure.

What is planted: whole weights that are zero, which leaves a tensor with nothing alive in it, and scattered output and
input channels whose weights are zero. Biases and normalisations live on, so that what is dead is constant, not zero.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - as everybody calls it
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from graphs import Chooser

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU)
ALL_DEAD, SOME_OUTPUTS_DEAD, SOME_INPUTS_DEAD = 0.12, 0.3, 0.12


class Convolution(nn.Module):
    """A convolution, perhaps normalised, with an activation."""

    def __init__(
        self, choose: Chooser, inside: int, outside: int, *, kernel: int = 3, groups: int = 1
    ) -> None:
        super().__init__()
        bias = choose.chance(0.5)
        self.conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(outside) if choose.chance(0.5) else nn.Identity()
        self.act = choose.one_of(ACTIVATIONS)()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        return self.act(self.norm(self.conv(x)))


class UNet(nn.Module):
    """Convolutions down and up again, with skips; up by interpolation or by transposed convolutions."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        widths = [choose.integer(2, 9) for _ in range(choose.integer(2, 4))]
        self.how = choose.one_of(("nearest", "bilinear", "transposed"))
        self.joined = choose.chance(0.6)
        self.stem = Convolution(choose, 3, widths[0])
        pairs = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(Convolution(choose, a, b) for a, b in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) if self.how == "transposed" else Convolution(choose, b, a)
            for a, b in reversed(pairs)
        )
        self.merge = nn.ModuleList(
            Convolution(choose, 2 * a if self.joined else a, a) for a, _ in reversed(pairs)
        )
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.stem(x)
        skips = []
        for block in self.down:
            skips.append(x)
            x = block(F.max_pool2d(x, 2))
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = x if self.how == "transposed" else F.interpolate(x, scale_factor=2, mode=self.how)
            x = up(x)
            x = merge(torch.cat([x, skip], 1) if self.joined else x + skip)
        return self.head(x)


class Upscaler(nn.Module):
    """Grouped convolutions and grouped transposed ones, perhaps a shuffle of subpixels."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        groups, per = choose.one_of((1, 2, 3)), choose.integer(1, 4)
        width, wide = groups * per, groups * choose.integer(1, 4)
        self.first = Convolution(choose, 3, width)
        self.grouped = Convolution(choose, width, width, groups=groups)
        self.up = nn.ConvTranspose2d(width, wide, 3, stride=2, groups=groups, bias=choose.chance(0.7))
        self.norm = nn.BatchNorm2d(wide) if choose.chance(0.5) else nn.Identity()
        self.act = choose.one_of(ACTIVATIONS)()
        self.deep = Convolution(choose, wide, 4 * choose.integer(1, 3))
        self.shuffle = nn.PixelShuffle(2) if choose.chance(0.5) else nn.Identity()
        deep = self.deep.conv.out_channels
        self.last = nn.Conv2d(deep if isinstance(self.shuffle, nn.Identity) else deep // 4, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.act(self.norm(self.up(self.grouped(self.first(x)))))
        return self.last(self.shuffle(self.deep(x)))


class Perceptron(nn.Module):
    """Two linear layers, perhaps gated."""

    def __init__(self, choose: Chooser, width: int, outside: int | None = None) -> None:
        super().__init__()
        hidden = choose.integer(3, 10)
        self.gated = choose.chance(0.3)
        self.up = nn.Linear(width, 2 * hidden if self.gated else hidden, bias=choose.chance(0.8))
        self.act = choose.one_of(ACTIVATIONS)()
        self.down = nn.Linear(hidden, outside or width, bias=choose.chance(0.8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block."""
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            return self.down(self.act(gate) * x)
        return self.down(self.act(x))


class Mixer(nn.Module):
    """Patches mixed along tokens and along channels."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        width, tokens = choose.integer(3, 8), 16
        self.embed = nn.Conv2d(3, width, 2, stride=2)
        count = choose.integer(1, 2)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * count))
        self.mixes = nn.ModuleList(Perceptron(choose, tokens) for _ in range(count))
        self.moves = nn.ModuleList(Perceptron(choose, width) for _ in range(count))
        self.residual = choose.chance(0.7)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.embed(x).flatten(2).transpose(1, 2)
        for at, (mix, move) in enumerate(zip(self.mixes, self.moves, strict=True)):
            y = mix(self.norms[2 * at](x).transpose(1, 2)).transpose(1, 2)
            x = x + y if self.residual else y
            y = move(self.norms[2 * at + 1](x))
            x = x + y if self.residual else y
        return self.head(x.mean(1))


class Recurrent(nn.Module):
    """A convolution along time, then recurrent networks in one or both directions."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        width = choose.integer(3, 8)
        self.first = nn.Conv1d(3, width, 3, padding=choose.one_of((0, 1)))
        self.act = choose.one_of(ACTIVATIONS)()
        kinds = (nn.GRU, nn.LSTM, nn.GRU, nn.LSTM, nn.RNN)
        self.layers = nn.ModuleList()
        for _ in range(choose.integer(1, 3)):
            both, units = choose.chance(0.4), choose.integer(2, 6)
            kind = choose.one_of(kinds)
            self.layers.append(kind(width, units, batch_first=True, bidirectional=both))
            width = units * (2 if both else 1)
        self.last = choose.chance(0.5)
        self.head = Perceptron(choose, width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.act(self.first(x)).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)[0]
        return self.head(x[:, -1] if self.last else x)


class SqueezeExcite(nn.Module):
    """Inverted bottlenecks whose channels are weighted by what they hold on average."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        width = choose.integer(3, 8)
        self.stem = Convolution(choose, 3, width)
        self.blocks = nn.ModuleList()
        for _ in range(choose.integer(1, 3)):
            wide, thin = width * choose.integer(1, 2), choose.integer(1, 4)
            block = nn.ModuleDict({
                "expand": Convolution(choose, width, wide, kernel=1),
                "depthwise": Convolution(choose, wide, wide, groups=wide),
                "squeeze": nn.Conv2d(wide, thin, 1),
                "excite": nn.Conv2d(thin, wide, 1),
                "project": nn.Conv2d(wide, width, 1, bias=choose.chance(0.5)),
                "norm": nn.BatchNorm2d(width) if choose.chance(0.5) else nn.Identity(),
            })  # fmt: skip
            self.blocks.append(block)
        self.residual = choose.chance(0.7)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.stem(x)
        for block in self.blocks:
            y = block["depthwise"](block["expand"](x))
            y = y * torch.sigmoid(block["excite"](F.relu(block["squeeze"](F.adaptive_avg_pool2d(y, 1)))))
            y = block["norm"](block["project"](y))
            x = x + y if self.residual else y
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Attention whose queries share keys and values; the softmax written out or not."""

    def __init__(self, choose: Chooser, width: int, *, shared: bool = True) -> None:
        super().__init__()
        self.size = choose.integer(1, 4)
        self.kv = choose.integer(1, 3)
        self.per = choose.integer(1, 3) if shared else 1
        heads = self.kv * self.per
        self.query = nn.Linear(width, heads * self.size, bias=choose.chance(0.7))
        self.key = nn.Linear(width, self.kv * self.size, bias=choose.chance(0.7))
        self.value = nn.Linear(width, self.kv * self.size, bias=choose.chance(0.7))
        self.out = nn.Linear(heads * self.size, width)
        self.fused = choose.chance(0.4)

    def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, as (batch, head, position, size)."""
        key, value = (
            part(x).view(x.shape[0], x.shape[1], self.kv, self.size).transpose(1, 2)
            for part in (self.key, self.value)
        )
        if self.per > 1:
            key, value = (part.repeat_interleave(self.per, dim=1) for part in (key, value))
        return key, value

    def attend(self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Run the attention on keys and values that are given."""
        query = self.query(x).view(x.shape[0], x.shape[1], self.kv * self.per, self.size).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(query, key, value)
        else:
            y = torch.softmax(query @ key.transpose(-1, -2) / self.size**0.5, -1) @ value
        return self.out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the attention."""
        return self.attend(x, *self.both(x))


class SharedKeys(nn.Module):
    """Transformer blocks; some read the keys and values of the first."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        width = choose.integer(3, 8)
        self.embed = nn.Linear(5, width)
        first = Attention(choose, width)
        self.attentions = nn.ModuleList([first])
        for _ in range(choose.integer(0, 2)):
            other = Attention(choose, width)
            other.size, other.kv, other.per = first.size, first.kv, first.per
            other.query = nn.Linear(width, first.kv * first.per * first.size)
            other.key = other.value = nn.Identity()
            other.out = nn.Linear(first.kv * first.per * first.size, width)
            self.attentions.append(other)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(len(self.attentions)))
        self.forwards = nn.ModuleList(Perceptron(choose, width) for _ in self.attentions)
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.embed(x)
        key, value = self.attentions[0].both(x)
        for attention, norm, forward in zip(self.attentions, self.norms, self.forwards, strict=True):
            x = x + attention.attend(norm(x), key, value)
            x = x + forward(x)
        return self.head(x)


class Windowed(nn.Module):
    """Attention within windows of a map, shifted in every second block."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        self.heads, self.size = choose.integer(1, 3), choose.integer(1, 3)
        width = choose.one_of((self.heads * self.size, choose.integer(3, 8)))
        self.embed = nn.Conv2d(3, width, 1)
        count = choose.integer(1, 2)
        inner = self.heads * self.size
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(count))
        self.packed = nn.ModuleList(nn.Linear(width, 3 * inner) for _ in range(count))
        self.out = nn.ModuleList(nn.Linear(inner, width) for _ in range(count))
        self.bias = nn.ParameterList(torch.randn(self.heads, 4, 4) for _ in range(count))
        self.forwards = nn.ModuleList(Perceptron(choose, width) for _ in range(count))
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.embed(x).permute(0, 2, 3, 1)
        for at, norm in enumerate(self.norms):
            y = torch.roll(norm(x), (-1, -1), (1, 2)) if at else norm(x)
            y = self._attended(y, at)
            x = x + (torch.roll(y, (1, 1), (1, 2)) if at else y)
            x = x + self.forwards[at](x)
        return self.head(x.mean((1, 2)))

    def _attended(self, x: torch.Tensor, at: int) -> torch.Tensor:
        rows, columns, width = x.shape[1:]
        x = x.view(-1, rows // 2, 2, columns // 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, width)
        packed = self.packed[at](x).view(-1, 4, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        scores = packed[0] @ packed[1].transpose(-1, -2) + self.bias[at]
        y = (torch.softmax(scores, -1) @ packed[2]).transpose(1, 2).reshape(-1, 4, self.heads * self.size)
        y = self.out[at](y).view(-1, rows // 2, columns // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        return y.reshape(-1, rows, columns, width)


class Einsums(nn.Module):
    """Projections into heads and experts, written as equations."""

    def __init__(self, choose: Chooser) -> None:
        super().__init__()
        width, heads, size = choose.integer(3, 7), choose.integer(1, 3), choose.integer(1, 4)
        self.embed = nn.Linear(5, width)
        self.query, self.key, self.value = (nn.Parameter(torch.randn(width, heads, size)) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, size, width))
        self.experts = choose.integer(1, 3)
        hidden = choose.integer(2, 6)
        self.gate = nn.Linear(width, self.experts)
        self.up = nn.Parameter(torch.randn(self.experts, width, hidden))
        self.shift = nn.Parameter(torch.randn(self.experts, hidden))
        self.down = nn.Parameter(torch.randn(self.experts, hidden, width))
        self.act = choose.one_of(ACTIVATIONS)()
        self.head = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network."""
        x = self.embed(x)
        query, key, value = (
            torch.einsum("bsd,dhk->bshk", x, weight) for weight in (self.query, self.key, self.value)
        )
        scores = torch.softmax(torch.einsum("bqhk,bshk->bhqs", query, key), -1)
        x = x + torch.einsum("bshk,hkd->bsd", torch.einsum("bhqs,bshk->bqhk", scores, value), self.out)
        hidden = self.act(torch.einsum("bsd,edf->bsef", x, self.up) + self.shift)
        y = torch.einsum("bsef,efd->bsed", hidden, self.down)
        x = x + (torch.softmax(self.gate(x), -1)[..., None] * y).sum(2)
        return self.head(x)


IMAGE, SERIES, TOKENS = (2, 3, 8, 8), (2, 3, 9), (2, 6, 5)
FAMILIES: dict[str, tuple[Callable[[Chooser], nn.Module], tuple[int, ...]]] = {
    "U-Net": (UNet, IMAGE),
    "upscaler": (Upscaler, IMAGE),
    "mixer": (Mixer, IMAGE),
    "recurrent": (Recurrent, SERIES),
    "squeeze and excite": (SqueezeExcite, IMAGE),
    "shared keys": (SharedKeys, TOKENS),
    "windowed": (Windowed, IMAGE),
    "einsum": (Einsums, TOKENS),
}


def network(family: str, choose: Chooser, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """Return a network of a family with planted dead structure, and inputs for it."""
    torch.manual_seed(seed)
    kind, shape = FAMILIES[family]
    net = kind(choose).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 2)
                module.bias.normal_()
        for weight, axes in weights(net):
            _plant(weight, axes, random)
    return net, {"x": torch.randn(shape)}


def weights(net: nn.Module) -> Iterator[tuple[torch.Tensor, tuple[int, int]]]:
    """Yield a network's weights, each with its axes of output and input channels."""
    own = {id(parameter) for parameter in net.parameters(recurse=False)}
    for module in net.modules():
        turned = isinstance(module, nn.ConvTranspose2d)
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) or parameter.ndim < 2:
                continue
            axes = (parameter.ndim - 1, parameter.ndim - 2) if id(parameter) in own else (0, 1)
            yield parameter, (axes[1], axes[0]) if turned else axes


def _plant(weight: torch.Tensor, axes: tuple[int, int], random: np.random.Generator) -> None:
    if random.random() < ALL_DEAD:
        weight.zero_()
    for axis, share in zip(axes, (SOME_OUTPUTS_DEAD, SOME_INPUTS_DEAD), strict=True):
        if random.random() < share:
            dead = np.flatnonzero(random.random(weight.shape[axis]) < random.choice((0.3, 0.6, 0.9)))
            weight.index_fill_(axis, torch.from_numpy(dead), 0)
