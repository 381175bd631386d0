"""One rule an operator; one file a family. Importing this package registers every family in it."""

from importlib import import_module
from pkgutil import iter_modules

from etp_deploy.surgery.rules.registry import RefusedError, covered, examples_of, rule, statement, unknown

for _family in iter_modules(__path__):
    import_module(f"{__name__}.{_family.name}")

__all__ = ["RefusedError", "covered", "examples_of", "rule", "statement", "unknown"]
