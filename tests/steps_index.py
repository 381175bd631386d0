"""Steps that move entries to and from places that the graph computes, channel by channel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def indexing(b: Builder) -> bool:
    """ScatterElements or GatherElements along one axis, with indices that are copied along another or are not."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    rank, copied = b.rank(x), b.choose.integer(1, b.rank(x) - 1)
    axis = b.choose.one_of([other for other in range(rank) if other != copied])
    places = _places(b, x, axis, copied)
    if places is None:
        return False
    if b.choose.chance(0.5):
        return b.add(b.emit("GatherElements", [x, places], axis=axis))
    base = b.choose.one_of([name for name in b.pool if b.shape(name) == b.shape(x)])
    if b.choose.chance(0.4):
        base = b.emit("Mul", [base, b.initializer(np.zeros((), np.float32), "z")]) or base
    more = {"reduction": b.choose.one_of(("add", "mul", "max"))} if b.opset >= 18 else {}
    return b.add(b.emit("ScatterElements", [base, places, x], axis=axis, **more))


def _places(b: Builder, x: str, axis: int, copied: int) -> str | None:
    """Compute an index along an axis for every entry, the same for all along another axis."""
    largest = b.emit("ArgMax", [x], axis=copied, keepdims=1)
    if largest is None:
        return None
    inside = b.emit("Mod", [largest, b.initializer(np.array(b.shape(x)[axis], np.int64), "k")])
    target = [1] * b.rank(x)
    target[copied] = b.shape(x)[copied] if b.choose.chance(0.9) else 1
    return inside and b.emit("Expand", [inside, b.initializer(np.array(target, np.int64), "k")])


def averaging(b: Builder) -> bool:
    """A sum divided by a number of its own for each row, copied along the channels; at least one, or not."""
    x = b.pick(2, 3)
    if x is None:
        return False
    axes = b.initializer(np.array([-1], np.int64), "k")
    number = b.emit("ReduceSum", [x, axes], keepdims=1)
    if number is not None and b.choose.chance(0.7):
        number = b.emit("Max", [number, b.initializer(np.ones((), np.float32), "o")])
    if number is None:
        return False
    if b.choose.chance(0.7):
        target = [1] * (b.rank(x) - 1) + [b.shape(x)[-1]]
        number = b.emit("Expand", [number, b.initializer(np.array(target, np.int64), "k")])
    return number is not None and b.add(b.emit("Div", [x, number]))


STEPS = (indexing, averaging)
