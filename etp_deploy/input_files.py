"""Inputs from files: arrays in npz or json, images from a folder."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.errors import InputError, UsageError
from etp_deploy.inputs import fits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etp_deploy.inputs import InputSpec

IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def load_inputs(path: Path | str, specs: Sequence[InputSpec]) -> dict[str, np.ndarray]:
    """Read arrays for a model's inputs.

    Args:
        path: an npz or json file that holds one array for each input by name, or a folder of images for the
            one input with four axes: resized to it, in its order of axes, scaled to 0..1 where it is float.
        specs: what the model takes.

    Raises:
        InputError: when there is no such file, or it cannot be read.
        UsageError: when the path holds no inputs, or not these.
    """
    place = Path(path)
    if not place.exists():
        raise InputError("there is no such file of inputs", where=str(place), hint="check the path")
    if place.is_dir():
        return _images(place, specs)
    if place.suffix not in {".npz", ".json"}:
        raise UsageError(
            "neither npz nor json nor a folder", where=str(place), hint="save inputs with numpy.savez"
        )
    try:
        found = _npz(place) if place.suffix == ".npz" else _json(place)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the inputs: {error}", where=str(place)) from error
    if missing := [spec.name for spec in specs if spec.name not in found]:
        held = ", ".join(found) or "nothing"
        raise UsageError(f"holds no array for {missing[0]!r}", where=str(place), hint=f"it holds {held}")
    return {spec.name: _as(spec, found[spec.name], place) for spec in specs}


def _npz(path: Path) -> dict[str, np.ndarray]:
    # no pickles: a file of inputs must not be able to run anything
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _json(path: Path) -> dict[str, np.ndarray]:
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict):
        raise ValueError("wanted an object of arrays by input name")  # noqa: TRY004 - the file's value
    return {name: np.asarray(values) for name, values in document.items()}


def _as(spec: InputSpec, array: np.ndarray, path: Path) -> np.ndarray:
    """Give the array in the input's type, when its shape fits.

    Raises:
        UsageError: when it does not.
    """
    if not fits(spec, array):
        raise UsageError(
            f"{spec.name}: holds {array.shape}, the model takes {spec.shape}", where=str(path), hint=""
        )
    try:
        return array.astype(spec.dtype, copy=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{spec.name}: {error}", where=str(path), hint=f"wanted {spec.dtype}") from error


def _images(folder: Path, specs: Sequence[InputSpec]) -> dict[str, np.ndarray]:
    """Stack the folder's images, in order of their names, as many as the batch takes."""
    try:
        from PIL import Image  # noqa: PLC0415 - only for images, and not required
    except ImportError as error:
        raise UsageError(
            "reading images needs Pillow", where=str(folder), hint="pip install pillow"
        ) from error
    if len(specs) != 1 or len(specs[0].shape) != 4:
        raise UsageError("images fit models with one input of four axes", where=str(folder), hint="use npz")
    (spec,) = specs
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGES)
    if not files:
        hint = f"looked for {', '.join(sorted(IMAGES))}"
        raise UsageError("the folder holds no images", where=str(folder), hint=hint)
    batch = spec.shape[0]
    if isinstance(batch, int):
        files = [files[at % len(files)] for at in range(batch)]
    last = spec.shape[1] not in {1, 3, 4} and spec.shape[3] in {1, 3, 4}
    height, width = spec.shape[1:3] if last else spec.shape[2:4]
    channels = spec.shape[3] if last else spec.shape[1]
    mode = {1: "L", 4: "RGBA"}.get(channels if isinstance(channels, int) else 3, "RGB")
    stacked: list[np.ndarray] = []
    for file in files:
        with Image.open(file) as image:
            own = stacked[0].shape[:2] if stacked else (image.height, image.width)
            rows = height if isinstance(height, int) else own[0]
            columns = width if isinstance(width, int) else own[1]
            stacked.append(np.atleast_3d(np.asarray(image.convert(mode).resize((columns, rows)))))
    array = np.stack(stacked)
    if not last:
        array = array.transpose(0, 3, 1, 2)
    scaled = array / np.float32(255) if spec.dtype.kind not in "iu" else array
    return {spec.name: _as(spec, np.ascontiguousarray(scaled), folder)}
