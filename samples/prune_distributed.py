#!/usr/bin/env python3
"""Prune a network that several processes train, on one machine or many: torchrun does the rest.

    torchrun --nproc-per-node=2 prune_distributed.py [-o FOLDER] [--sharded]

Needs etp-deploy[train]. Each process trains on its share of the data. With --sharded each also holds only its share
of the weights (`fully_shard`); without, all hold all of them (`DistributedDataParallel`). Either way the same
modules die everywhere, as in one process. Uses the GPUs where there are any.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import etp_deploy as etp
from etp_deploy.errors import EtpError
from etp_deploy.training import Blueprint, Controller, Progress, coupled_groups, make

if TYPE_CHECKING:
    from collections.abc import Sequence


def network(width: int) -> nn.Sequential:
    """Return a convolutional network for images of digits."""
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(8 * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10)),
    )


def parallel(plain: nn.Sequential, device: torch.device, *, sharded: bool) -> nn.Module:
    """Return the network as several processes train it."""
    plain.to(device)
    if not sharded:
        return nn.parallel.DistributedDataParallel(plain)
    for layer in plain:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            fully_shard(layer)
    return fully_shard(plain)


def train(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """Train and prune at once; return the wrapped network."""
    torch.manual_seed(0)  # every process starts from the same weights
    plain, example = network(options.width), torch.zeros(1, 1, 8, 8)
    # These need the whole network: make them before it is sharded. Names stay valid whatever wraps it.
    blueprint = Blueprint(plain, example)
    groups = coupled_groups(plain, example, blueprint=blueprint)
    model = parallel(plain, device, sharded=options.sharded)
    regularizer = make("etp", model, groups, beta=0.01, norm="l2")
    updates = max(1, options.epochs * 2 // 3)
    controller = Controller(regularizer, options.target, updates=updates, blueprint=blueprint)

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    data = TensorDataset(images, torch.tensor(raw.target))
    sampler: DistributedSampler[TensorDataset] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch_size=64 // distributed.get_world_size(), sampler=sampler, drop_last=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with Progress(controller, options.epochs) as progress:  # the first process alone prints
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            for x, y in progress.batches(loader):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
                loss.backward()
                optimizer.step()
                controller.step(optimizer.param_groups[0]["lr"])
                progress.loss(loss)
            controller.update()  # on every process: they sum up their shares and agree
            progress.line()
    return model


def deploy(state: dict[str, torch.Tensor], options: argparse.Namespace) -> None:
    """Export the whole network, compress it and verify."""
    model = network(options.width)
    model.load_state_dict(state)
    options.output.mkdir(parents=True, exist_ok=True)
    full, small = options.output / "full.onnx", options.output / "small.onnx"
    etp.export(model, {"image": torch.zeros(1, 1, 8, 8)}, full, dynamic=["image.0=batch"])
    report = etp.compress(full, small)
    print(f"parameters {report.before.parameters:,} -> {report.after.parameters:,}")
    print(f"same outputs: {etp.verify(full, small).passed}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Train in all processes, deploy in the first; return 0, or the error's exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("pruned-distributed"), help="folder for the files"
    )
    parser.add_argument(
        "--target", default="params:0.25", help="params:R or macs:R, R relative to the dense network"
    )
    parser.add_argument(
        "--epochs", type=int, default=30, help="of training, two thirds of them with the force"
    )
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--sharded", action="store_true", help="shard the weights (fully_shard)")
    options = parser.parse_args(arguments)
    if "RANK" not in os.environ:
        parser.error("start it with: torchrun --nproc-per-node=2 prune_distributed.py")
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if gpu else "gloo")
    try:
        model = train(options, device)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if distributed.get_rank() == 0:
            deploy(state, options)
    except EtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
