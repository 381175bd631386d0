"""What a network would cost once its dead structure is removed, relative to the dense one."""

from __future__ import annotations

import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from math import exp, log
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from etp_deploy.bench.sessions import Setting, bind_host, open_session
from etp_deploy.errors import UsageError
from etp_deploy.exporting import export
from etp_deploy.inputs import draw_inputs, input_specs
from etp_deploy.pipeline import compress
from etp_deploy.training.wrapping import plain_copy

if TYPE_CHECKING:
    from torch import nn

    from etp_deploy.training.blueprint import Blueprint

KINDS = ("params", "macs", "latency")
# one block of runs of each file lasts about this long, so that neither a clock tick nor a neighbour decides
_BLOCK_SECONDS = 0.02


def parse_target(text: str) -> tuple[str, float]:
    """Read a target such as "params:0.5", "macs:0.25" or "latency:0.5".

    Raises:
        UsageError: it is none.
    """
    kind, _, ratio = text.partition(":")
    try:
        value = float(ratio)
    except ValueError:
        value = 0.0
    if kind not in KINDS or not 0 < value < 1:
        raise UsageError(f"{text!r} is no target", hint="such as params:0.5, macs:0.25 or latency:0.5")
    return kind, value


class Cost(ABC):
    """A cost relative to the dense network's."""

    @abstractmethod
    def ratio(self, model: nn.Module, zero: np.ndarray) -> float:
        """Return the cost of the compressed network, 1 for the dense.

        Args:
            model: the network.
            zero: which of its weights count as zero, flat, in the order of `named_parameters`.
        """


class PlannedCost(Cost):
    """Parameters or multiply-accumulates as the surgery plans them; nothing is exported again.

    Args:
        blueprint: of the network.
        kind: "params" or "macs".
    """

    def __init__(self, blueprint: Blueprint, kind: Literal["params", "macs"]) -> None:
        self._blueprint = blueprint
        self._kind = kind
        self._dense = self._of(np.zeros(blueprint.total, bool))

    def _of(self, zero: np.ndarray) -> int:
        price = self._blueprint.price(zero)
        return price.parameters if self._kind == "params" else price.macs

    def ratio(self, model: nn.Module, zero: np.ndarray) -> float:
        """Return planned over dense."""
        del model
        return self._of(zero) / self._dense


class LatencyCost(Cost):
    """Latency in ONNX Runtime on this machine: export, compress, and time against the dense export, interleaved.

    With one thread on the CPU the processor's time counts, which other processes cannot lengthen; else wall time.

    Args:
        model: the network, whose export now is the dense one.
        example_inputs: as `etp_deploy.exporting.export` takes them.
        exporter: "torchscript" or "dynamo".
        provider: of ONNX Runtime, as `bench` takes them.
        threads: of ONNX Runtime.
        rounds: how many pairs of blocks are timed.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        exporter: str = "torchscript",
        provider: str = "cpu",
        threads: int = 1,
        rounds: int = 9,
    ) -> None:
        self._inputs = example_inputs
        self._exporter = exporter
        self._setting = Setting(provider=provider, threads=threads)
        self._rounds = rounds
        self._folder = tempfile.TemporaryDirectory(prefix="etp-deploy-")
        self._dense = Path(self._folder.name, "dense.onnx")
        self._export(plain_copy(model), self._dense)

    def _export(self, model: nn.Module, path: Path) -> None:
        opset = 17 if self._exporter == "torchscript" else 20
        export(model, self._inputs, path, exporter=self._exporter, opset=opset, check=False)

    def ratio(self, model: nn.Module, zero: np.ndarray) -> float:
        """Return the typical quotient of compressed and dense times."""
        full, small = Path(self._folder.name, "full.onnx"), Path(self._folder.name, "small.onnx")
        self._export(with_zeros(model, zero), full)
        compress(full, small, verify=False, simplify=False)
        return self._quotient(small)

    def _quotient(self, small: Path) -> float:
        arrays = draw_inputs(input_specs(self._dense), seed=0)
        runs = [bind_host(open_session(path, self._setting), arrays) for path in (self._dense, small)]
        cpu = self._setting.provider == "cpu" and self._setting.threads == 1
        clock = time.thread_time if cpu else time.perf_counter
        started = clock()
        for run in runs * 3:
            run()
        count = max(1, round(_BLOCK_SECONDS / max((clock() - started) / 6, 1e-6)))
        logs = []
        for number in range(self._rounds):
            times = [0.0, 0.0]
            for place in (0, 1) if number % 2 else (1, 0):
                started = clock()
                for _ in range(count):
                    runs[place]()
                times[place] = clock() - started
            logs.append(log(times[1] / times[0]))
        return exp(statistics.median(logs))


def with_zeros(model: nn.Module, zero: np.ndarray) -> nn.Module:
    """Return a copy of a network in which more weights are zero.

    Args:
        model: the network.
        zero: which weights, flat, in the order of `named_parameters`.
    """
    twin = plain_copy(model)
    start = 0
    with torch.no_grad():
        for weight in twin.parameters():
            gone = torch.from_numpy(zero[start : start + weight.numel()]).reshape(weight.shape)
            weight.masked_fill_(gone.to(weight.device), 0.0)
            start += weight.numel()
    return twin
