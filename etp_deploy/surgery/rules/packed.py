"""Contractions with weights of a few bits an entry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from etp_deploy.surgery.examples import computed, example, literal
from etp_deploy.surgery.rules.common import attribute, constant_at, input_at
from etp_deploy.surgery.rules.quantized import BYTES, MICROSOFT
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.packed import PackedContraction

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement


_BIAS = literal([0.5, -1.0, 0.0, 2.0, 0.25, -0.75, 1.0, 3.0], "float32")
_SIZES: dict[str, Any] = {"K": 32, "N": 8, "bits": 4, "block_size": 16}
_PACKED = (
    literal((np.arange(8 * 2 * 8) * 37 % 251).reshape(8, 2, 8), BYTES),
    literal(np.linspace(0.1, 0.2, 16), "float32"),
)


@rule(
    "MatMulNBits",
    domain=MICROSOFT,
    examples=(
        example(computed(2, 3, 32), *_PACKED, **_SIZES),
        example(
            computed(2, 3, 32),
            *_PACKED,
            literal([0x21, 0x83, 0x65, 0x87, 0x78, 0x56, 0x34, 0x12], BYTES),
            None,
            _BIAS,
            **_SIZES,
        ),
        example(
            computed(2, 3, 26), *_PACKED, literal(np.linspace(5, 9, 16), "float32"), **_SIZES | {"K": 26}
        ),
        example(
            computed(2, 3, 32),
            *_PACKED,
            None,
            literal([0] * 16 + [1] * 16, "int32"),
            **_SIZES,
            removable=False,
        ),
        example(computed(2, 3, 32), *_PACKED, None, None, computed(8), **_SIZES, removable=False),
        example(computed(2, 3, 32), *_PACKED, **_SIZES, weight_prepacked=1, removable=False),
        example(
            computed(2, 3, 32),
            _PACKED[0],
            literal(np.linspace(0.1, 0.2, 8), "float32"),
            **_SIZES,
            removable=False,
        ),
    ),
)
def matmul_n_bits(node: ir.Node) -> Statement:
    """y[..., m] = sum_k x[..., k] * (b[m, k] - zero[m, k // block]) * scale[m, k // block] + bias[m]"""
    packed = constant_at(node, 1, "the weight is")
    for index in (2, 3, 5):
        if input_at(node, index) is not None:
            constant_at(node, index, "the weight's scale, zero point or bias is")
    if input_at(node, 4) is not None:
        raise RefusedError("its groups are listed index by index")
    bits = int(attribute(node, "bits", 4))
    if bits not in {2, 4, 8} or packed.ndim != 3 or attribute(node, "weight_prepacked", 0):
        raise RefusedError("its weight is packed in another way")
    block = int(attribute(node, "block_size", 0))
    blocks = -(-int(attribute(node, "K", 0)) // max(block, 1))
    if (
        packed.shape[1:] != (blocks, block * bits // 8)
        or constant_at(node, 2, "the scale is").size != len(packed) * blocks
    ):
        raise RefusedError("its weight is not of the size that it says")
    return PackedContraction(node, bits=bits, block=block)
