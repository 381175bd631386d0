"""What a model file holds and whether two models computed the same, before any time is taken."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.helper
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]

from etp_deploy.bench.results import ModelFacts
from etp_deploy.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Outputs agree when they are this close, relative to the output's largest magnitude: above what another order
# of summation does, below what a wrong model does.
AGREEMENT = 1e-3


def names(paths: Sequence[Path]) -> list[str]:
    """File names, with as many folders as tell them apart; a number where the same file comes twice."""
    depth = 1
    deepest = max((len(path.resolve().parts) for path in paths), default=1)
    labels = [path.name for path in paths]
    distinct = len({path.resolve() for path in paths})
    while len(set(labels)) < distinct and depth < deepest:
        depth += 1
        labels = ["/".join(path.resolve().parts[-depth:]) for path in paths]
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        seen[label] = seen.get(label, 0) + 1
        found.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return found


def read_facts(path: Path, name: str) -> ModelFacts:
    """Hash and sizes of a model with its external data.

    Raises:
        ModelError: when it cannot be read or its external data is missing.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        files = [path, *sorted(_external_files(path, model))]
        digest = hashlib.sha256()
        for file in files:
            _update(digest, file)
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise ModelError(
            f"cannot read {Path(error.filename or path).name}: {error.strerror or error}",
            where=str(path),
            hint="external data must lie beside the model",
        ) from error
    except DecodeError as error:
        raise ModelError(
            "not an ONNX model, or truncated", where=str(path), hint="export it again"
        ) from error
    weights = [(math.prod(t.dims), _bits(t.data_type)) for t in model.graph.initializer]
    return ModelFacts(
        name=name,
        sha256=digest.hexdigest(),
        bytes=size,
        weights_bytes=sum((count * bits + 7) // 8 for count, bits in weights),
        parameters=sum(count for count, _ in weights),
        nodes=len(model.graph.node),
        opset=max((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), default=0),
        ir_version=model.ir_version,
    )


def compare_outputs(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How far apart the outputs of two models are that ran on the same inputs.

    `max_rel_difference` is relative to the output's largest magnitude.
    """
    common = [name for name in first if name in second]
    if not common or len(common) < len(first):
        return {"compared": False, "reason": "the models' outputs have different names"}
    shapes = [name for name in common if first[name].shape != second[name].shape]
    if shapes:
        return {"compared": False, "reason": f"the shapes of output {shapes[0]} differ"}
    worst, relative = 0.0, 0.0
    for name in common:
        one, other = first[name], second[name]
        if one.dtype.kind in "OSU" or other.dtype.kind in "OSU":
            difference, scale = float(not np.array_equal(one, other)), 1.0
        else:
            difference, scale = _difference(one.astype(np.float64), other.astype(np.float64))
        worst = max(worst, difference)
        relative = max(relative, difference / scale if scale else difference)
    agree = relative <= AGREEMENT
    return {"compared": True, "max_abs_difference": worst, "max_rel_difference": relative, "agree": agree}


def _difference(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Largest difference and largest magnitude; equal infinities and NaNs differ by nothing."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(one - other)
    apart[(one == other) | (np.isnan(one) & np.isnan(other))] = 0.0
    apart[np.isnan(apart)] = math.inf
    finite = np.abs(one[np.isfinite(one)])
    return float(apart.max(initial=0.0)), float(finite.max(initial=0.0))


def _external_files(path: Path, model: onnx.ModelProto) -> set[Path]:
    """Files beside the model that hold its weights; a location that leaves the folder is refused."""
    found = set()
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = onnx.external_data_helper.ExternalDataInfo(tensor).location
            file = path.parent / location
            if Path(location).is_absolute() or ".." in Path(location).parts:
                raise ModelError("external data lies outside the model's folder", where=str(path), hint="")
            found.add(file)
    return found


def _update(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)


def _bits(kind: int) -> int:
    packed: dict[int, int] = {
        onnx.TensorProto.INT4: 4,
        onnx.TensorProto.UINT4: 4,
        onnx.TensorProto.FLOAT4E2M1: 4,
    }
    if kind in packed:
        return packed[kind]
    return 8 if kind == onnx.TensorProto.STRING else onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize * 8
