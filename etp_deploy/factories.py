"""Modules and example inputs from what a command line can say."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etp_deploy.errors import ExportError, UsageError
from etp_deploy.worker import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
# Where training scripts put the weights within what they save.
_NESTED = ("state_dict", "model_state_dict", "model")


@dataclasses.dataclass(frozen=True)
class InputDeclaration:
    """An input of a module to export.

    Args:
        name: its name in the exported model; passed by keyword where the module's `forward` has it.
        shape: the sizes to trace with.
        dtype: a torch type by name, such as "float32" or "int64".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class DynamicAxis:
    """An axis of an input whose size is free.

    Args:
        name: the input.
        axis: counted from 0.
        dim: the dimension's name; axes with one name have one size.
    """

    name: str
    axis: int
    dim: str


def parse_input(text: str) -> InputDeclaration:
    """Parse `NAME=1x3x224x224[:dtype]`; `NAME=scalar` is a single number.

    >>> parse_input("ids=1x16:int64")
    InputDeclaration(name='ids', shape=(1, 16), dtype='int64')

    Raises:
        UsageError: when the text has another form.
    """
    name, _, rest = text.rpartition("=")
    sizes, _, dtype = rest.partition(":")
    form = "write NAME=1x3x224x224 or NAME=1x16:int64"
    if not name or not re.fullmatch(r"scalar|\d+(x\d+)*", sizes):
        raise UsageError("not an input declaration", where=text, hint=form)
    shape = () if sizes == "scalar" else tuple(int(size) for size in sizes.split("x"))
    if 0 in shape:
        raise UsageError("an input of size 0 cannot be traced", where=text, hint=form)
    if dtype and dtype not in _DTYPES:
        raise UsageError(f"unknown type {dtype!r}", where=text, hint=f"there are: {', '.join(_DTYPES)}")
    return InputDeclaration(name, shape, dtype or "float32")


def parse_dynamic(text: str) -> DynamicAxis:
    """Parse `NAME.AXIS=DIM`.

    >>> parse_dynamic("ids.0=batch")
    DynamicAxis(name='ids', axis=0, dim='batch')

    Raises:
        UsageError: when the text has another form.
    """
    place, _, dim = text.rpartition("=")
    name, _, axis = place.rpartition(".")
    if not name or not re.fullmatch(r"\d{1,3}", axis) or not dim.isidentifier():
        raise UsageError("not a dynamic axis", where=text, hint="write NAME.0=batch")
    return DynamicAxis(name, int(axis), dim)


def load_factory(spec: str) -> Callable[..., Any]:
    """Import what `package.module:factory` names; modules in the current folder are found as well.

    Raises:
        UsageError: when the text has another form.
        ExportError: when the module cannot be imported or has no such factory.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise UsageError("not a factory", where=spec, hint="write package.module:function")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises while it is imported
        what = f"cannot import {module_name!r}: {first_line(error)}"
        raise ExportError(what, where=spec, hint="is it installed, or in the current folder?") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_") and callable(getattr(found, key))]
            hint = f"it has: {', '.join(public[:8])}" if public else "check the name"
            raise ExportError(f"{module_name!r} has no {name!r}", where=spec, hint=hint)
        found = getattr(found, part)
    if not callable(found):
        raise ExportError("the factory cannot be called", where=spec, hint="name a function or a class")
    factory: Callable[..., Any] = found
    return factory


def build_module(spec: str, weights: Path | str | None = None) -> Any:
    """Call a factory without arguments and load weights into the module it returns.

    Args:
        spec: "package.module:factory".
        weights: a file of `torch.save(module.state_dict())` or of safetensors.

    Raises:
        UsageError: when `spec` has another form.
        ExportError: when the factory fails or returns something else, or the weights do not fit.
    """
    torch = require_torch()
    factory = load_factory(spec)
    try:
        module = factory()
    except Exception as error:  # whatever a stranger's factory raises
        what = f"the factory failed: {first_line(error)}"
        raise ExportError(what, where=spec, hint="it is called without arguments") from error
    if not isinstance(module, torch.nn.Module):
        what = f"the factory returned {type(module).__name__}, not a torch.nn.Module"
        raise ExportError(what, where=spec, hint="return the module itself")
    if weights is not None:
        load_weights(module, weights)
    return module


def load_weights(module: Any, path: Path | str) -> None:
    """Load a file of weights into a module, every key and shape matching; no code in the file is run.

    Raises:
        ExportError: when the file cannot be read or does not fit, naming the first keys.
    """
    state = _strip_prefix(_read_weights(Path(path)))
    own = module.state_dict()
    problems = {
        "the file lacks": [key for key in own if key not in state],
        "the module has no": [key for key in state if key not in own],
        "shapes differ for": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    found = [f"{what} {_first(keys)}" for what, keys in problems.items() if keys]
    if found:
        hint = "are these the weights of this module?"
        raise ExportError("; ".join(found), where=str(path), hint=hint)
    module.load_state_dict(state)


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more


def _strip_prefix(state: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the prefix that DataParallel puts before every key."""
    prefixed = bool(state) and all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if prefixed else key: value for key, value in state.items()}


def _read_weights(path: Path) -> dict[str, Any]:
    torch = require_torch()
    if not path.is_file():
        raise ExportError("there is no such file of weights", where=str(path), hint="check the path")
    hint = "save it with torch.save(module.state_dict(), path)"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file  # noqa: PLC0415 - only where it is needed

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ExportError(
            "safetensors is not installed", where=str(path), hint="pip install safetensors"
        ) from error
    except Exception as error:  # torch.load raises whatever its unpickling meets
        raise ExportError(
            f"cannot read the weights: {first_line(error)}", where=str(path), hint=hint
        ) from error
    for key in _NESTED:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise ExportError("the file holds no dictionary of tensors", where=str(path), hint=hint)
    return state


def require_torch() -> Any:
    """Import PyTorch.

    Raises:
        ExportError: when it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ExportError("PyTorch is not installed", hint="pip install 'etp-deploy[train]'") from error
