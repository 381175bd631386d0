"""Steps of random graphs that multiply with a vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphs import Builder


def scored(b: Builder) -> bool:
    """MatMul with a constant vector from either side, which takes one axis away."""
    x = b.pick(2, 3, 4)
    if x is None:
        return False
    left = b.choose.chance(0.3) and not (b.dynamic and b.rank(x) == 2)
    size = b.shape(x)[-2 if left else -1]
    weight = b.weight((size,), size, column=0)
    made = b.emit("MatMul", [weight, x] if left else [x, weight])
    if made is None or b.choose.chance(0.3):
        return b.add(made)
    again = b.emit("Unsqueeze", [made, b.ints(-1)])
    return again is not None and b.add(b.linear(again, 5))


def meeting_a_vector(b: Builder) -> bool:
    """MatMul of a computed tensor and a computed vector, or of a vector and a constant of any rank."""
    x = b.pick(2, 3, 4)
    if x is None or b.dynamic:
        return False
    row = b.pick()
    while row is not None and b.rank(row) > 1:
        row = b.emit("ReduceMean", [row], axes=[0], keepdims=0) if b.opset < 18 else _first(b, row)
    if row is None or b.rank(row) != 1:
        return False
    kind = b.choose.one_of(("right", "left", "constant", "turned", "both"))
    wanted = b.shape(x)[-2 if kind == "left" else -1]
    if kind in {"right", "left"} and b.shape(row)[0] != wanted:
        row = b.linear(row, wanted)
    if row is None:
        return False
    size = b.shape(row)[0]
    if kind == "constant":
        shape = b.choose.one_of(((size, 4), (3, size, 4)))
        operands = [row, b.weight(shape, size, out=len(shape) - 1, column=len(shape) - 2)]
    elif kind == "turned":
        shape = b.choose.one_of(((4, size), (3, 4, size)))
        operands = [b.weight(shape, size, out=len(shape) - 2, column=len(shape) - 1), row]
    elif kind == "both":
        operands = [row, b.linear(row, size) or row]
    else:
        operands = [row, x] if kind == "left" else [x, row]
    return b.add(b.emit("MatMul", operands))


def _first(b: Builder, name: str) -> str | None:
    return b.emit("ReduceMean", [name, b.ints(0)], keepdims=0)


STEPS = (scored, meeting_a_vector)
