"""ONNX Runtime sessions as they are measured: on the provider asked for, their threads not spinning."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import onnxruntime as ort

from etp_deploy.errors import BenchmarkError, ProviderError
from etp_deploy.sessions import connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import numpy as np


@dataclasses.dataclass(frozen=True)
class Setting:
    """How sessions are opened.

    Args:
        provider: an alias ("cpu", "cuda", ...) or a provider's class name.
        threads: intra-op threads; 0 leaves the number to ONNX Runtime.
        profile_prefix: where to write ONNX Runtime's profile; empty for none.
        on_device: keep inputs and outputs in the device's memory where it has its own.
    """

    provider: str = "cpu"
    threads: int = 1
    profile_prefix: str = ""
    on_device: bool = False


def open_session(model: Path, setting: Setting) -> ort.InferenceSession:
    """Open a session on the asked provider, its threads not spinning.

    Spinning threads of one session slow down another in the same process, so every session compared is opened
    without.

    Raises:
        ProviderError: when the provider is absent or the session fell back to another.
        BenchmarkError: when ONNX Runtime cannot load the model.
    """
    try:
        return connect(model, _options(setting), setting.provider)
    except ProviderError:
        raise
    except Exception as error:  # ONNX Runtime's errors share no base class with a public name
        raise BenchmarkError(
            f"ONNX Runtime cannot load the model: {_first_line(error)}", where=model.name, hint=""
        ) from error


def bind_host(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> Callable[[], object]:
    """Make a call that runs the session from arrays on the host to arrays on the host, copies included."""
    if all(array.dtype.isbuiltin == 1 for array in inputs.values()):
        return functools.partial(session.run, None, dict(inputs))
    # numpy has no bfloat16 and the like: ONNX Runtime takes their bits with the type beside them.
    values = {name: _ort_value(array, "cpu") for name, array in inputs.items()}
    names = [output.name for output in session.get_outputs()]
    return functools.partial(session.run_with_ort_values, names, values)


def bind_device(
    session: ort.InferenceSession, inputs: Mapping[str, np.ndarray], device: str
) -> Callable[[], object]:
    """Make a call that runs the session with inputs and outputs in the device's memory: compute alone."""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, _ort_value(array, device))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)
    binding.synchronize_inputs()

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def run_outputs(session: ort.InferenceSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run once and return the outputs that are arrays, by name."""
    names = [output.name for output in session.get_outputs()]
    values = bind_host(session, inputs)()
    assert isinstance(values, list)
    arrays = (value.numpy() if hasattr(value, "numpy") else value for value in values)
    return {name: array for name, array in zip(names, arrays, strict=True) if hasattr(array, "dtype")}


def _options(setting: Setting) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = setting.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if setting.profile_prefix:
        options.enable_profiling = True
        options.profile_file_prefix = setting.profile_prefix
    return options


def _ort_value(array: np.ndarray, device: str) -> ort.OrtValue:
    if array.dtype.isbuiltin == 1:
        return ort.OrtValue.ortvalue_from_numpy(array, device, 0)
    import onnx  # noqa: PLC0415 - rarely needed, and not in the measured process

    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
