"""Mutants of rules: one statement, guard or argument gone, or one literal changed; which of them no example notices."""

from __future__ import annotations

import ast
import copy
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from rule_graphs import graph_failure, neighbours
from rule_harness import SEEDS, Outcome, Trial, verdict

from etp_deploy.surgery.rules import registry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from graphs import Case

    from etp_deploy.surgery.examples import Example

# how constants may pass through a Pointwise
CONSTANTS = ("evaluate", "pass", "zero", "none")
# what is said to the reader alone
WORDS = ("whole",)
_UNIT = "constants are evaluated at one place of the axis, for which the runtime refuses a scale of more"
_MORE = "true, and more than the rule says, which mistrusts the rounding of a mean divided by almost nothing"
_PINNED = "no valid node has other ranks, and shapes that are not known are pinned anyhow"
_BODIES = "branches of an example read nothing that could be cut: test_surgery_bodies.py shows those that do"
_LEFT_OUT = "no valid node leaves out a state"
_UNEVEN = "no valid node has heads of different sizes"
_WHOLE = "heads whose size has to stay keep their queries, whatever the keys hold"
_WORDS = "refused in any case, for another reason"
_GPU = "packed heads run on GPUs alone: test_attention_pinned.py compares them with their equal in separate tensors"
_ONE_MATRIX = "a stack of one matrix is cut the same; only weights in a stored form ask for a contraction"
_SAME = "the operator itself, run on the constants, gives them back"
# mutants that are as right as the rule, each with the reason
EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("attention", "_quotient", "without if parts < 1 or total % parts:"): _UNEVEN,
    (
        "attention",
        "group_query_attention",
        "without shiftable=not (rotated or normalised or sink or attribute(node, 'softcap', 0.0)) in Form",
    ): _WHOLE,
    (
        "attention",
        "group_query_attention",
        "'softcap_' for 'softcap' in not (rotated or normalised or sink or attribute(node, 'softcap', 0.0)) in Form",
    ): _WHOLE,
    (
        "attention",
        "group_query_attention",
        "1.0 for 0.0 in not (rotated or normalised or sink or attribute(node, 'softcap', 0.0)) in Form",
    ): _WHOLE,
    (
        "attention",
        "projecting_attention",
        "without if any((input_at(node, index) is not None for index in (4, 6))) or _used(node, 1):",
    ): _WORDS,
    ("attention", "projecting_attention", "without if attribute(node, 'do_rotary', 0):"): _WORDS,
    (
        "attention",
        "multi_head_attention",
        "without tensors: tuple[Tensor, ...] = (Tensor(0, (QUERY, KEY, VALUE), (2, 3, 4)),)",
    ): _GPU,
    ("attention", "multi_head_attention", "without size = value_size = static(node.inputs[0], 4)"): _GPU,
    (
        "attention",
        "multi_head_attention",
        "without tensors = (Tensor(0, (QUERY,), (2,)), Tensor(1, (KEY, VALUE), (2, 3, 4)))",
    ): _GPU,
    ("attention", "multi_head_attention", "without size = value_size = static(node.inputs[1], 4)"): _GPU,
    ("attention", "multi_head_attention", "1 for 0 in 0 in Tensor"): _GPU,
    ("attention", "multi_head_attention", "3 for 2 in (2, 3, 4) in Tensor"): _GPU,
    ("attention", "multi_head_attention", "4 for 3 in (2, 3, 4) in Tensor"): _GPU,
    ("attention", "multi_head_attention", "5 for 4 in (2, 3, 4) in Tensor"): _GPU,
    ("attention", "multi_head_attention", "1 for 0 in 0 in Tensor (2)"): _GPU,
    ("attention", "multi_head_attention", "3 for 2 in (2,) in Tensor"): _GPU,
    ("attention", "multi_head_attention", "2 for 1 in 1 in Tensor"): _GPU,
    ("attention", "multi_head_attention", "3 for 2 in (2, 3, 4) in Tensor (2)"): _GPU,
    ("attention", "multi_head_attention", "4 for 3 in (2, 3, 4) in Tensor (2)"): _GPU,
    ("attention", "multi_head_attention", "5 for 4 in (2, 3, 4) in Tensor (2)"): _GPU,
    (
        "convolution",
        "conv_transpose",
        "2 for 1 in 1 in Weight (2)",
    ): "the layout of a transposed weight is fixed",
    ("convolution", "conv_transpose", "1 for 0 in 0 in Weight"): "the layout of a transposed weight is fixed",
    (
        "convolution",
        "resize",
        "'evaluate' for 'none' in 'none' if extrapolates else 'pass' in Pointwise",
    ): "one place, resized, has another shape, so that nothing is known",
    ("controlflow", "branch", "without results=(End(one), End(two)) in Tie"): _BODIES,
    ("controlflow", "branch", "without out=End(out) in Tie"): _BODIES,
    ("controlflow", "loop", "without if source is None:"): _LEFT_OUT,
    ("controlflow", "scan", "without if source is None:"): _LEFT_OUT,
    (
        "controlflow",
        "scan",
        "without if opset_of(node) < _SCAN_WITHOUT_BATCH:",
    ): "with a batch axis more, the ranks inside and outside differ, so that nothing is tied",
    ("elementwise", "identity", "without constants='pass' in Pointwise"): _SAME,
    ("elementwise", "identity", "'evaluate' for 'pass' in 'pass' in Pointwise"): _SAME,
    ("integers", "qgemm", "without _matrix(node, 3)"): _PINNED,
    (
        "indexing",
        "_alike",
        "without if len({len(shape) for shape in shapes}) != 1 or len(shapes) != len(values):",
    ): _PINNED,
    (
        "linear",
        "matmul",
        "without if second is not None and second.ndim == 2 and (first is None):",
    ): _ONE_MATRIX,
    (
        "linear",
        "matmul",
        "without if first is not None and first.ndim == 2 and (second is None) and (rank(node.inputs[1]) >= 2):",
    ): _ONE_MATRIX,
    ("indexing", "slice_", "without constants='pass' in Pointwise"): _SAME,
    ("indexing", "slice_", "'evaluate' for 'pass' in 'pass' in Pointwise"): _SAME,
    (
        "movement",
        "tile",
        "without if len(node.inputs) != TILE_INPUTS:",
    ): "inference knows no shape there",
    ("normalization", "layer_normalization", "without constants='none' in Pointwise"): _UNIT,
    ("normalization", "layer_normalization", "'evaluate' for 'none' in 'none' in Pointwise"): _UNIT,
    ("normalization", "rms_normalization", "without constants='none' in Pointwise"): _UNIT,
    ("normalization", "rms_normalization", "'evaluate' for 'none' in 'none' in Pointwise"): _UNIT,
    ("normalization", "rms_normalization", "'zero' for 'none' in 'none' in Pointwise"): _MORE,
}

