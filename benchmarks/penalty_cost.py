"""The regulariser's share of a training step, against a loop over modules as in the reference code.

    python benchmarks/penalty_cost.py --out benchmarks/results/penalty_cost.json

For VGG-19 (32x32 images, as for CIFAR-100) and ViT-B/16 (224x224): the processor time of a training step of 32 images
with SGD, and what each form of the force adds to a step, as it is in the loop. What it adds does not depend on the
images, so steps of two images are compared, one with and one without it in turn, which tells small differences from a
busy machine. Medians, one thread, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from etp_deploy.training import Group, TorqueRegularizer, discover, neurons, packed_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VGG19 = (64, 64, 0, 128, 128, 0, *(256,) * 4, 0, *(512,) * 4, 0, *(512,) * 4, 0)
BATCH = 32
FEW = 2
NORMS = ("l2_squared", "l2", "mean_l1")
FORMS = ("add_gradients", "penalty", "shrink")


def vgg19() -> nn.Sequential:
    """VGG-19 with BatchNorm for 32x32 images: 20.0 million weights."""
    layers: list[nn.Module] = []
    width = 3
    for wanted in VGG19:
        if not wanted:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(width, wanted, 3, padding=1), nn.BatchNorm2d(wanted), nn.ReLU(inplace=True)]
        width = wanted
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 100))


class Block(nn.Module):
    """A pre-norm transformer block of ViT-B."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, shape (N, T, width), to tokens."""
        n, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(n, t, width))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """ViT-B/16 for 224x224 images: 86 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 768, 16, stride=16)
        self.position = nn.Parameter(torch.zeros(1, 196, 768))
        self.blocks = nn.Sequential(*(Block() for _ in range(12)))
        self.norm, self.head = nn.LayerNorm(768), nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits, from the mean over tokens."""
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))

    def groups(self) -> list[Group]:
        """Heads and neurons of each block."""
        groups = []
        for index in range(12):
            name = f"blocks.{index}"
            groups.append(packed_heads(f"{name}.heads", f"{name}.qkv.weight", f"{name}.proj.weight", 12, 64))
            groups.append(neurons(f"{name}.mlp", f"{name}.fc1", f"{name}.fc2"))
        return groups


def reference(weights: Sequence[Tensor], forces: Sequence[Sequence[float]], beta: float) -> Tensor:
    """The formula as the reference code computes it: a loop over layers and modules, through autograd."""
    total = torch.zeros(())
    for weight, pulls in zip(weights, forces, strict=True):
        for module, pull in zip(weight, pulls, strict=True):
            total = total + pull * module.square().sum()
    return beta * total


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the median processor time of a call, after one to warm up."""
    work()
    return statistics.median(once(work) for _ in range(repeats))


def once(work: Callable[[], object]) -> float:
    """Return the processor time of a call."""
    started = time.process_time()
    work()
    return time.process_time() - started


class Training:
    """Steps of a network on noise.

    Args:
        model: the network.
        size: height and width of its images.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self.model = model
        self.size = size
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(self, batch: int, form: str = "", regularizer: TorqueRegularizer | None = None) -> None:
        """Take one, with the force in one of its forms."""
        images, labels = torch.ones(batch, 3, self.size, self.size), torch.zeros(batch, dtype=torch.int64)
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        if form == "penalty":
            loss = loss + regularizer.penalty()
        loss.backward()
        if form == "add_gradients":
            regularizer.add_gradients()
        self.optimizer.step()
        if form == "shrink":
            regularizer.shrink(1e-9)


def measure(
    name: str, model: nn.Module, groups: Sequence[Group], size: int, options: argparse.Namespace
) -> dict:
    """Time a step, and what each form of the force adds to one, for one network."""
    training = Training(model, size)
    whole = seconds(lambda: training.step(BATCH), options.repeats)
    kinds = {
        (norm, form): TorqueRegularizer(model, beta=1e-9, norm=norm, groups=groups)
        for norm in NORMS
        for form in FORMS
    }
    extra: dict[tuple[str, str], list[float]] = {kind: [] for kind in kinds}
    training.step(FEW)
    for _ in range(options.rounds):
        for (norm, form), regularizer in kinds.items():
            plain = once(lambda: training.step(FEW))
            extra[norm, form].append(once(lambda f=form, r=regularizer: training.step(FEW, f, r)) - plain)
    rows = {norm: {form: statistics.median(extra[norm, form]) for form in FORMS} for norm in NORMS}
    regularizer = TorqueRegularizer(model, beta=1e-9)
    weights = [model.get_parameter(part.parameter) for group in regularizer.groups for part in group.parts]
    forces = [regularizer.forces(group.name).tolist() for group in regularizer.groups]
    loop = seconds(lambda: reference(weights, forces, 1e-9).backward(), 1)
    row = {
        "network": name,
        "weights": sum(weight.numel() for weight in model.parameters()),
        "step_seconds": whole,
        "seconds": rows,
        "share": {n: {form: s / whole for form, s in forms.items()} for n, forms in rows.items()},
        "differences": {norm: {form: extra[norm, form] for form in FORMS} for norm in NORMS},
        "reference_loop_seconds": loop,
        "reference_loop_modules": sum(len(pulls) for pulls in forces),
        "reference_loop_share": loop / whole,
    }
    for norm, forms in row["share"].items():
        print(f"{name:9} {norm:10} " + "  ".join(f"{form} {share:.2%}" for form, share in forms.items()))
    print(f"{name:9} loop over {row['reference_loop_modules']} modules {row['reference_loop_share']:.2%}")
    return row


def main() -> None:
    """Measure both networks and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the results go, as JSON")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of 32 images of each network")
    parser.add_argument("--rounds", type=int, default=7, help="comparisons of each form")
    parser.add_argument("--networks", nargs="+", default=["vgg", "vit"], choices=["vgg", "vit"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if "vgg" in options.networks:
        net = vgg19()
        groups = discover(net, exclude=["54"], include_norm=True)
        rows.append(measure("VGG-19", net, groups, 32, options))
    if "vit" in options.networks:
        vit = ViT()
        rows.append(measure("ViT-B/16", vit, vit.groups(), 224, options))
    document = {
        "schema": "etp-deploy/penalty-cost/2",
        "command": f"python benchmarks/penalty_cost.py --repeats {options.repeats} --rounds {options.rounds}"
        f" --networks {' '.join(options.networks)}",
        "batch": BATCH,
        "threads": 1,
        "clock": "processor time of the process",
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "networks": rows,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
