"""Steps of random graphs that run along some axes and pass the channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def running(b: Builder) -> bool:
    """A running sum or one triangle, over channels or not; time turned round."""
    x = b.pick(3, 4)
    if x is None:
        return False
    kind, rank = b.choose.one_of(("CumSum", "Trilu", "ReverseSequence")), b.rank(x)
    if kind == "CumSum":
        axis = b.initializer(np.array(b.choose.integer(1, rank - 1), np.int64), "k")
        return b.add(b.emit("CumSum", [x, axis], reverse=b.choose.integer(0, 1)))
    if kind == "Trilu":
        return b.opset >= 14 and b.add(b.emit("Trilu", [x], upper=b.choose.integer(0, 1)))
    if b.dynamic:
        return False
    lengths = [b.choose.integer(1, b.shape(x)[1]) for _ in range(b.shape(x)[0])]
    return b.add(b.emit("ReverseSequence", [x, b.ints(*lengths)], batch_axis=0, time_axis=1))


def sampling(b: Builder) -> bool:
    """GridSample or RoiAlign of an image, at constant or computed places."""
    x = b.pick(4)
    if x is None or b.opset < 16 or b.opset >= 22 or b.dynamic:
        return False
    n, _, height, width = b.shape(x)
    if b.choose.chance(0.3):
        boxes = b.initializer(np.array([[0, 0, width - 1, height - 1]], np.float32), "g")
        return b.add(b.emit("RoiAlign", [x, boxes, b.ints(n - 1)], output_height=2, output_width=3))
    if b.choose.chance(0.6):
        grid = b.initializer(b.random.uniform(-1.2, 1.2, (n, 3, 4, 2)).astype(np.float32), "g")
    else:
        size = b.shape(x)[1]
        made = b.emit("Conv", [x, b.weight((2, size, 1, 1), size, out=0, column=1)])
        made = made and b.emit("Tanh", [made])
        grid = (made and b.emit("Transpose", [made], perm=[0, 2, 3, 1])) or ""
    mode = {} if b.choose.chance(0.7) else {"padding_mode": "border"}
    return bool(grid) and b.add(b.emit("GridSample", [x, grid], **mode))


STEPS = (running, sampling)
