"""The six tasks: data, network, loss, metric and the one recipe that all methods share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import data
import models
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from pruning import Unit
    from torch import Tensor, nn


class Network(Protocol):
    """A network that declares what can be pruned from it."""

    def units(self) -> tuple[Unit, ...]:
        """Return what can be pruned."""
        ...


@dataclass(frozen=True)
class Kind:
    """What is asked of a network's outputs.

    Args:
        metric: its name, for readers.
        higher: whether more is better.
        loss: of outputs and targets.
        answers: what the outputs say, to be compared example by example: classes, label sets, or values.
        score: the metric of all test outputs.
    """

    metric: str
    higher: bool
    loss: Callable[[Tensor, Tensor], Tensor]
    answers: Callable[[Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs.argmax(1) == targets).double().mean())


def _micro_f1(outputs: Tensor, targets: Tensor) -> float:
    said, true = outputs > 0, targets > 0.5
    hits = int((said & true).sum())
    return 2 * hits / max(int(said.sum()) + int(true.sum()), 1)


def _mean_error(outputs: Tensor, targets: Tensor) -> float:
    return float((outputs - targets).abs().double().mean())


CLASSES = Kind("accuracy", True, functional.cross_entropy, lambda y: y.argmax(1), _accuracy)
LABELS = Kind("micro-F1", True, functional.binary_cross_entropy_with_logits, lambda y: y > 0, _micro_f1)
SERIES = Kind("MAE", False, functional.mse_loss, lambda y: y, _mean_error)


@dataclass(frozen=True)
class Recipe:
    """How every network of a task is trained, whatever the method.

    Args:
        rate: peak learning rate of Adam in the dense training; forced training and fine-tuning take `again` of it.
        batch: examples of a step.
        dense: epochs of the start that all methods share.
        force: epochs with the force.
        tune: epochs of fine-tuning what is left.
        again: share of the rate after the start.
    """

    rate: float
    batch: int
    dense: int
    force: int
    tune: int
    again: float = 0.5


@dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Args:
        name: as on the command line.
        title: for readers.
        kind: what is asked.
        load: reads the data.
        build: makes the dense network, from torch's global generator.
        recipe: how it is trained.
        reduced: what is smaller than in the literature, in words.
        seeds: how many seeds it gets.
        speedups: wanted ratios of MACs.
    """

    name: str
    title: str
    kind: Kind
    load: Callable[[], data.Data]
    build: Callable[[data.Data], nn.Module]
    recipe: Recipe
    reduced: str
    seeds: int = 6
    speedups: tuple[float, ...] = (4.0, 9.0)


def _minilm(loaded: data.Data) -> nn.Module:
    """Build the first two blocks of MiniLM with its embeddings of the tokens that occur."""
    if loaded.vocabulary is None:
        raise ValueError("sentences come with their vocabulary")
    network = models.Bert(len(loaded.vocabulary))
    weights = {name: tensor for name, tensor in data.minilm_weights().items() if "pooler" not in name}
    table = "embeddings.word_embeddings.weight"
    weights[table] = weights[table][loaded.vocabulary]
    places = "embeddings.position_embeddings.weight"
    weights[places] = weights[places][: network.bert.config.max_position_embeddings]
    own = network.bert.state_dict()
    network.bert.load_state_dict({name: weights.get(name, tensor) for name, tensor in own.items()})
    return network


_FASHION = partial(data.fashion, 2400, 1600, 2000)

TASKS = {
    task.name: task
    for task in (
        Task(
            "graph-gat",
            "GAT, planted multi-label graphs",
            LABELS,
            partial(data.graphs, 300, 100, 200, nodes=48, features=24, labels=12),
            lambda _: models.Gat(),
            Recipe(rate=1e-2, batch=16, dense=24, force=10, tune=8),
            reduced="3 attentions of 16 heads of 8; 300 training graphs of 48 nodes",
        ),
        Task(
            "vision-vit",
            "ViT, Fashion-MNIST",
            CLASSES,
            _FASHION,
            lambda _: models.Vit(),
            Recipe(rate=2e-3, batch=32, dense=12, force=4, tune=4),
            reduced="16 patches of 8x8, 3 blocks of width 64, 8 heads of 8, 256 neurons; "
            "2,400 training and 2,000 test images",
        ),
        Task(
            "vision-vgg",
            "VGG-19-BN, Fashion-MNIST",
            CLASSES,
            _FASHION,
            lambda _: models.Vgg(),
            Recipe(rate=2e-3, batch=32, dense=8, force=3, tune=3),
            reduced="an eighth of the widths; 2,400 training and 2,000 test images",
        ),
        Task(
            "series-informer",
            "Informer, Beijing PM2.5 and weather",
            SERIES,
            partial(data.beijing, 1600, 400, 800, known=48, horizon=24),
            lambda _: models.Informer(hidden=2048),
            Recipe(rate=1e-3, batch=32, dense=6, force=3, tune=3),
            # with fewer neurons 9x is out of reach: the width of the LayerNorms, which the distilling convolution
            # reads, stays
            reduced="width 64, 2 encoder layers and 1 decoder layer, 2,048 neurons each as published; "
            "1,600 training windows of 48 hours, 24 ahead",
        ),
        Task(
            "vision-resnet",
            "ResNet-50, Fashion-MNIST",
            CLASSES,
            _FASHION,
            lambda _: models.ResNet(),
            Recipe(rate=2e-3, batch=32, dense=8, force=2, tune=2),
            reduced="an eighth of the widths, a 3x3 stem of stride 2 without pooling; "
            "2,400 training and 2,000 test images",
        ),
        Task(
            "language-bert",
            "BERT (MiniLM), Rotten Tomatoes",
            CLASSES,
            partial(data.sentences, 1200, 500, 1000, 20),
            _minilm,
            Recipe(rate=1e-4, batch=32, dense=3, force=2, tune=2, again=1.0),
            reduced="the first 2 of 6 blocks, 20 tokens, embeddings frozen; 1,200 training and 1,000 test sentences",
        ),
    )
}
