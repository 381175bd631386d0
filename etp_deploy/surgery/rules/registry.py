"""Which rule speaks for which operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from etp_deploy.surgery.statements.body import Ties, bodies
from etp_deploy.surgery.statements.opaque import Opaque

if TYPE_CHECKING:
    from collections.abc import Callable

    import onnx_ir as ir

    from etp_deploy.surgery.examples import Example
    from etp_deploy.surgery.statements.base import Statement

    Rule = Callable[["ir.Node"], "Statement"]

RuleType = TypeVar("RuleType", bound="Rule")

_RULES: dict[tuple[str, str], Rule] = {}
_EXAMPLES: dict[tuple[str, str], tuple[Example, ...]] = {}


class RefusedError(Exception):
    """A rule that does not cover this form of its operator says why; the node's tensors are then pinned."""


def rule(
    *operators: str, domain: str = "", examples: tuple[Example, ...] = ()
) -> Callable[[RuleType], RuleType]:
    """Register a function as the rule of some operators of a domain, with nodes that show what it covers."""

    def register(function: RuleType) -> RuleType:
        for operator in operators:
            assert (domain, operator) not in _RULES, f"two rules for {operator}"
            _RULES[domain, operator] = function
            _EXAMPLES[domain, operator] = tuple(
                item for item in examples if item.operator in {None, operator}
            )
        return function

    return register


def examples_of(domain: str, operator: str) -> tuple[Example, ...]:
    """Return the examples that an operator's rule carries."""
    return _EXAMPLES[domain, operator]


def covered() -> list[tuple[str, str]]:
    """Return every operator that has a rule, as (domain, operator)."""
    return sorted(_RULES)


def statement(node: ir.Node) -> Statement:
    """Return what a node says about its tensors; a node without a rule pins them."""
    function = _RULES.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
    if function is None:
        return unknown(
            node, f"no rule for the operator {node.domain + '.' if node.domain else ''}{node.op_type}"
        )
    try:
        return function(node)
    except RefusedError as refused:
        return unknown(node, str(refused))


def unknown(node: ir.Node, reason: str) -> Statement:
    """Return the statement of a node of which nothing is assumed: its tensors stay, its bodies' interfaces too."""
    return Ties(node, (), whole=reason) if bodies(node) else Opaque(node, reason)
