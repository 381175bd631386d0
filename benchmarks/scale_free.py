"""A convolution in front of BatchNorm is scale-free: what that does to pruning, and what the gain in its module does.

    python benchmarks/scale_free.py --out benchmarks/results/scale_free

The demo's VGG (BatchNorm after each convolution) learns the digits in the ways below, with the gain of the norm as a
part of each filter's module and without. After each epoch it is counted how many filters have become small (root mean
square of their weights below 5e-4), and how many are dead, so that they can be removed without a change: filter or
gain exactly zero. Writes OUT.json and OUT.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from etp_deploy.demo.data import load_digits
from etp_deploy.demo.networks import build, parameters
from etp_deploy.demo.train import RECIPES, accuracy
from etp_deploy.training import TorqueRegularizer
from etp_deploy.training.modules import batch_norm_gains

if TYPE_CHECKING:
    from torch import nn

    from etp_deploy.training import Group

THRESHOLD = 5e-4
SEEDS = (0, 1, 2)
SHOWN = (1, 5, 10, 12, 20)


@dataclass(frozen=True)
class Way:
    """How the network is pruned.

    Attributes:
        name: what the table calls it.
        gain: whether modules hold the gain.
        norm: of the force; none where empty.
        beta: strength.
        proximal: whether the weights are shrunk after the step; else the loss holds the penalty.
    """

    name: str
    gain: bool
    norm: str
    beta: float
    proximal: bool


WAYS = (
    Way("dense", gain=True, norm="", beta=0.0, proximal=False),
    Way("paper's recipe: squared L2 in the loss", gain=False, norm="l2_squared", beta=1e-2, proximal=False),
    Way("the same", gain=True, norm="l2_squared", beta=1e-2, proximal=False),
    Way('proximal "l2"', gain=False, norm="l2", beta=0.03, proximal=True),
    Way('proximal "l2", the demo\'s recipe', gain=True, norm="l2", beta=0.03, proximal=True),
)


@dataclass(frozen=True)
class Epoch:
    """What an epoch left.

    Attributes:
        number: from 1.
        small: filters whose root mean square is below the threshold.
        dead: filters that can be removed.
        accuracy: on the test images.
        parameters: of the network without the dead.
    """

    number: int
    small: int
    dead: int
    accuracy: float
    parameters: int


def without_gains(model: nn.Module, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Return groups whose modules are the filters alone."""
    gains = batch_norm_gains(model)
    return tuple(
        replace(group, parts=tuple(part for part in group.parts if part.parameter not in gains))
        for group in groups
    )


def small_filters(model: nn.Module, groups: tuple[Group, ...]) -> int:
    """Count filters whose root mean square lies below the threshold."""
    filters = [model.get_parameter(group.parts[0].parameter).detach() for group in groups]
    return sum(int((weight.square().flatten(1).mean(1).sqrt() < THRESHOLD).sum()) for weight in filters)


def train(way: Way, seed: int) -> list[Epoch]:
    """Train the network once, and return what each epoch left."""
    recipe, digits = RECIPES["vgg"], load_digits()
    torch.manual_seed(seed)
    model = build("vgg")
    judge = TorqueRegularizer(model, groups=model.groups())
    groups = model.groups() if way.gain else without_gains(model, model.groups())
    force = TorqueRegularizer(model, beta=way.beta, norm=way.norm or "l2", groups=groups, threshold=THRESHOLD)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    epochs = recipe.pruning + recipe.tuning
    steps, step, found = epochs * math.ceil(len(labels) / recipe.batch), 0, []
    generator = torch.Generator().manual_seed(seed)
    for number in range(1, epochs + 1):
        model.train()
        forced = bool(way.norm) and number <= recipe.pruning
        for chosen in torch.split(torch.randperm(len(labels), generator=generator), recipe.batch):
            step += 1
            rate = recipe.rate * min(step / steps / 0.2, max(0.02, (1 - step / steps) / 0.8))
            optimizer.param_groups[0]["lr"] = rate
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            if forced and not way.proximal:
                loss = loss + force.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if forced and way.proximal:
                force.shrink(rate)
            if way.norm and number > 1:
                force.hold()
        if forced:
            force.clip()
            force.freeze()
        dead = judge.dead()
        with torch.device("meta"):
            left = parameters(model.reduced(dead))
        found.append(
            Epoch(
                number,
                small_filters(model, model.groups()),
                sum(int(gone.sum()) for gone in dead.values()),
                accuracy(model, digits.test_images, digits.test_labels),
                left,
            )
        )
    return found


def table(runs: list[dict]) -> str:
    """Lay the runs out: one row each."""
    head = " | ".join(f"after {number}" for number in SHOWN)
    lines = [
        "Small / dead filters of 448 after so many epochs (the force is on during the first 12).\n",
        f"| recipe | gain in the module | seed | {head} | accuracy | fewer parameters |",
        "|---|---|---:|" + "---:|" * (len(SHOWN) + 2),
    ]
    dense = {run["seed"]: run["epochs"][-1]["parameters"] for run in runs if not run["way"]["norm"]}
    for run in runs:
        epochs, way = run["epochs"], run["way"]
        counts = " | ".join(f"{epochs[n - 1]['small']} / {epochs[n - 1]['dead']}" for n in SHOWN)
        gain = "" if not way["norm"] else "yes" if way["gain"] else "no"
        last = epochs[-1]
        fewer = dense[run["seed"]] / last["parameters"]
        lines.append(
            f"| {way['name']} | {gain} | {run['seed']} | {counts} | {last['accuracy']:.2%} | {fewer:.2f}x |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all ways with all seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the results go, without a suffix")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for seed in options.seeds:
        for way in WAYS:
            epochs = train(way, seed)
            runs.append({"way": asdict(way), "seed": seed, "epochs": [asdict(epoch) for epoch in epochs]})
            print(way.name, way.gain, seed, epochs[-1], flush=True)
    runs.sort(key=lambda run: [way.name for way in WAYS].index(run["way"]["name"]))
    document = {
        "schema": "etp-deploy/scale-free/1",
        "command": "python benchmarks/scale_free.py",
        "torch": torch.__version__,
        "threshold": THRESHOLD,
        "runs": runs,
    }
    print(table(runs))
    if options.out is not None:
        options.out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(table(runs))


if __name__ == "__main__":
    main()
