"""A log of forces, norms and dead counts over training, as JSON lines or CSV, and its pictures."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from etp_deploy.errors import UsageError
from etp_deploy.training.drawing import Curve, curves
from etp_deploy.training.shards import is_first

if TYPE_CHECKING:
    from collections.abc import Sequence

    from etp_deploy.training.dying import GroupStatistics
    from etp_deploy.training.regularizer import TorqueRegularizer


@dataclass(frozen=True)
class Row:
    """One group at one time.

    Attributes:
        time: the epoch, step or update that the caller counts.
        group: its name.
        kind: what its modules are.
        total: how many there are.
        dead: how many of them are dead.
        min_norm: the least L2 norm of a module.
        mean_norm: the mean.
        max_norm: the largest.
        min_force: the least force times strength.
        max_force: the largest.
    """

    time: int
    group: str
    kind: str
    total: int
    dead: int
    min_norm: float
    mean_norm: float
    max_norm: float
    min_force: float
    max_force: float


class Recorder:
    """Collects a row for each group at each time, and writes each as it comes.

        recorder = Recorder("run.jsonl")
        for epoch in range(epochs):
            ...
            recorder.record(epoch, regularizer)
        Path("norms.svg").write_text(recorder.picture())

    Args:
        path: a file ending in .jsonl or .csv, continued where it exists; None keeps rows in memory alone.

    Raises:
        UsageError: the file's name ends otherwise.
    """

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.suffix not in {".jsonl", ".csv"}:
            raise UsageError("a log is .jsonl or .csv", where=str(self.path))
        self.rows: list[Row] = (
            list(read_rows(self.path)) if self.path is not None and self.path.exists() else []
        )

    def record(self, time: int, regularizer: TorqueRegularizer) -> None:
        """Note all groups at a time; rows of this time or later, of a run that was cut off, are dropped."""
        if any(row.time >= time for row in self.rows):
            self.rows = [row for row in self.rows if row.time < time]
            self._rewrite()
        fresh = []
        for found in regularizer.statistics():
            force = regularizer.forces(found.name) * regularizer.strength
            fresh.append(
                Row(
                    time,
                    found.name,
                    found.kind,
                    found.total,
                    found.dead,
                    found.min_norm,
                    found.mean_norm,
                    found.max_norm,
                    float(force.min()),
                    float(force.max()),
                )
            )
        self.rows += fresh
        self._write(fresh)

    def _rewrite(self) -> None:
        if self.path is not None and is_first():
            self.path.unlink(missing_ok=True)
            self._write(self.rows)

    def _write(self, rows: Sequence[Row]) -> None:
        if self.path is None or not is_first():
            return
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            if self.path.suffix == ".jsonl":
                file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
                return
            writer = csv.writer(file)
            if new:
                writer.writerow([field.name for field in fields(Row)])
            writer.writerows([list(asdict(row).values()) for row in rows])

    def picture(self) -> str:
        """Draw the mean norm of each group over time, in units of its first, as an SVG."""
        series: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            series.setdefault(row.group, []).append((row.time, row.mean_norm))
        drawn = [
            Curve(name, [(time, norm / (points[0][1] or 1.0)) for time, norm in points])
            for name, points in series.items()
        ]
        return curves(drawn, title="Mean norm of a module, relative to the first", x="time", y="norm")


def read_rows(path: Path | str) -> list[Row]:
    """Read a log back.

    Args:
        path: a file that `Recorder` wrote.
    """
    path = Path(path)
    with path.open(newline="") as file:
        if path.suffix == ".jsonl":
            return [Row(**json.loads(line)) for line in file]
        kinds = {"time": int, "group": str, "kind": str, "total": int, "dead": int}
        return [
            Row(**{key: kinds.get(key, float)(value) for key, value in row.items()})
            for row in csv.DictReader(file)
        ]


def table(statistics: Sequence[GroupStatistics], title: str = "") -> Table:
    """Return a table of groups for the terminal: how many modules are alive, and their norms.

    Args:
        statistics: as `TorqueRegularizer.statistics` returns them.
        title: above the table.
    """
    result = Table(title=title or None)
    for column in ("group", "kind"):
        result.add_column(column)
    for column in ("alive", "of", "mean norm", "largest"):
        result.add_column(column, justify="right")
    for row in statistics:
        alive = str(row.total - row.dead)
        result.add_row(
            row.name, row.kind, alive, str(row.total), f"{row.mean_norm:.3g}", f"{row.max_norm:.3g}"
        )
    return result
