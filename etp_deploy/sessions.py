"""ONNX Runtime sessions that are what was asked for, or an error: the one list of providers, the one check.

To be called in a worker process: creating or running a session on a broken model can crash.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from etp_deploy.errors import ExportError, ModelError, ProviderError
from etp_deploy.worker import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CPU = "CPUExecutionProvider"

# alias -> provider class, how to get it
PROVIDERS = {
    "cpu": (CPU, "pip install onnxruntime"),
    "cuda": (
        "CUDAExecutionProvider",
        "pip install 'onnxruntime-gpu[cuda,cudnn]' on a machine with an NVIDIA driver",
    ),
    "tensorrt": (
        "TensorrtExecutionProvider",
        "pip install onnxruntime-gpu tensorrt on a machine with an NVIDIA driver",
    ),
    "openvino": ("OpenVINOExecutionProvider", "pip install onnxruntime-openvino instead of onnxruntime"),
    "directml": ("DmlExecutionProvider", "pip install onnxruntime-directml, on Windows"),
    "coreml": ("CoreMLExecutionProvider", "it is in onnxruntime's packages for macOS and iOS"),
    "xnnpack": (
        "XnnpackExecutionProvider",
        "it is in the Android packages; elsewhere build ONNX Runtime with --use_xnnpack",
    ),
    "qnn": ("QNNExecutionProvider", "pip install onnxruntime-qnn"),
    "migraphx": ("MIGraphXExecutionProvider", "pip install onnxruntime-migraphx on a machine with ROCm"),
    "webgpu": ("WebGpuExecutionProvider", "it is in builds of ONNX Runtime with --use_webgpu"),
    "acl": ("ACLExecutionProvider", "build ONNX Runtime with --use_acl"),
    "nnapi": ("NnapiExecutionProvider", "it is in the Android packages"),
}
_MORE_ALIASES = {"dml": "directml", "trt": "tensorrt", "gpu": "cuda"}
# Providers whose tensors live in another memory than the host's, by ONNX Runtime's name for that device.
DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
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


def provider_class(provider: str) -> str:
    """Translate an alias into the provider's class name.

    Raises:
        ProviderError: when neither an alias nor a class name is meant.
    """
    lowered = provider.lower()
    alias = _MORE_ALIASES.get(lowered, lowered)
    if alias in PROVIDERS:
        return PROVIDERS[alias][0]
    if provider.endswith("ExecutionProvider") or provider in onnxruntime.get_available_providers():
        return provider
    raise ProviderError(
        "there is no execution provider of this name",
        where=f"provider {provider!r}",
        hint=f"known are {', '.join(PROVIDERS)}, and class names that end in ExecutionProvider",
    )


def check_provider(provider: str) -> str:
    """Return the provider's class name when the installed ONNX Runtime has it.

    Raises:
        ProviderError: with what was asked for, what there is and how to install it.
    """
    wanted = provider_class(provider)
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise ProviderError(
            f"asked for {wanted}, but ONNX Runtime {onnxruntime.__version__} here has only {', '.join(available)}",
            where=f"provider {provider!r}",
            hint=_how_to_install(wanted),
        )
    return wanted


def provider_name(provider: str) -> str:
    """As `check_provider`, in one sentence for every reason.

    Raises:
        ProviderError: when this build of ONNX Runtime does not have it.
    """
    try:
        return check_provider(provider)
    except ProviderError as error:
        hint = f"{error.message}: {error.hint}"
        raise ProviderError("the execution provider is not available", where=provider, hint=hint) from error


def connect(
    model: Path | str, options: Any, provider: str, provider_options: Mapping[str, str] | None = None
) -> Any:
    """Create a session that is on the asked provider; an error of ONNX Runtime's own passes through.

    Raises:
        ProviderError: when the provider is absent or the session fell back to another.
    """
    wanted = check_provider(provider)
    if wanted in DEVICES and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    # The CPU provider follows by itself for nodes the asked one does not take.
    providers = [(wanted, dict(provider_options or {}))]
    session = onnxruntime.InferenceSession(str(model), options, providers=providers)
    session.disable_fallback()
    got = session.get_providers()
    if not got or got[0] != wanted:
        raise ProviderError(
            f"asked for {wanted}, got {', '.join(got)}: ONNX Runtime fell back silently",
            where=f"provider {provider!r}",
            hint=_how_to_install(wanted),
        )
    return session


def open_session(path: Path | str, *, optimize: bool, provider: str = "cpu") -> Any:
    """Create a session with all graph optimisations or none.

    Raises:
        ProviderError: when the session did not get the provider that was asked for.
        ModelError: when ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 4
    # checked before for its options, which are by class
    settings = _OPTIONS.get(provider_name(provider), {})
    try:
        return connect(path, options, provider, settings)
    except ProviderError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise ModelError(f"ONNX Runtime refuses the model: {first_line(error)}", where=str(path)) from error


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
    import ml_dtypes  # noqa: PLC0415 - rarely needed, and not in processes whose memory is measured

    dtype, shape = np.dtype(getattr(ml_dtypes, names[0])), value.shape()
    data = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)


def _how_to_install(wanted: str) -> str:
    hints = [hint for name, hint in PROVIDERS.values() if name == wanted]
    return hints[0] if hints else "install a build of ONNX Runtime that has it"
