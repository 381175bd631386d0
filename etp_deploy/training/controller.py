"""Pruning to a wanted size or speed: adapts the force while training, lands on the target, then holds the dead."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from etp_deploy.errors import UsageError
from etp_deploy.training.blueprint import Blueprint
from etp_deploy.training.cost import Cost, LatencyCost, PlannedCost, parse_target
from etp_deploy.training.scheduled import Scheduled, Update
from etp_deploy.training.shards import from_first

if TYPE_CHECKING:
    from torch import Tensor

    from etp_deploy.training.recording import Recorder
    from etp_deploy.training.regularizer import TorqueRegularizer
    from etp_deploy.training.schedule import Schedule

# beta changes by at most this factor at an update: what a change does shows some updates later
_STRIDE = 1.5


class Controller(Scheduled):
    """Reaches a wanted ratio of parameters, multiply-accumulates or measured latency.

        controller = Controller(regularizer, "latency:0.5", updates=20, example_inputs=x)
        for epoch in range(30):
            for x, y in batches:
                ...
                optimizer.step()
                controller.step(rate)
            controller.update()

    At each update the network is clipped, the dead are frozen, and the network is priced as if they were removed.
    Where there is force, beta grows or falls so that the cost follows `target ** (update / updates)`. Once the target
    is reached, or at the last update, the force ends: what is then missing is made up for by killing the modules of
    the least relative score, as few as reach the target, and every later step only holds the dead.

    Args:
        regularizer: the force; its beta is where the search starts.
        target: "params:0.5", "macs:0.25" or "latency:0.5".
        updates: by how many updates the target is to be reached.
        example_inputs: as `etp_deploy.exporting.export` takes them, in place of a blueprint or a cost.
        blueprint: of the network, for parameters and multiply-accumulates.
        cost: another way to price, such as `LatencyCost` on another provider; asked once beforehand whether it can
            reach the target.
        schedule: of the force over the steps; full strength where None.
        clip: whether what lies below the threshold goes at each "update" or at each "step".
        every: price at every so many updates, and at the last.
        gain: how strongly beta follows the distance from the wanted course.
        proximal: whether `step` shrinks the weights; False where the loss holds `penalty()`, or the gradients get
            theirs by `add_gradients()`.
        recorder: told of each update.
        exporter: "torchscript" (where None) or "dynamo"; with `example_inputs` alone.

    Raises:
        UsageError: an option cannot be meant or would not be looked at, or the target is out of reach.
        ExportError: the network cannot be exported.
    """

    def __init__(
        self,
        regularizer: TorqueRegularizer,
        target: str,
        *,
        updates: int,
        example_inputs: Any = None,
        blueprint: Blueprint | None = None,
        cost: Cost | None = None,
        schedule: Schedule | None = None,
        clip: Literal["update", "step"] = "update",
        every: int = 1,
        gain: float = 1.0,
        proximal: bool = True,
        recorder: Recorder | None = None,
        exporter: str | None = None,
    ) -> None:
        kind, self.target = parse_target(target)
        if updates < 1 or every < 1:
            raise UsageError("updates and every are at least 1", where="controller")
        if not (math.isfinite(gain) and gain >= 0):
            raise UsageError(f"{gain} is neither zero nor positive", where="gain")
        _check_pricing(kind, target, example_inputs, blueprint, cost, exporter)
        super().__init__(regularizer, schedule, clip=clip, proximal=proximal, recorder=recorder)
        self.updates = updates
        self._every = every
        self._gain = gain
        model = regularizer.model
        if cost is None:
            exporter = exporter or "torchscript"
            if kind == "latency":
                cost = LatencyCost(model, example_inputs, exporter=exporter)
            else:
                blueprint = blueprint or Blueprint(model, example_inputs, exporter=exporter)
                blueprint.check(model)
                cost = PlannedCost(blueprint, "params" if kind == "params" else "macs")
        self._cost: Cost = cost
        self._check_reach(target)

    def _ratio(self, killed: Tensor | None = None) -> float:
        """Return the cost with some modules killed; every process has to ask, and the first one's answer holds."""
        zero = self.regularizer.zeros(killed)
        return from_first(lambda: self._cost.ratio(self.regularizer.model, zero))

    def _check_reach(self, target: str) -> None:
        """Refuse a target that is missed even with one module left in each group, before any training."""
        least = [torch.arange(len(dead)) > 0 for dead in self.regularizer.dead().values()]
        floor = self._ratio(torch.cat(least))
        if floor > self.target:
            hint = f"with one module left in each group the cost is {floor:.3f} of the dense network's"
            raise UsageError("the target is out of reach of these groups", where=target, hint=hint)

    def _judge(self, number: int, dead: int) -> Update:
        """Price the network, adapt beta, and land on the target at the last update."""
        ratio, killed = None, 0
        last = number >= self.updates
        if last or number % self._every == 0:
            ratio = self._ratio()
            if ratio > self.target and last:
                killed, ratio = self._land(ratio)
                dead = self.regularizer.freeze()
        reached = ratio is not None and ratio <= self.target
        found = Update(number, ratio, self.regularizer.beta, dead, killed, done=last or reached)
        # what no force could have done, as while warming up, says nothing about beta
        if ratio is not None and not found.done and self.regularizer.strength > 0:
            self._adapt(number, ratio)
        return found

    def _adapt(self, number: int, ratio: float) -> None:
        """Move beta by how far the cost is from its course, in units of the whole way."""
        whole = -math.log(self.target)
        behind = (math.log(ratio) + whole * number / self.updates) / whole
        self.base *= min(max(math.exp(self._gain * behind), 1 / _STRIDE), _STRIDE)

    def _land(self, ratio: float) -> tuple[int, float]:
        """Kill as few of the least modules as reach the target; return how many, and the cost.

        In each group the best one stays: a tensor keeps at least one channel.
        """
        order = self._ranked()
        low, high, best = 0, len(order), ratio
        total = sum(len(dead) for dead in self.regularizer.dead().values())
        while low < high:
            middle = (low + high) // 2
            killed = torch.zeros(total, dtype=torch.bool)
            killed[order[: middle + 1]] = True
            found = self._ratio(killed)
            if found <= self.target:
                high, best = middle, found
            else:
                low = middle + 1
        count = min(low + 1, len(order))
        killed = torch.zeros(total, dtype=torch.bool)
        killed[order[:count]] = True
        self.regularizer.zero(killed)
        if best > self.target:
            best = self._ratio()
        return count, best

    def _ranked(self) -> Tensor:
        """Return the live modules that may be killed, least relative score first, by place in the row of all."""
        scores, candidates, start = self.regularizer.relative_scores(), [], 0
        for name, dead in self.regularizer.dead().items():
            score = scores[name].cpu().double().masked_fill(dead.cpu(), math.inf)
            live = torch.nonzero(~dead.cpu()).reshape(-1)
            best = live[score[live].argmax()] if len(live) else None
            candidates += [(float(score[i]), start + int(i)) for i in live if best is None or i != best]
            start += len(dead)
        return torch.tensor([place for _, place in sorted(candidates)], dtype=torch.int64)


def _check_pricing(  # noqa: PLR0917 - the options as the controller has them
    kind: str,
    target: str,
    example_inputs: Any,
    blueprint: Blueprint | None,
    cost: Cost | None,
    exporter: str | None,
) -> None:
    """Refuse what there is too little or too much of to price a network with.

    Raises:
        UsageError: an option is missing, or would not be looked at.
    """
    if cost is not None:
        if not (blueprint is None and example_inputs is None and exporter is None):
            hint = "give no blueprint, no example_inputs and no exporter"
            raise UsageError("a cost prices by itself", where="cost", hint=hint)
        return
    if example_inputs is None and (blueprint is None or kind == "latency"):
        raise UsageError("nothing to price the network with", where=target, hint="give example_inputs")
    if blueprint is not None and kind == "latency":
        raise UsageError(
            "latency is measured, not planned", where="blueprint", hint="give example_inputs alone"
        )
    if blueprint is not None and not (example_inputs is None and exporter is None):
        where = "exporter" if example_inputs is None else "example_inputs"
        raise UsageError("the blueprint was exported before", where=where, hint="give it to Blueprint")
