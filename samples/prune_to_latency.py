#!/usr/bin/env python3
"""Prune a network until it runs in a wanted share of the time, measured in ONNX Runtime on this machine.

    python prune_to_latency.py [-o FOLDER] [--target latency:0.5] [--epochs 20]

Needs etp-deploy[train]. At each update the network is exported, compressed and timed against the dense one, turn by
turn, so that a busy machine does not decide; the force follows what was measured, and ends at the target.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import etp_deploy as etp
from etp_deploy.errors import EtpError
from etp_deploy.training import Controller, Progress, coupled_groups, make

if TYPE_CHECKING:
    from collections.abc import Sequence


def network(width: int) -> nn.Sequential:
    """Return a convolutional network for images of digits, drawn four times as large."""

    def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
        return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *(*convolution(1, width), nn.MaxPool2d(2), *convolution(width, 2 * width), nn.MaxPool2d(2)),
        *(
            *convolution(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, 10),
        ),
    )


def train(options: argparse.Namespace, example: torch.Tensor) -> tuple[nn.Module, float]:
    """Train and prune at once; return the network and the share of the dense latency that it was measured at."""
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[: options.images, None] / 8 - 1
    images = nn.functional.interpolate(images, scale_factor=4)
    loader = DataLoader(
        TensorDataset(images, torch.tensor(raw.target[: options.images])), batch_size=64, shuffle=True
    )
    model = network(options.width)
    regularizer = make("etp", model, coupled_groups(model, example), beta=0.01, norm="l2")
    # The example is what is timed: its batch size is the one that latency is wanted for.
    updates = max(1, options.epochs * 2 // 3)
    controller = Controller(regularizer, options.target, updates=updates, example_inputs=example)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with Progress(controller, options.epochs) as progress:
        for _ in range(options.epochs):
            model.train()
            for x, y in progress.batches(loader):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                controller.step(optimizer.param_groups[0]["lr"])
                progress.loss(loss)
            controller.update()
            progress.line()
    return model, [found.ratio for found in controller.history if found.ratio is not None][-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, export, compress and time once more; return 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pruned-to-latency"), help="folder for the files"
    )
    parser.add_argument("--target", default="latency:0.5", help="latency:R, R relative to the dense network")
    parser.add_argument(
        "--epochs", type=int, default=20, help="of training, two thirds of them with the force"
    )
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--images", type=int, default=1797, help="how many images to train on")
    parser.add_argument("--bench-seconds", type=float, default=10.0, help="time for the last benchmark")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    example = torch.zeros(1, 1, 32, 32)
    try:
        model, ratio = train(options, example)
        print(f"while training: {ratio:.2f} of the dense latency")
        options.output.mkdir(parents=True, exist_ok=True)
        full, small = options.output / "full.onnx", options.output / "small.onnx"
        etp.export(model, {"image": example}, full)
        etp.compress(full, small)
        for row in etp.benchmark([full, small], max_seconds=options.bench_seconds, memory=False).comparisons:
            print(f"the files: {row.interval.ratio:.2f} of the dense latency ({row.verdict})")
    except EtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
