"""The whole job on the digits: train, export, compress, verify, run, benchmark, bundle, report."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from etp_deploy.bench import benchmark
from etp_deploy.bundling import bundle
from etp_deploy.demo.data import load_digits
from etp_deploy.demo.folder import MARKER, SCHEMA, demo_folder
from etp_deploy.demo.networks import CLASSES, IMAGE_SHAPE
from etp_deploy.demo.report import CAPTION, demo_page
from etp_deploy.demo.train import train
from etp_deploy.errors import ProviderError
from etp_deploy.exporting import export
from etp_deploy.modelfile import read_model
from etp_deploy.pipeline import compress
from etp_deploy.sessions import open_session, run_session
from etp_deploy.sizes import model_sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from etp_deploy.demo.data import Digits
    from etp_deploy.demo.train import Epoch, TrainedNetwork

    Tell = Callable[[str, float], None]

#: Points of accuracy that may be lost against the dense network.
MOST_LOST = 0.015
#: Raw brightness of the digits runs from 0 to 16; pictures have 0 to 255.
PREPROCESSING = {"mode": "L", "layout": "NCHW", "scale": 1 / 255, "mean": 0.5, "std": 0.5}
_PICTURES = 50
#: Most time of timing for each network and provider.
BENCH_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network of the demo.

    Args:
        name: as in `etp_deploy.demo.networks.NETWORKS`.
        title: for readers.
        smaller: how many times fewer parameters it must end with.
        share: its part of the whole demo's time.
    """

    name: str
    title: str
    smaller: float
    share: float


SUBJECTS = (
    Subject("vgg", "VGG-style convolutional network", 4.0, 0.45),
    Subject("vit", "vision transformer", 2.0, 0.55),
)


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found: one JSON document, and which goals were missed, in words."""

    document: Mapping[str, Any]
    missed: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        return dict(self.document)


def run_demo(
    output: Path,
    *,
    seed: int = 0,
    progress: Tell | None = None,
) -> DemoResult:
    """Do the whole job for each network and leave a folder with models, JSON, page, pictures and a bundle.

    Args:
        output: the folder, which appears whole; one of a demo before is replaced.
        seed: of the training.
        progress: called with what is being done and the share of all work that is done.

    Raises:
        OutputError: when the folder cannot be written.
        VerificationError: when a compressed model does not agree with its original.
    """
    tell = progress or (lambda _step, _share: None)
    digits = load_digits()
    with demo_folder(output) as folder:
        job = _Job(folder, digits, seed, tell)
        start = 0.0
        networks = []
        for subject in SUBJECTS:
            job.begin(subject, start)
            networks.append(_network(job, subject))
            start += subject.share
        tell("bundle", 0.99)
        _bundle(folder, digits, networks[0])
        missed = tuple(line for network in networks for line in _missed(network))
        document = {
            "schema": SCHEMA,
            "seed": seed,
            "caption": CAPTION,
            "networks": networks,
            "missed": list(missed),
            "notes": job.notes,
            "seconds": job.seconds,
            "environment": job.environment,
        }
        (folder / "report.html").write_text(demo_page(document, job.raw), encoding="utf-8")
        _save(folder / MARKER, document)
    return DemoResult(document, missed)


class _Job:
    """Where results go, how long each stage took, and what is told."""

    def __init__(self, folder: Path, digits: Digits, seed: int, tell: Tell) -> None:
        self.folder, self.digits, self.seed = folder, digits, seed
        self.tell = tell
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.raw: dict[str, dict[str, Any]] = {}
        self.environment: Mapping[str, Any] = {}

    def begin(self, subject: Subject, start: float) -> None:
        """Say which network comes now."""
        self.subject, self.start = subject, start

    @contextmanager
    def stage(self, name: str, low: float, high: float) -> Iterator[Callable[[str, float], None]]:
        """Time a stage that takes the network's work from one share to another; tell of steps within."""

        def step(detail: str, share: float) -> None:
            done = self.start + self.subject.share * (low + (high - low) * min(share, 1.0))
            what = f"{name}: {detail}" if detail else name
            self.tell(f"{self.subject.name}: {what}", done)

        step("", 0.0)
        began = time.perf_counter()
        try:
            yield step
        finally:
            took = time.perf_counter() - began
            self.seconds[f"{self.subject.name} {name}"] = round(took, 2)


