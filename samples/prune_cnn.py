#!/usr/bin/env python3
"""Prune a network of your own while it trains: from PyTorch to a smaller ONNX file, proved equal and timed.

    python prune_cnn.py [-o FOLDER] [--target macs:0.25] [--epochs 30]

Needs etp-deploy[train]. Put your network in place of `Net`, your data in place of `digits`, and an input of the
right shape in place of `example`; nothing else knows what is trained.
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
from etp_deploy.errors import EtpError
from etp_deploy.training import Blueprint, Controller, Progress, coupled_groups, make

if TYPE_CHECKING:
    from collections.abc import Sequence


class Block(nn.Module):
    """Two convolutions that add to what they read: a residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, shape (N, C, H, W), and what the convolutions make of it."""
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class Net(nn.Sequential):
    """A small residual network for images of one channel."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            *(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(Block(width), nn.MaxPool2d(2), Block(width)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
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
    right = sum(
        int((model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(data, batch_size=256)
    )
    return right / len(data)


def train(model: nn.Module, data: TensorDataset, target: str, epochs: int) -> None:
    """Train and prune at once; what lies beyond the target's last update tunes the survivors."""
    example = torch.zeros(1, 1, 8, 8)
    # The network is exported once, to learn what can only go together: the channels of a residual stream, a
    # filter with its normalisation and all that read it.
    blueprint = Blueprint(model, example)
    groups = coupled_groups(model, example, blueprint=blueprint)
    # The force. Beta is only where the controller starts: it finds the strength that leads to the target.
    regularizer = make("etp", model, groups, beta=0.01, norm="l2")
    controller = Controller(regularizer, target, updates=max(1, epochs * 2 // 3), blueprint=blueprint)

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    with Progress(controller, epochs) as progress:
        for _ in range(epochs):
            model.train()
            for images, labels in progress.batches(loader):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                controller.step(optimizer.param_groups[0]["lr"])  # the force acts on the weights
                rates.step()
                progress.loss(loss)
            controller.update()  # the dead are frozen, the rest is priced, the force adapts
            progress.line()


def deploy(model: nn.Module, folder: Path, seconds: float) -> None:
    """Export, remove what is dead, prove that nothing changed, and measure what it gained."""
    full, small = folder / "full.onnx", folder / "small.onnx"
    etp.export(model, {"image": torch.zeros(1, 1, 8, 8)}, full, dynamic=["image.0=batch"])
    # "off" removes all that is dead, which is what the target counts; "auto" would keep a few channels where
    # ONNX Runtime is faster with them.
    report = etp.compress(full, small, align="off")
    before, after = report.before, report.after
    print(f"parameters {before.parameters:,} -> {after.parameters:,}")
    print(f"multiply-accumulates {before.macs:,} -> {after.macs:,}")
    print(f"same outputs: {etp.verify(full, small).passed}")
    for row in etp.benchmark([full, small], max_seconds=seconds, memory=False).comparisons:
        print(f"speed-up in ONNX Runtime on this machine: {1 / row.interval.ratio:.2f}x ({row.verdict})")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do all of it; return 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pruned-cnn"), help="folder for the ONNX files"
    )
    parser.add_argument(
        "--target", default="macs:0.25", help="params:R or macs:R, R relative to the dense network"
    )
    parser.add_argument(
        "--epochs", type=int, default=30, help="of training, two thirds of them with the force"
    )
    parser.add_argument("--width", type=int, default=32, help="channels of the network")
    parser.add_argument("--bench-seconds", type=float, default=10.0, help="time for the benchmark")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    training, test = digits()
    model = Net(options.width)
    try:
        train(model, training, options.target, options.epochs)
        print(f"accuracy on the test images: {accuracy(model, test):.1%}")
        options.output.mkdir(parents=True, exist_ok=True)
        deploy(model, options.output, options.bench_seconds)
    except EtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
