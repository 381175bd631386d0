"""Attention as one operator, in ONNX and in ONNX Runtime's own set."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.examples import computed, example, indices, literal, weight
from etp_deploy.surgery.rules.common import attribute, input_at, rank, static
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.attention import Attention, Form
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.heads import KEY, QUERY, VALUE, Heads, Tensor
from etp_deploy.surgery.statements.rotary import Rotary

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

_MICROSOFT = "com.microsoft"
_CACHE = "a cache of keys and values holds it, at"


def _used(node: ir.Node, *places: int) -> bool:
    """Return whether any of some outputs is read, or an output of the model."""
    outputs = [node.outputs[place] for place in places if place < len(node.outputs)]
    return any(value.uses() or value.is_graph_output() for value in outputs)


def _separate(axes: tuple[int, ...], key_axes: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    key_axes = axes if key_axes is None else key_axes
    return Tensor(0, (QUERY,), axes), Tensor(1, (KEY,), key_axes), Tensor(2, (VALUE,), key_axes)


def _check(node: ir.Node, tensors: tuple[Tensor, ...], qk_output: int) -> None:
    if any(array_of(node.inputs[tensor.index]) is not None for tensor in tensors):
        raise RefusedError("constant queries, keys or values of an attention")
    if _used(node, qk_output):
        raise RefusedError("the scores of an attention are used")


def _quotient(total: int, parts: int) -> int:
    if parts < 1 or total % parts:
        raise RefusedError("the heads of an attention do not divide its width")
    return total // parts


@rule(
    "Attention",
    examples=(
        example(computed(2, 4, 5, 6), computed(2, 4, 3, 6), computed(2, 4, 3, 2), opset=23),
        example(computed(2, 4, 5, 6), computed(2, 2, 3, 6), computed(2, 2, 3, 2), opset=23, is_causal=1),
        example(
            *(computed(2, 5, 12), computed(2, 3, 6), computed(2, 3, 4)),
            opset=23,
            q_num_heads=4,
            kv_num_heads=2,
        ),
        example(
            *(computed(2, 5, 12) for _ in range(3)), weight(4, 5, 5), opset=23, q_num_heads=4, kv_num_heads=4
        ),
        example(
            *(computed(2, 5, 12), computed(2, 3, 12), computed(2, 3, 12), computed(2, 4, 5, 3)),
            opset=23,
            q_num_heads=4,
            kv_num_heads=4,
            scale=0.3,
        ),
        example(
            *(computed(2, 3, 12), computed(2, 3, 12), computed(2, 3, 12)),
            literal(np.tril(np.ones((3, 3))), "bool"),
            opset=23,
            q_num_heads=4,
            kv_num_heads=4,
            softcap=2.0,
        ),
        example(
            *(computed(2, 4, 3, 2), computed(2, 2, 3, 2), computed(2, 2, 3, 2), None),
            *(computed(2, 2, 4, 2), computed(2, 2, 4, 2)),
            outputs=3,
            opset=23,
        ),
        example(
            *(computed(2, 4, 3, 2), computed(2, 4, 3, 2), computed(2, 4, 3, 2)),
            outputs=4,
            opset=23,
            removable=False,
        ),
        example(computed(2, 4, 3, 2), weight(2, 4, 3, 2), computed(2, 4, 3, 2), opset=23, removable=False),
        example(
            *(computed(2, 4, 5, 6), computed(2, 4, 3, 6), computed(2, 4, 3, 2), None, None, None),
            literal([0, 2]),
            opset=24,
        ),
    ),
)
def attention(node: ir.Node) -> Statement:
    """y[b, h, n, e] = sum_m softmax_m(scale * q[b, h, n] . k[b, g, m] + mask) * v[b, g, m, e]"""
    merged = rank(node.inputs[0]) == 3
    tensors = _separate((2,) if merged else (1, 3))
    _check(node, tensors, 3)
    if merged:
        queries, groups = int(attribute(node, "q_num_heads", 0)), int(attribute(node, "kv_num_heads", 0))
        size, value_size = (
            _quotient(static(node.inputs[index], 2), n) for index, n in ((0, queries), (2, groups))
        )
    else:
        queries, groups = (static(node.inputs[index], 1) for index in (0, 1))
        size, value_size = (static(node.inputs[index], 3) for index in (0, 2))
    cached = input_at(node, 4) is not None or input_at(node, 5) is not None or _used(node, 1, 2)
    form = Form(
        (2,) if merged else (1, 3),
        scale=None if "scale" in node.attributes else 1.0 / math.sqrt(size),
        counts=tuple(name for name in ("q_num_heads", "kv_num_heads") if name in node.attributes),
        sums_to_one=not _may_mask_all(node),
        shiftable=not attribute(node, "softcap", 0.0),
        cached=_CACHE if cached else "",
        per_head=((3, 3),),
    )
    return Attention(node, tensors, Heads(groups, _quotient(queries, groups), size, value_size), form)


def _may_mask_all(node: ir.Node) -> bool:
    """Return whether a query may see no key, for which the operator answers zero."""
    mask = array_of(input_at(node, 3))
    if input_at(node, 6) is not None:
        return True
    if mask is None:
        return input_at(node, 3) is not None
    seen = mask if mask.dtype.kind == "b" else mask > -np.inf
    # under a causal mask the first key is the one that all queries see
    return not (seen[..., 0] if attribute(node, "is_causal", 0) else seen.any(axis=-1)).all()


@rule(
    "MultiHeadAttention",
    domain=_MICROSOFT,
    examples=(
        example(computed(2, 3, 12), computed(2, 5, 12), computed(2, 5, 8), num_heads=4),
        example(
            *(computed(2, 3, 12), computed(2, 3, 12), computed(2, 3, 12), None),
            *(literal(np.tri(2, 3, 1), "int32"), computed(1, 4, 3, 3)),
            num_heads=4,
            scale=0.4,
        ),
        example(
            *(computed(2, 3, 12), computed(2, 3, 12), computed(2, 3, 12), None, None, weight(1, 4, 3, 3)),
            num_heads=4,
            unidirectional=1,
        ),
        example(computed(1, 2, 20), computed(1, 5, 3, 4), computed(1, 5, 3, 4), num_heads=5),
        example(
            *(computed(2, 3, 12), computed(2, 3, 12), computed(2, 3, 12), computed(36)),
            num_heads=4,
            removable=False,
        ),
        example(computed(2, 3, 12), weight(2, 5, 12), computed(2, 5, 12), num_heads=4, removable=False),
    ),
)
def multi_head_attention(node: ir.Node) -> Statement:
    """y[b, n, (h, e)] = sum_m softmax_m(scale * q[b, n, h] . k[b, m, h] + mask) * v[b, m, h, e], packed in any way

    What a mask hides gets a number added (`mask_filter_value`), so that weights sum to one under any mask.
    """
    heads = int(attribute(node, "num_heads", 0))
    if input_at(node, 3) is not None:
        raise RefusedError("a bias that is computed or shared by packed tensors")
    packed = rank(node.inputs[0]) == 5
    key = 0 if packed else rank(input_at(node, 1))
    if packed:
        tensors: tuple[Tensor, ...] = (Tensor(0, (QUERY, KEY, VALUE), (2, 3, 4)),)
        size = value_size = static(node.inputs[0], 4)
    elif key == 5:
        tensors = (Tensor(0, (QUERY,), (2,)), Tensor(1, (KEY, VALUE), (2, 3, 4)))
        size = value_size = static(node.inputs[1], 4)
    else:
        tensors = _separate((2,), (1, 3) if key == 4 else (2,))
        size = _quotient(static(node.inputs[0], 2), heads)
        value_size = (
            static(input_at(node, 2), 3) if key == 4 else _quotient(static(input_at(node, 2), 2), heads)
        )
    _check(node, tensors, 3)
    cached = any(input_at(node, index) is not None for index in (6, 7)) or _used(node, 1, 2)
    form = Form(
        (2,),
        scale=None if attribute(node, "scale", 0.0) else 1.0 / math.sqrt(size),
        counts=("num_heads",),
        one_size=key != 3,
        cached=_CACHE if cached else "",
        per_head=((5, 3),),
    )
    return Attention(node, tensors, Heads(heads, 1, size, value_size), form)


@rule(
    "GroupQueryAttention",
    domain=_MICROSOFT,
    examples=(
        example(
            *(computed(2, 3, 96), None, None, None, None, literal([2, 2], "int32"), literal(3, "int32")),
            num_heads=4,
            kv_num_heads=4,
            outputs=1,
        ),
        example(
            *(computed(2, 3, 64), None, None, None, None, literal([2, 2], "int32"), literal(3, "int32")),
            num_heads=4,
            kv_num_heads=2,
            outputs=1,
        ),
        example(
            *(computed(2, 3, 128), None, None, None, None, literal([2, 2], "int32"), literal(3, "int32")),
            *(weight(4, 8), weight(4, 8)),
            num_heads=4,
            kv_num_heads=2,
            do_rotary=1,
            outputs=1,
        ),
        example(
            *(
                computed(2, 3, 32),
                computed(2, 3, 16),
                computed(2, 3, 16),
                computed(2, 2, 0, 8),
                computed(2, 2, 0, 8),
            ),
            *(literal([2, 2], "int32"), literal(3, "int32")),
            num_heads=4,
            kv_num_heads=2,
            outputs=3,
        ),
        example(
            *(computed(2, 3, 32), weight(2, 3, 32), computed(2, 3, 32), None, None),
            *(literal([2, 2], "int32"), literal(3, "int32")),
            num_heads=4,
            kv_num_heads=4,
            outputs=1,
            removable=False,
        ),
    ),
)
def group_query_attention(node: ir.Node) -> Statement:
    """y[b, n, (h, e)] = sum_m softmax_m(scale * q[b, n, h] . k[b, g, m] + mask) * v[b, g, m, e], h / g heads a key"""
    queries, groups = int(attribute(node, "num_heads", 0)), int(attribute(node, "kv_num_heads", 0))
    packed = input_at(node, 1) is None
    tensors = (Tensor(0, (QUERY, KEY, VALUE), (2,)),) if packed else _separate((2,))
    _check(node, tensors, 3)
    size = _quotient(static(node.inputs[0], 2), queries + 2 * groups if packed else queries)
    rotated = bool(attribute(node, "do_rotary", 0))
    normalised = input_at(node, 14) is not None
    cached = any(input_at(node, index) is not None for index in (3, 4, 12, 13)) or _used(node, 1, 2)
    sink = input_at(node, 11) is not None or attribute(node, "smooth_softmax", 0) > 0
    form = Form(
        (2,),
        counts=("num_heads", "kv_num_heads"),
        # rows beyond a sequence's length hold what the kernel pleases
        sums_to_one=False,
        shiftable=not (rotated or normalised or sink or attribute(node, "softcap", 0.0)),
        whole="heads have to be of a size that is a multiple of eight, at",
        cached=_CACHE if cached else "",
        per_head=((10, 3), (11, 1)),
    )
    return Attention(node, tensors, Heads(groups, _quotient(queries, groups), size, size), form)


@rule(
    "Attention",
    domain=_MICROSOFT,
    examples=(
        example(
            *(computed(2, 3, 6), weight(6, 36), weight(36), None, computed(2, 2, 4, 5, 3)),
            num_heads=4,
            outputs=2,
            removable=False,
        ),
        example(
            computed(2, 3, 6),
            weight(6, 96),
            weight(96),
            num_heads=1,
            do_rotary=1,
            rotary_embedding_dim=32,
            removable=False,
        ),
        example(computed(2, 3, 6), computed(6, 36), weight(36), num_heads=4, removable=False),
    ),
)
def projecting_attention(node: ir.Node) -> Statement:
    """y = MultiHeadAttention(x wq + bq, x wk + bk, x wv + bv); `prepare` writes out the forms that can be cut"""
    if any(input_at(node, index) is not None for index in (4, 6)) or _used(node, 1):
        raise RefusedError("an Attention with a cache")
    if attribute(node, "do_rotary", 0):
        raise RefusedError("an Attention that rotates its queries and keys")
    raise RefusedError("an Attention whose weights are computed")


@rule(
    *("PackedAttention", "PackedMultiHeadAttention", "DecoderAttention", "SparseAttention"),
    *("DecoderMaskedMultiHeadAttention", "DecoderMaskedSelfAttention", "LongformerAttention", "QAttention"),
    domain=_MICROSOFT,
    examples=(
        example(
            *(computed(2, 1, 12), computed(2, 1, 12), computed(2, 1, 12), None, None),
            *(computed(2, 4, 5, 3), computed(2, 4, 5, 3), literal(4, "int32")),
            operator="DecoderMaskedMultiHeadAttention",
            outputs=3,
            num_heads=4,
            past_present_share_buffer=1,
            removable=False,
        ),
        example(computed(2, 3, 12), computed(12, 36), computed(36), num_heads=4, removable=False),
    ),
)
def pinned_attention(node: ir.Node) -> Statement:
    """y = attention over packed tokens, caches or blocks, whose heads are the model's interface or its kernel's"""
    raise RefusedError(f"{node.op_type} keeps its heads: its caches or packed tokens are laid out by them")


@rule(
    "RotaryEmbedding",
    examples=(
        example(computed(2, 4, 3, 6), weight(8, 3), weight(8, 3), indices(2, 3, below=8), opset=23),
        example(
            *(computed(2, 3, 24), weight(8, 2), weight(8, 2), indices(2, 3, below=8)),
            opset=23,
            num_heads=4,
            rotary_embedding_dim=4,
            interleaved=1,
        ),
        example(
            *(computed(2, 4, 3, 6), weight(8, 4), weight(8, 4), indices(2, 3, below=8)),
            opset=23,
            removable=False,
        ),
    ),
)
def rotary_embedding(node: ir.Node) -> Statement:
    """y[h, i] = x[h, i] * cos[i] - x[h, j] * sin[i] for the pairs (i, j) of a head"""
    return _rotary(node, static(node.inputs[1], rank(node.inputs[1]) - 1))


@rule(
    "RotaryEmbedding",
    domain=_MICROSOFT,
    examples=(
        example(computed(2, 4, 3, 6), indices(2, 3, below=8), weight(8, 3), weight(8, 3)),
        example(computed(2, 3, 24), indices(1, below=5), weight(8, 3), weight(8, 3), interleaved=1),
        example(
            *(computed(2, 3, 24), indices(2, 3, below=8), weight(8, 2), weight(8, 2)),
            num_heads=4,
            rotary_embedding_dim=4,
        ),
        example(
            *(computed(2, 3, 24), indices(2, 3, below=8), weight(8, 3), weight(8, 3)),
            num_heads=4,
            is_packed_batching=1,
            removable=False,
        ),
    ),
)
def microsoft_rotary_embedding(node: ir.Node) -> Statement:
    """y[h, i] = x[h, i] * cos[i] - x[h, j] * sin[i] for the pairs (i, j) of a head"""
    if attribute(node, "is_packed_batching", 0):
        raise RefusedError("a rotary embedding of packed batches")
    return _rotary(node, static(node.inputs[2], 1))


def _rotary(node: ir.Node, half: int) -> Statement:
    open_heads = rank(node.inputs[0]) == 4
    heads = int(attribute(node, "num_heads", 0))
    if open_heads:
        heads, size = static(node.inputs[0], 1), static(node.inputs[0], 3)
    elif heads:
        size = _quotient(static(node.inputs[0], 2), heads)
    else:
        size = 2 * half
        heads = _quotient(static(node.inputs[0], 2), size)
    partner, rotated = np.arange(size), 2 * half
    if rotated > size:
        raise RefusedError("the tables of a rotary embedding are wider than its heads")
    turned = np.arange(rotated)
    partner[:rotated] = turned ^ 1 if attribute(node, "interleaved", 0) else (turned + half) % max(rotated, 1)
    return Rotary(node, (1, 3) if open_heads else (2,), heads, partner)
