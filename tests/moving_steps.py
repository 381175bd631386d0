"""Steps of random graphs that move, repeat or reduce entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def joining(b: Builder) -> bool:
    """Concat of tensors that fit, along any axis, sometimes with a constant."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    shape = b.shape(x)
    fits = [
        name
        for name in b.pool
        if b.rank(name) == len(shape)
        and all(a == c for d, (a, c) in enumerate(zip(b.shape(name), shape, strict=True)) if d != axis)
    ]
    names = [x] + [b.choose.one_of(fits) for _ in range(b.choose.integer(1, 2))]
    if b.choose.chance(0.2) and not b.dynamic:
        size = (*shape[:axis], 2, *shape[axis + 1 :])
        names.append(b.initializer(b.vector(int(np.prod(size))).reshape(size), "p"))
    return b.add(b.emit("Concat", names, axis=axis if b.choose.chance(0.5) else axis - len(shape)))


def splitting(b: Builder) -> bool:
    """Split along an axis into two or three."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    size = b.shape(x)[axis]
    count = b.choose.integer(2, 3)
    if size < count:
        return False
    if size % count == 0 and b.choose.chance(0.5):
        attributes = {"num_outputs": count} if b.opset >= 18 else {}
        first = b.emit("Split", [x], count, axis=axis, **attributes)
    else:
        cuts = [1] * (count - 1)
        first = b.emit("Split", [x, b.ints(*cuts, size - len(cuts))], count, axis=axis)
    if first is None:
        return False
    names = list(b.nodes[-1].output)
    return b.add(*(names if b.choose.chance(0.7) else names[:1]))


def slicing(b: Builder) -> bool:
    """Slice along one or two axes."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axes = [b.choose.integer(1, b.rank(x) - 1)]
    if b.choose.chance(0.2):
        axes = list(range(1, b.rank(x)))[:2]
    starts = [b.choose.integer(0, b.shape(x)[axis] - 1) for axis in axes]
    ends = [
        b.choose.one_of((2**31, b.shape(x)[axis], start + 2))
        for axis, start in zip(axes, starts, strict=True)
    ]
    inputs = [x, b.ints(*starts), b.ints(*ends), b.ints(*axes)]
    if b.choose.chance(0.3):
        inputs.append(b.ints(*(b.choose.integer(1, 2) for _ in axes)))
    return b.add(b.emit("Slice", inputs))


def gathering(b: Builder) -> bool:
    """Gather along an axis by constant indices: some, all in another order, one, one twice."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    axis = b.choose.integer(1, b.rank(x) - 1)
    size = b.shape(x)[axis]
    order = b.random.permutation(size)
    kind = b.choose.one_of(("some", "order", "one", "twice", "negative"))
    if kind == "one":
        indices = np.array(int(order[0]), np.int64)
    elif kind == "twice":
        indices = np.array([*order, order[0]], np.int64)
    elif kind == "negative":
        indices = order[: (size + 1) // 2].astype(np.int64) - size
    else:
        indices = order[: size if kind == "order" else (size + 1) // 2].astype(np.int64)
    return b.add(b.emit("Gather", [x, b.initializer(indices, "k")], axis=axis))


def shuffling(b: Builder) -> bool:
    """ShuffleNet's shuffle: Reshape, Transpose, Reshape."""
    x = b.pick(4)
    if x is None:
        return False
    n, size, *space = b.shape(x)
    groups = [g for g in (2, 3, 4) if size % g == 0]
    if not groups:
        return False
    g = b.choose.one_of(groups)
    split = b.emit("Reshape", [x, b.target(n, g, size // g, *space)])
    swapped = None if split is None else b.emit("Transpose", [split], perm=[0, 2, 1, 3, 4])
    return swapped is not None and b.add(b.emit("Reshape", [swapped, b.target(n, size, *space)]))


def reshaping(b: Builder) -> bool:  # noqa: PLR0911 - a list of kinds
    """Merge neighbouring axes, split one, or flatten."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    shape = list(b.shape(x))
    kind = b.choose.one_of(("flatten", "merge", "split", "batch", "unsqueeze", "squeeze"))
    if kind == "flatten":
        return b.add(b.emit("Flatten", [x], axis=1 if b.dynamic else b.choose.integer(0, 2)))
    if kind == "merge" and len(shape) > 2:
        axis = b.choose.integer(1, len(shape) - 2)
        return b.add(
            b.emit("Reshape", [x, b.target(*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])])
        )
    if kind == "split" and len(shape) < 5:
        axis = b.choose.integer(1, len(shape) - 1)
        parts = [d for d in (2, 3, 4) if shape[axis] % d == 0]
        if parts:
            part = b.choose.one_of(parts)
            return b.add(
                b.emit("Reshape", [x, b.target(*shape[:axis], part, shape[axis] // part, *shape[axis + 1 :])])
            )
    if kind == "batch" and len(shape) > 2:
        return b.add(b.emit("Reshape", [x, b.target(shape[0] * shape[1], *shape[2:])]))
    if kind == "unsqueeze" and len(shape) < 5:
        return b.add(b.emit("Unsqueeze", [x, b.ints(b.choose.integer(1, len(shape)))]))
    ones = [axis for axis, size in enumerate(shape) if size == 1 and axis]
    return bool(ones) and b.add(b.emit("Squeeze", [x, b.ints(b.choose.one_of(ones))]))


def transposing(b: Builder) -> bool:
    """Transpose any axes but, mostly, the batch."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    rest = [int(axis) + 1 for axis in b.random.permutation(b.rank(x) - 1)]
    perm = [0, *rest]
    if not b.dynamic and b.choose.chance(0.15):
        perm = [int(axis) for axis in b.random.permutation(b.rank(x))]
    return b.add(b.emit("Transpose", [x], perm=perm))


def repeating(b: Builder) -> bool:
    """Expand or Tile."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    shape = b.shape(x)
    if b.choose.chance(0.3):
        return b.add(
            b.emit("Tile", [x, b.ints(*(1 if a == 0 else b.choose.integer(1, 2) for a in range(len(shape))))])
        )
    sizes = [
        1 if axis == 0 else (b.choose.integer(2, 4) if size == 1 else size) for axis, size in enumerate(shape)
    ]
    return b.add(b.emit("Expand", [x, b.ints(*sizes)]))


def reduction(b: Builder) -> bool:
    """A reduction over some axes."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    operator = b.choose.one_of(
        (
            "ReduceMean",
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceSum",
            "ReduceL2",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
    )
    axes = [axis for axis in range(1, b.rank(x)) if b.choose.chance(0.5)] or [b.rank(x) - 1]
    keepdims = b.choose.integer(0, 1)
    as_input = b.opset >= 18 or operator == "ReduceSum"
    if as_input:
        return b.add(b.emit(operator, [x, b.ints(*axes)], keepdims=keepdims))
    return b.add(b.emit(operator, [x], axes=axes, keepdims=keepdims))


def softmax(b: Builder) -> bool:
    """Softmax along an axis."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    return b.add(
        b.emit(b.choose.one_of(("Softmax", "LogSoftmax")), [x], axis=b.choose.integer(1, b.rank(x) - 1))
    )
