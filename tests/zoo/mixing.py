"""Convolutional networks whose channels are concatenated, shuffled, gated or transposed."""

# ruff: noqa: D102  # the class says what `forward` computes, and `sites` are those of zoo.sites

from __future__ import annotations

import torch
from torch import nn

from zoo.convolutional import conv
from zoo.sites import Shift, Site, Slot, Widths, columns, rows, shift


class DenseLayer(nn.Module):
    """BatchNormalization, ReLU, 1x1, BatchNormalization, ReLU, 3x3: what a dense block appends."""

    def __init__(self, cin: int, inner: int, growth: int) -> None:
        super().__init__()
        self.n1, self.conv1 = nn.BatchNorm2d(cin), conv(cin, inner, 1)
        self.n2, self.conv2 = nn.BatchNorm2d(inner), conv(inner, growth)

    def forward(self, x):
        x = self.conv1(torch.relu(self.n1(x)))
        return self.conv2(torch.relu(self.n2(x)))


class DenseNet(nn.Module):
    """Two dense blocks with a transition: each BatchNormalization has its own constant for a dead one."""

    def __init__(self, widths: Widths, depth: int = 2) -> None:
        super().__init__()
        self.widths, self.depth = widths, depth
        self.stem, self.bn = conv(3, widths["stem"]), nn.BatchNorm2d(widths["stem"])
        self.blocks, cin = nn.ModuleList(), widths["stem"]
        for b in range(2):
            layers = nn.ModuleList()
            for i in range(depth):
                growth = widths[f"{b}.{i}.growth"]
                layers.append(DenseLayer(cin, widths[f"{b}.{i}.inner"], growth))
                cin += growth
            self.blocks.append(layers)
            if b == 0:
                self.norm, self.transition = (
                    nn.BatchNorm2d(cin),
                    conv(cin, widths["transition"], 1, bias=True),
                )
                cin = widths["transition"]
        self.last, self.fc = nn.BatchNorm2d(cin), nn.Linear(cin, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        for b, layers in enumerate(self.blocks):
            for layer in layers:
                x = torch.cat([x, layer(x)], 1)
            if b == 0:
                x = nn.functional.avg_pool2d(self.transition(torch.relu(self.norm(x))), 2)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))

    def sites(self) -> list[Site]:
        found = []
        for b, layers in enumerate(self.blocks):
            ends = (self.norm, self.transition) if b == 0 else (self.last, self.fc)
            readers = [(layer.n1, layer.conv1) for layer in layers] + [ends]
            first = ("stem", self.stem, self.bn) if b == 0 else ("transition", self.transition, None)
            written = [(*first, 0)] + [
                (f"{b}.{i}.growth", y.conv2, None, i + 1) for i, y in enumerate(layers)
            ]
            offset = 0
            for key, layer, norm, since in written:
                width = layer.out_channels
                later = readers[since:]
                found.append(
                    Site(
                        key,
                        width,
                        "inner",
                        rows(layer),
                        [
                            *([shift(layer, norm)] if norm or layer.bias is not None else []),
                            *(Shift(None, n, 1, offset) for n, _ in later),
                        ],
                        [slot for _, reader in later for slot in columns(reader, offset=offset)],
                    )
                )
                offset += width
            found += [
                Site(
                    f"{b}.{i}.inner",
                    y.conv1.out_channels,
                    "inner",
                    rows(y.conv1),
                    [shift(y.conv1, y.n2)],
                    columns(y.conv2),
                    (f"{b}.{i}.conv2",),
                )
                for i, y in enumerate(layers)
            ]
        return found


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Deal the channels of each group out over all groups."""
    batch, channels, height, width = x.shape
    x = x.view(batch, groups, channels // groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


class ShuffleNet(nn.Module):
    """ShuffleNet's first unit: grouped 1x1, channel shuffle, depthwise, grouped 1x1.

    The width `unit` counts the channels that go from each group to each other: a channel's place dies in all
    groups at once, equally often in each run of places that the second grouped convolution reads.
    """

    groups = 3

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        g, w = self.groups, widths["stem"]
        inner = g * g * widths["unit"]
        self.stem, self.bn = conv(3, w, stride=2), nn.BatchNorm2d(w)
        self.conv1, self.bn1 = conv(w, inner, 1, groups=g), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, groups=inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, w, 1, groups=g), nn.BatchNorm2d(w)
        self.fc = nn.Linear(w, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        y = shuffle(torch.relu(self.bn1(self.conv1(x))), self.groups)
        y = self.bn3(self.conv3(self.bn2(self.conv2(y))))
        return self.fc(torch.relu(x + y).mean((2, 3)))

    def sites(self) -> list[Site]:
        g, unit = self.groups, self.widths["unit"]
        places = g * unit
        writers = [Slot(self.conv1.weight, 0, 1, i * places) for i in range(g)]
        shifts = [Shift(None, self.bn1, 1, i * places) for i in range(g)]
        depth = Slot(self.conv2.weight, 0, g)
        return [
            Site("unit", unit, "inner", [*writers, depth], [*shifts, Shift(None, self.bn2, g)], (), (), g)
        ]


class Half(nn.Module):
    """1x1, depthwise, 1x1: the working half of a ShuffleNet v2 unit."""

    def __init__(self, cin: int, inner: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, stride=stride, groups=inner), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, cout, 1), nn.BatchNorm2d(cout)

    def forward(self, x):
        x = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.bn3(self.conv3(x)))

    def site(self, key: str) -> Site:
        return Site(
            key,
            self.conv1.out_channels,
            "inner",
            rows(self.conv1, self.conv2),
            [shift(self.conv1, self.bn1), shift(self.conv2, self.bn2)],
            columns(self.conv3),
        )


class ShuffleNetV2(nn.Module):
    """A downsampling and a basic unit: concat, shuffle, split.

    The width `stream` counts half the channels of one branch: pairs of channels die, one of each branch,
    equally often in what becomes the next unit's idle and its working half.
    """

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        w, stem = 2 * widths["stream"], widths["stem"]
        self.stem, self.bn = conv(3, stem, stride=2), nn.BatchNorm2d(stem)
        self.depth, self.bn1 = conv(stem, stem, stride=2, groups=stem), nn.BatchNorm2d(stem)
        self.point, self.bn2 = conv(stem, w, 1), nn.BatchNorm2d(w)
        self.down = Half(stem, widths["inner0"], w, 2)
        self.unit = Half(w, widths["inner1"], w, 1)
        self.last, self.bn3 = conv(2 * w, widths["last"], 1), nn.BatchNorm2d(widths["last"])
        self.fc = nn.Linear(widths["last"], 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn(self.stem(x))), 3, 2, 1)
        idle = torch.relu(self.bn2(self.point(self.bn1(self.depth(x)))))
        idle, busy = shuffle(torch.cat([idle, self.down(x)], 1), 2).chunk(2, 1)
        x = shuffle(torch.cat([idle, self.unit(busy)], 1), 2)
        return self.fc(torch.relu(self.bn3(self.last(x))).mean((2, 3)))

    def sites(self) -> list[Site]:
        w = self.widths
        half = w["stream"]
        stem = Site(
            "stem",
            w["stem"],
            "inner",
            rows(self.stem, self.depth),
            [shift(self.stem, self.bn), shift(self.depth, self.bn1)],
            columns(self.point, self.down.conv1),
        )
        last = Site(
            "last", w["last"], "inner", rows(self.last), [shift(self.last, self.bn3)], columns(self.fc)
        )
        # places below `half` stay idle in the second unit, and pair with that unit's own channels
        idle, busy = range(half), range(half, 2 * half)
        stream = Site(
            "stream",
            half,
            "stream",
            [
                *rows(self.point, self.down.conv3),
                Slot(self.unit.conv3.weight, 0, 2, only=idle),
            ],
            [
                shift(self.point, self.bn2),
                shift(self.down.conv3, self.down.bn3),
                Shift(None, self.unit.bn3, 2, only=idle),
            ],
            [
                Slot(self.unit.conv1.weight, 1, 2, -2 * half, only=busy),
                Slot(self.last.weight, 1, 4, only=idle),
            ],
            (),
            2,
        )
        return [stem, self.down.site("inner0"), self.unit.site("inner1"), last, stream]


class Double(nn.Module):
    """Two padded convolutions."""

    def __init__(self, cin: int, first: int, second: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, first), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = conv(first, second), nn.BatchNorm2d(second)

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class UNet(nn.Module):
    """Encoder and decoder with transposed convolutions; skips are read by both."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = w = widths
        self.enc1 = Double(3, w["e1a"], w["e1b"])
        self.enc2 = Double(w["e1b"], w["e2a"], w["e2b"])
        self.mid = Double(w["e2b"], w["ma"], w["mb"])
        self.up2 = nn.ConvTranspose2d(w["mb"], w["u2"], 2, 2)
        self.dec2 = Double(w["u2"] + w["e2b"], w["d2a"], w["d2b"])
        self.up1 = nn.ConvTranspose2d(w["d2b"], w["u1"], 3, 2, 1, 1)
        self.dec1 = Double(w["u1"] + w["e1b"], w["d1a"], w["d1b"])
        self.out = conv(w["d1b"], 2, 1, bias=True)

    def forward(self, x):
        one = self.enc1(x)
        two = self.enc2(nn.functional.max_pool2d(one, 2))
        x = self.mid(nn.functional.max_pool2d(two, 2))
        x = self.dec2(torch.cat([self.up2(x), two], 1))
        x = self.dec1(torch.cat([self.up1(x), one], 1))
        return self.out(x)

    def sites(self) -> list[Site]:
        w, found = self.widths, []

        def add(key, layer, norm, readers, padded) -> None:
            found.append(Site(key, w[key], "inner", rows(layer), [shift(layer, norm)], readers, padded))

        for key, double in (
            ("e1", self.enc1),
            ("e2", self.enc2),
            ("m", self.mid),
            ("d2", self.dec2),
            ("d1", self.dec1),
        ):
            names = ("ma", "mb") if key == "m" else (f"{key}a", f"{key}b")
            add(names[0], double.conv1, double.bn1, columns(double.conv2), (f"{key}.conv2",))
            read, padded = {
                "e1": (columns(self.enc2.conv1) + columns(self.dec1.conv1, offset=w["u1"]), ("enc2", "dec1")),
                "e2": (columns(self.mid.conv1) + columns(self.dec2.conv1, offset=w["u2"]), ("mid", "dec2")),
                "m": ([Slot(self.up2.weight, 0)], ("up2",)),
                "d2": ([Slot(self.up1.weight, 0)], ("up1",)),
                "d1": (columns(self.out), ()),
            }[key]
            add(names[1], double.conv2, double.bn2, read, padded)
        for key, up, dec in (("u2", self.up2, "dec2"), ("u1", self.up1, "dec1")):
            reader = getattr(self, dec).conv1
            found.append(
                Site(key, w[key], "inner", [Slot(up.weight, 1)], [Shift(up.bias)], columns(reader), (dec,))
            )
        return found


