"""The force over a training, by a schedule and without a target: the hooks that a training loop calls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from etp_deploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from etp_deploy.training.recording import Recorder
    from etp_deploy.training.regularizer import TorqueRegularizer
    from etp_deploy.training.schedule import Schedule


@dataclass(frozen=True)
class Update:
    """What an update found.

    Attributes:
        number: counted from 1.
        ratio: the cost relative to the dense network; None where it was not asked for.
        beta: the regulariser's before the update, zero where there was no force.
        dead: dead modules over all groups.
        killed: how many of these were killed by score to land on the target.
        done: whether the force has ended.
    """

    number: int
    ratio: float | None
    beta: float
    dead: int
    killed: int
    done: bool


def check_every(every: int | None) -> None:
    """Refuse what is no number of steps between two updates; None is after each epoch.

    Raises:
        UsageError: it is not positive.
    """
    if every is not None and every < 1:
        raise UsageError(f"an update after every {every} steps", where="every", hint="at least 1, or None")


class Scheduled:
    """A force for as long as its schedule says; at each update the dead are frozen. A `Controller` has a target too.

        force = Scheduled(regularizer, Schedule(steps, warmup=0.1))
        for epoch in range(epochs):
            for x, y in batches:
                ...
                optimizer.step()
                force.step(rate)
            force.update()

    Args:
        regularizer: the force; its beta is full strength.
        schedule: of the force over the steps; full strength without end where None.
        clip: whether what lies below the threshold goes at each "update" or at each "step".
        proximal: whether `step` shrinks the weights; False where the loss holds `penalty()`, or the gradients get
            theirs by `add_gradients()`.
        recorder: told of each update.

    Raises:
        UsageError: an option cannot be meant.
    """

    def __init__(
        self,
        regularizer: TorqueRegularizer,
        schedule: Schedule | None = None,
        *,
        clip: Literal["update", "step"] = "update",
        proximal: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        if clip not in {"update", "step"}:
            raise UsageError(f"{clip!r} is neither update nor step", where="clip")
        self.regularizer = regularizer
        self.proximal = proximal
        self.history: list[Update] = []
        self.done = False
        self.base = regularizer.beta
        self._steps = 0
        self._schedule = schedule
        self._clip = clip
        self._recorder = recorder

    def penalty(self) -> Tensor:
        """Return the regulariser's penalty while there is force, zero after; for the loss, with `proximal=False`.

        Under `torch.no_grad()` it is a number to look at, however the force is applied.

        Raises:
            UsageError: `step` shrinks the weights, and the force would act twice.
        """
        if torch.is_grad_enabled():
            self._check_once("penalty")
        self._set_beta()
        if self.done:
            return torch.zeros((), device=next(self.regularizer.model.parameters()).device)
        return self.regularizer.penalty()

    def add_gradients(self, scale: float = 1.0) -> None:
        """Add the penalty's gradient while there is force, with `proximal=False`; see `TorqueRegularizer`.

        Raises:
            UsageError: `step` shrinks the weights, and the force would act twice.
        """
        self._check_once("add_gradients")
        self._set_beta()
        if not self.done:
            self.regularizer.add_gradients(scale)

    def _check_once(self, where: str) -> None:
        if self.proximal:
            hint = "pass proximal=False, or leave it out"
            raise UsageError("step() shrinks the weights: the force would act twice", where=where, hint=hint)

    def _set_beta(self) -> None:
        share = 1.0 if self._schedule is None else self._schedule.share(self._steps)
        self.regularizer.beta = 0.0 if self.done else self.base * share

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Shrink, clip where that was asked for, and hold the frozen; call it after each optimiser step.

        Args:
            rate: the optimiser's learning rate at this step.
        """
        self._set_beta()
        if not self.done:
            if self.proximal:
                self.regularizer.shrink(rate)
            if self._clip == "step":
                self.regularizer.clip()
        if self.history:
            self.regularizer.hold()
        self._steps += 1

    @torch.no_grad()
    def update(self) -> Update:
        """Clip, freeze and judge; call it after each epoch, or as often as suits."""
        number = len(self.history) + 1
        if self.done:
            self.regularizer.hold()
            found = Update(number, None, 0.0, self.history[-1].dead, 0, done=True)
        else:
            self.regularizer.clip()
            found = self._judge(number, self.regularizer.freeze())
            self.done = found.done
            self.regularizer.advance()
        self.history.append(found)
        if self._recorder is not None:
            self._recorder.record(number, self.regularizer)
        self._set_beta()
        return found

    def _judge(self, number: int, dead: int) -> Update:
        """Return what an update finds: here, whether the schedule has come to its end."""
        ended = self._schedule is not None and self._steps >= self._schedule.steps
        return Update(number, None, self.regularizer.beta, dead, 0, done=ended)

    def metrics(self) -> dict[str, float]:
        """Return numbers for a training's logger: strength, dead, cost, and by group dead, norms and force."""
        regularizer = self.regularizer
        statistics = regularizer.statistics()
        result = {"etp/beta": regularizer.beta, "etp/dead": float(sum(row.dead for row in statistics))}
        ratios = [found.ratio for found in self.history if found.ratio is not None]
        if ratios:
            result["etp/ratio"] = ratios[-1]
        for row in statistics:
            force = float(regularizer.forces(row.name).max()) * regularizer.strength
            result[f"etp/{row.name}/dead"] = float(row.dead)
            result[f"etp/{row.name}/mean_norm"] = row.mean_norm
            result[f"etp/{row.name}/max_norm"] = row.max_norm
            result[f"etp/{row.name}/max_force"] = force
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the model and the optimiser; the regulariser's state is in it."""
        return {
            "regularizer": self.regularizer.state_dict(),
            "history": [asdict(found) for found in self.history],
            "done": self.done,
            "base": self.base,
            "steps": self._steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            UsageError: the regulariser has other groups.
        """
        self.regularizer.load_state_dict(state["regularizer"])
        self.history = [Update(**found) for found in state["history"]]
        self.done, self.base = bool(state["done"]), float(state["base"])
        self._steps = int(state["steps"])
