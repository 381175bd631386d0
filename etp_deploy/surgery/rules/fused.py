"""Operators of ONNX Runtime's own that its optimiser writes for several standard ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, weight
from etp_deploy.surgery.rules.common import attribute, broadcast_maps, rank, same_axes
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.product import Product
from etp_deploy.surgery.statements.stacked import stack
from etp_deploy.surgery.statements.weights import Weight

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement

DOMAIN = "com.microsoft"


@rule(
    "Gelu", "QuickGelu", domain=DOMAIN, examples=(example(computed(2, 3, 6)), example(computed(2, 6, 4, 5)))
)
def gelu(node: ir.Node) -> Statement:
    """y[...] = x[...] * F(x[...]), F the normal distribution or a sigmoid close to it"""
    return Pointwise(node, {0: same_axes(rank(node.inputs[0]))})


@rule(
    "BiasGelu",
    "FastGelu",
    domain=DOMAIN,
    examples=(
        example(computed(2, 3, 6), weight(6)),
        example(computed(2, 3, 6), operator="FastGelu"),
        example(computed(4, 6), computed(6)),
    ),
)
def biased_gelu(node: ir.Node) -> Statement:
    """y[..., c] = gelu(x[..., c] + b[c])"""
    return Pointwise(node, broadcast_maps(node))


@rule(
    "FusedMatMul",
    "TransposeMatMul",
    domain=DOMAIN,
    examples=(
        example(computed(2, 3, 6), weight(6, 4), alpha=0.5),
        example(computed(2, 3, 6), weight(4, 6), transB=1, alpha=2.0),
        example(computed(2, 6, 3), weight(6, 4), transA=1),
        example(weight(4, 6), computed(2, 6, 3), alpha=0.5),
        example(weight(6, 4), computed(2, 3, 6), transA=1, transB=1),
        example(computed(2, 4, 3, 6), computed(2, 4, 5, 6), transB=1, alpha=0.25),
        example(computed(2, 4, 6, 3), computed(2, 4, 6, 5), transA=1),
        example(computed(2, 4, 3, 6), computed(2, 4, 6, 5), alpha=0.25),
        example(computed(6), weight(6, 4), alpha=0.5, removable=False),
        example(computed(2, 4, 3, 6), weight(4, 5, 6), transB=1),
        example(weight(4, 6, 5), computed(4, 3, 6), transA=1, transB=1, alpha=0.5),
        example(
            computed(2, 2, 6),
            computed(2, 6, 4),
            transBatchA=1,
            operator="FusedMatMul",
            removable=False,
        ),
    ),
)
def fused_matmul(node: ir.Node) -> Statement:
    """y[..., n, m] = alpha * sum_k a[..., n, k] * b[..., k, m], with a or b transposed on request"""
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise RefusedError("a product that exchanges the batch with an axis of the matrices")
    alpha = float(attribute(node, "alpha", 1.0))
    turned = (bool(attribute(node, "transA", 0)), bool(attribute(node, "transB", 0)))
    if min(rank(value) for value in node.inputs) < 2:
        raise RefusedError("a product with a vector")
    arrays = [array_of(value) for value in node.inputs]
    for which in (0, 1):
        array = arrays[which]
        if array is not None and array.ndim == 2 and arrays[1 - which] is None:
            return _contraction(node, 1 - which, turned, alpha)
        if array is not None and array.ndim > 2 and arrays[1 - which] is None:
            return stack(node, 1 - which, turned, alpha)
    return Product(node, transposed=turned, scale=alpha)


def _contraction(node: ir.Node, data: int, turned: tuple[bool, bool], alpha: float) -> Statement:
    """Return the statement of a product with a constant matrix.

    Args:
        node: the node.
        data: which of the two is computed.
        turned: which of them are transposed.
        alpha: what the product is multiplied by.
    """
    axes = rank(node.inputs[data])
    inner, outer = axes - 1, axes - 2
    if turned[data] != (data == 1):
        inner, outer = outer, inner
    contracted = int(turned[1]) if data == 0 else 1 - int(turned[0])
    out = axes - 1 if data == 0 else axes - 2
    return Contraction(
        node,
        data=data,
        data_axis=inner,
        out_axis=out,
        weight=Weight(1 - data, out=1 - contracted, contracted=contracted),
        bias=None,
        bias_scale=alpha,
        sources=(*range(axes - 2), outer, outer),
    )
