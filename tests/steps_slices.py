"""Steps of random graphs that slice backwards, in strides and along several axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def striding(b: Builder) -> bool:
    """A Slice along one axis that runs backwards or takes every second or third index, or along two axes."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    size, step = b.shape(x)[axis], b.choose.one_of((-3, -2, -1, -1, 2, 3))
    if step < 0:
        start = b.choose.one_of((-1, size - 1, b.choose.integer(0, size - 1)))
        stop = b.choose.one_of((np.iinfo(np.int64).min, -size - 1, -size))
    else:
        start, stop = b.choose.integer(0, size - 1), np.iinfo(np.int64).max
    starts, stops, axes, steps = [start], [stop], [axis], [step]
    if b.choose.chance(0.2) and b.rank(x) > 2:
        starts, stops, steps = [*starts, 0], [*stops, b.choose.integer(1, 3)], [*steps, 1]
        axes.append(b.choose.one_of([other for other in range(1, b.rank(x)) if other != axis]))
    made = b.emit("Slice", [x, b.ints(*starts), b.ints(*stops), b.ints(*axes), b.ints(*steps)])
    if made is not None and b.shape(made) == b.shape(x) and b.choose.chance(0.4):
        made = b.emit("Add", [made, x])
    return b.add(made)


STEPS = (striding,)
