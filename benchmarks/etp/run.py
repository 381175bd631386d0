"""Put ETP to the test: train, prune and fine-tune six networks with every method, and measure what is left.

    python benchmarks/etp/run.py vision-vgg
    python benchmarks/etp/run.py all

Each finished cell (task, method, speed-up, seed) is one line of `results/TASK.jsonl`, written whole; a run that
starts again skips what is there. `report.py` makes the tables.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import json
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import data
import measure
import torch
import training
from methods import METHODS, Choice, OutOfReachError, Setting
from pruning import FLOOR, Multiplications, expanded, macs
from tasks import TASKS, Task

from etp_deploy.training import removal_order

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from methods import Force
    from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
RUNS = data.CACHE / "runs"
#: Training examples that the order of removal is found on.
EXAMPLES = 800
#: What is run first; the others follow once all tasks have these.
FIRST = tuple(name for name in METHODS if not name.endswith("-index") and name != "cut")
#: What makes a cell: two lines that agree in these are the same cell.
KEY = ("record", "task", "method", "strength", "variant", "speedup", "seed")
Document = dict[str, Any]


@dataclass
class Results:
    """The finished records of a task, in a file that only grows.

    Args:
        path: of the file; it need not exist.
    """

    path: Path
    records: list[Document] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.records = [json.loads(line) for line in lines]

    def find(self, **wanted: Any) -> Document | None:
        """Return the record with these values, None where there is none."""
        for record in self.records:
            if all(record.get(name) == value for name, value in wanted.items()):
                return record
        return None

    def add(self, record: Document) -> Document:
        """Write a record as one line, all of it or nothing, and return it."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(one) + "\n" for one in self.records), encoding="utf-8")
        draft.replace(self.path)
        return record