class Excite(nn.Module):
    """An inverted residual with squeeze-and-excite and hard swish."""

    def __init__(self, cin: int, expanded: int, squeezed: int, cout: int, stride: int) -> None:
        super().__init__()
        self.skip = stride == 1
        self.expand, self.bn1 = conv(cin, expanded, 1), nn.BatchNorm2d(expanded)
        self.depth, self.bn2 = (
            conv(expanded, expanded, 5, stride=stride, groups=expanded),
            nn.BatchNorm2d(expanded),
        )
        self.reduce, self.excite = (
            conv(expanded, squeezed, 1, bias=True),
            conv(squeezed, expanded, 1, bias=True),
        )
        self.project, self.bn3 = conv(expanded, cout, 1), nn.BatchNorm2d(cout)

    def forward(self, x):
        y = nn.functional.hardswish(self.bn1(self.expand(x)))
        y = nn.functional.hardswish(self.bn2(self.depth(y)))
        gate = torch.relu(self.reduce(nn.functional.adaptive_avg_pool2d(y, 1)))
        y = y * nn.functional.hardsigmoid(self.excite(gate))
        y = self.bn3(self.project(y))
        return x + y if self.skip else y


class MobileNetV3(nn.Module):
    """Squeeze-and-excite blocks: a dead channel's gate dies with it."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = w = widths
        self.stem, self.bn = conv(3, 8, stride=2), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList([Excite(8, w["e0"], w["s0"], 12, 2), Excite(12, w["e1"], w["s1"], 12, 1)])
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        x = nn.functional.hardswish(self.bn(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))

    def sites(self) -> list[Site]:
        found = []
        for i, b in enumerate(self.blocks):
            found += [
                Site(
                    f"e{i}",
                    b.expand.out_channels,
                    "inner",
                    rows(b.expand, b.depth, b.excite),
                    [shift(b.expand, b.bn1), shift(b.depth, b.bn2), shift(b.excite)],
                    columns(b.reduce, b.project),
                ),
                Site(
                    f"s{i}",
                    b.reduce.out_channels,
                    "inner",
                    rows(b.reduce),
                    [shift(b.reduce)],
                    columns(b.excite),
                ),
            ]
        return found


class Pitch(nn.Module):
    """1-D convolutions after explicit padding, each with ReLU and then BatchNormalization (torchcrepe)."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        channels = [widths[f"conv{i}"] for i in range(3)]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 5) for a, b in zip([1, *channels], channels, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm1d(c) for c in channels)
        self.fc = nn.Linear(channels[-1] * 8, 10)

    def forward(self, x):
        for c, n in zip(self.convs, self.norms, strict=True):
            x = nn.functional.max_pool1d(n(torch.relu(c(nn.functional.pad(x, (2, 2))))), 2)
        return torch.sigmoid(self.fc(x.transpose(1, 2).flatten(1)))

    def sites(self) -> list[Site]:
        found, width = [], self.convs[-1].out_channels
        # the last map is flattened positions first: a channel is every width-th column
        ends = [Slot(self.fc.weight, 1, 1, i * width) for i in range(8)]
        for i, (c, n) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = i + 1 == len(self.convs)
            readers = ends if last else columns(self.convs[i + 1])
            padded = () if last else (f"conv{i + 1}",)
            shifts = [Shift(c.bias), Shift(None, n)]
            found.append(Site(f"conv{i}", c.out_channels, "inner", rows(c), shifts, readers, padded))
        return found


class Volume(nn.Module):
    """3-D convolutions."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        channels = [widths[f"conv{i}"] for i in range(3)]
        self.convs = nn.ModuleList(
            nn.Conv3d(a, b, 3, 1 + i % 2, 1)
            for i, (a, b) in enumerate(zip([1, *channels], channels, strict=False))
        )
        self.norms = nn.ModuleList(nn.BatchNorm3d(c) for c in channels)
        self.fc = nn.Linear(channels[-1], 10)

    def forward(self, x):
        for c, n in zip(self.convs, self.norms, strict=True):
            x = nn.functional.silu(n(c(x)))
        return self.fc(x.mean((2, 3, 4)))

    def sites(self) -> list[Site]:
        found = []
        for i, (c, n) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = i + 1 == len(self.convs)
            readers = columns(self.fc) if last else columns(self.convs[i + 1])
            padded = () if last else (f"conv{i + 1}",)
            found.append(Site(f"conv{i}", c.out_channels, "inner", rows(c), [shift(c, n)], readers, padded))
        return found
