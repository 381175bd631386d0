"""From a PyTorch module to an ONNX file that is shown to compute the same.

torch's exporters are sometimes wrong without saying so (an optimisation drops `x + 1e-9`): the exported file
is run against the module before it appears at its destination.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etp_deploy.comparing import ATOL, Difference, difference, format_rtol
from etp_deploy.errors import ExportError, UsageError
from etp_deploy.factories import (
    DynamicAxis,
    InputDeclaration,
    build_module,
    load_factory,
    load_weights,
    parse_dynamic,
    parse_input,
    require_torch,
)
from etp_deploy.files import check_output
from etp_deploy.inputs import dynamic_dims, input_specs
from etp_deploy.modelfile import read_model, write_model
from etp_deploy.sessions import shapes_line
from etp_deploy.tracing import EXPORTERS, Call, evaluating, make_call, trace
from etp_deploy.trials import plan_trials
from etp_deploy.worker import first_line, isolated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "DynamicAxis",
    "ExportReport",
    "InputDeclaration",
    "build_module",
    "export",
    "load_factory",
    "load_weights",
    "parse_dynamic",
    "parse_input",
]

# PyTorch's and ONNX Runtime's kernels sum in another order; exporters' mistakes are far larger.
EXPORT_RTOL = 1e-4


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was exported and how far it is from the module.

    Args:
        path: the file.
        exporter: "dynamo" or "torchscript".
        opset: version of ONNX's operators in the file.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        bytes: size of the file, without external data.
        samples: how many inputs were compared; 0 when not asked to.
        max_abs_error: largest absolute difference between module and file.
        max_rel_error: largest difference relative to its output's scale.
        notes: sizes that the module itself refuses.
    """

    path: Path
    exporter: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes: int
    samples: int
    max_abs_error: float
    max_rel_error: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary of JSON values."""
        return {
            **dataclasses.asdict(self),
            "path": str(self.path),
            **{key: list(getattr(self, key)) for key in ("inputs", "outputs", "notes")},
        }


def export(
    module: Any,
    args: Any,
    path: Path | str,
    *,
    dynamic: Sequence[DynamicAxis | str] = (),
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int = 20,
    exporter: str = "dynamo",
    check: bool = True,
    samples: int = 3,
    seed: int = 0,
    rtol: float = EXPORT_RTOL,
    metadata: Mapping[str, str] | None = None,
) -> ExportReport:
    """Export a module in evaluation mode, compare the file with it, and write the file whole.

    Args:
        module: a `torch.nn.Module`; its training flags are as before afterwards.
        args: a tensor, a tuple of tensors, a dictionary of tensors by `forward`'s argument names, or
            declarations (`InputDeclaration` or text such as "x=1x3x224x224").
        path: the .onnx file to write.
        dynamic: axes of free size, as `DynamicAxis` or text such as "x.0=batch".
        input_names: names for tensors given without; by default those of `forward`'s arguments.
        output_names: names for the outputs.
        opset: version of ONNX's operators.
        exporter: "dynamo" or "torchscript".
        check: compare file and module, on the example, on `samples` inputs drawn to the file's real input
            ranges and, where an axis is dynamic, at other sizes.
        samples: how many drawn inputs at the example's sizes.
        seed: of the first drawn input.
        rtol: allowed difference relative to each output's scale (see `etp_deploy.comparing`).
        metadata: entries for the file's `metadata_props`.

    Raises:
        ExportError: when torch is missing, the export fails, or the file computes something else.
        UsageError: when an option cannot be meant.
        OutputError: when the file cannot be written.
    """
    torch = require_torch()
    path = Path(path)
    check_output(path)
    if exporter not in EXPORTERS:
        raise UsageError(f"unknown exporter {exporter!r}", where="exporter", hint=f"there are: {EXPORTERS}")
    call = make_call(module, args, dynamic, input_names)
    with evaluating(module), torch.no_grad(), tempfile.TemporaryDirectory(prefix="etp-deploy-") as folder:
        draft = Path(folder, "model.onnx")
        model = trace(module, call, output_names=output_names, opset=opset, exporter=exporter, folder=folder)
        write_model(model, draft, metadata=metadata)
        found, count, notes = (
            _compare(module, call, draft, samples=samples, seed=seed, rtol=rtol)
            if check
            else (Difference(0.0, 0.0, ""), 0, ())
        )
        written = read_model(draft)
        write_model(written, path)
    return ExportReport(
        path=path,
        exporter=exporter,
        opset=written.graph.opset_imports.get("", 0),
        inputs=tuple(str(value.name) for value in written.graph.inputs),
        outputs=tuple(str(value.name) for value in written.graph.outputs),
        bytes=path.stat().st_size,
        samples=count,
        max_abs_error=found.max_abs,
        max_rel_error=found.max_rel,
        notes=notes,
    )


def _compare(
    module: Any, call: Call, file: Path, *, samples: int, seed: int, rtol: float
) -> tuple[Difference, int, tuple[str, ...]]:
    """Run file and module on the same inputs.

    Returns:
        The largest difference, how many inputs were compared, and the sizes that the module refuses.

    Raises:
        ExportError: when they differ, or the file runs on less than the module does.
    """
    specs = input_specs(file)
    sizes = {dim: call.tensors[name].shape[i] for name, axes in call.dims.items() for i, dim in axes.items()}
    start = {dim: size for dim, size in sizes.items() if dim in dynamic_dims(specs)}
    drawn = [trial.feeds(specs) for trial in plan_trials(specs, samples=samples, seed=seed, start=start)]
    feeds = [{name: _tensor(array) for name, array in arrays.items()} for arrays in drawn]
    if call.given:
        feeds.insert(0, call.tensors)
    kept, references, notes = [], [], []
    for tensors in feeds:
        # What the exporter found unused is not among the file's inputs; the module still wants it.
        moved = {name: tensors.get(name, own).to(own.device) for name, own in call.tensors.items()}
        try:
            references.append(_leaves(call.run(module, moved)))
            kept.append({spec.name: _numpy(moved[spec.name]) for spec in specs})
        except Exception as error:  # noqa: BLE001 - whatever a stranger's module raises at sizes it cannot take
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            notes.append(f"skipped {shapes}: the module does not run there ({first_line(error)})")
    if not kept:
        raise ExportError(notes[0], where=type(module).__name__, hint="give example inputs that it takes")
    outputs = isolated("etp_deploy.sessions:run_exported", str(file), kept)
    worst = _worst(references, outputs, rtol)
    if worst.reason:
        hint = f"inputs such as {shapes_line(kept[0])} show it; try the other exporter"
        raise ExportError(f"the exported file {worst.reason}", where=type(module).__name__, hint=hint)
    return worst, len(kept), tuple(notes)


def _worst(references: Sequence[Sequence[Any]], outputs: Sequence[Sequence[Any]], rtol: float) -> Difference:
    """Return the largest difference over all inputs and outputs, with the first reason."""
    worst = Difference(0.0, 0.0, "")
    for wanted, got in zip(references, outputs, strict=True):
        if len(wanted) != len(got):
            return Difference(
                math.inf, math.inf, f"has {len(got)} outputs where the module has {len(wanted)}"
            )
        for i, (reference, output) in enumerate(zip(wanted, got, strict=True)):
            found = difference(reference, output, rtol=max(rtol, format_rtol(reference.dtype)), atol=ATOL)
            reason = f"differs from the module: output {i} {found.reason}" if found.reason else ""
            worst = Difference(
                max(worst.max_abs, found.max_abs), max(worst.max_rel, found.max_rel), worst.reason or reason
            )
    return worst


def _leaves(result: Any) -> list[np.ndarray]:
    """Return the tensors within whatever a module returns, in the order in which exporters number them."""
    torch = require_torch()
    leaves = torch.utils._pytree.tree_leaves(result)  # noqa: SLF001 - the only flattening that knows all containers
    return [_numpy(leaf) for leaf in leaves if torch.is_tensor(leaf)]


def _tensor(array: np.ndarray) -> Any:
    torch = require_torch()
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _numpy(tensor: Any) -> np.ndarray:
    """Return a tensor as an array; bfloat16, which numpy lacks, by its bits."""
    torch = require_torch()
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes  # noqa: PLC0415 - only where it is needed

        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())
