"""One training loop for all tasks, methods and phases: Adam, one thread, warm-up and linear decay."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from data import Split
    from tasks import Kind
    from torch import Tensor, nn


def shares(epochs: int, examples: int, batch: int) -> list[float]:
    """Return for each step the share of the peak rate: up over the first tenth, then down to 5 %."""
    steps = epochs * math.ceil(examples / batch)
    return [min((step + 1) / (0.1 * steps), max(0.05, 1 - step / steps), 1.0) for step in range(steps)]


def train(
    network: nn.Module,
    split: Split,
    kind: Kind,
    *,
    rate: float,
    batch: int,
    epochs: int,
    seed: int,
    after_step: Callable[[float], None] | None = None,
) -> None:
    """Train a network in place.

    Args:
        network: any; parameters without gradient stay as they are.
        split: the examples.
        kind: gives the loss.
        rate: peak learning rate.
        batch: examples of a step.
        epochs: passes over the examples.
        seed: of their order.
        after_step: called after each optimiser step with its learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = iter(shares(epochs, len(split), batch))
    network.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(split), generator=generator).split(batch):
            step_rate = rate * next(schedule)
            for group in optimizer.param_groups:
                group["lr"] = step_rate
            part = split.take(chosen)
            loss = kind.loss(network(*part.inputs), part.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if after_step is not None:
                after_step(step_rate)
    network.eval()


@torch.no_grad()
def outputs(network: nn.Module, split: Split, batch: int = 100) -> Tensor:
    """Return a network's outputs for all examples, in evaluation mode."""
    network.eval()
    parts = [split.take(slice(start, start + batch)) for start in range(0, len(split), batch)]
    return torch.cat([network(*part.inputs) for part in parts])
