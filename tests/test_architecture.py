"""Imports point one way, torch stays where it belongs, every family of rules is registered and documented."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import etp_deploy
from etp_deploy.surgery.rules import covered, examples_of, registry

PACKAGE = Path(etp_deploy.__file__).parent
TORCH = ("training", "demo", "exporting.py", "factories.py", "tracing.py")
# stages in the order in which data flows; a file may import from its own stage and those before it
STAGES = (
    ("errors", "files", "worker", "html", "plots", "runtime", "_version"),
    (
        "modelcheck",
        "modelstrip",
        "tensors",
        "modelfile",
        "inputs",
        "input_ranges",
        "input_files",
        "comparing",
        "sessions",
    ),
    ("surgery",),
    ("sizes", "onnxsim_child", "simplify", "trials", "verification"),
    ("tuning", "bench", "inspection"),
    ("pipeline", "bundling", "exporting", "factories", "tracing", "training"),
    ("reports",),
    ("demo", "cli"),
)


def files() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Names of the modules that a file imports, at any depth, type-checking blocks included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def stage_of(name: str) -> int:
    """The stage of a top-level module of the package."""
    return next(place for place, names in enumerate(STAGES) if name in names)


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_along_the_data(path):
    """No file imports from a later stage, and torch is imported only for training and export."""
    inside = path.relative_to(PACKAGE)
    top = inside.parts[0].removesuffix(".py")
    names = imports(path)
    if inside.parts[0] not in TORCH:
        assert not {name for name in names if name.split(".")[0] == "torch"}
    if top == "__init__":
        return
    for name in names:
        parts = name.split(".")
        if parts[0] == "etp_deploy" and len(parts) > 1:
            assert stage_of(parts[1]) <= stage_of(top), f"{inside} imports {name}"


def test_the_runtime_needs_no_more_than_numpy_and_onnxruntime():
    """What an edge pipeline imports is the standard library, these two, and our errors."""
    ours = {name for name in imports(PACKAGE / "runtime.py") if name.startswith("etp_deploy")}
    assert ours == {"etp_deploy.errors"}


def test_every_family_of_rules_is_registered():
    """Each file of rules speaks for at least one operator, and the table is what the package says it covers."""
    homes = {function.__module__.rsplit(".", 1)[1] for function in registry._RULES.values()}
    families = {path.stem for path in (PACKAGE / "surgery" / "rules").glob("*.py")}
    assert families - {"__init__", "registry", "common"} == homes
    assert len(covered()) > 100


@pytest.mark.parametrize("operator", covered(), ids=lambda operator: operator[1])
def test_a_rule_begins_with_its_equation(operator):
    """The first line of a rule's docstring is the equation that it implements."""
    first = (inspect.getdoc(registry._RULES[operator]) or "").splitlines()[0]
    assert "=" in first


def test_every_operator_has_an_example():
    """Each operator that a rule covers has a node that shows it, on which the properties are checked."""
    assert [operator for operator in covered() if not examples_of(*operator)] == []
