#!/usr/bin/env python3
"""Classify every image in a folder with a bundle: an edge pipeline in one file.

    python classify_folder.py BUNDLE IMAGES [--json]

Needs numpy, onnxruntime and pillow. What turns a picture into the model's input comes from the bundle: its
input's shape, and the section `preprocessing` of its manifest, every entry of which may be left out:

    mode    "L" or "RGB"; by default what the input's number of channels says
    size    [height, width] to resize to; by default the input's
    layout  "NCHW" or "NHWC"; by default where the 1 or 3 channels are
    scale   what to multiply the pixels 0 to 255 with, 1/255 by default
    mean    what to subtract after that, one number or one for each channel
    std     what to divide by after that, one number or one for each channel
    invert  true when the model was trained on bright strokes on a dark ground and pictures are the opposite
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from etp_deploy.errors import BundleError, EtpError, UsageError
from etp_deploy.runtime import EdgeModel

if TYPE_CHECKING:
    from collections.abc import Sequence

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"))
DEFAULTS = {"scale": 1 / 255, "mean": 0.0, "std": 1.0}
CHANNELS = {1: "L", 3: "RGB"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Classify and print; return 0, 1 when an image could not be read, 2 for usage and 3 for other errors."""
    options = _parser().parse_args(arguments)
    try:
        model = EdgeModel(options.bundle, providers=[options.provider], threads=options.threads)
        if options.self_test:
            model.self_test()
        paths = images(options.images)
        unreadable = 0
        for path in paths:
            try:
                answer = classify(model, path)
            except (OSError, Image.DecompressionBombError) as error:  # pillow's words for what is no image
                print(f"{path}: not an image that can be read ({error})", file=sys.stderr)
                unreadable += 1
                continue
            row = f"{answer['file']}\t{answer['label']}\t{answer['score']:.3f}"
            print(json.dumps(answer, ensure_ascii=False) if options.json else row)
    except EtpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 1 if unreadable else 0


def images(folder: Path) -> tuple[Path, ...]:
    """Return the image files in a folder, sorted by name.

    Raises:
        UsageError: when there are none.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder of images", where=str(folder), hint="check the path")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        hint = f"known are: {' '.join(sorted(SUFFIXES))}"
        raise UsageError("the folder holds no images", where=str(folder), hint=hint)
    return tuple(found)


def classify(model: EdgeModel, path: Path) -> dict[str, Any]:
    """Return the best class of one image: file, index, label and score (a probability).

    Raises:
        OSError: when the file is no image.
        BundleError: when the bundle is not one of an image classifier.
    """
    with Image.open(path) as image:
        pixels = preprocess(model, image)
    outputs = model(pixels)
    scores = np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs, dtype=np.float64)
    if scores.ndim != 2:
        what = f"the first output has shape {list(scores.shape)}, not [1, classes]"
        raise BundleError(what, where=str(model.folder), hint="bundle a classifier")
    probabilities = softmax(scores[0])
    best = int(probabilities.argmax())
    label = model.labels[best] if best < len(model.labels) else str(best)
    return {"file": path.name, "index": best, "label": label, "score": round(float(probabilities[best]), 6)}


def preprocess(model: EdgeModel, image: Image.Image) -> np.ndarray:
    """Return an image as the model's input, with a leading axis of one.

    Raises:
        BundleError: when the bundle does not say how.
    """
    settings = model.preprocessing
    channels, height, width, layout = _geometry(model)
    try:
        scale, mean, std = (np.asarray(settings.get(k, d), float) for k, d in DEFAULTS.items())
    except (TypeError, ValueError) as error:
        what = f"the preprocessing is not made of numbers: {error}"
        raise BundleError(what, where=str(model.folder), hint="bundle again with numbers") from error
    picture = image.convert(settings.get("mode") or CHANNELS[channels])
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float64).reshape(height, width, channels)
    if settings.get("invert"):
        pixels = 255.0 - pixels
    pixels = (pixels * scale - mean) / std
    if layout == "NCHW":
        pixels = pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(pixels[None], dtype=model.inputs[0].dtype)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities; scores that already are probabilities stay as they are."""
    if scores.min() >= 0 and abs(scores.sum() - 1) < 1e-3:
        return scores
    powers = np.exp(scores - scores.max())
    return np.asarray(powers / powers.sum())


def _geometry(model: EdgeModel) -> tuple[int, int, int, str]:
    """Return channels, height, width and layout of the model's input."""
    shape, settings = model.inputs[0].shape, model.preprocessing
    if len(model.inputs) != 1 or len(shape) != 4:
        what = "the model does not take one image as [batch, channels, height, width]"
        raise BundleError(what, where=str(model.folder), hint="bundle a classifier of images")
    layout = settings.get("layout") or (
        "NHWC" if shape[3] in CHANNELS and shape[1] not in CHANNELS else "NCHW"
    )
    channels, height, width = shape[1:] if layout == "NCHW" else (shape[3], shape[1], shape[2])
    height, width = settings.get("size") or (height, width)
    if channels not in CHANNELS or not isinstance(height, int) or not isinstance(width, int):
        what = f"the input's shape {list(shape)} does not say the size of an image"
        raise BundleError(what, where=str(model.folder), hint='bundle with preprocessing "size" and "layout"')
    return int(channels), height, width, layout


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Classify every image in a folder with a bundle.")
    parser.add_argument("bundle", type=Path, help="folder that 'etp-deploy bundle' wrote")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument(
        "--provider", default="CPUExecutionProvider", help="ONNX Runtime's execution provider"
    )
    parser.add_argument("--threads", type=int, help="threads within one operator")
    parser.add_argument("--self-test", action="store_true", help="run the bundle's example first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
