"""ONNX Runtime sessions that are what was asked for, or an error.

To be called in a worker process: creating or running a session on a broken model can crash.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnxruntime

from etp_deploy.errors import ExportError, ModelError, ProviderError
from etp_deploy.worker import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
# TF32 keeps ten bits of mantissa: results would differ by more than anything we look for.
_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
# Types that numpy has no name for are handed over as their bits: the type's number in ONNX.
_BITS_ONLY = {
    "bfloat16": 16,
    "float8_e4m3fn": 17,
    "float8_e4m3fnuz": 18,
    "float8_e5m2": 19,
    "float8_e5m2fnuz": 20,
}


def provider_name(provider: str) -> str:
    """Return ONNX Runtime's name of a provider given by it or by a short form such as "cuda".

    Raises:
        ProviderError: when this build of ONNX Runtime does not have it.
    """
    name = _PROVIDERS.get(provider.lower(), provider)
    available = onnxruntime.get_available_providers()
    if name not in available:
        hint = f"this build of ONNX Runtime has: {', '.join(available)}"
        raise ProviderError("the execution provider is not available", where=provider, hint=hint)
    return name


def open_session(path: Path | str, *, optimize: bool, provider: str = "cpu") -> Any:
    """Create a session with all graph optimisations or none.

    Raises:
        ProviderError: when the session did not get the provider that was asked for.
        ModelError: when ONNX Runtime refuses the model.
    """
    name = provider_name(provider)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(name, _OPTIONS.get(name, {}))])
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise ModelError(f"ONNX Runtime refuses the model: {first_line(error)}", where=str(path)) from error
    if session.get_providers()[0] != name:
        hint = "its libraries are missing or its device is not there"
        raise ProviderError("the session did not get the execution provider", where=provider, hint=hint)
    return session


def run_session(session: Any, feeds: Mapping[str, np.ndarray], *, where: str = "") -> dict[str, Any]:
    """Run once and return the outputs by name.

    Raises:
        ModelError: when ONNX Runtime cannot run the model on these inputs.
    """
    outputs = session.get_outputs()
    names = [output.name for output in outputs]
    try:
        if not any(array.dtype.name in _BITS_ONLY for array in feeds.values()) and not any(
            _type_number(output.type) for output in outputs
        ):
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        values = {name: _ort_value(array) for name, array in feeds.items()}
        results = session.run_with_ort_values(names, values)
        return {name: _array(value) for name, value in zip(names, results, strict=True)}
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}", where=where) from error


def run_exported(path: str, feeds: Sequence[Mapping[str, np.ndarray]]) -> list[list[Any]]:
    """Run a freshly exported file on every input.

    Returns:
        The outputs of each run, in the file's order.

    Raises:
        ExportError: when it refuses an input that the module takes.
    """
    session = open_session(path, optimize=True)
    outputs = []
    for arrays in feeds:
        try:
            outputs.append(list(run_session(session, arrays).values()))
        except ModelError as error:
            place = shapes_line(arrays)
            what = f"the exported file does not run at {place}, where the module does: {error.message}"
            hint = (
                "the exporter fixed a size that should be free; try the other exporter or fewer dynamic axes"
            )
            raise ExportError(what, hint=hint) from error
    return outputs


def shapes_line(arrays: Mapping[str, np.ndarray]) -> str:
    """Name the shapes of arrays in one line."""
    return ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())


def _type_number(declared: str) -> int | None:
    """Return the number of a type that needs handing over as bits, from e.g. "tensor(bfloat16)"."""
    return _BITS_ONLY.get(declared.removeprefix("tensor(").removesuffix(")").replace("float8", "float8_"))


def _ort_value(array: np.ndarray) -> Any:
    number = _BITS_ONLY.get(array.dtype.name)
    if number is None:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.require(array, requirements="C"))
    bits = np.require(array, requirements="C").view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, number)


def _array(value: Any) -> Any:
    """Return an output as an array; sequences and maps, which cannot be compared, as they are."""
    if not value.is_tensor():
        return value
    names = [name for name, number in _BITS_ONLY.items() if number == value.element_type()]
    if not names:
        return value.numpy()
    dtype, shape = np.dtype(getattr(ml_dtypes, names[0])), value.shape()
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)