_ORIGINALS = dict(registry._RULES)


@dataclass(frozen=True)
class Mutant:
    """One change of one function of a family of rules.

    Attributes:
        family: the module's name.
        function: the changed function.
        change: what was done, in words that stay when lines move.
        number: which of the function's changes it is, None for none.
    """

    family: str
    function: str
    change: str
    number: int | None

    @property
    def key(self) -> tuple[str, str, str]:
        """What a list of equivalent mutants names it by."""
        return self.family, self.function, self.change

    def tree(self) -> ast.Module:
        """Return the changed module."""
        module = copy.deepcopy(_source(self.family))
        function = next(item for item in _functions(module) if item.name == self.function)
        for number, (apply, _) in enumerate(_changes(function)):
            if number == self.number:
                apply()
                break
        return ast.fix_missing_locations(module)


def families() -> list[str]:
    """Return the modules whose rules carry examples; a node with a body is shown by whole graphs instead."""
    shown = {
        function.__module__ for operator, function in _ORIGINALS.items() if registry.examples_of(*operator)
    }
    return sorted(name.rsplit(".", 1)[1] for name in shown)


def mutants(family: str) -> Iterator[Mutant]:
    """Yield every mutant of a family of rules."""
    for function in _functions(_source(family)):
        seen: dict[str, int] = {}
        for number, (_, words) in enumerate(_changes(function)):
            seen[words] = seen.get(words, 0) + 1
            change = words if seen[words] == 1 else f"{words} ({seen[words]})"
            yield Mutant(family, function.name, change, number)


def unchanged(family: str) -> Mutant:
    """Return a family as it is, for a negative control."""
    return Mutant(family, _functions(_source(family))[0].name, "nothing", None)


def survives(mutant: Mutant) -> bool:
    """Return whether no example fails, raises, or lets less go than with the rule as it is."""
    rules = _rules_of(mutant)
    if rules is None:
        return False
    with mock.patch.dict(registry._RULES, rules):
        for operator in _concerned(mutant):
            for number, example in enumerate(registry.examples_of(*operator)):
                if _noticed(operator, number, example):
                    return False
        return not any(_fails(case, stays) for case, stays in neighbours().get(mutant.function, ()))


def _fails(case: Case, stays: int) -> bool:
    try:
        return graph_failure(case, stays) is not None
    except Exception:  # noqa: BLE001 - a rule that raises is noticed
        return True


