"""The demo's two networks, each declaring which of its modules can really be removed.

Both are built from sizes alone, so that the network left by pruning can be built natively at its smaller
size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from etp_deploy.errors import UsageError
from etp_deploy.training import Group, Part, neurons, separate_heads

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Shape of one example, without the batch.
IMAGE_SHAPE = (1, 8, 8)
CLASSES = 10


class ConvNet(nn.Module):
    """A VGG-style network: pairs of 3x3 convolutions with BatchNorm, a pooling after each pair but the last.

    Args:
        widths: filters of each convolution, an even number of them.
    """

    def __init__(self, widths: Sequence[int] = (32, 32, 64, 64, 128, 128)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.convolutions = nn.ModuleList()
        self.norms = nn.ModuleList()
        incoming = IMAGE_SHAPE[0]
        for width in self.widths:
            self.convolutions.append(nn.Conv2d(incoming, width, 3, padding=1))
            self.norms.append(nn.BatchNorm2d(width))
            incoming = width
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(incoming, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, 10), of images, shape (N, 1, 8, 8)."""
        x = images
        for index, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = functional.relu(norm(convolution(x)))
            if index % 2 and index + 1 < len(self.widths):
                x = self.pool(x)
        return cast("Tensor", self.classifier(x.mean((2, 3))))

    def groups(self) -> tuple[Group, ...]:
        """Return the filters of each convolution, each with its gain in the BatchNorm after it.

        A convolution in front of a BatchNorm is scale-free: only the gain says how large the channel is.
        Biases stay outside, so a dead channel is a constant, seldom zero.
        """
        return tuple(
            Group(
                f"convolutions.{index}",
                "channels",
                (Part(f"convolutions.{index}.weight"), Part(f"norms.{index}.weight")),
            )
            for index in range(len(self.widths))
        )

    def reduced(self, dead: Mapping[str, Tensor]) -> ConvNet:
        """Build the same architecture, with fresh weights, at the widths that remain, at least one each.

        Args:
            dead: by group, which modules are dead; as `TorqueRegularizer.dead` returns it.
        """
        return ConvNet([max(1, int((~dead[group.name]).sum())) for group in self.groups()])


class Attention(nn.Module):
    """Self-attention with separate projections, of inner width heads * head_dim.

    Args:
        width: channels in and out.
        heads: number of heads.
        head_dim: channels of a head.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        inner = heads * head_dim
        self.query = nn.Linear(width, inner)
        self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.output = nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens, shape (N, T, width), of tokens of the same shape."""
        batch, count, _ = tokens.shape
        query, key, value = (
            layer(tokens).reshape(batch, count, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.softmax(query @ key.transpose(2, 3) * self.head_dim**-0.5, dim=-1)
        mixed = (scores @ value).transpose(1, 2).reshape(batch, count, self.heads * self.head_dim)
        return cast("Tensor", self.output(mixed))


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: channels of the residual stream.
        heads: attention heads.
        head_dim: channels of a head.
        hidden: neurons of the multilayer perceptron.
    """

    def __init__(self, width: int, heads: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens, shape (N, T, width), of tokens of the same shape."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return cast("Tensor", tokens + self.fc2(functional.gelu(self.fc1(self.norm2(tokens)))))


class VisionTransformer(nn.Module):
    """A small vision transformer: 16 patches of 2x2, learned positions, mean over tokens.

    Args:
        heads: attention heads of each block.
        hidden: neurons of each block's multilayer perceptron.
        width: channels of the residual stream.
        head_dim: channels of a head.
    """

    def __init__(
        self,
        heads: Sequence[int] = (8, 8, 8),
        hidden: Sequence[int] = (256, 256, 256),
        *,
        width: int = 64,
        head_dim: int = 16,
    ) -> None:
        super().__init__()
        self.width, self.head_dim = width, head_dim
        self.heads, self.hidden = tuple(heads), tuple(hidden)
        self.patches = nn.Conv2d(IMAGE_SHAPE[0], width, 2, stride=2)
        count = (IMAGE_SHAPE[1] // 2) * (IMAGE_SHAPE[2] // 2)
        self.positions = nn.Parameter(torch.randn(1, count, width) * 0.5)
        self.blocks = nn.ModuleList(
            Block(width, h, head_dim, n) for h, n in zip(self.heads, self.hidden, strict=True)
        )
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, 10), of images, shape (N, 1, 8, 8)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return cast("Tensor", self.classifier(self.norm(tokens).mean(1)))

    def groups(self) -> tuple[Group, ...]:
        """Return the heads and hidden neurons of each block.

        The residual stream is no group: it runs through LayerNorm, which needs all of its channels, so a zero
        in it removes nothing.
        """
        groups: list[Group] = []
        for index, heads in enumerate(self.heads):
            block = f"blocks.{index}"
            attention = f"{block}.attention"
            projections = [f"{attention}.{layer}" for layer in ("query", "key", "value")]
            groups += [
                separate_heads(attention, projections, f"{attention}.output", heads, self.head_dim),
                neurons(f"{block}.mlp", f"{block}.fc1", f"{block}.fc2"),
            ]
        return tuple(groups)

    def reduced(self, dead: Mapping[str, Tensor]) -> VisionTransformer:
        """Build the same architecture, with fresh weights, with the heads and neurons that remain.

        Args:
            dead: by group, which modules are dead; as `TorqueRegularizer.dead` returns it.
        """
        kept = {name: max(1, int((~modules).sum())) for name, modules in dead.items()}
        blocks = [f"blocks.{index}" for index in range(len(self.heads))]
        return VisionTransformer(
            [kept[f"{block}.attention"] for block in blocks],
            [kept[f"{block}.mlp"] for block in blocks],
            width=self.width,
            head_dim=self.head_dim,
        )


#: The demo's networks by name.
NETWORKS: Mapping[str, type[ConvNet | VisionTransformer]] = {
    "vgg": ConvNet,
    "vit": VisionTransformer,
}


def build(name: str) -> ConvNet | VisionTransformer:
    """Build one of the demo's networks at full size with fresh weights from torch's global generator.

    Raises:
        UsageError: there is no such network.
    """
    if name not in NETWORKS:
        raise UsageError(f"there is no network {name!r}", hint=f"one of {', '.join(NETWORKS)}")
    return NETWORKS[name]()


def parameters(network: nn.Module) -> int:
    """Return the number of weights of a network, buffers such as running means left out."""
    return sum(parameter.numel() for parameter in network.parameters())
