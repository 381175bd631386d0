"""A folder with all that an edge pipeline needs, checksummed: see `etp_deploy.runtime` for its reader."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import etp_deploy
from etp_deploy.comparing import ATOL, difference, format_rtol
from etp_deploy.errors import BundleError, UsageError
from etp_deploy.files import whole_folder
from etp_deploy.inputs import draw_inputs, input_specs
from etp_deploy.runtime import MANIFEST, SCHEMA, SCHEMA_VERSION
from etp_deploy.sessions import open_session, run_session
from etp_deploy.worker import isolated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

_MODEL = "model.onnx"
_EXAMPLE = "example.npz"
# Other processors and providers sum in another order; a broken one is wrong by far more than this.
_SELF_TEST_RTOL = 1e-4
_DTYPES = {
    **{name: name for name in ("float16", "bool", "int8", "int16", "int32", "int64")},
    **{name: name for name in ("uint8", "uint16", "uint32", "uint64")},
    "float": "float32",
    "double": "float64",
    "string": "str",
}


def bundle(
    model: Path | str,
    out_dir: Path | str,
    *,
    example: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    summary: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Path:
    """Write a bundle whole or not at all: model, manifest, and an example with its expected outputs.

    The bundled model is loaded and must reproduce the example before the folder appears.

    Args:
        model: the ONNX file; it is not changed.
        out_dir: the folder to make; it may exist when empty.
        example: an array for each input, drawn to the inputs' ranges by default.
        seed: of the drawn example.
        summary: what else to say about the model; JSON values.
        labels: names of the classes, in the order of the model's scores.
        preprocessing: how raw data becomes inputs, for the pipeline that reads it; JSON values.

    Returns:
        The folder.

    Raises:
        ModelError: when the model cannot be read or run.
        BundleError: when an input or output is of a type that numpy does not have.
        UsageError: when the example does not fit the model, or an entry is no JSON.
        OutputError: when the folder cannot be written or is in use.
    """
    from etp_deploy.modelfile import read_model, write_model  # noqa: PLC0415 - the worker process needs neither

    source, out = Path(model), Path(out_dir)
    given = read_model(source)
    extra = _json_section({"summary": summary, "labels": labels, "preprocessing": preprocessing})
    feeds = _example(source, example, seed)
    with whole_folder(out) as folder:
        write_model(given, folder / _MODEL, inputs=(source,))
        bundled = read_model(folder / _MODEL)
        arguments = str(source), str(folder / _MODEL), feeds
        inputs, outputs, expected = isolated("etp_deploy.bundling:_run_example", *arguments)
        _save_example(folder / _EXAMPLE, [feeds[t["name"]] for t in inputs], expected)
        manifest = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "created_by": f"etp-deploy {etp_deploy.__version__}",
            "model": _MODEL,
            "inputs": inputs,
            "outputs": outputs,
            "files": {file.name: _fingerprint(file) for file in sorted(folder.iterdir())},
            "example": {"file": _EXAMPLE, "rtol": _tolerance(bundled, expected), "atol": ATOL},
            **extra,
            "summary": {**_summary(bundled, folder), **(extra["summary"] or {})},
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        isolated("etp_deploy.runtime:_self_test", str(folder))
    return out


def _json_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the caller's entries as JSON values."""
    section = {}
    for name, value in values.items():
        plain = dict(value) if hasattr(value, "keys") else value
        if name == "labels" and value is not None:
            plain = list(value)
            if not all(isinstance(label, str) for label in plain):
                raise UsageError("labels must be text", where="labels", hint="give one name for each class")
        try:
            section[name] = json.loads(json.dumps(plain, allow_nan=False))
        except (TypeError, ValueError) as error:
            what = f"cannot be written as JSON: {error}"
            raise UsageError(what, where=name, hint="use numbers, text, lists and dictionaries") from error
    return section


