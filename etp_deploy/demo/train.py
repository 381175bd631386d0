"""Training of the demo's networks, dense or with ETP, from a seed.

ETP here is exponential torque with the group-lasso norm "l2", applied as a proximal step after each optimiser
step; docs/etp-training.md tells with numbers why the paper's plain recipe does not do at this size. The dead
are frozen after each epoch, and the last epochs train the survivors without force.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from etp_deploy.demo.data import load_digits
from etp_deploy.demo.networks import build, parameters
from etp_deploy.training import GroupStatistics, TorqueRegularizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from etp_deploy.demo.data import Digits
    from etp_deploy.demo.networks import ConvNet, VisionTransformer


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; dense training takes the same epochs and rate without the force.

    Args:
        rate: peak learning rate of Adam.
        beta: strength of the torque.
        pruning: epochs with the force; the dead are frozen after each.
        tuning: epochs after them, without.
        batch: images of a step.
    """

    rate: float
    beta: float
    pruning: int
    tuning: int
    batch: int = 64


#: The recipe of each network.
RECIPES = {
    "vgg": Recipe(rate=2e-3, beta=0.03, pruning=12, tuning=8),
    "vit": Recipe(rate=3e-3, beta=0.022, pruning=15, tuning=10),
}


@dataclass(frozen=True)
class Epoch:
    """What an epoch left.

    Args:
        number: the epoch, from 1.
        epochs: number of epochs in all.
        loss: mean cross entropy over the training images, the force left out.
        accuracy: on the test images, in [0, 1].
        dead: dead modules over all groups.
        remaining: parameters of the network once the dead are removed.
    """

    number: int
    epochs: int
    loss: float
    accuracy: float
    dead: int
    remaining: int


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network at full size, in evaluation mode.

    Args:
        name: its name in `NETWORKS`.
        module: the network.
        accuracy: on the test images, in [0, 1].
        history: all epochs in order.
        statistics: dead modules and norms of each group.
        remaining: parameters of the network once the dead are removed, carriers of constants left out.
    """

    name: str
    module: ConvNet | VisionTransformer
    accuracy: float
    history: tuple[Epoch, ...]
    statistics: tuple[GroupStatistics, ...]
    remaining: int


def train(
    network_name: str,
    *,
    etp: bool,
    seed: int = 0,
    progress: Callable[[Epoch], None] | None = None,
    recipe: Recipe | None = None,
) -> TrainedNetwork:
    """Train one of the demo's networks on the digits.

    The seed fixes initial weights and the order of images. Torch's global generator and number of threads are
    left as they were.

    Args:
        network_name: "vgg" or "vit".
        etp: whether to prune; the dense network otherwise.
        seed: of everything random.
        progress: called after each epoch.
        recipe: in place of the network's own.

    Raises:
        UsageError: there is no such network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(network_name)
    recipe = recipe or RECIPES[network_name]
    digits = load_digits()
    regularizer = TorqueRegularizer(network, beta=recipe.beta, norm="l2", groups=network.groups())
    with _one_thread():
        history = _run(network, regularizer, digits, recipe, etp=etp, seed=seed, progress=progress)
    return TrainedNetwork(
        network_name,
        network.eval(),
        history[-1].accuracy,
        tuple(history),
        regularizer.statistics(),
        history[-1].remaining,
    )


@torch.no_grad()
def accuracy(network: nn.Module, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the share of images, shape (N, 1, 8, 8), classified right; the network ends in eval mode."""
    predicted = network.eval()(torch.from_numpy(images)).argmax(1)
    return float((predicted == torch.from_numpy(labels)).double().mean())


def _run(
    network: ConvNet | VisionTransformer,
    regularizer: TorqueRegularizer,
    digits: Digits,
    recipe: Recipe,
    *,
    etp: bool,
    seed: int,
    progress: Callable[[Epoch], None] | None,
) -> list[Epoch]:
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.rate)
    epochs = recipe.pruning + recipe.tuning
    steps = epochs * math.ceil(len(labels) / recipe.batch)
    step = 0
    history: list[Epoch] = []
    for number in range(1, epochs + 1):
        network.train()
        forced = etp and number <= recipe.pruning
        losses = 0.0
        for chosen in torch.split(torch.randperm(len(labels), generator=generator), recipe.batch):
            step += 1
            rate = recipe.rate * _schedule(step / steps)
            losses += len(chosen) * _step(network, optimizer, images[chosen], labels[chosen], rate)
            if forced:
                regularizer.shrink(rate)
            if etp and number > 1:
                regularizer.hold()
        if forced:
            regularizer.clip()
            regularizer.freeze()
        dead = regularizer.dead()
        epoch = Epoch(
            number,
            epochs,
            losses / len(labels),
            accuracy(network, digits.test_images, digits.test_labels),
            sum(int(modules.sum()) for modules in dead.values()),
            _remaining(network, dead),
        )
        history.append(epoch)
        if progress is not None:
            progress(epoch)
    return history


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute with one thread.

    Networks of this size gain next to nothing from a second, threads that wait for a busy core cost an order
    of magnitude, and the result does not depend on how many cores a machine has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _remaining(network: ConvNet | VisionTransformer, dead: Mapping[str, torch.Tensor]) -> int:
    """Return the parameters of the reduced network, built without memory so that nothing random is drawn."""
    with torch.device("meta"):
        return parameters(network.reduced(dead))


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    rate: float,
) -> float:
    """Take one optimiser step at a learning rate and return the loss before it."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = functional.cross_entropy(network(images), labels)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def _schedule(done: float) -> float:
    """Return the learning rate's share of its peak: up over the first fifth of training, then down to 2 %."""
    return min(done / 0.2, max(0.02, (1 - done) / 0.8))
