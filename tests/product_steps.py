"""Steps of random graphs that multiply: dense layers, attention, gates, embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder


def dense(b: Builder) -> bool:
    """MatMul with a weight from the right, or from the left, with a bias or not."""
    x = b.pick()
    if x is None or b.rank(x) < 2:
        return False
    width = b.choose.one_of((4, 6, 8, 12))
    if b.choose.chance(0.8):
        return b.add(b.linear(x, width))
    size = b.shape(x)[-2]
    if b.rank(x) > 2 or not b.dynamic:
        made = b.emit("MatMul", [b.weight((width, size), size, out=0, column=1), x])
        return b.add(None if made is None else b.biased(made, b.rank(made) - 2))
    return False


def batched(b: Builder) -> bool:
    """MatMul with a weight of more than two axes."""
    x = b.pick(3, 4)
    if x is None:
        return False
    size, batch = b.shape(x)[-1], b.shape(x)[-3] if b.rank(x) == 4 else b.choose.integer(2, 3)
    weight = b.weight((batch, size, 5), size, out=2, column=1)
    if b.rank(x) == 3:
        lifted = b.emit("Unsqueeze", [x, b.ints(1)])
        return lifted is not None and b.add(b.emit("MatMul", [lifted, weight]))
    return b.add(b.emit("MatMul", [x, weight]))


def gemm(b: Builder) -> bool:
    """Gemm in all its forms."""
    x = b.pick(2)
    if x is None:
        flat = b.pick(3, 4)
        x = None if flat is None else b.emit("Flatten", [flat], axis=1)
    if x is None:
        return False
    across = not b.dynamic and b.choose.chance(0.15)
    turned, width = b.choose.chance(0.5), b.choose.one_of((4, 6, 8, 10))
    size = b.shape(x)[0 if across else 1]
    shape = (width, size) if turned else (size, width)
    inputs = [x, b.weight(shape, size, out=0 if turned else 1, column=1 if turned else 0)]
    attributes: dict[str, object] = {"transB": int(turned), "transA": int(across)}
    if b.choose.chance(0.7):
        own = b.choose.one_of(((width,), (width,), (1, width), (), (1,)))
        inputs.append(b.initializer(b.vector(int(np.prod(own, dtype=int))).reshape(own), "b"))
    if b.choose.chance(0.3):
        attributes["alpha"] = 0.5
    if b.choose.chance(0.3):
        attributes["beta"] = b.choose.one_of((2.0, 0.0, -0.5))
    return b.add(b.emit("Gemm", inputs, **attributes))


def attention(b: Builder) -> bool:
    """Attention over the second axis: separate or packed, masked or not, with one or several keys."""
    x = b.pick(3)
    if x is None:
        return False
    n, length, _ = b.shape(x)
    heads, size = b.choose.integer(1, 4), b.choose.integer(1, 3)
    single = heads > 1 and b.choose.chance(0.2)
    counts = (heads, 1 if single else heads, 1 if single else heads)
    parts = _projections(b, x, counts, size)
    if parts is None:
        return False
    q, k, v = (
        _heads(b, part, (n, length, count, size), last)
        for part, count, last in zip(parts, counts, (False, True, False), strict=True)
    )
    if q is None or k is None or v is None:
        return False
    scores = b.emit("MatMul", [q, k])
    if scores is not None:
        scale = b.initializer(np.array(size**0.5, np.float32), "k")
        scores = b.emit(b.choose.one_of(("Div", "Mul")), [scores, scale])
    if scores is not None and b.choose.chance(0.3):
        mask = np.triu(np.full((length, length), -5.0, np.float32), 1)
        scores = b.emit("Add", [scores, b.initializer(mask, "k")])
    if scores is not None and b.choose.chance(0.2):
        scores = b.emit("Add", [scores, b.initializer(b.vector(heads).reshape(1, heads, 1, 1), "p")])
    weights = None if scores is None else b.emit("Softmax", [scores], axis=-1)
    if weights is not None and b.choose.chance(0.15):
        weights = b.emit("Dropout", [weights])
    mixed = None if weights is None else b.emit("MatMul", [weights, v])
    back = None if mixed is None else b.emit("Transpose", [mixed], perm=[0, 2, 1, 3])
    merged = None if back is None else b.emit("Reshape", [back, b.target(n, length, heads * size)])
    if merged is None:
        return False
    out = b.linear(merged, b.shape(x)[-1])
    if out is not None and b.choose.chance(0.5):
        out = b.emit("Add", [out, x])
    return b.add(out)


def _projections(b: Builder, x: str, counts: tuple[int, int, int], size: int) -> list[str] | None:
    widths = [count * size for count in counts]
    if b.choose.chance(0.5):
        parts = [b.linear(x, width) for width in widths]
        return None if any(part is None for part in parts) else [part for part in parts if part is not None]
    packed = b.linear(x, sum(widths))
    if packed is None:
        return None
    first = b.emit("Split", [packed, b.ints(*widths)], 3, axis=2)
    return None if first is None else list(b.nodes[-1].output)


def _heads(b: Builder, name: str, shape: tuple[int, int, int, int], last: bool) -> str | None:
    split = b.emit("Reshape", [name, b.target(*shape)])
    return (
        None if split is None else b.emit("Transpose", [split], perm=[0, 2, 3, 1] if last else [0, 2, 1, 3])
    )


def between(b: Builder) -> bool:
    """MatMul of two computed tensors: a tensor with itself turned, or with what fits."""
    x = b.pick(2, 3, 4)
    if x is None or (b.dynamic and b.rank(x) == 2):
        return False
    rank = b.rank(x)
    perm = [*range(rank - 2), rank - 1, rank - 2]
    turned = b.emit("Transpose", [x], perm=perm)
    if turned is None:
        return False
    partner = [name for name in b.pool if b.rank(name) == rank and b.shape(name)[-2] == b.shape(x)[-1]]
    if partner and b.choose.chance(0.5):
        return b.add(b.emit("MatMul", [x, b.choose.one_of(partner)]))
    return b.add(b.emit("MatMul", [x, turned] if b.choose.chance(0.5) else [turned, x]))


def gated(b: Builder) -> bool:
    """A gated feed-forward layer."""
    x = b.pick(3)
    if x is None:
        return False
    width = b.choose.one_of((6, 8, 12))
    up, gate = b.linear(x, width), b.linear(x, width)
    gate = None if gate is None else b.emit("Sigmoid", [gate])
    joined = None if up is None or gate is None else b.emit("Mul", [gate, up])
    return joined is not None and b.add(b.linear(joined, b.shape(x)[-1]))


def embedding(b: Builder) -> bool:
    """Rows of a table by integer inputs, and a table of positions."""
    if "ids" not in b.inputs or b.dynamic:
        return False
    length, width = b.shape("ids")[1], b.choose.one_of((6, 8, 12))
    table = b.weight((11, width), 4, out=1)
    rows = b.emit("Gather", [table, "ids"])
    if rows is not None and b.choose.chance(0.5):
        rows = b.emit("Add", [rows, b.initializer(b.vector(length * width).reshape(1, length, width), "p")])
    return b.add(rows)
