"""Einsum, as far as it is a transposition or a contraction with a constant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from etp_deploy.surgery.equations import EquationError, equation
from etp_deploy.surgery.examples import computed, example, weight
from etp_deploy.surgery.rules.registry import RefusedError, rule
from etp_deploy.surgery.statements.base import array_of
from etp_deploy.surgery.statements.moves import Permute
from etp_deploy.surgery.statements.stacked import Stacked

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Statement
    from etp_deploy.surgery.statements.named import Names


@rule(
    "Einsum",
    examples=(
        example(computed(2, 6, 4), equation="abc->acb"),
        example(computed(2, 6, 4), equation="abc->a", removable=False),
        example(computed(2, 6, 6), equation="abb->ab", removable=False),
        example(computed(2, 3, 6), weight(6, 4), equation="abc,cd->abd"),
        example(computed(2, 3, 6), weight(6, 3, 4), equation="abc,cde->abde"),
        example(computed(2, 5, 3, 4), weight(3, 4, 6), equation="abcd,cde->abe"),
        example(computed(2, 3, 6), weight(5, 6), equation="...c,dc->d..."),
        example(weight(3, 6, 4), computed(2, 6), equation="eih,ti->teh"),
        example(weight(3, 6, 4), computed(2, 3, 6), equation="eih,tei"),
        example(computed(2, 3, 6), weight(1, 6, 4), equation="eti,eih->eth"),
        example(computed(2, 3, 6), weight(6), equation="abc,c->bac"),
        example(computed(2, 3, 6), weight(6, 4), equation="abc,cd->ab", removable=False),
        example(computed(2, 3, 6), weight(3, 4), equation="abc,bd->abd", removable=False),
        example(computed(2, 3, 6), weight(6, 6), equation="abc,cc->abc", removable=False),
        example(computed(2, 3, 6), computed(2, 6, 3), equation="abc,acd->abd", removable=False),
        example(computed(2, 6), weight(6), weight(6), equation="ab,b,b->ab", removable=False),
    ),
)
def einsum(node: ir.Node) -> Statement:
    """y[out] = sum over all names that are not in out of the product of the operands x[names]"""
    try:
        inputs, out = equation(node)
    except EquationError as error:
        raise RefusedError(str(error)) from error
    if any(len(set(names)) < len(names) for names in inputs):
        raise RefusedError("an equation that takes a diagonal")
    if len(inputs) == 1 and set(inputs[0]) == set(out):
        return Permute(node, tuple(inputs[0].index(name) for name in out))
    constants = [array_of(value) for value in node.inputs]
    if len(inputs) != 2 or (constants[0] is None) == (constants[1] is None):
        raise RefusedError("an equation that is no product of a matrix and a constant")
    data = 0 if constants[0] is None else 1
    if not set(inputs[0]) ^ set(inputs[1]) <= set(out):
        raise RefusedError("an equation that sums over an axis of one operand")
    ours, weight = (_broadcast(node.inputs[which], inputs[which]) for which in (data, 1 - data))
    known = {*ours, *weight}
    named = tuple(name if name in known else None for name in out)
    return Stacked(node, data=data, names=(ours, weight, named))


def _broadcast(value: ir.Value | None, names: tuple[str, ...]) -> Names:
    """Return the names of the axes that have more than one index."""
    assert value is not None
    assert value.shape is not None
    return tuple(None if size == 1 else name for name, size in zip(names, value.shape, strict=True))
