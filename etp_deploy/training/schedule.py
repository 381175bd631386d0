"""How strong the force is over training: warm-up, ramp, full strength, anneal."""

from __future__ import annotations

import math
from dataclasses import dataclass

from etp_deploy.errors import UsageError


@dataclass(frozen=True)
class Schedule:
    """Shares of a training's steps, in this order; what is left between ramp and anneal is full strength.

        schedule = Schedule(1000, warmup=0.1, ramp=0.2, anneal=0.3)
        regularizer.beta = 0.02 * schedule.share(step)

    Attributes:
        steps: how many steps the force has in all; none after them.
        warmup: the share without force, in which the network learns first.
        ramp: the share in which the force grows linearly.
        anneal: the share at the end in which it falls, as half a cosine, to nothing.

    Raises:
        UsageError: there are no steps, or shares are negative or more than the whole.
    """

    steps: int
    warmup: float = 0.0
    ramp: float = 0.0
    anneal: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.warmup, self.ramp, self.anneal)
        if self.steps < 1:
            raise UsageError(f"{self.steps} steps", where="steps", hint="at least 1")
        if any(not share >= 0 for share in shares) or sum(shares) > 1 + 1e-9:  # sums of rounded shares
            raise UsageError(f"warm-up, ramp and anneal are {shares}", where="schedule", hint="shares of one")

    def share(self, step: int) -> float:
        """Return the share of full strength at a step, counted from 0."""
        done = step / self.steps
        if done < self.warmup or done >= 1:
            return 0.0
        if done < self.warmup + self.ramp:
            return (done - self.warmup) / self.ramp
        if done > 1 - self.anneal:
            return 0.5 + 0.5 * math.cos(math.pi * (done - 1 + self.anneal) / self.anneal)
        return 1.0
