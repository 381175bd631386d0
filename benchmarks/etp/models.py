"""The six networks, each with the units that can be pruned from it.

Widths are those of a machine with one core to spare; depth and wiring are those of the networks named.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from pruning import Unit
from torch import Tensor, nn
from torch.nn import functional

from etp_deploy.training import Group, Part

if TYPE_CHECKING:
    from collections.abc import Sequence

_NORM_BUFFERS = ("bias", "running_mean", "running_var")


def _channels(name: str, makers: Sequence[tuple[str, str]], readers: Sequence[str]) -> Unit:
    """Declare channels: filters of one or several convolutions with the gains after them.

    Args:
        name: of the unit.
        makers: names of the convolutions that compute the channels, each with its BatchNorm.
        readers: names of weights that read the channels along axis 1.
    """
    gains = tuple(Part(f"{norm}.weight") for _, norm in makers)
    filters = tuple(Part(f"{convolution}.weight") for convolution, _ in makers)
    group = Group(name, "channels", tuple(part for pair in zip(filters, gains, strict=True) for part in pair))
    rest = [Part(f"{norm}.{buffer}") for _, norm in makers for buffer in _NORM_BUFFERS]
    return Unit(group, (*rest, *(Part(reader, axis=1) for reader in readers)), gains)


def _neurons(name: str, first: str, second: str) -> Unit:
    """Declare the neurons between two linear layers, rows and columns."""
    group = Group(name, "neurons", (Part(f"{first}.weight"), Part(f"{second}.weight", axis=1)))
    return Unit(group, (Part(f"{first}.bias"),))


def _heads(name: str, projections: Sequence[str], output: str, heads: int, size: int) -> Unit:
    """Declare the heads of an attention with separate query, key and value layers."""
    split = (heads, size)
    rows = tuple(
        Part(f"{layer}.weight", split=split, decisive=index == 2) for index, layer in enumerate(projections)
    )
    group = Group(name, "heads", (*rows, Part(f"{output}.weight", axis=1, split=split)))
    return Unit(group, tuple(Part(f"{layer}.bias", split=split) for layer in projections))


class Vgg(nn.Module):
    """VGG-19 with BatchNorm: sixteen 3x3 convolutions in five stages, one linear layer.

    Args:
        width: filters of the first stage; the original has 64.
        stages: convolutions of each stage.
        classes: outputs.
    """

    def __init__(self, width: int = 8, stages: Sequence[int] = (2, 2, 4, 4, 4), classes: int = 10) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        incoming = 1
        for stage, depth in enumerate(stages):
            outgoing = width * 2 ** min(stage, 3)
            for _ in range(depth):
                self.convolutions.append(nn.Conv2d(incoming, outgoing, 3, padding=1, bias=False))
                self.norms.append(nn.BatchNorm2d(outgoing))
                incoming = outgoing
        self.classifier = nn.Linear(incoming, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, classes), of images, shape (N, 1, H, W)."""
        x, index = images, 0
        for depth in self.stages:
            for _ in range(depth):
                x = functional.relu(self.norms[index](self.convolutions[index](x)))
                index += 1
            x = functional.max_pool2d(x, 2)
        return cast("Tensor", self.classifier(x.mean((2, 3))))

    def units(self) -> tuple[Unit, ...]:
        """Return the filters of each convolution."""
        last = len(self.convolutions) - 1
        readers = [f"convolutions.{index + 1}.weight" for index in range(last)] + ["classifier.weight"]
        return tuple(
            _channels(f"convolutions.{index}", [(f"convolutions.{index}", f"norms.{index}")], [reader])
            for index, reader in enumerate(readers)
        )


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a residual connection."""

    def __init__(self, incoming: int, inner: int, outgoing: int, stride: int, *, project: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(incoming, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outgoing, 1, bias=False), nn.BatchNorm2d(outgoing)
        self.down = nn.Conv2d(incoming, outgoing, 1, stride=stride, bias=False) if project else None
        self.bn_down = nn.BatchNorm2d(outgoing) if project else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after the block."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.down is not None and self.bn_down is not None:
            x = self.bn_down(self.down(x))
        return functional.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50: a stem, four stages of bottlenecks, one linear layer.

    Args:
        width: inner channels of the first stage; the original has 64.
        stages: blocks of each stage.
        classes: outputs.
    """

    def __init__(self, width: int = 8, stages: Sequence[int] = (3, 4, 6, 3), classes: int = 10) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.stem, self.bn = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width)
        self.blocks = nn.ModuleList()
        incoming = width
        for stage, depth in enumerate(stages):
            inner = width * 2**stage
            for place in range(depth):
                stride = 2 if stage and not place else 1
                self.blocks.append(Bottleneck(incoming, inner, 4 * inner, stride, project=not place))
                incoming = 4 * inner
        self.classifier = nn.Linear(incoming, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, classes), of images, shape (N, 1, H, W)."""
        x = functional.relu(self.bn(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return cast("Tensor", self.classifier(x.mean((2, 3))))

    def units(self) -> tuple[Unit, ...]:
        """Return the inner channels of each block, and the residual stream of each stage as one."""
        first = ["blocks.0.conv1.weight", "blocks.0.down.weight"]
        found = [_channels("stem", [("stem", "bn")], first)]
        start = 0
        for stage, depth in enumerate(self.stages):
            blocks = [f"blocks.{index}" for index in range(start, start + depth)]
            start += depth
            for block in blocks:
                found += [
                    _channels(f"{block}.{i}", [(f"{block}.conv{i}", f"{block}.bn{i}")], [reader])
                    for i, reader in ((1, f"{block}.conv2.weight"), (2, f"{block}.conv3.weight"))
                ]
            readers = [f"{block}.conv1.weight" for block in blocks[1:]]
            if stage + 1 < len(self.stages):
                readers += [f"blocks.{start}.conv1.weight", f"blocks.{start}.down.weight"]
            else:
                readers.append("classifier.weight")
            makers = [(f"{block}.conv3", f"{block}.bn3") for block in blocks]
            makers.append((f"{blocks[0]}.down", f"{blocks[0]}.bn_down"))
            found.append(_channels(f"stage{stage}", makers, readers))
        return tuple(found)


class Attention(nn.Module):
    """Attention of heads of a fixed size; how many there are is read off the weights.

    Args:
        width: channels in and out.
        heads: number of heads.
        size: channels of a head.
        sparse: Informer's ProbSparse: how many queries attend; the rest take the mean of the values.
    """

    def __init__(self, width: int, heads: int, size: int, *, sparse: bool = False) -> None:
        super().__init__()
        self.heads, self.size, self.sparse = heads, size, sparse
        self.query, self.key, self.value = (nn.Linear(width, heads * size) for _ in range(3))
        self.output = nn.Linear(heads * size, width)

    def forward(self, x: Tensor, memory: Tensor | None = None, *, causal: bool = False) -> Tensor:
        """Return tokens, shape (N, T, width), of tokens x that attend to `memory`, or to themselves."""
        batch, count, _ = x.shape
        memory = x if memory is None else memory
        query, key, value = (
            layer(source).reshape(batch, source.shape[1], -1, self.size).transpose(1, 2)
            for layer, source in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        scores = query @ key.transpose(2, 3) * self.size**-0.5
        if causal:
            later = torch.ones(count, count, device=x.device).triu(1) * -1e4
            scores = scores + later
        mixed = torch.softmax(scores, dim=-1) @ value
        if self.sparse:
            mixed = torch.where(_active(scores), mixed, value.mean(2, keepdim=True))
        return cast("Tensor", self.output(mixed.transpose(1, 2).reshape(batch, count, -1)))

    def unit(self, name: str) -> Unit:
        """Return the heads."""
        layers = [f"{name}.{layer}" for layer in ("query", "key", "value")]
        return _heads(name, layers, f"{name}.output", self.heads, self.size)


def _active(scores: Tensor) -> Tensor:
    """Return which queries attend, shape (N, heads, T, 1): the 5 ln T of the largest sparsity measure.

    The measure is Informer's, the largest score less the mean over a sample of 5 ln T keys. The sample is spread
    evenly instead of drawn, so that the exported file does what the network does, and a query's place in the
    order is counted instead of sorted.
    """
    queries, keys = scores.shape[2], scores.shape[3]
    wanted, sample = (min(size, math.ceil(5 * math.log(size))) for size in (queries, keys))
    seen = scores[..., torch.arange(sample) * keys // sample]
    measure = seen.amax(-1) - seen.mean(-1)
    above = (measure.unsqueeze(-2) > measure.unsqueeze(-1)).float().sum(-1, keepdim=True)
    return above < wanted


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, size: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, size)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the shape of `tokens`."""
        tokens = tokens + self.attention(self.norm1(tokens))
        return cast("Tensor", tokens + self.fc2(functional.gelu(self.fc1(self.norm2(tokens)))))


