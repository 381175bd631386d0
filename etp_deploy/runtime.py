"""What an edge pipeline imports: a bundle, checked and ready to run.

Needs numpy and onnxruntime only, and of this package nothing but its errors.

    model = EdgeModel("bundle")
    model.self_test()
    scores = model(image)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from etp_deploy.errors import BundleError, ModelError, ProviderError, UsageError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEMA = "etp-deploy/bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

_REMAKE = "make the bundle again, or copy it again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One input or output.

    Args:
        name: its name in the model.
        dtype: its numpy type; "str" for text.
        shape: sizes, names where they are dynamic, None where they have no name.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """How far this machine's outputs are from those stored in the bundle.

    Args:
        max_abs_error: largest absolute difference.
        max_rel_error: largest difference relative to the largest magnitude of its output.
    """

    max_abs_error: float
    max_rel_error: float


class EdgeModel:
    """A bundle whose files are what was bundled, loaded into ONNX Runtime.

    Args:
        folder: what `etp-deploy bundle` wrote.
        providers: ONNX Runtime's execution providers in order of preference, the CPU by default; the first
            must be available.
        threads: threads within one operator, ONNX Runtime's choice by default.

    Raises:
        BundleError: when a file is missing or altered, or the manifest is of an unknown version.
        ProviderError: when the first provider is not what the session got.
        ModelError: when ONNX Runtime refuses the model.
    """

    def __init__(
        self, folder: Path | str, *, providers: Sequence[str] | None = None, threads: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self.inputs = _tensors(self.manifest, "inputs", self.folder)
        self.outputs = _tensors(self.manifest, "outputs", self.folder)
        _check_files(self.manifest, self.folder)
        self._session = _open(self.folder / _model_name(self.manifest, self.folder), providers, threads)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the model's scores; empty when the bundle has none."""
        return tuple(self.manifest.get("labels") or ())

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What the bundle says about turning raw data into inputs; empty when it says nothing."""
        return dict(self.manifest.get("preprocessing") or {})

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers in use."""
        return tuple(self._session.get_providers())

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Run the model once.

        Args:
            feeds: an array for each input, by name.

        Returns:
            The outputs by name.

        Raises:
            UsageError: when a name, type or shape is not what the model takes.
            ModelError: when ONNX Runtime cannot run the model on these inputs.
        """
        arrays = self._checked(feeds)
        names = [output.name for output in self.outputs]
        try:
            return dict(zip(names, self._session.run(names, arrays), strict=True))
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            reason = _first_line(error)
            raise ModelError(
                f"ONNX Runtime cannot run the model: {reason}", where=str(self.folder)
            ) from error

    def __call__(self, *arrays: Any) -> Any:
        """Run the model on arrays in the order of `inputs`.

        Returns:
            The output when there is one, otherwise a tuple in the order of `outputs`.

        Raises:
            UsageError: when an array is missing, too many, or not what the model takes.
            ModelError: when ONNX Runtime cannot run the model on these inputs.
        """
        if len(arrays) != len(self.inputs):
            names = ", ".join(tensor.name for tensor in self.inputs)
            what = f"{len(arrays)} arrays given where the model takes {len(self.inputs)}"
            raise UsageError(what, where=str(self.folder), hint=f"its inputs are: {names}")
        outputs = self.run({tensor.name: array for tensor, array in zip(self.inputs, arrays, strict=True)})
        values = tuple(outputs.values())
        return values[0] if len(values) == 1 else values

    def example(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return the stored example: inputs and expected outputs by name.

        Raises:
            BundleError: when the example cannot be read.
        """
        path = self.folder / str(_section(self.manifest, "example", self.folder).get("file"))
        try:
            with np.load(path, allow_pickle=False) as stored:
                inputs = {t.name: _from_store(stored[f"input_{i}"]) for i, t in enumerate(self.inputs)}
                outputs = {t.name: _from_store(stored[f"output_{i}"]) for i, t in enumerate(self.outputs)}
        except (OSError, ValueError, KeyError, EOFError) as error:
            what = f"the example cannot be read: {_first_line(error)}"
            raise BundleError(what, where=str(path), hint=_REMAKE) from error
        return inputs, outputs

    def self_test(self) -> SelfTest:
        """Run the stored example here and compare with what it gave where the bundle was made.

        Raises:
            VerificationError: when an output differs by more than the bundle's tolerances.
            BundleError: when the example cannot be read.
        """
        section = _section(self.manifest, "example", self.folder)
        rtol, atol = float(section.get("rtol", 0.0)), float(section.get("atol", 0.0))
        inputs, expected = self.example()
        outputs = self.run(inputs)
        worst_abs = worst_rel = 0.0
        for name, reference in expected.items():
            absolute, scale = _distance(reference, outputs[name])
            relative = absolute / scale if scale else (np.inf if absolute else 0.0)
            worst_abs, worst_rel = max(worst_abs, absolute), max(worst_rel, relative)
            if not absolute <= atol + rtol * scale:
                what = (
                    f"output {name!r} differs from the stored one by {absolute:.3g}, {relative:.3g} relative"
                )
                hint = f"do not trust this machine's {self.providers[0]}"
                raise VerificationError(what, where=str(self.folder), hint=hint)
        return SelfTest(worst_abs, worst_rel)

    def _checked(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the feeds as arrays after checking names, types and shapes."""
        known = [tensor.name for tensor in self.inputs]
        for names, what in (
            ([name for name in feeds if name not in known], "the model has no input"),
            ([name for name in known if name not in feeds], "nothing is given for input"),
        ):
            if names:
                hint = f"its inputs are: {', '.join(known)}"
                raise UsageError(f"{what} {names[0]!r}", where=str(self.folder), hint=hint)
        sizes: dict[str, tuple[int, str]] = {}
        return {tensor.name: _checked_array(tensor, feeds[tensor.name], sizes) for tensor in self.inputs}


def _self_test(folder: str) -> None:
    """Load a bundle and run its example: what the bundler asks of a process that imports nothing else."""
    EdgeModel(folder).self_test()


def _checked_array(tensor: TensorInfo, value: Any, sizes: dict[str, tuple[int, str]]) -> np.ndarray:
    """Return `value` as an array of the input's type and shape.

    Args:
        tensor: the input.
        value: an array of exactly its type, or numbers in lists.
        sizes: of the named dimensions seen so far, with where they were seen; added to.
    """
    where = f"input {tensor.name!r}"
    dtype = np.dtype(object if tensor.dtype == "str" else tensor.dtype)
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        hint = f"give an array of {tensor.dtype}"
        raise UsageError(f"not an array: {_first_line(error)}", where=where, hint=hint) from error
    if array.dtype.kind == "U" and tensor.dtype == "str":
        array = array.astype(object)
    if array.dtype != dtype:
        hint = f"convert it: array.astype({tensor.dtype!r})"
        raise UsageError(f"the array's type is {array.dtype}, not {tensor.dtype}", where=where, hint=hint)
    fits = len(array.shape) == len(tensor.shape) and all(
        size == dim for size, dim in zip(array.shape, tensor.shape, strict=True) if isinstance(dim, int)
    )
    if not fits:
        shape = "x".join("?" if dim is None else str(dim) for dim in tensor.shape) or "a single number"
        raise UsageError(
            f"the array's shape is {list(array.shape)}", where=where, hint=f"the model takes {shape}"
        )
    for size, dim in zip(array.shape, tensor.shape, strict=True):
        if isinstance(dim, str) and dim.isidentifier():
            first, place = sizes.setdefault(dim, (size, where))
            if first != size:
                hint = f"{place} has {first}"
                raise UsageError(
                    f"the size of {dim!r} is {size} here and {first} elsewhere", where=where, hint=hint
                )
    return array


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise BundleError("there is no such bundle folder", where=str(folder), hint="check the path")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "is this a folder that 'etp-deploy bundle' wrote?"
        raise BundleError(f"no manifest: {error.strerror}", where=str(path), hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"the manifest is no JSON: {_first_line(error)}", where=str(path), hint=_REMAKE
        ) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise BundleError(
            "not the manifest of a bundle", where=str(path), hint=f"its schema is not {SCHEMA!r}"
        )
    if manifest.get("schema_version") != SCHEMA_VERSION:
        what = f"the bundle's version is {manifest.get('schema_version')!r}, known is {SCHEMA_VERSION}"
        raise BundleError(what, where=str(path), hint="update etp-deploy, or make the bundle again")
    return manifest


def _section(manifest: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    section = manifest.get(name)
    if not isinstance(section, dict):
        raise BundleError(f"the manifest has no section {name!r}", where=str(folder / MANIFEST), hint=_REMAKE)
    return section


def _model_name(manifest: Mapping[str, Any], folder: Path) -> str:
    name = manifest.get("model")
    if not isinstance(name, str) or name not in _section(manifest, "files", folder):
        raise BundleError("the manifest names no model file", where=str(folder / MANIFEST), hint=_REMAKE)
    return name


def _tensors(manifest: Mapping[str, Any], kind: str, folder: Path) -> tuple[TensorInfo, ...]:
    try:
        return tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in manifest[kind])
    except (KeyError, TypeError) as error:
        what = f"the manifest does not describe the {kind}"
        raise BundleError(what, where=str(folder / MANIFEST), hint=_REMAKE) from error


def _check_files(manifest: Mapping[str, Any], folder: Path) -> None:
    """Refuse a bundle of which a file is missing, of another size, or of other content."""
    for name, entry in _section(manifest, "files", folder).items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise BundleError(f"the manifest's entry {name!r} is not valid", where=str(folder), hint=_REMAKE)
        if not path.is_file():
            raise BundleError("a file of the bundle is missing", where=str(path), hint=_REMAKE)
        try:
            size = path.stat().st_size
            if size != entry.get("bytes"):
                what = f"the file has {size} bytes instead of {entry.get('bytes')}"
                raise BundleError(what, where=str(path), hint=_REMAKE)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"cannot read: {error.strerror}", where=str(path), hint=_REMAKE) from error
        if digest != entry.get("sha256"):
            raise BundleError("the file is not the one that was bundled", where=str(path), hint=_REMAKE)


def _open(path: Path, providers: Sequence[str] | None, threads: int | None) -> Any:
    wanted = list(providers or ["CPUExecutionProvider"])
    available = onnxruntime.get_available_providers()
    if wanted[0] not in available:
        hint = f"this build of ONNX Runtime has: {', '.join(available)}"
        raise ProviderError("the execution provider is not available", where=wanted[0], hint=hint)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        if threads < 1:
            raise UsageError(f"{threads} threads cannot run anything", where="threads", hint="give 1 or more")
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise ModelError(f"ONNX Runtime refuses the model: {_first_line(error)}", where=str(path)) from error
    if session.get_providers()[0] != wanted[0]:
        hint = "its libraries are missing or its device is not there"
        raise ProviderError("the session did not get the execution provider", where=wanted[0], hint=hint)
    return session


def _distance(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return the largest absolute difference and the reference's largest finite magnitude.

    The difference is infinite where types, shapes, text, NaN or infinities are not the same; values that are
    no floating-point numbers get the scale 0, so that no relative tolerance applies to them.
    """
    if reference.dtype != other.dtype or reference.shape != other.shape:
        return np.inf, 0.0
    if reference.dtype.kind not in "fc":
        if np.array_equal(reference, other):
            return 0.0, 0.0
        numbers = reference.dtype.kind in "iub"
        return (
            float(np.max(np.abs(reference.astype(float) - other.astype(float)))) if numbers else np.inf
        ), 0.0
    wide = np.complex128 if reference.dtype.kind == "c" else np.float64
    a, b = reference.astype(wide), other.astype(wide)
    if not np.array_equal(np.where(np.isfinite(a), 0, a), np.where(np.isfinite(b), 0, b), equal_nan=True):
        return np.inf, 0.0
    finite = np.isfinite(a)
    error = float(np.max(np.abs(a[finite] - b[finite]), initial=0.0))
    return error, float(np.max(np.abs(a[finite]), initial=0.0))


def _from_store(array: np.ndarray) -> np.ndarray:
    """Return text, which is stored at a fixed width, as ONNX Runtime takes it."""
    return array.astype(object) if array.dtype.kind == "U" else array


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
