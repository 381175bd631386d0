"""Steps of random graphs: attention and rotary embeddings as operators, ONNX's and ONNX Runtime's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from graphs import Builder

MICROSOFT = "com.microsoft"


def _planted(b: Builder, array: np.ndarray, heads: int) -> np.ndarray:
    """Let whole heads of a weight's columns, or columns at other places in each head, be zero."""
    rows, width = array.shape
    split = array.reshape(rows, heads, width // heads)
    kind = b.choose.one_of(("none", "heads", "heads", "inside", "columns"))
    if kind == "heads":
        split[:, b.dead(heads)] = 0
    elif kind == "inside":
        for head in range(heads):
            place = (np.arange(b.choose.integer(1, 2)) + head) % (width // heads)
            split[:, head, place] = 0
    elif kind == "columns":
        array[:, b.dead(width)] = 0
    return array


def _projection(b: Builder, x: str, heads: int, size: int) -> str | None:
    width, fan = heads * size, b.shape(x)[-1]
    array = (b.random.standard_normal((fan, width)) / np.sqrt(fan)).astype(np.float32)
    made = b.emit("MatMul", [x, b.initializer(_planted(b, array, heads))])
    return b.biased(made, 2)


def _opened(b: Builder, name: str | None, heads: int, size: int) -> str | None:
    if name is None:
        return None
    n, length, _ = b.shape(name)
    split = b.emit("Reshape", [name, b.target(n, length, heads, size)])
    return None if split is None else b.emit("Transpose", [split], perm=[0, 2, 1, 3])


def _closed(b: Builder, name: str | None) -> str | None:
    if name is None:
        return None
    n, heads, length, size = b.shape(name)
    moved = b.emit("Transpose", [name], perm=[0, 2, 1, 3])
    return None if moved is None else b.emit("Reshape", [moved, b.target(n, length, heads * size)])


def _read(b: Builder, x: str, name: str | None, heads: int) -> bool:
    """Let an out-projection read the heads, some of them with zeros."""
    if name is None:
        return False
    width, out = b.shape(name)[-1], b.shape(x)[-1]
    array = (b.random.standard_normal((out, width)) / np.sqrt(width)).astype(np.float32)
    made = b.emit("MatMul", [name, b.initializer(_planted(b, array, heads).T.copy())])
    made = b.biased(made, 2)
    if made is not None and b.choose.chance(0.4):
        made = b.emit("Add", [made, x])
    return b.add(made)


def _bias(b: Builder, heads: int, queries: int, keys: int) -> str:
    """Return an added bias, an own one for each head or one for all, computed or not."""
    shape = (1, b.choose.one_of((heads, 1)), queries, keys)
    bias = b.initializer(b.random.standard_normal(shape).astype(np.float32), "k")
    if b.choose.chance(0.4):
        bias = b.emit("Mul", [bias, b.initializer(b.vector(shape[1]).reshape(1, -1, 1, 1), "p")]) or bias
    return bias


def _others(b: Builder, x: str) -> str:
    """Return what keys and values are made of: the same tensor, or another sequence as wide as it likes."""
    fits = [name for name in b.pool if b.rank(name) == 3 and b.shape(name)[0] == b.shape(x)[0]]
    return str(b.choose.one_of(fits)) if b.choose.chance(0.3) else x


def _picked(b: Builder) -> str | None:
    x = b.pick(3)
    return None if x is None or b.shape(x)[-1] > 64 or b.shape(x)[1] > 32 else x


def standard_attention(b: Builder) -> bool:
    """ONNX's Attention on tensors of three or four axes, with grouped queries, masks and rotary embeddings."""
    x = _picked(b)
    if x is None or b.opset < 23:
        return False
    other = _others(b, x)
    groups, per_group = b.choose.integer(1, 4), b.choose.one_of((1, 1, 2, 3))
    size, value_size = b.choose.one_of((2, 4)), b.choose.integer(1, 4)
    heads, merged = groups * per_group, b.choose.chance(0.5)
    q, k, v = (
        _projection(b, x, heads, size),
        _projection(b, other, groups, size),
        _projection(b, other, groups, value_size),
    )
    attributes: dict[str, object] = {"q_num_heads": heads, "kv_num_heads": groups} if merged else {}
    if not merged:
        q, k, v = _opened(b, q, heads, size), _opened(b, k, groups, size), _opened(b, v, groups, value_size)
    if b.choose.chance(0.3):
        q, k = (
            _rotated(b, part, count, size, b.shape(source)[1])
            for part, count, source in ((q, heads, x), (k, groups, other))
        )
    if q is None or k is None or v is None:
        return False
    inputs = [q, k, v]
    lengths = b.shape(x)[1], b.shape(other)[1]
    kind = b.choose.one_of(("none", "none", "bias", "seen"))
    if kind == "bias":
        inputs.append(_bias(b, heads, *lengths))
    elif kind == "seen":
        inputs.append(b.initializer(b.random.random(lengths) < 0.6, "k"))
    if b.choose.chance(0.3):
        attributes["is_causal"] = 1
    if b.choose.chance(0.2):
        attributes["softcap"] = 2.0
    if b.choose.chance(0.2):
        attributes["scale"] = 0.5
    made = b.emit("Attention", inputs, **attributes)
    return _read(b, x, made if merged else _closed(b, made), heads)


def _rotated(b: Builder, name: str | None, heads: int, size: int, length: int) -> str | None:
    """Rotate queries or keys, by ONNX's operator or ONNX Runtime's own."""
    if name is None or size % 2:
        return name
    half = b.choose.one_of((size // 2, 1))
    angles = b.random.standard_normal((length + 2, half)).astype(np.float32)
    tables = [b.initializer(np.cos(angles), "k"), b.initializer(np.sin(angles), "k")]
    places = b.initializer(b.random.integers(0, length, (b.shape(name)[0], length)), "k")
    attributes: dict[str, object] = {"interleaved": int(b.choose.chance(0.4))}
    if 2 * half < size:
        attributes |= {"rotary_embedding_dim": 2 * half, "num_heads": heads}
    if b.choose.chance(0.5) or b.opset < 23:
        return b.emit("RotaryEmbedding", [name, places, *tables], domain=MICROSOFT, **attributes)
    if b.rank(name) == 3:
        attributes["num_heads"] = heads
    return b.emit("RotaryEmbedding", [name, *tables, places], **attributes)


def projecting_attention(b: Builder) -> bool:
    """ONNX Runtime's Attention, which holds the projections."""
    x = _picked(b)
    if x is None:
        return False
    heads, size, value_size = b.choose.integer(1, 4), b.choose.integer(1, 4), b.choose.integer(1, 4)
    fan, (n, length) = b.shape(x)[-1], b.shape(x)[:2]
    if b.choose.chance(0.6):
        value_size = size
    parts = [
        _planted(b, (b.random.standard_normal((fan, heads * width)) / np.sqrt(fan)).astype(np.float32), heads)
        for width in (size, size, value_size)
    ]
    weight = np.concatenate(parts, axis=1)
    if b.choose.chance(0.3):
        weight[b.dead(fan)] = 0
    biased = b.choose.chance(0.7)
    inputs = [x, b.initializer(weight), b.initializer(b.vector(weight.shape[1]), "b") if biased else ""]
    attributes: dict[str, object] = {"num_heads": heads, "unidirectional": int(b.choose.chance(0.3))}
    if value_size != size or b.choose.chance(0.2):
        attributes["qkv_hidden_sizes"] = [heads * size, heads * size, heads * value_size]
    kind = b.choose.one_of(("none", "none", "mask", "lengths", "bias"))
    if kind == "mask":
        inputs.append(b.initializer((b.random.random((n, length)) < 0.7).astype(np.int32), "k"))
    elif kind == "lengths":
        inputs.append(b.initializer(b.random.integers(1, length + 1, n).astype(np.int32), "k"))
    elif kind == "bias":
        inputs += ["", "", _bias(b, heads, length, length)]
    made = b.emit("Attention", inputs, domain=MICROSOFT, **attributes)
    return _read(b, x, made, heads)


def multi_head_attention(b: Builder) -> bool:
    """ONNX Runtime's MultiHeadAttention: separate tensors, keys and values by head, a bias, a mask."""
    x = _picked(b)
    if x is None:
        return False
    other = _others(b, x)
    heads, size = b.choose.integer(1, 4), b.choose.integer(1, 4)
    by_head = b.choose.chance(0.25)
    value_size = size if by_head else b.choose.integer(1, 4)
    q, k, v = (
        _projection(b, x, heads, size),
        _projection(b, other, heads, size),
        _projection(b, other, heads, value_size),
    )
    if by_head:
        k, v = _opened(b, k, heads, size), _opened(b, v, heads, value_size)
    elif size % 2 == 0 and b.choose.chance(0.2):
        q, k = _rotated(b, q, heads, size, b.shape(x)[1]), _rotated(b, k, heads, size, b.shape(other)[1])
    if q is None or k is None or v is None:
        return False
    (n, length), keys = b.shape(x)[:2], b.shape(other)[1]
    inputs = [q, k, v]
    if not by_head and b.choose.chance(0.5):
        inputs.append(b.initializer(b.vector(heads * (2 * size + value_size)), "b"))
    kind = b.choose.one_of(("none", "none", "mask", "bias", "both"))
    if kind != "none":
        mask = b.initializer((b.random.random((n, keys)) < 0.7).astype(np.int32), "k")
        inputs += [""] * (4 - len(inputs)) + [mask if kind in {"mask", "both"} else ""]
        inputs += [_bias(b, heads, length, keys)] if kind in {"bias", "both"} else []
    attributes: dict[str, object] = {"num_heads": heads}
    if b.choose.chance(0.2):
        attributes["scale"] = 0.4
    made = b.emit("MultiHeadAttention", inputs, domain=MICROSOFT, **attributes)
    return _read(b, x, made, heads)


def group_query_attention(b: Builder) -> bool:
    """ONNX Runtime's GroupQueryAttention, packed or not, rotated or not, with a cache at times."""
    x = _picked(b)
    if x is None:
        return False
    groups, per_group, size = b.choose.integer(1, 3), b.choose.one_of((1, 2, 3)), b.choose.one_of((8, 16))
    heads, (n, length) = groups * per_group, b.shape(x)[:2]
    if b.choose.chance(0.4):
        parts: list[str | None] = [_projection(b, x, heads + 2 * groups, size), "", ""]
    else:
        parts = [_projection(b, x, count, size) for count in (heads, groups, groups)]
    if None in parts:
        return False
    inputs = [part or "" for part in parts] + ["", ""]
    inputs.append(b.initializer(np.full(n, length - 1, np.int32), "k"))
    inputs.append(b.initializer(np.array(length, np.int32), "k"))
    attributes: dict[str, object] = {"num_heads": heads, "kv_num_heads": groups}
    if size == 16 and b.choose.chance(0.6):
        angles = b.random.standard_normal((length + 1, 8)).astype(np.float32)
        inputs += [b.initializer(np.cos(angles), "k"), b.initializer(np.sin(angles), "k")]
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(b.choose.chance(0.4))}
    if b.choose.chance(0.2):
        attributes["smooth_softmax"] = 1
    elif b.choose.chance(0.3):
        inputs += [""] * (11 - len(inputs)) + [b.initializer(b.vector(heads, 0), "s")]
    outputs = 3 if b.choose.chance(0.2) else 1
    made = b.emit("GroupQueryAttention", inputs, outputs, domain=MICROSOFT, **attributes)
    return _read(b, x, made, heads)


STEPS = (
    standard_attention,
    standard_attention,
    projecting_attention,
    multi_head_attention,
    group_query_attention,
)
"""What `graph_steps` adds to its own."""