class Vit(nn.Module):
    """A small vision transformer: patches, learned positions, mean over tokens.

    Args:
        width: channels of the residual stream.
        depth: blocks.
        heads: of each block, of 8 channels each.
        hidden: neurons of each block.
        patch: side of a patch.
        side: of an image.
        classes: outputs.
    """

    def __init__(
        self,
        *,
        width: int = 64,
        depth: int = 3,
        heads: int = 8,
        hidden: int = 256,
        patch: int = 8,
        side: int = 32,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.1)
        self.blocks = nn.ModuleList(Block(width, heads, 8, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (N, classes), of images, shape (N, 1, side, side)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        return cast("Tensor", self.classifier(self.norm(tokens).mean(1)))

    def units(self) -> tuple[Unit, ...]:
        """Return the heads and neurons of each block; the residual stream needs all of its channels."""
        found: list[Unit] = []
        for index, block in enumerate(self.blocks):
            name = f"blocks.{index}"
            found += [
                cast("Attention", block.attention).unit(f"{name}.attention"),
                _neurons(f"{name}.mlp", f"{name}.fc1", f"{name}.fc2"),
            ]
        return tuple(found)


class GraphAttention(nn.Module):
    """Graph attention on batches of graphs given by adjacency matrices.

    Args:
        incoming: features of a node.
        heads: number of heads.
        size: channels of a head.
    """

    def __init__(self, incoming: int, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.linear = nn.Linear(incoming, heads * size, bias=False)
        self.source = nn.Parameter(torch.randn(heads * size) * size**-0.5)
        self.target = nn.Parameter(torch.randn(heads * size) * size**-0.5)
        self.bias = nn.Parameter(torch.zeros(heads * size))

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        """Return features, shape (B, N, heads * size), of nodes, shape (B, N, incoming)."""
        x = self.linear(nodes)
        target, source = (
            self._heads(x * vector).sum(-1, keepdim=True) for vector in (self.target, self.source)
        )
        scores = functional.leaky_relu(target + source.transpose(2, 3), 0.2)
        weights = torch.softmax(scores + (adjacency.unsqueeze(1) - 1) * 1e4, dim=-1)
        mixed = (weights @ self._heads(x)).transpose(1, 2)
        return mixed.reshape(nodes.shape[0], nodes.shape[1], -1) + self.bias

    def _heads(self, x: Tensor) -> Tensor:
        """Return features by head, shape (B, heads, N, size)."""
        return x.reshape(x.shape[0], x.shape[1], -1, self.size).transpose(1, 2)


class Gat(nn.Module):
    """Three graph attentions with ELU, and a linear layer that gives each node its labels.

    Args:
        features: of a node.
        heads: of each attention.
        size: channels of a head.
        labels: outputs of each node.
    """

    def __init__(self, features: int = 24, heads: int = 16, size: int = 8, labels: int = 12) -> None:
        super().__init__()
        widths = (features, heads * size, heads * size)
        self.attentions = nn.ModuleList(GraphAttention(width, heads, size) for width in widths)
        self.classifier = nn.Linear(heads * size, labels)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        """Return logits, shape (B, N, labels), of nodes (B, N, features) and adjacency (B, N, N) with loops."""
        x = nodes
        for attention in self.attentions:
            x = functional.elu(attention(x, adjacency))
        return cast("Tensor", self.classifier(x))

    def units(self) -> tuple[Unit, ...]:
        """Return the heads of each attention."""
        found = []
        readers = [f"attentions.{i + 1}.linear.weight" for i in range(len(self.attentions) - 1)]
        readers.append("classifier.weight")
        for index, reader in enumerate(readers):
            name = f"attentions.{index}"
            attention = cast("GraphAttention", self.attentions[index])
            split = (attention.heads, attention.size)
            parts = (Part(f"{name}.linear.weight", split=split), Part(reader, axis=1, split=split))
            rest = tuple(Part(f"{name}.{vector}", split=split) for vector in ("bias", "source", "target"))
            found.append(Unit(Group(name, "heads", parts), rest))
        return tuple(found)


class Distilling(nn.Module):
    """Informer's halving of the sequence: convolution, BatchNorm, ELU, pooling."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return half the tokens."""
        x = functional.elu(self.norm(self.convolution(tokens.transpose(1, 2))))
        return functional.max_pool1d(x, 3, stride=2, padding=1).transpose(1, 2)


class InformerLayer(nn.Module):
    """A post-norm layer of encoder or decoder, with cross-attention in the decoder."""

    def __init__(self, width: int, heads: int, hidden: int, *, cross: bool) -> None:
        super().__init__()
        self.attention = Attention(width, heads, 8, sparse=not cross)
        self.cross = Attention(width, heads, 8) if cross else None
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if cross else 2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Return tokens of the shape of x."""
        x = self.norms[0](x + self.attention(x, causal=memory is not None))
        if self.cross is not None:
            x = self.norms[1](x + self.cross(x, memory))
        return cast("Tensor", self.norms[-1](x + self.fc2(functional.gelu(self.fc1(x)))))

    def units(self, name: str) -> list[Unit]:
        """Return heads and neurons."""
        found = [self.attention.unit(f"{name}.attention")]
        if self.cross is not None:
            found.append(self.cross.unit(f"{name}.cross"))
        return [*found, _neurons(f"{name}.mlp", f"{name}.fc1", f"{name}.fc2")]


class Informer(nn.Module):
    """Informer: an encoder with ProbSparse attention and distilling, a generative decoder.

    Args:
        variables: of the series, forecast all at once.
        marks: features of the time of each step.
        horizon: steps that are forecast.
        label: known steps that the decoder starts from.
        width: channels of the residual stream.
        heads: of each attention.
        hidden: neurons of each layer.
    """

    def __init__(
        self,
        *,
        variables: int = 5,
        marks: int = 3,
        horizon: int = 24,
        label: int = 24,
        width: int = 64,
        heads: int = 8,
        hidden: int = 256,
    ) -> None:
        super().__init__()
        self.horizon, self.label = horizon, label
        self.embed_encoder = nn.Linear(variables + marks, width)
        self.embed_decoder = nn.Linear(variables + marks, width)
        self.positions = nn.Parameter(torch.randn(1, 256, width) * 0.1)
        self.encoder = nn.ModuleList(InformerLayer(width, heads, hidden, cross=False) for _ in range(2))
        self.distilling = Distilling(width)
        self.decoder = InformerLayer(width, heads, hidden, cross=True)
        self.project = nn.Linear(width, variables)

    def forward(self, series: Tensor, marks: Tensor) -> Tensor:
        """Return the forecast, shape (N, horizon, variables).

        Args:
            series: the known steps, shape (N, T, variables).
            marks: the times of the known steps and of those to come, shape (N, T + horizon, marks).
        """
        known = series.shape[1]
        x = self.embed_encoder(torch.cat([series, marks[:, :known]], dim=2)) + self.positions[:, :known]
        x = self.encoder[1](self.distilling(self.encoder[0](x)))
        start = functional.pad(series[:, known - self.label :], (0, 0, 0, self.horizon))
        y = torch.cat([start, marks[:, known - self.label :]], dim=2)
        y = self.embed_decoder(y) + self.positions[:, : self.label + self.horizon]
        return cast("Tensor", self.project(self.decoder(y, x)[:, self.label :]))

    def units(self) -> tuple[Unit, ...]:
        """Return heads and neurons of all layers."""
        found = [unit for i in range(2) for unit in self.encoder[i].units(f"encoder.{i}")]  # type: ignore[operator]
        return (*found, *self.decoder.units("decoder"))


class Bert(nn.Module):
    """The first blocks of a BERT encoder with a classifier on the mean of its tokens.

    Args:
        vocabulary: number of tokens.
        width: channels of the residual stream.
        depth: blocks.
        heads: of each block.
        hidden: neurons of each block.
        length: most tokens of a sentence.
        classes: outputs.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int = 384,
        depth: int = 2,
        heads: int = 12,
        hidden: int = 1536,
        length: int = 24,
        classes: int = 2,
    ) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel  # noqa: PLC0415 - seconds to import, for one task

        config = BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=hidden,
            max_position_embeddings=max(length, 32),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
        self.depth, self.heads, self.size = depth, heads, width // heads
        self.bert = BertModel(config, add_pooling_layer=False)
        self.bert.embeddings.requires_grad_(False)
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits, shape (N, classes), of tokens and their mask, shape (N, T)."""
        hidden = self.bert(input_ids=tokens, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return cast("Tensor", self.classifier((hidden * weights).sum(1) / weights.sum(1)))

    def units(self) -> tuple[Unit, ...]:
        """Return the heads and neurons of each block."""
        found = []
        for index in range(self.depth):
            layer = f"bert.encoder.layer.{index}"
            own = [f"{layer}.attention.self.{name}" for name in ("query", "key", "value")]
            found += [
                _heads(f"{layer}.heads", own, f"{layer}.attention.output.dense", self.heads, self.size),
                _neurons(f"{layer}.mlp", f"{layer}.intermediate.dense", f"{layer}.output.dense"),
            ]
        return tuple(found)
