#!/usr/bin/env python3
"""Prune a transformer of your own: whole attention heads and neurons go, the residual width stays.

    python prune_transformer.py [-o FOLDER] [--target params:0.4] [--method etp] [--epochs 30]

Needs etp-deploy[train]. The transformer reads an image of a digit as a sentence of eight rows. Nothing here says
what a head is: the groups come from the exported network.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import etp_deploy as etp
from etp_deploy.errors import EtpError
from etp_deploy.training import METHODS, Blueprint, Controller, Progress, coupled_groups, make

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEADS, NEURONS = 64, 8, 128


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, shape (N, T, WIDTH), transformed."""
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Reads eight rows of eight pixels, answers which digit they are."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(torch.randn(8, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, rows: Tensor) -> Tensor:
        """Return logits, shape (N, 10), for rows, shape (N, 8, 8)."""
        return self.head(self.norm(self.blocks(self.embedding(rows) + self.position)).mean(1))


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,797 handwritten digits of 8x8 pixels, three quarters to train on."""
    raw = load_digits()
    whole = TensorDataset(torch.tensor(raw.images, dtype=torch.float32) / 8 - 1, torch.tensor(raw.target))
    train, test = random_split(whole, [0.75, 0.25], generator=torch.Generator().manual_seed(0))
    return train, test


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of right answers."""
    model.eval()
    return sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(data, batch_size=256)) / len(data)


def train(model: nn.Module, data: TensorDataset, options: argparse.Namespace) -> None:
    """Train and prune at once; the last third of the epochs tunes what is left."""
    example = torch.zeros(1, 8, 8)
    blueprint = Blueprint(model, example)
    groups = coupled_groups(model, example, blueprint=blueprint)
    for group in groups:
        print(f"{group.name}: {group.count(model)} {group.kind}")
    # "l2" pulls a module just as strongly when it is small, so that it reaches zero; "ordered" pulls the modules
    # most that are the smallest already.
    options_of_etp = {"norm": "l2", "pivot": "ordered"} if options.method == "etp" else {}
    regularizer = make(options.method, model, groups, beta=0.01, **options_of_etp)
    controller = Controller(
        regularizer, options.target, updates=max(1, options.epochs * 2 // 3), blueprint=blueprint
    )

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=options.epochs * len(loader))
    with Progress(controller, options.epochs) as progress:
        for _ in range(options.epochs):
            model.train()
            for rows, labels in progress.batches(loader):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(rows), labels)
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
        "-o", "--output", type=Path, default=Path("pruned-transformer"), help="folder for the files"
    )
    parser.add_argument(
        "--target", default="params:0.4", help="params:R or macs:R, R relative to the dense network"
    )
    methods = [method for method in METHODS if method != "slimming"]  # it needs BatchNorm
    parser.add_argument("--method", choices=methods, default="etp", help="the force")
    parser.add_argument(
        "--epochs", type=int, default=30, help="of training, two thirds of them with the force"
    )
    parser.add_argument("--depth", type=int, default=2, help="blocks of the transformer")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    training, test = digits()
    model = Transformer(options.depth)
    try:
        train(model, training, options)
        print(f"accuracy on the test images: {accuracy(model, test):.1%}")
        options.output.mkdir(parents=True, exist_ok=True)
        full, small = options.output / "full.onnx", options.output / "small.onnx"
        etp.export(model, {"rows": torch.zeros(1, 8, 8)}, full, dynamic=["rows.0=batch"])
        report = etp.compress(full, small)
        print(
            f"parameters {report.before.parameters:,} -> {report.after.parameters:,}; removed {report.removed}"
        )
        print(f"same outputs: {etp.verify(full, small).passed}")
    except EtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