def _noticed(operator: tuple[str, str], number: int, example: Example) -> bool:
    found: list[Outcome] = []
    for seed in SEEDS:
        try:
            found.append(Trial(*operator, example, seed).outcome())
        except Exception:  # noqa: BLE001 - a rule that raises is noticed
            return True
        if found[-1].failure is not None:
            return True
    lost, claimed = _usual(operator, number)
    less = sum(item.lost for item in found) < lost or sum(item.claimed for item in found) < claimed
    return less or verdict(found, removable=example.removable) is not None


@functools.cache
def _usual(operator: tuple[str, str], number: int) -> tuple[int, int]:
    """Return how much goes and is claimed with the rule as it is."""
    with mock.patch.dict(registry._RULES, _ORIGINALS):
        example = registry.examples_of(*operator)[number]
        found = [Trial(*operator, example, seed).outcome() for seed in SEEDS]
    return sum(item.lost for item in found), sum(item.claimed for item in found)


# changing


def _changes(function: ast.FunctionDef) -> Iterator[tuple[Any, str]]:
    """Yield, for each change of a function, what applies it to this tree, and its words."""
    documented = ast.get_docstring(function) is not None
    yield from _deletions(function.body[1:] if documented else function.body, function.body)
    for call in ast.walk(function):
        if not isinstance(call, ast.Call) or not _constructs(call) or call in function.decorator_list:
            continue
        for place, keyword in enumerate(call.keywords):
            if keyword.arg is not None and keyword.arg not in WORDS:
                yield (
                    functools.partial(call.keywords.pop, place),
                    f"without {ast.unparse(keyword)} in {_name(call)}",
                )
        for argument in (*call.args, *(k.value for k in call.keywords if k.arg not in WORDS)):
            for literal in ast.walk(argument):
                if isinstance(literal, ast.Constant) and literal.value is not None:
                    for other in _others(literal.value):
                        words = f"{other!r} for {literal.value!r} in {ast.unparse(argument)} in {_name(call)}"
                        yield functools.partial(setattr, literal, "value", other), words


def _deletions(statements: list[ast.stmt], body: list[ast.stmt]) -> Iterator[tuple[Any, str]]:
    for statement in statements:
        last = statement is body[-1] and isinstance(statement, ast.Return)
        if not isinstance(statement, ast.Assert | ast.Pass) and not last:
            first = ast.unparse(statement).splitlines()[0]
            yield functools.partial(_replace, body, statement), f"without {first}"
        for name in ("body", "orelse"):
            inner = getattr(statement, name, [])
            if inner and not (isinstance(inner[0], ast.Raise) and len(inner) == 1):
                yield from _deletions(inner, inner)


def _replace(body: list[ast.stmt], statement: ast.stmt) -> None:
    body[body.index(statement)] = ast.Pass()


def _constructs(call: ast.Call) -> bool:
    """Return whether a call makes a statement or a part of one."""
    return _name(call)[:1].isupper() and not _name(call).endswith("Error") and _name(call) != "Opaque"


def _name(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _others(value: Any) -> list[Any]:
    """Return what a literal is replaced by."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    return [other for other in CONSTANTS if other != value] if value in CONSTANTS else [f"{value}_"]


# running


@functools.cache
def _source(family: str) -> ast.Module:
    module = sys.modules[f"{registry.__package__}.{family}"]
    return ast.parse(Path(str(module.__file__)).read_text())


def _functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [item for item in tree.body if isinstance(item, ast.FunctionDef)]


def _rules_of(mutant: Mutant) -> dict[tuple[str, str], Any] | None:
    """Return the rules that a changed module registers, None where it cannot be imported."""
    name = f"{registry.__package__}.{mutant.family}"
    code = compile(mutant.tree(), str(sys.modules[name].__file__), "exec")
    with (
        mock.patch.dict(registry._RULES, clear=True),
        mock.patch.dict(registry._EXAMPLES, clear=True),
    ):
        try:
            exec(code, {"__name__": name, "__package__": registry.__package__})  # noqa: S102 - our own source
        except Exception:  # noqa: BLE001 - a module that cannot be imported is noticed
            return None
        return dict(registry._RULES)


def _concerned(mutant: Mutant) -> list[tuple[str, str]]:
    """Return the operators whose rules reach the changed function."""
    calls = {
        function.name: {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
        for function in _functions(_source(mutant.family))
    }
    reaching, grown = {mutant.function}, True
    while grown:
        more = {name for name, used in calls.items() if used & reaching} - reaching
        reaching |= more
        grown = bool(more)
    name = f"{registry.__package__}.{mutant.family}"
    return [
        operator
        for operator, function in sorted(_ORIGINALS.items())
        if function.__module__ == name and function.__name__ in reaching
    ]
