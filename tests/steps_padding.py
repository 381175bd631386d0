"""Steps of random graphs that pad along channels or along named axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def widening(b: Builder) -> bool:
    """A Pad along channels and perhaps along another axis, or one that cuts."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    axes = [axis]
    if b.rank(x) > 2 and b.choose.chance(0.3):
        axes.append(b.choose.one_of([other for other in range(1, b.rank(x)) if other != axis]))
    least = -1 if b.choose.chance(0.2) else 0
    pads = [b.choose.integer(least, 2) for _ in range(2 * len(axes))]
    mode = b.choose.one_of(("constant", "constant", "constant", "edge"))
    value = (
        b.initializer(np.array(b.choose.one_of((0.0, 0.5)), np.float32), "k") if mode == "constant" else ""
    )
    if b.opset >= 18 and b.choose.chance(0.7):
        return b.add(b.emit("Pad", [x, b.ints(*pads), value, b.ints(*axes)], mode=mode))
    whole = np.zeros((2, b.rank(x)), np.int64)
    whole[:, axes] = np.reshape(pads, (2, -1))
    return b.add(b.emit("Pad", [x, b.ints(*whole.reshape(-1)), *([value] if value else [])], mode=mode))


STEPS = (widening,)