@dataclass
class Experiment:
    """One task's cells.

    Args:
        task: the task.
        results: where its records go.
        runs: folder for trained weights, so that what shares a start shares the work.
        bench_seconds: for each timing, of seed 0 alone; 0 leaves it out.
    """

    task: Task
    results: Results
    runs: Path = RUNS
    bench_seconds: float = measure.BENCH_SECONDS
    _data: data.Data | None = None

    @property
    def data(self) -> data.Data:
        """The task's data, read once."""
        if self._data is None:
            self._data = self.task.load()
        return self._data

    def example(self) -> tuple[Tensor, ...]:
        """Return one sample."""
        return tuple(tensor[:1] for tensor in self.data.test.inputs)

    def run(self, methods: Sequence[str], seed: int) -> None:
        """Finish the cells of some methods for a seed; what is finished is skipped."""
        self._cell("dense", 1.0, seed)
        for method in methods:
            if seed == 0:
                for choice in METHODS[method].choices:
                    for speedup in self.task.speedups:
                        self._tuning(method, choice, speedup)
            for speedup in self.task.speedups:
                self._cell(method, speedup, seed)

    def _tuning(self, method: str, choice: Choice, speedup: float) -> None:
        """Record how a choice does on the validation examples, with seed 0."""
        key = self._key("tuning", method, choice, speedup, 0)
        if self.results.find(**key) is not None:
            return
        started = time.perf_counter()
        try:
            small, _ = self._tuned(method, choice, speedup, 0)
        except OutOfReachError as error:
            found: Document = {"failed": str(error)}
        else:
            found = {"validation": self._score(small, self.data.validation)}
        self._tell(self.results.add({**key, **found, "seconds": round(time.perf_counter() - started, 1)}))

    def _cell(self, method: str, speedup: float, seed: int) -> None:
        """Measure a method's network on the test examples, with what validation chose."""
        choice = Choice(0.0) if method == "dense" else self._chosen(method, speedup)
        key = self._key("cell", method, choice, speedup, seed)
        if self.results.find(**key) is not None:
            return
        started = time.perf_counter()
        if choice is None:
            found: Document = {"failed": self._why(method, speedup)}
        else:
            try:
                found = self._measured(method, choice, speedup, seed)
            except OutOfReachError as error:
                found = {"failed": str(error)}
        seconds = round(time.perf_counter() - started, 1)
        self._tell(self.results.add({**key, **found, "seconds": seconds, "machine": machine()}))

    def _key(self, record: str, method: str, choice: Choice | None, speedup: float, seed: int) -> Document:
        chosen = (None, None) if choice is None else (choice.strength, choice.variant)
        return dict(zip(KEY, (record, self.task.name, method, *chosen, speedup, seed), strict=True))

    def _tell(self, record: Document) -> None:
        shown = {
            name: record[name]
            for name in (*KEY, "validation", "value", "failed", "seconds")
            if name in record
        }
        print(dt.datetime.now(dt.UTC).strftime("%H:%M:%S"), json.dumps(shown), flush=True)

    def _tunings(self, method: str, speedup: float) -> list[Document]:
        wanted = {"record": "tuning", "method": method, "speedup": speedup}
        return [
            r for r in self.results.records if all(r.get(name) == value for name, value in wanted.items())
        ]

    def _chosen(self, method: str, speedup: float) -> Choice | None:
        """Return what did best on the validation examples; None where nothing worked."""
        sign = 1 if self.task.kind.higher else -1
        scores = [
            (sign * r["validation"], r["strength"], r["variant"])
            for r in self._tunings(method, speedup)
            if "validation" in r
        ]
        return Choice(*max(scores)[1:]) if scores else None

    def _why(self, method: str, speedup: float) -> str:
        return next((r["failed"] for r in self._tunings(method, speedup)), "nothing was tried")

    def _score(self, network: nn.Module, split: data.Split) -> float:
        return self.task.kind.score(training.outputs(network, split), split.targets)

    # training, every phase of it kept on disk

    def _train(
        self, network: nn.Module, epochs: int, seed: int, share: float, force: Force | None = None
    ) -> None:
        recipe = self.task.recipe
        training.train(
            network,
            self.data.train,
            self.task.kind,
            rate=recipe.rate * share,
            batch=recipe.batch,
            epochs=epochs,
            seed=seed,
            after_step=None if force is None else force.pull,
        )

    def _kept(self, name: str) -> Path:
        self.runs.mkdir(parents=True, exist_ok=True)
        return self.runs / f"{self.task.name}.{name}.pt"

    def _start(self, seed: int) -> nn.Module:
        """Return the dense network that all methods start from."""
        torch.manual_seed(seed)
        network = self.task.build(self.data)
        path = self._kept(f"start.{seed}")
        if path.exists():
            network.load_state_dict(torch.load(path))
        else:
            self._train(network, self.task.recipe.dense, seed, 1.0)
            torch.save(network.state_dict(), path)
        return network.eval()

    def _removal(self, speedup: float, seed: int) -> Mapping[str, Tensor]:
        """Return the order in which modules had best go from the dense network, by sensitivity on training examples."""
        path = self._kept(f"removal.{speedup:g}x.{seed}")
        if path.exists():
            found: dict[str, Tensor] = torch.load(path)
            return found
        network, kind = self._start(seed), self.task.kind
        units = network.units()
        shuffled = torch.randperm(len(self.data.train), generator=torch.Generator().manual_seed(seed))
        batches = [self.data.train.take(chosen) for chosen in shuffled[:EXAMPLES].split(8)]
        order = removal_order(
            network,
            [unit.readers() for unit in units],
            batches,
            lambda model, part: kind.loss(model(*part.inputs), part.targets),
            cost=Multiplications(network, units, self.example()),
            target=1 / speedup,
            least=FLOOR,
        )
        torch.save(order, path)
        return order

    def _forced(self, method: str, choice: Choice, speedup: float, seed: int) -> tuple[nn.Module, Force]:
        """Return the network after the epochs with a force, and the force."""
        recipe = self.task.recipe
        network = self._start(seed)
        shares = training.shares(recipe.force, len(self.data.train), recipe.batch)
        pulls = recipe.rate * recipe.again * sum(shares)
        setting = Setting(
            network,
            network.units(),
            self.example(),
            choice,
            pulls,
            speedup,
            lambda: self._removal(speedup, seed),
        )
        force = METHODS[method].force(setting)
        aim = f".{speedup:g}x" if METHODS[method].aims else ""
        path = self._kept(f"forced.{method}.{choice.name}{aim}.{seed}")
        if path.exists():
            network.load_state_dict(torch.load(path))
        else:
            self._train(network, recipe.force, seed + 1000, recipe.again, force)
            torch.save(network.state_dict(), path)
        return network, force

    def _tuned(
        self, method: str, choice: Choice, speedup: float, seed: int
    ) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
        """Return the pruned network after fine-tuning, and what it kept."""
        path = self._kept(f"tuned.{method}.{choice.name}.{speedup:g}x.{seed}")
        if path.exists():
            small, keep = torch.load(path, weights_only=False)  # this harness's own file
            return small.eval(), keep
        _, force = self._forced(method, choice, speedup, seed)
        small, keep = force.pruned()
        self._train(small, self.task.recipe.tune, seed + 2000, self.task.recipe.again)
        torch.save((small, keep), path)
        return small.eval(), keep

    def _dense(self, seed: int) -> nn.Module:
        """Return the dense network, trained on for as long as the others."""
        network = copy.deepcopy(self._start(seed))
        path = self._kept(f"dense.{seed}")
        if path.exists():
            network.load_state_dict(torch.load(path))
        else:
            recipe = self.task.recipe
            self._train(network, recipe.force, seed + 1000, recipe.again)
            self._train(network, recipe.tune, seed + 2000, recipe.again)
            torch.save(network.state_dict(), path)
        return network.eval()

    # measuring

    def _measured(self, method: str, choice: Choice, speedup: float, seed: int) -> Document:
        """Train a network and measure it, in PyTorch and as a compressed file."""
        started = time.perf_counter()
        start = self._start(seed)
        if method == "dense":
            small = full = self._dense(seed)
        else:
            small, keep = self._tuned(method, choice, speedup, seed)
            # back to full size: what training with a dead set leaves, and what the surgery has to shrink
            full = small if keep is None else expanded(small, start, start.units(), keep)
        trained = time.perf_counter()
        example, test, kind = self.example(), self.data.test, self.task.kind
        before, after = macs(start, example), macs(small, example)
        name = f"{self.task.name}.{method}.{speedup:g}x.{seed}"
        files = measure.Files(self.runs / f"{name}.full.onnx", self.runs / f"{name}.onnx")
        found = {
            "metric": kind.metric,
            "value": self._score(full, test),
            "macs": {"dense": before, "pruned": after, "ratio": before / after},
            "parameters": {"dense": _parameters(start), "pruned": _parameters(small)},
            "onnx": measure.write(full, test, files),
            "equality": measure.equality(full, files.compressed, test, kind),
        }
        if self.bench_seconds and seed == 0:
            reference = self._reference(test)
            found["timing"] = measure.timing(reference, files.compressed, full, test, self.bench_seconds)
        found["train_seconds"] = round(trained - started, 1)
        return found

    def _reference(self, split: data.Split) -> Path:
        """Return the dense network's file, which all are timed against; written where it is not there."""
        name = f"{self.task.name}.dense.1x.0"
        files = measure.Files(self.runs / f"{name}.full.onnx", self.runs / f"{name}.onnx")
        if not files.compressed.exists():
            measure.write(self._dense(0), split, files)
        return files.compressed


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def machine() -> Document:
    """Return what the results depend on beside the seed."""
    names = ("torch", "onnx", "onnxruntime", "numpy", "transformers")
    return {
        "when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def rounds(tasks: Sequence[Task], methods: Sequence[str]) -> Iterator[tuple[Task, list[str], int]]:
    """Yield what to run, in the order that makes the tables useful early: seed 0 first, published variants last."""
    first = [method for method in methods if method in FIRST]
    later = [method for method in methods if method not in FIRST]
    for some, seed in ((some, seed) for some in (first, later) for seed in range(10)):
        for task in tasks:
            if seed < task.seeds and some:
                yield task, some, seed


def main() -> int:
    """Run the tasks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=[*TASKS, "all"])
    parser.add_argument("--methods", default=",".join(METHODS), help="names, with commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = list(TASKS) if "all" in options.tasks else options.tasks
    experiments = {name: Experiment(TASKS[name], Results(RESULTS / f"{name}.jsonl")) for name in names}
    try:
        for task, methods, seed in rounds([TASKS[name] for name in names], options.methods.split(",")):
            experiments[task.name].run(methods, seed)
    except data.FetchError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
