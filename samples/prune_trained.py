#!/usr/bin/env python3
"""Prune a network that is trained already: ask its loss which modules it can do without, and let ETP take these.

    python prune_trained.py [-o FOLDER] [--target macs:0.25] [--pivot network] [--epochs 10]

Needs etp-deploy[train]. Put your trained network in place of `trained`, and your data in place of `digits`. With
--pivot ordered the norms decide instead, layer by layer; with 0 the place of a filter in its layer does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import etp_deploy as etp
from etp_deploy.errors import EtpError, UsageError
from etp_deploy.training import (
    Blueprint,
    Controller,
    PlannedCost,
    Progress,
    coupled_groups,
    make,
    removal_order,
)
from etp_deploy.training.cost import parse_target

if TYPE_CHECKING:
    from collections.abc import Sequence

RATE = 2e-3


def convolution(incoming: int, outgoing: int) -> tuple[nn.Module, ...]:
    """Return a convolution with its normalisation and activation."""
    return nn.Conv2d(incoming, outgoing, 3, padding=1, bias=False), nn.BatchNorm2d(outgoing), nn.ReLU()


class Net(nn.Sequential):
    """Six convolutions, whose filters cost the less the later they come, for images of one channel."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(
            *(*convolution(1, width), *convolution(width, width), nn.MaxPool2d(2)),
            *(*convolution(width, 2 * width), *convolution(2 * width, 2 * width), nn.MaxPool2d(2)),
            *(*convolution(2 * width, 4 * width), *convolution(4 * width, 4 * width)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
        )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,797 handwritten digits of 8x8 pixels, three quarters to train on."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    whole = TensorDataset(images, torch.tensor(raw.target))
    train, test = random_split(whole, [0.75, 0.25], generator=torch.Generator().manual_seed(0))
    return train, test


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of right answers."""
    model.eval()
    batches = DataLoader(data, batch_size=256)
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches) / len(data)


def loss_of(model: nn.Module, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return what the network is trained for."""
    images, labels = batch
    return nn.functional.cross_entropy(model(images), labels)


def trained(width: int, data: TensorDataset, epochs: int) -> nn.Module:
    """Train a dense network."""
    model = Net(width)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(epochs):
        for batch in DataLoader(data, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    return model


def prune(model: nn.Module, data: TensorDataset, options: argparse.Namespace) -> None:
    """Find the order, train with a force by it, and tune what is left."""
    example = torch.zeros(1, 1, 8, 8)
    blueprint = Blueprint(model, example)
    groups = coupled_groups(model, example, blueprint=blueprint)
    kind, share = parse_target(options.target)
    order = None
    if options.pivot == "network":
        # The loss is asked again and again as modules go: what was needless beside its like becomes needed. Small
        # batches tell more than large ones.
        batches = list(DataLoader(data, batch_size=8, shuffle=True))[:100]
        cost = PlannedCost(blueprint, "params" if kind == "params" else "macs")
        order = removal_order(model, groups, batches, loss_of, cost=cost, target=share)
        for group in groups:
            places = ", ".join(f"{place:.0f}" for place in order[group.name].sort().values[:8])
            print(f"{group.name}: {len(order[group.name])} {group.kind}, first to go at {places}")
    # "relative": the same beta means the same in every layer.
    pivot = options.pivot if options.pivot in {"network", "ordered"} else int(options.pivot)
    regularizer = make(
        "etp", model, groups, beta=1.0, norm="l2", pivot=pivot, importance=order, relative=True
    )
    forced = max(1, options.epochs // 2)
    controller = Controller(regularizer, options.target, updates=forced, blueprint=blueprint)

    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, total_steps=options.epochs * len(loader), pct_start=0.1
    )
    with Progress(controller, options.epochs) as progress:
        for _ in range(options.epochs):
            model.train()
            for batch in progress.batches(loader):
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                optimizer.step()
                controller.step(optimizer.param_groups[0]["lr"])
                rates.step()
                progress.loss(loss)
            controller.update()
            progress.line()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, prune, export, compress, verify; return 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pruned-trained"), help="folder for the ONNX files"
    )
    parser.add_argument(
        "--target", default="macs:0.25", help="params:R or macs:R, R relative to the dense network"
    )
    parser.add_argument("--pivot", choices=["network", "ordered", "0"], default="network", help="see above")
    parser.add_argument("--epochs", type=int, default=10, help="of pruning, half of them with the force")
    parser.add_argument("--dense-epochs", type=int, default=10, help="of training the dense network")
    parser.add_argument("--width", type=int, default=16, help="filters of the first convolution")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        if parse_target(options.target)[0] == "latency":
            raise UsageError("the order is by parameters or multiplications", where=options.target)
        training, test = digits()
        model = trained(options.width, training, options.dense_epochs)
        print(f"accuracy of the dense network on the test images: {accuracy(model, test):.1%}")
        prune(model, training, options)
        print(f"accuracy on the test images: {accuracy(model, test):.1%}")
        options.output.mkdir(parents=True, exist_ok=True)
        full, small = options.output / "full.onnx", options.output / "small.onnx"
        etp.export(model, {"image": torch.zeros(1, 1, 8, 8)}, full, dynamic=["image.0=batch"])
        report = etp.compress(full, small, align="off")
        print(f"multiply-accumulates {report.before.macs:,} -> {report.after.macs:,}")
        print(f"same outputs: {etp.verify(full, small).passed}")
    except EtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
