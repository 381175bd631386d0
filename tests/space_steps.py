"""Steps of random graphs over space: convolutions, pooling, padding, resizing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def convolution(b: Builder) -> bool:
    """A Conv of any kind."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    channels, spatial = b.shape(x)[1], b.rank(x) - 2
    groups, out = _groups(b, channels)
    kernel = [b.choose.one_of((1, 3, 3, 2)) for _ in range(spatial)]
    attributes = {"group": groups, "kernel_shape": kernel, **_padding(b, spatial, kernel)}
    if b.choose.chance(0.2):
        attributes["strides"] = [b.choose.integer(1, 2) for _ in range(spatial)]
    if b.choose.chance(0.2) and "auto_pad" not in attributes:
        attributes["dilations"] = [b.choose.integer(1, 2) for _ in range(spatial)]
    fan = channels // groups * int(np.prod(kernel))
    shape = (out, channels // groups, *kernel)
    inputs = [x, b.weight(shape, fan, out=0, column=1)]
    if b.choose.chance(0.6):
        inputs.append(b.initializer(b.vector(out), "b"))
    return b.add(b.emit("Conv", inputs, **attributes))


def transposed_convolution(b: Builder) -> bool:
    """A ConvTranspose."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    channels, spatial = b.shape(x)[1], b.rank(x) - 2
    groups, out = _groups(b, channels)
    kernel = [b.choose.one_of((1, 2, 3)) for _ in range(spatial)]
    attributes = {"group": groups, "kernel_shape": kernel, "strides": [b.choose.integer(1, 2)] * spatial}
    if b.choose.chance(0.3):
        attributes["pads"] = [1] * (2 * spatial)
    fan = channels // groups * int(np.prod(kernel))
    inputs = [x, b.weight((channels, out // groups, *kernel), fan, out=1 if groups == 1 else None, column=0)]
    if b.choose.chance(0.6):
        inputs.append(b.initializer(b.vector(out), "b"))
    return b.add(b.emit("ConvTranspose", inputs, **attributes))


def _groups(b: Builder, channels: int) -> tuple[int, int]:
    kind = b.choose.one_of(("one", "one", "depthwise", "grouped", "multiplied"))
    if kind == "depthwise":
        return channels, channels
    if kind == "multiplied" and channels <= 12:
        return channels, 2 * channels
    divisors = [g for g in (2, 3, 4) if channels % g == 0]
    if kind == "grouped" and divisors:
        groups = b.choose.one_of(divisors)
        return groups, groups * b.choose.integer(1, 5)
    return 1, b.choose.one_of((4, 6, 8, 12, 1))


def _padding(b: Builder, spatial: int, kernel: list[int]) -> dict[str, object]:
    kind = b.choose.one_of(("same", "same", "none", "uneven", "auto"))
    if kind == "same":
        return {"pads": [k // 2 for k in kernel] * 2}
    if kind == "uneven":
        return {"pads": [b.choose.integer(0, 2) for _ in range(2 * spatial)]}
    if kind == "auto":
        return {"auto_pad": b.choose.one_of(("SAME_UPPER", "SAME_LOWER", "VALID"))}
    return {}


def pooling(b: Builder) -> bool:
    """Any pooling."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    spatial = b.rank(x) - 2
    operator = b.choose.one_of(
        (
            "MaxPool",
            "AveragePool",
            "AveragePool",
            "LpPool",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "GlobalLpPool",
        )
    )
    if operator.startswith("Global"):
        return b.add(b.emit(operator, [x]))
    kernel = [b.choose.integer(1, min(3, side)) for side in b.shape(x)[2:]]
    attributes: dict[str, object] = {"kernel_shape": kernel, "strides": [b.choose.integer(1, 2)] * spatial}
    if b.choose.chance(0.5):
        attributes["pads"] = [min(k - 1, b.choose.integer(0, 1)) for k in kernel] * 2
    if operator != "LpPool" and b.choose.chance(0.3):
        attributes["ceil_mode"] = 1
    if operator == "AveragePool" and b.choose.chance(0.5):
        attributes["count_include_pad"] = 1
    return b.add(b.emit(operator, [x], **attributes))


def padding(b: Builder) -> bool:
    """A Pad along space or channels."""
    x = b.pick(3, 4, 5)
    if x is None:
        return False
    rank = b.rank(x)
    pads = [0, 0, *(b.choose.integer(0, 1) for _ in range(rank - 2))] * 2
    if b.choose.chance(0.25):
        pads[1] = b.choose.integer(0, 2)
    mode = b.choose.one_of(("constant", "constant", "reflect", "edge"))
    inputs = [x, b.ints(*pads)]
    if mode == "constant" and b.choose.chance(0.5):
        inputs.append(b.initializer(np.array(b.choose.one_of((0.0, 0.5)), np.float32), "k"))
    return b.add(b.emit("Pad", inputs, mode=mode))


def resizing(b: Builder) -> bool:
    """A Resize by scales or to sizes."""
    x = b.pick(4)
    if x is None:
        return False
    mode = b.choose.one_of(("nearest", "linear", "cubic"))
    if b.choose.chance(0.5):
        shape = b.shape(x)
        inputs = [x, "", "", b.ints(*shape[:2], *(side * 2 for side in shape[2:]))]
    else:
        inputs = [x, "", b.initializer(np.array([1, 1, 2, 1.5], np.float32), "k")]
    extra = {} if mode == "nearest" else {"coordinate_transformation_mode": "align_corners"}
    return b.add(b.emit("Resize", inputs, mode=mode, **(extra if b.choose.chance(0.3) else {})))


def rearranging(b: Builder) -> bool:
    """DepthToSpace or SpaceToDepth."""
    x = b.pick(4)
    if x is None:
        return False
    if b.choose.chance(0.5):
        return b.add(b.emit("DepthToSpace", [x], blocksize=2, mode=b.choose.one_of(("DCR", "CRD"))))
    return b.add(b.emit("SpaceToDepth", [x], blocksize=2))
