"""Steps that compute from constants what several nodes read: biases repeated, cut while the model runs, shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx

if TYPE_CHECKING:
    from graphs import Builder


def sharing(b: Builder) -> bool:
    """A bias made of constants that two tensors of one shape get, one of them weighted anew."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    alike = [name for name in b.pool if b.shape(name) == b.shape(x)]
    other = b.choose.one_of(alike)
    bias = _bias(b, b.shape(x)[1:])
    if bias is None:
        return False
    made = [b.emit("Add", [x, bias]), b.emit(b.choose.one_of(("Add", "Mul")), [other, bias])]
    if b.choose.chance(0.5):
        scale = b.vector(b.shape(x)[-1])
        scale[:: b.choose.integer(1, 3)] = 0
        made[1] = made[1] and b.emit("Mul", [made[1], b.initializer(scale, "s")])
    added = [name is not None and b.add(name) for name in made]
    return all(added)


def _bias(b: Builder, shape: tuple[int, ...]) -> str | None:
    """Make a constant of a shape: a product, a Tile or a Slice of constants."""
    axis = b.choose.integer(0, len(shape) - 1)
    kind = b.choose.one_of(("product", "tile", "slice"))
    if kind == "slice":
        longer = [size + 2 * (place == axis) for place, size in enumerate(shape)]
        start = _computed(b)
        end = start and b.emit("Add", [start, b.ints(shape[axis])])
        return end and b.emit("Slice", [_drawn(b, *longer), start, end, b.ints(axis)])
    part = [1 if place == axis else size for place, size in enumerate(shape)]
    if kind == "tile":
        return b.emit("Tile", [_drawn(b, *part), b.ints(*(s // p for s, p in zip(shape, part, strict=True)))])
    line = [size if place == axis else 1 for place, size in enumerate(shape)]
    return b.emit("Mul", [_drawn(b, *part), _drawn(b, *line)])


def _drawn(b: Builder, *shape: int) -> str:
    return b.initializer(b.random.standard_normal(shape).astype(np.float32), "t")


def _computed(b: Builder) -> str | None:
    """Compute 0 or 1 from the data."""
    total = b.emit("ReduceSum", [b.pool[0]], keepdims=0)
    positive = total and b.emit("Greater", [total, b.initializer(np.zeros((), np.float32), "z")])
    number = positive and b.emit("Cast", [positive], to=onnx.TensorProto.INT64)
    return number and b.emit("Reshape", [number, b.ints(1)])


STEPS = (sharing,)
