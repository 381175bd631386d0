"""Matrix products."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.examples import computed, example, weight
from etp_deploy.surgery.rules.common import attribute, constant_at, input_at, rank
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.product import Product
from etp_deploy.surgery.statements.stacked import stack
from etp_deploy.surgery.statements.weights import Weight

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement


@rule(
    "MatMul",
    examples=(
        example(computed(2, 3, 6), weight(6, 4)),
        example(computed(6), weight(6, 4)),
        example(weight(4, 6), computed(2, 6, 3)),
        example(weight(4, 6), computed(6)),
        example(computed(2, 3, 6), weight(6)),
        example(weight(6), computed(2, 6, 3)),
        example(computed(6), weight(6)),
        example(weight(3, 5, 6), computed(6)),
        example(computed(2, 3, 6), computed(6)),
        example(computed(6), computed(2, 6, 3)),
        example(computed(6), computed(6)),
        example(computed(2, 3, 5, 4), computed(2, 3, 4, 5)),
        example(computed(2, 3, 6, 4), computed(3, 4, 5)),
        example(computed(2, 3, 5, 4), weight(3, 4, 5)),
        example(weight(3, 5, 4), computed(3, 4, 2)),
        example(computed(3, 2, 4), weight(3, 4, 5)),
        example(computed(2, 6), weight(3, 6, 4)),
        example(computed(2, 1, 3, 6), weight(1, 4, 6, 5)),
        example(computed(2, 3, 4, 6), weight(2, 1, 6, 5)),
        example(computed(6), weight(3, 6, 4)),
    ),
)
def matmul(node: ir.Node) -> Statement:
    """y[..., n, m] = sum_k a[..., n, k] * b[..., k, m]"""
    first, second = array_of(node.inputs[0]), array_of(node.inputs[1])
    if second is not None and second.ndim == 2 and first is None:
        axis = rank(node.inputs[0]) - 1
        weight = Weight(1, out=1, contracted=0)
        return Contraction(node, data=0, data_axis=axis, out_axis=axis, weight=weight, bias=None)
    if first is not None and first.ndim == 2 and second is None and rank(node.inputs[1]) >= 2:
        axis = rank(node.inputs[1]) - 2
        weight = Weight(0, out=0, contracted=1)
        return Contraction(node, data=1, data_axis=axis, out_axis=axis, weight=weight, bias=None)
    if (first is None) != (second is None):
        return stack(node, 0 if first is None else 1)
    return Product(node)


@rule(
    "Gemm",
    examples=(
        example(computed(5, 6), weight(6, 4), weight(4)),
        example(computed(5, 6), weight(4, 6), weight(4), transB=1, alpha=0.5, beta=2.0),
        example(computed(6, 5), weight(6, 4), weight(1, 4), transA=1),
        example(computed(5, 6), weight(6, 4), alpha=0.5, beta=2.0),
        example(computed(5, 6), weight(6, 4), weight(5, 4), removable=False),
        example(computed(5, 6), weight(6, 4), weight(4), beta=0.0, removable=False),
        example(computed(5, 6), computed(6, 4), removable=False),
        example(computed(5, 6), weight(6, 4), computed(4), removable=False),
    ),
)
def gemm(node: ir.Node) -> Statement:
    """y[n, m] = alpha * sum_k a[n, k] * b[k, m] + beta * c[m], with a or b transposed on request"""
    constant_at(node, 1, "the weight is")
    if input_at(node, 2) is not None and constant_at(node, 2, "the bias is").ndim == 2:
        rows = constant_at(node, 2, "the bias is").shape[0]
        if rows != 1:
            raise RefusedError("the bias differs from row to row")
    beta = float(attribute(node, "beta", 1.0))
    if beta == 0.0:
        raise RefusedError("the bias is switched off (beta is 0)")
    weight = (
        Weight(1, out=0, contracted=1) if attribute(node, "transB", 0) else Weight(1, out=1, contracted=0)
    )
    return Contraction(
        node,
        data=0,
        data_axis=0 if attribute(node, "transA", 0) else 1,
        out_axis=1,
        weight=weight,
        bias=2,
        bias_scale=float(attribute(node, "alpha", 1.0)) / beta,
        out_scale=beta,
    )