def _network(job: _Job, subject: Subject) -> dict[str, Any]:
    """Do everything for one network."""
    name, folder, digits = subject.name, job.folder, job.digits
    trained = {
        "dense": _trained(job, name, folder / f"{name}-dense.onnx", etp=False, start=0.0),
        "etp": _trained(job, name, folder / f"{name}-etp.onnx", etp=True, start=0.36),
    }
    original, compressed = folder / f"{name}-etp.onnx", folder / f"{name}-compressed.onnx"
    with job.stage("compress", 0.72, 0.8) as step:
        report = compress(original, compressed, progress=lambda stage: step(stage, 0.5))
    compression = {**report.to_json(), "source": original.name, "destination": compressed.name}
    _save(folder / f"{name}-compress.json", compression)
    with job.stage("test set", 0.8, 0.81):
        answers = _answers_onnx(compressed, digits.test_images)
        with torch.no_grad():
            expected = trained["etp"].module(torch.from_numpy(digits.test_images)).argmax(1).numpy()
    dense = folder / f"{name}-dense.onnx"
    sizes = {"dense": model_sizes(read_model(dense), dense), "etp": report.before, "compressed": report.after}
    return {
        "name": name,
        "title": subject.title,
        "goal": subject.smaller,
        "test_images": len(answers),
        "accuracy": {
            "dense": trained["dense"].accuracy,
            "etp": trained["etp"].accuracy,
            "compressed_onnx": float((answers == digits.test_labels).mean()),
        },
        "mismatches": int((answers != expected).sum()),
        **{
            key: {stage: getattr(found, key) for stage, found in sizes.items()}
            for key in ("parameters", "macs", "bytes")
        },
        "compression": compression,
        "training": {kind: [dataclasses.asdict(e) for e in trained[kind].history] for kind in trained},
        "benchmarks": _benchmarks(job, original, compressed),
    }


def _trained(job: _Job, name: str, path: Path, *, etp: bool, start: float) -> TrainedNetwork:
    """Train a network and export it with a free batch size."""
    kind = "etp" if etp else "dense"
    with job.stage(f"training {kind}", start, start + 0.34) as step:
        trained = train(name, etp=etp, seed=job.seed, progress=_epochs(step))
    with job.stage(f"export {kind}", start + 0.34, start + 0.36):
        images = {"images": torch.from_numpy(job.digits.test_images[:2])}
        export(trained.module, images, path, dynamic=["images.0=batch"], output_names=["logits"])
    return trained


def _epochs(step: Callable[[str, float], None]) -> Callable[[Epoch], None]:
    return lambda e: step(f"epoch {e.number} of {e.epochs}, {e.accuracy:.1%}", e.number / e.epochs)


def _answers_onnx(path: Path, images: np.ndarray) -> np.ndarray:
    """Return the class that a file gives each image."""
    (scores,) = run_session(open_session(path, optimize=True), {"images": images}, where=str(path)).values()
    return np.asarray(scores.argmax(1))


def _benchmarks(job: _Job, original: Path, compressed: Path) -> dict[str, Any]:
    """Time both files on the CPU, and on CUDA where ONNX Runtime has it; raw samples go into files of their own."""
    import onnxruntime  # noqa: PLC0415 - only to ask what there is

    found = {}
    providers = ["cpu"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.append("cuda")
    for place, provider in enumerate(providers):
        width = 0.18 / len(providers)
        low = 0.81 + place * width
        with job.stage(f"benchmark {provider}", low, low + width) as step:
            try:
                result = benchmark(
                    [original, compressed], providers=[provider], max_seconds=BENCH_SECONDS, progress=step
                )
            except ProviderError as error:
                job.notes.append(str(error))
                continue
        document = result.to_json()
        job.environment = document["environment"]
        job.raw[f"{job.subject.name} {provider}"] = document
        _save(job.folder / f"{job.subject.name}-bench-{provider}.json", document)
        found[provider] = {key: value for key, value in document.items() if key != "samples"}
    return found


def _bundle(folder: Path, digits: Digits, network: Mapping[str, Any]) -> None:
    """Bundle the compressed convolutional network, and save test images for pipelines to read."""
    bundle(
        folder / f"{network['name']}-compressed.onnx",
        folder / "bundle",
        example={"images": digits.test_images[:1]},
        labels=[str(digit) for digit in range(CLASSES)],
        preprocessing=PREPROCESSING,
        summary={"task": "handwritten digits, 8x8", "test_accuracy": network["accuracy"]["compressed_onnx"]},
    )
    pictures = folder / "digits"
    pictures.mkdir()
    height, width = IMAGE_SHAPE[1:]
    for index in range(min(_PICTURES, len(digits.test_labels))):
        bright = np.rint((digits.test_images[index, 0] + 1) / 2 * 255).astype(np.uint8)
        header = f"P5\n{width} {height}\n255\n".encode()
        (pictures / f"{index:03}-is-{digits.test_labels[index]}.pgm").write_bytes(header + bright.tobytes())


def _missed(network: Mapping[str, Any]) -> Iterator[str]:
    """Say which goals a network missed."""
    sizes, accuracy = network["parameters"], network["accuracy"]
    ratio = sizes["etp"] / sizes["compressed"]
    if ratio < network["goal"]:
        yield f"{network['name']}: {ratio:.2f}x fewer parameters, wanted {network['goal']:g}x"
    # half an image of 450 lies far below any rounding of these shares
    if accuracy["compressed_onnx"] < accuracy["dense"] - MOST_LOST - 1e-9:
        lost = (accuracy["dense"] - accuracy["compressed_onnx"]) * 100
        yield f"{network['name']}: {lost:.2f} points less accurate than dense, allowed are {MOST_LOST * 100:g}"
    found = network["compression"]["verification"]
    if found is None or not found["passed"]:
        yield f"{network['name']}: the compressed model is not verified"
    if network["mismatches"]:
        yield f"{network['name']}: {network['mismatches']} answers of the compressed file differ from PyTorch's"


def _save(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
