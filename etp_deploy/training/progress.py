"""Progress of a training in the terminal: a bar over its batches, a line for each epoch, a table at the end."""

from __future__ import annotations

import time
from operator import length_hint
from typing import TYPE_CHECKING, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch import Tensor

from etp_deploy.training.recording import table
from etp_deploy.training.shards import is_first

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from etp_deploy.training.scheduled import Scheduled

T = TypeVar("T")


class Progress:
    """What a pruning training shows: force, loss, dead modules, cost and the time left.

        with Progress(controller, epochs) as progress:
            for epoch in range(epochs):
                for x, y in progress.batches(loader):
                    ...
                    progress.loss(loss)
                controller.update()
                progress.line()

    The bar is drawn on a terminal alone; lines and the table are printed anywhere, by the first process of several.

    Args:
        force: a `Scheduled` force or a `Controller`.
        epochs: how many there are.
        start: how many were done before, where a training is resumed.
        console: where to print; None for standard error.
    """

    def __init__(
        self, force: Scheduled, epochs: int, *, start: int = 0, console: Console | None = None
    ) -> None:
        self._force = force
        self._epochs = epochs
        self._epoch = start
        self._first = start
        self._console = console or Console(stderr=True, highlight=False)
        self._quiet = not is_first()
        self._losses: list[float | Tensor] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        visible = self._console.is_terminal and not self._quiet
        self._bars = Bars(*columns, console=self._console, transient=True, disable=not visible)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if kind is None:
            statistics = self._force.regularizer.statistics()  # sums over shards need every process
            if not self._quiet:
                self._console.print(table(statistics, title="What is left"))

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Yield a loader's batches, with a bar on the terminal."""
        name = f"epoch {self._epoch + 1}/{self._epochs}"
        task = self._bars.add_task(name, total=length_hint(loader) or None, loss="-")
        for batch in loader:
            yield batch
            shown = self._losses and not self._bars.disable
            self._bars.update(task, advance=1, loss=f"{float(self._losses[-1]):.3f}" if shown else "-")
        self._bars.remove_task(task)

    def loss(self, value: float | Tensor) -> None:
        """Note the loss of a batch; a tensor is read no sooner than it is shown."""
        self._losses.append(value.detach() if isinstance(value, Tensor) else value)

    def line(self) -> None:
        """Print the line of an epoch; call it after the epoch's update."""
        self._epoch += 1
        done, left = self._epoch - self._first, self._epochs - self._epoch
        parts = [f"epoch {self._epoch:>{len(str(self._epochs))}}/{self._epochs}"]
        if self._losses:
            parts.append(f"loss {sum(map(float, self._losses)) / len(self._losses):.4f}")
        if self._force.history:
            last = self._force.history[-1]
            parts.append(f"force {f'{last.beta:.2e}' if last.beta else 'off':8}")
            total = sum(len(dead) for dead in self._force.regularizer.dead().values())
            parts.append(f"dead {last.dead}/{total}")
            ratios = [found.ratio for found in self._force.history if found.ratio is not None]
            if ratios:
                parts.append(f"cost {ratios[-1]:.3f}")
        parts.append(f"{_clock((time.monotonic() - self._started) / done * left)} left")
        self._losses.clear()
        if not self._quiet:
            self._console.print("  ".join(parts), soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
