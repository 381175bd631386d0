"""Convolutional networks, parameterised by every width that can die."""

# ruff: noqa: D102  # the class says what `forward` computes, and `sites` and `site` are those of zoo.sites
from __future__ import annotations

import torch
from torch import nn

from zoo.sites import Site, Widths, columns, rows, shift


def conv(
    cin: int, cout: int, k: int = 3, *, stride: int = 1, groups: int = 1, bias: bool = False
) -> nn.Conv2d:
    """A convolution that keeps the size at stride one."""
    return nn.Conv2d(cin, cout, k, stride, k // 2, groups=groups, bias=bias)


class Vgg(nn.Module):
    """Padded 3x3 convolutions with BatchNormalization, pooling, and a classifier over flattened maps."""

    pools = (1, 3)

    def __init__(self, widths: Widths, head: str = "flatten", bias: bool = True) -> None:
        super().__init__()
        self.widths, self.head = widths, head
        channels = [widths[f"conv{i}"] for i in range(5)]
        self.convs = nn.ModuleList(
            conv(a, b, bias=bias) for a, b in zip([3, *channels], channels, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.pool = nn.MaxPool2d(2)
        self.area = 16 if head == "flatten" else 1
        self.fc0 = nn.Linear(channels[-1] * self.area, widths["fc0"])
        self.fc1 = nn.Linear(widths["fc0"], 10)

    def forward(self, x):
        for i, (c, n) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = torch.relu(n(c(x)))
            if i in self.pools:
                x = self.pool(x)
        if self.head == "pool":
            x = nn.functional.adaptive_avg_pool2d(x, 1)
        return self.fc1(torch.relu(self.fc0(torch.flatten(x, 1))))

    def sites(self) -> list[Site]:
        found = []
        for i, (c, n) in enumerate(zip(self.convs, self.norms, strict=True)):
            last = i + 1 == len(self.convs)
            readers = columns(self.fc0, block=self.area) if last else columns(self.convs[i + 1])
            padded = () if last else (f"conv{i + 1}",)
            found.append(Site(f"conv{i}", c.out_channels, "inner", rows(c), [shift(c, n)], readers, padded))
        width = self.fc0.out_features
        found.append(Site("fc0", width, "neuron", rows(self.fc0), [shift(self.fc0)], columns(self.fc1)))
        return found


class Basic(nn.Module):
    """A residual block of two 3x3 convolutions."""

    def __init__(self, cin: int, inner: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(cin, inner, stride=stride), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, cout), nn.BatchNorm2d(cout)
        self.down = None
        if stride != 1:
            self.down = nn.Sequential(conv(cin, cout, 1, stride=stride), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(y + (x if self.down is None else self.down(x)))


class Bottleneck(nn.Module):
    """A residual block of 1x1, (grouped) 3x3 and 1x1 convolutions; `widths` from input to output."""

    def __init__(
        self, widths: tuple[int, int, int, int], stride: int, *, down: bool, groups: int = 1
    ) -> None:
        super().__init__()
        cin, first, second, cout = widths
        self.conv1, self.bn1 = conv(cin, first, 1), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = conv(first, second, stride=stride, groups=groups), nn.BatchNorm2d(second)
        self.conv3, self.bn3 = conv(second, cout, 1), nn.BatchNorm2d(cout)
        self.down = nn.Sequential(conv(cin, cout, 1, stride=stride), nn.BatchNorm2d(cout)) if down else None

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    """Stages of basic blocks; `stageN` is the width of a residual stream, `NbM` that inside a block."""

    def __init__(self, widths: Widths, stages: int = 3, depth: int = 2) -> None:
        super().__init__()
        self.widths = widths
        self.stem, self.bn = conv(3, widths["stage0"]), nn.BatchNorm2d(widths["stage0"])
        self.stages = nn.ModuleList()
        cin = widths["stage0"]
        for s in range(stages):
            cout, blocks = widths[f"stage{s}"], nn.ModuleList()
            for b in range(depth):
                blocks.append(Basic(cin, widths[f"{s}b{b}"], cout, 2 if s and not b else 1))
                cin = cout
            self.stages.append(blocks)
        self.fc = nn.Linear(cin, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.fc(x.mean((2, 3)))

    def sites(self) -> list[Site]:
        found = []
        for s, blocks in enumerate(self.stages):
            head = blocks[0]
            feeds = (self.stem, self.bn) if s == 0 else (head.down[0], head.down[1])
            shifts, writers, readers, padded = [shift(*feeds)], rows(feeds[0]), [], []
            for b, block in enumerate(blocks):
                name = f"{s}b{b}"
                inner = block.conv1.out_channels
                found.append(
                    Site(
                        name,
                        inner,
                        "inner",
                        rows(block.conv1),
                        [shift(block.conv1, block.bn1)],
                        columns(block.conv2),
                        (f"{name}.conv2",),
                    )
                )
                writers += rows(block.conv2)
                shifts.append(shift(block.conv2, block.bn2))
                if block is not head or s == 0:
                    readers += columns(block.conv1)
                    padded.append(f"{name}.conv1")
            if s + 1 < len(self.stages):
                following = self.stages[s + 1][0]
                readers += columns(following.conv1, following.down[0])
                padded.append(f"{s + 1}b0.conv1")
            else:
                readers += columns(self.fc)
            found.append(
                Site(f"stage{s}", head.conv2.out_channels, "stream", writers, shifts, readers, tuple(padded))
            )
        return found


class BottleneckResNet(nn.Module):
    """Stages of bottleneck blocks; with `groups`, ResNeXt, whose inner widths count channels of one group."""

    def __init__(self, widths: Widths, stages: int = 2, depth: int = 2, groups: int = 1) -> None:
        super().__init__()
        self.widths, self.groups = widths, groups
        self.stem, self.bn = conv(3, widths["stem"], 7, stride=2), nn.BatchNorm2d(widths["stem"])
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        cin = widths["stem"]
        for s in range(stages):
            cout, blocks = widths[f"stage{s}"], nn.ModuleList()
            for b in range(depth):
                first, second = groups * widths[f"{s}b{b}.1"], groups * widths[f"{s}b{b}.2"]
                stride = 2 if s and not b else 1
                blocks.append(Bottleneck((cin, first, second, cout), stride, down=b == 0, groups=groups))
                cin = cout
            self.stages.append(blocks)
        self.fc = nn.Linear(cin, 10)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn(self.stem(x))))
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
        return self.fc(x.mean((2, 3)))

    def sites(self) -> list[Site]:
        first = self.stages[0][0]
        found = [
            Site(
                "stem",
                self.stem.out_channels,
                "inner",
                rows(self.stem),
                [shift(self.stem, self.bn)],
                columns(first.conv1, first.down[0]),
            )
        ]
        for s, blocks in enumerate(self.stages):
            down = blocks[0].down
            writers, shifts, readers = rows(down[0]), [shift(down[0], down[1])], []
            for b, block in enumerate(blocks):
                name = f"{s}b{b}"
                # a grouped convolution's input axis is not one run of columns: it dies by its writer only
                second = columns(block.conv2) if self.groups == 1 else []
                found += [
                    Site(
                        f"{name}.1",
                        block.conv1.out_channels // self.groups,
                        "inner",
                        rows(block.conv1),
                        [shift(block.conv1, block.bn1)],
                        second,
                        tuple(f"{name}.conv2.{g}" for g in range(self.groups)),
                        self.groups,
                    ),
                    Site(
                        f"{name}.2",
                        block.conv2.out_channels // self.groups,
                        "inner",
                        rows(block.conv2),
                        [shift(block.conv2, block.bn2)],
                        columns(block.conv3),
                        (),
                        self.groups,
                    ),
                ]
                writers += rows(block.conv3)
                shifts.append(shift(block.conv3, block.bn3))
                readers += columns(block.conv1) if b else []
            if s + 1 < len(self.stages):
                following = self.stages[s + 1][0]
                readers += columns(following.conv1, following.down[0])
            else:
                readers += columns(self.fc)
            found.append(Site(f"stage{s}", blocks[0].conv3.out_channels, "stream", writers, shifts, readers))
        return found


class Inverted(nn.Module):
    """An inverted residual block: expand, depthwise, project."""

    def __init__(
        self, cin: int, expanded: int, cout: int, stride: int, *, skip: bool, expand: bool = True
    ) -> None:
        super().__init__()
        self.skip = skip
        self.expand = nn.Sequential(conv(cin, expanded, 1), nn.BatchNorm2d(expanded)) if expand else None
        self.depth = nn.Sequential(
            conv(expanded, expanded, stride=stride, groups=expanded), nn.BatchNorm2d(expanded)
        )
        self.project = nn.Sequential(conv(expanded, cout, 1), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = x if self.expand is None else nn.functional.relu6(self.expand(x))
        y = self.project(nn.functional.relu6(self.depth(y)))
        return x + y if self.skip else y


class MobileNetV2(nn.Module):
    """Inverted residuals with depthwise convolutions and ReLU6; `streamN` runs through one or two blocks."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        w = widths
        self.stem = nn.Sequential(conv(3, w["stem"], stride=2), nn.BatchNorm2d(w["stem"]))
        self.blocks = nn.ModuleList(
            [
                Inverted(w["stem"], w["stem"], w["stream0"], 1, skip=False, expand=False),
                Inverted(w["stream0"], w["e1"], w["stream1"], 2, skip=False),
                Inverted(w["stream1"], w["e2"], w["stream1"], 1, skip=True),
                Inverted(w["stream1"], w["e3"], w["stream2"], 2, skip=False),
                Inverted(w["stream2"], w["e4"], w["stream2"], 1, skip=True),
            ]
        )
        self.last = nn.Sequential(conv(w["stream2"], w["last"], 1), nn.BatchNorm2d(w["last"]))
        self.fc = nn.Linear(w["last"], 10)

    def forward(self, x):
        x = nn.functional.relu6(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = nn.functional.relu6(self.last(x))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))

    def sites(self) -> list[Site]:
        b, w = self.blocks, self.widths
        found = []
        for i, block in enumerate(b):
            first = block.expand or self.stem
            found.append(
                Site(
                    f"e{i}" if i else "stem",
                    block.depth[0].out_channels,
                    "inner",
                    rows(first[0], block.depth[0]),
                    [shift(*first), shift(*block.depth)],
                    columns(block.project[0]),
                )
            )
        readers = [(b[1],), (b[2], b[3]), (b[4],)]
        for s, blocks in enumerate([(b[0],), (b[1], b[2]), (b[3], b[4])]):
            projections = [x.project for x in blocks]
            read = columns(*(x.expand[0] for x in readers[s])) + (columns(self.last[0]) if s == 2 else [])
            found.append(
                Site(
                    f"stream{s}",
                    w[f"stream{s}"],
                    "stream",
                    rows(*(p[0] for p in projections)),
                    [shift(*p) for p in projections],
                    read,
                )
            )
        found.append(
            Site("last", w["last"], "inner", rows(self.last[0]), [shift(*self.last)], columns(self.fc))
        )
        return found