def _example(model: Path, example: Mapping[str, np.ndarray] | None, seed: int) -> dict[str, np.ndarray]:
    specs = input_specs(model)
    for spec in specs:
        if spec.dtype.kind not in "fciubO" or spec.dtype.isbuiltin != 1:
            what = f"input {spec.name!r} is {spec.dtype}, which numpy cannot feed"
            raise BundleError(what, where=str(model), hint="export the model with float32 inputs")
    if example is None:
        return draw_inputs(specs, seed=seed, batch=1)
    names = [spec.name for spec in specs]
    if sorted(example) != sorted(names):
        what = f"the example has {sorted(example)} where the model takes {sorted(names)}"
        raise UsageError(what, where="example", hint="give one array for each input")
    arrays = {name: np.asarray(example[name]) for name in names}
    for spec in specs:
        array = arrays[spec.name]
        sizes = [dim if isinstance(dim, int) else None for dim in spec.shape]
        fits = array.ndim == len(sizes) and all(
            d in (None, n) for d, n in zip(sizes, array.shape, strict=True)
        )
        if array.dtype != spec.dtype or not fits:
            what = f"the array is {array.dtype}{list(array.shape)}"
            hint = f"the model takes {spec.dtype}{list(spec.shape)}"
            raise UsageError(what, where=f"example {spec.name!r}", hint=hint)
    return arrays


def _run_example(
    source: str, written: str, feeds: dict[str, np.ndarray]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[np.ndarray]]:
    """Run source and written model on the example; called in the worker process.

    Returns:
        Descriptions of the inputs and of the outputs for the manifest, and the outputs in their order.
    """
    reference = run_session(open_session(source, optimize=True), feeds, where=source)
    session = open_session(written, optimize=True)
    outputs = run_session(session, feeds, where=source)
    for name, array in reference.items():
        found = difference(array, outputs[name])
        if found.reason:
            raise BundleError(f"output {name!r} of the bundled model {found.reason}", where=source)
    described = [_described(session.get_inputs()), _described(session.get_outputs())]
    return described[0], described[1], [outputs[tensor["name"]] for tensor in described[1]]


def _described(values: Sequence[Any]) -> list[dict[str, Any]]:
    described = []
    for value in values:
        name = value.type.removeprefix("tensor(").removesuffix(")")
        if name not in _DTYPES:
            what = f"{value.name!r} is {value.type}, which numpy does not have"
            raise BundleError(what, hint="export the model with float32 inputs and outputs")
        described.append({"name": value.name, "dtype": _DTYPES[name], "shape": list(value.shape)})
    return described


def _save_example(path: Path, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Write arrays by position; text at a fixed width, as readers must not unpickle."""
    arrays = {f"input_{i}": array for i, array in enumerate(inputs)}
    arrays |= {f"output_{i}": array for i, array in enumerate(outputs)}
    plain = {key: array.astype(str) if array.dtype.kind == "O" else array for key, array in arrays.items()}
    np.savez_compressed(path, allow_pickle=False, **plain)


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _tolerance(model: ir.Model, outputs: Sequence[np.ndarray]) -> float:
    """Return the self-test's tolerance: looser where a narrow type is among the weights or outputs."""
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    dtypes = [
        tensor.dtype.numpy() for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point()
    ]
    return max(
        [_SELF_TEST_RTOL, *(4 * format_rtol(dtype) for dtype in (*dtypes, *(o.dtype for o in outputs)))]
    )


def _summary(model: ir.Model, folder: Path) -> dict[str, Any]:
    tensors = [v.const_value for graph in model.graphs() for v in graph.initializers.values()]
    floating = [tensor for tensor in tensors if tensor is not None and tensor.dtype.is_floating_point()]
    return {
        "parameters": sum(math.prod(tensor.shape.numpy()) for tensor in floating),
        "bytes": sum(file.stat().st_size for file in folder.glob(f"{_MODEL}*")),
        "nodes": sum(1 for graph in model.graphs() for _ in graph),
        "ir_version": model.ir_version,
        "opsets": dict(model.graph.opset_imports),
        "metadata": dict(model.metadata_props),
    }
