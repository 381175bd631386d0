"""Running torch's exporters: how a module is called, and the quiet around it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etp_deploy.errors import EtpError, ExportError, UsageError
from etp_deploy.factories import DynamicAxis, InputDeclaration, parse_dynamic, parse_input, require_torch
from etp_deploy.modelfile import read_model
from etp_deploy.worker import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import onnx_ir as ir

EXPORTERS = ("dynamo", "torchscript")


@dataclasses.dataclass(frozen=True)
class Call:
    """How a module is called: an example tensor for each input, and whether by keyword.

    Args:
        tensors: example tensors by input name, in the order of the exported inputs.
        keyword: whether `forward` takes them by these names.
        dims: for each input, the names of its dynamic axes.
        given: whether the tensors are the caller's own, not made from a declaration.
    """

    tensors: dict[str, Any]
    keyword: bool
    dims: dict[str, dict[int, str]]
    given: bool

    def run(self, module: Any, tensors: Mapping[str, Any]) -> Any:
        """Call the module on tensors by input name."""
        if self.keyword:
            return module(**tensors)
        return module(*(tensors[name] for name in self.tensors))


def make_call(
    module: Any, args: Any, dynamic: Sequence[DynamicAxis | str], input_names: Sequence[str] | None
) -> Call:
    """Bring every way of giving inputs into one form.

    Args:
        module: the module to call.
        args: tensors or declarations, as `etp_deploy.exporting.export` takes them.
        dynamic: axes of free size.
        input_names: names for tensors given without.

    Raises:
        UsageError: when an input is no tensor, or an axis is of no input.
    """
    torch = require_torch()
    if torch.is_tensor(args) or isinstance(args, str | InputDeclaration):
        args = (args,)
    parameters = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    given = isinstance(args, dict) or all(torch.is_tensor(value) for value in args)
    if isinstance(args, dict):
        tensors = dict(args)
    elif given:
        names = list(input_names or parameters)
        names += [f"input_{i}" for i in range(len(names), len(args))]
        tensors = dict(zip(names, args, strict=False))
    else:
        tensors = _declared_tensors(module, args)
    if not tensors or not all(torch.is_tensor(value) for value in tensors.values()):
        raise UsageError("the inputs are not tensors", where="args", hint="give tensors or declarations")
    keyword = all(name in parameters for name in tensors)
    if keyword:
        tensors = {name: tensors[name] for name in parameters if name in tensors}
    axes = [parse_dynamic(axis) if isinstance(axis, str) else axis for axis in dynamic]
    return Call(tensors, keyword, _dims(tensors, axes), given)


def _declared_tensors(module: Any, declarations: Sequence[Any]) -> dict[str, Any]:
    """Make a tensor for each declaration; integers are 0 or 1, which every table has."""
    torch = require_torch()
    first = next(module.parameters(), None)
    device = "cpu" if first is None else first.device
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for declaration in declarations:
        parsed = parse_input(declaration) if isinstance(declaration, str) else declaration
        dtype = getattr(torch, parsed.dtype, None) if isinstance(parsed, InputDeclaration) else None
        if not isinstance(dtype, torch.dtype):
            hint = "give tensors, or declarations such as x=1x3x224x224"
            raise UsageError(f"not an input: {str(parsed)[:80]}", where="args", hint=hint)
        if dtype.is_floating_point:
            tensor = torch.randn(parsed.shape, generator=generator).to(dtype)
        else:
            tensor = torch.randint(0, 2, parsed.shape, generator=generator).to(dtype)
        tensors[parsed.name] = tensor.to(device)
    return tensors


def _dims(tensors: Mapping[str, Any], axes: Sequence[DynamicAxis]) -> dict[str, dict[int, str]]:
    dims: dict[str, dict[int, str]] = {name: {} for name in tensors}
    for axis in axes:
        where = f"{axis.name}.{axis.axis}={axis.dim}"
        if axis.name not in tensors:
            raise UsageError("no input has this name", where=where, hint=f"there are: {', '.join(tensors)}")
        if axis.axis >= tensors[axis.name].dim():
            hint = f"it has {tensors[axis.name].dim()} axes, counted from 0"
            raise UsageError("the input has no such axis", where=where, hint=hint)
        dims[axis.name][axis.axis] = axis.dim
    return dims


def trace(
    module: Any, call: Call, *, output_names: Sequence[str] | None, opset: int, exporter: str, folder: str
) -> ir.Model:
    """Run torch's exporter, quietly.

    Args:
        module: in evaluation mode.
        call: the example inputs to trace with.
        output_names: names for the outputs, the exporter's choice where None.
        opset: version of ONNX's operators.
        exporter: one of `EXPORTERS`.
        folder: a temporary place; the model may map data in it.

    Raises:
        ExportError: when the exporter fails.
    """
    torch = require_torch()
    if exporter == "dynamo" and importlib.util.find_spec("onnxscript") is None:
        raise ExportError("onnxscript is not installed", hint="pip install 'etp-deploy[train]'")
    options: dict[str, Any] = {
        "input_names": list(call.tensors),
        "output_names": list(output_names) if output_names else None,
        "opset_version": opset,
        "verbose": False,
    }
    # An axis of size 1 would be taken for a constant; traced with 2 it stays free.
    tensors = {name: _at_least_two(tensor, call.dims[name]) for name, tensor in call.tensors.items()}
    args = () if call.keyword else tuple(tensors.values())
    options["kwargs"] = tensors if call.keyword else None
    try:
        with _quiet():
            if exporter == "dynamo":
                shapes = call.dims if call.keyword else tuple(call.dims.values())
                free = any(call.dims.values())
                program = torch.onnx.export(
                    module, args, dynamo=True, dynamic_shapes=shapes if free else None, **options
                )
                model: ir.Model = program.model
                return model
            file = Path(folder, "traced.onnx")
            torch.onnx.export(module, args, file, dynamo=False, dynamic_axes=call.dims, **options)
            return read_model(file)
    except EtpError:
        raise
    except Exception as error:  # the exporters raise whatever tracing a stranger's module meets
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        other = EXPORTERS[1 - EXPORTERS.index(exporter)]
        what = f"torch's {exporter} exporter failed: {first_line(cause)}"
        hint = f"try exporter {other!r}, another opset, or fewer dynamic axes"
        raise ExportError(what, where=type(module).__name__, hint=hint) from error


def _at_least_two(tensor: Any, dims: Mapping[int, str]) -> Any:
    for axis in dims:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, axis)
    return tensor


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Put a module into evaluation mode, without the attention fast path that exporters cannot trace."""
    torch = require_torch()
    modes = {part: part.training for part in module.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    module.eval()
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, training in modes.items():
            part.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' chatter away from our stdout and stderr."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._dynamo", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
