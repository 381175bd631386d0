"""The zoo: every network by name, with its full widths and an input."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from zoo.attention import Bert, Vit
from zoo.convolutional import BottleneckResNet, MobileNetV2, ResNet, Vgg
from zoo.language import T5, Gpt2, Llama, Swin
from zoo.mixing import DenseNet, MobileNetV3, Pitch, ShuffleNet, ShuffleNetV2, UNet, Volume
from zoo.sequences import Gat, Recurrent
from zoo.sites import Widths, randomise

# dynamo at opset 20 and 18, TorchScript at 17
EXPORTERS = ("dynamo", "dynamo18", "torchscript")
# TorchScript lacks an operator, or freezes what should stay open
DYNAMO = EXPORTERS[:2]

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
            of classes (or the size that it is) where it is an integer (0: a float).
        wholes: keys of sites that may die as a whole, one test for each.
        needs: a package that the definition imports.
        exporters: the exporters that can write it.
        constants: whether units with zero weights and live biases can go; where not, all of them is zero.
        masked: exporters whose attention is zero, not constant, for a sequence that is masked as a whole:
            heads with constant values must stay there.
        core: whether the test suite looks at it in many variants, or in a few.
    """

    make: Callable[[Widths], nn.Module]
    widths: Widths
    inputs: dict[str, tuple[tuple[int | str, ...], int | str]]
    wholes: tuple[str, ...] = ()
    needs: str = ""
    exporters: tuple[str, ...] = EXPORTERS
    constants: bool = True
    masked: tuple[str, ...] = ()
    core: bool = False

    @property
    def quickest(self) -> str:
        """The exporter that takes the least time."""
        return "torchscript" if "torchscript" in self.exporters else self.exporters[0]

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
                t = torch.randint(sizes.get(classes, classes), dims, generator=gen)
            else:
                t = torch.randn(dims, generator=gen)
            drawn.append(t)
        return tuple(drawn)

    def symbols(self) -> set[str]:
        """Which sizes may be dynamic."""
        return {d for shape, _ in self.inputs.values() for d in shape if isinstance(d, str)}


def _image(size: int) -> dict[str, tuple[tuple[int | str, ...], int | str]]:
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

_RESNEXT = {"stem": 16, "stage0": 32, "stage1": 48}
_RESNEXT |= {f"{s}b{b}.{k}": 5 + s for s in range(2) for b in range(2) for k in (1, 2)}
_DENSE = {"stem": 12, "transition": 16}
_DENSE |= {f"{b}.{i}.{k}": w for b in range(2) for i in range(2) for k, w in (("inner", 16), ("growth", 8))}
_SHUFFLE = {"stem": 12, "stream": 8, "inner0": 16, "inner1": 20, "last": 32}
_UNET = {"e1a": 8, "e1b": 10, "e2a": 12, "e2b": 16, "ma": 20, "mb": 24}
_UNET |= {"u2": 12, "d2a": 16, "d2b": 14, "u1": 8, "d1a": 12, "d1b": 8}
_CONVS = {"conv0": 12, "conv1": 16, "conv2": 20}
_LLAMA = {"stream": 32, "kv0": 4, "kv1": 3, "per0": 2, "per1": 3, "mlp0": 48, "mlp1": 40}
_SWIN = {"heads0": 4, "mlp0": 32, "heads1": 4, "mlp1": 40, "heads2": 8, "mlp2": 48}
_SERIES = {"x": (("batch", 10, 12), 0)}

ZOO: dict[str, Network] = {
    "vgg": Network(Vgg, _VGG, _image(16), ("conv0", "conv2", "conv4", "fc0"), core=True),
    "vgg-pool": Network(partial(Vgg, head="pool", bias=False), _VGG, _image(16)),
    "resnet": Network(ResNet, _RESNET, _image(16), ("0b0", "stage1", "2b1"), core=True),
    "resnet-bottleneck": Network(BottleneckResNet, _BOTTLENECK, _image(32), ("0b0.2", "stage0")),
    "mobilenetv2": Network(MobileNetV2, _MOBILE, _image(32), ("e2", "stream1"), core=True),
    "vit": Network(Vit, _VIT, _image(16), ("heads0", "mlp1"), core=True),
    "vit-packed": Network(partial(Vit, form="packed"), _VIT, _image(16), ("heads1", "mlp0"), core=True),
    "vit-mha": Network(partial(Vit, form="mha"), _VIT, _image(16)),
    "bert": Network(
        Bert, _VIT, _TEXT, ("heads0", "mlp1"), "transformers", masked=("torchscript",), core=True
    ),
    "bert-eager": Network(partial(Bert, form="eager"), _VIT, _TEXT, (), "transformers"),
    "resnext": Network(partial(BottleneckResNet, groups=4), _RESNEXT, _image(32), ("0b0.1",)),
    "densenet": Network(DenseNet, _DENSE, _image(16), ("0.0.growth", "1.0.inner")),
    "shufflenet": Network(ShuffleNet, {"stem": 12, "unit": 4}, _image(16)),
    "shufflenetv2": Network(ShuffleNetV2, _SHUFFLE, _image(32), ("inner1",)),
    "unet": Network(UNet, _UNET, _image(16), ("mb", "e2b")),
    "mobilenetv3": Network(MobileNetV3, {"e0": 24, "s0": 8, "e1": 32, "s1": 8}, _image(16), ("s1",)),
    "conv1d": Network(Pitch, _CONVS, {"x": (("batch", 1, 64), 0)}, ("conv1",)),
    "conv3d": Network(Volume, _CONVS, {"x": (("batch", 1, 8, 8, 8), 0)}, ("conv1",)),
    "gpt2": Network(Gpt2, _VIT, {"ids": (("batch", "sequence"), 50)}, ("heads0",), "transformers", DYNAMO),
    "llama": Network(Llama, _LLAMA, {"ids": (("batch", "sequence"), 50)}, (), "transformers", DYNAMO),
    # the exporter fixes what is open in rotary embeddings as one operator
    "llama-operator": Network(
        partial(Llama, form="operator"), _LLAMA, {"ids": ((2, 12), 50)}, (), "transformers", ("dynamo23",)
    ),
    "t5": Network(T5, {"heads": 4, "mlp": 64}, _TEXT, (), "transformers"),
    "swin": Network(Swin, _SWIN, _image(32), ("heads1",), "transformers"),
    "lstm": Network(Recurrent, {"h0": 16, "h1": 12}, _SERIES, constants=False),
    "gru": Network(partial(Recurrent, cell="GRU"), {"h0": 16, "h1": 12}, _SERIES, constants=False),
    "gat": Network(
        Gat,
        {"heads0": 4},
        {"x": (("batch", 16), 0), "edges": ((2, "sequence"), "batch")},
        ("heads0",),
        "",
        DYNAMO,
    ),
}
