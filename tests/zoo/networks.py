"""The zoo: every network by name, with its full widths and an input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from zoo.attention import Bert, Vit
from zoo.convolutional import BottleneckResNet, MobileNetV2, ResNet, Vgg
from zoo.sites import Widths, randomise

# dynamo at opset 20 and 18, TorchScript at 17
EXPORTERS = ("dynamo", "dynamo18", "torchscript")

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@dataclass(frozen=True)
class Network:
    """How to build a network at any widths, and what it reads.

    Args:
        make: the module at given widths.
        widths: the full widths.
        inputs: for each input its shape, with "batch" and "sequence" for what may be dynamic, and the number
            of classes where it is an integer (0: a float).
        wholes: keys of sites that may die as a whole, one test for each.
        needs: a package that the definition imports.
        exporters: the exporters that can write it.
    """

    make: Callable[[Widths], nn.Module]
    widths: Widths
    inputs: dict[str, tuple[tuple[int | str, ...], int]]
    wholes: tuple[str, ...] = ()
    needs: str = ""
    exporters: tuple[str, ...] = EXPORTERS

    @property
    def streams(self) -> bool:
        """Whether the width of a residual stream can shrink, and others too."""
        return any(key.startswith(("stage", "stream")) for key in self.widths)

    @property
    def dynamics(self) -> tuple[str, ...]:
        """Which sizes an export may leave open: none, the batch, the sequence too."""
        return ("static", "batch", "all") if "sequence" in self.symbols() else ("static", "batch")

    def build(self, widths: Widths | None = None, seed: int = 0) -> nn.Module:
        """The network with random weights, ready for inference."""
        return randomise(self.make(dict(self.widths if widths is None else widths)), seed)

    def draw(self, batch: int = 2, sequence: int = 12, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """One random example of every input."""
        gen = torch.Generator().manual_seed(seed)
        sizes = {"batch": batch, "sequence": sequence}
        drawn = []
        for name, (shape, classes) in self.inputs.items():
            dims = [sizes.get(d, d) for d in shape]
            if name == "mask":
                t = torch.ones(dims, dtype=torch.long)
                t[0, dims[1] // 2 :] = 0
            elif classes:
                t = torch.randint(classes, dims, generator=gen)
            else:
                t = torch.randn(dims, generator=gen)
            drawn.append(t)
        return tuple(drawn)

    def symbols(self) -> set[str]:
        """Which sizes may be dynamic."""
        return {d for shape, _ in self.inputs.values() for d in shape if isinstance(d, str)}


def _image(size: int) -> dict[str, tuple[tuple[int | str, ...], int]]:
    return {"x": (("batch", 3, size, size), 0)}


_TEXT = {"ids": (("batch", "sequence"), 50), "mask": (("batch", "sequence"), 2)}
_VGG = {"conv0": 16, "conv1": 16, "conv2": 24, "conv3": 24, "conv4": 32, "fc0": 40}
_RESNET = {"stage0": 16, "stage1": 24, "stage2": 32}
_RESNET |= {"0b0": 16, "0b1": 12, "1b0": 24, "1b1": 20, "2b0": 32, "2b1": 28}
_BOTTLENECK = {"stem": 16, "stage0": 32, "stage1": 48}
_BOTTLENECK |= {f"{s}b{b}.{k}": 12 + 4 * s for s in range(2) for b in range(2) for k in (1, 2)}
_MOBILE = {
    "stem": 16,
    "stream0": 8,
    "e1": 48,
    "stream1": 12,
    "e2": 72,
    "e3": 72,
    "stream2": 16,
    "e4": 96,
    "last": 64,
}
_VIT = {"heads0": 4, "heads1": 4, "mlp0": 64, "mlp1": 48}

ZOO: dict[str, Network] = {
    "vgg": Network(Vgg, _VGG, _image(16), ("conv0", "conv2", "conv4", "fc0")),
    "vgg-pool": Network(partial(Vgg, head="pool", bias=False), _VGG, _image(16)),
    "resnet": Network(ResNet, _RESNET, _image(16), ("0b0", "stage1", "2b1")),
    "resnet-bottleneck": Network(BottleneckResNet, _BOTTLENECK, _image(32), ("0b0.2", "stage0")),
    "mobilenetv2": Network(MobileNetV2, _MOBILE, _image(32), ("e2", "stream1")),
    "vit": Network(Vit, _VIT, _image(16), ("heads0", "mlp1")),
    "vit-packed": Network(partial(Vit, form="packed"), _VIT, _image(16), ("heads1", "mlp0")),
    "vit-mha": Network(partial(Vit, form="mha"), _VIT, _image(16)),
    "bert": Network(Bert, _VIT, _TEXT, ("heads0", "mlp1"), "transformers"),
    "bert-eager": Network(partial(Bert, form="eager"), _VIT, _TEXT, (), "transformers"),
}
