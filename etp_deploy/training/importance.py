"""Which modules a network can do without: how its loss depends on them, and in what order they had best go.

Sources: the first-order criterion of Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019);
that it has to be asked again as modules go, or whole layers are lost, Tanaka et al., "Pruning neural networks without
any data by iteratively conserving synaptic flow" (NeurIPS 2020).
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from etp_deploy.errors import UsageError
from etp_deploy.training.dying import Modules
from etp_deploy.training.layout import wide
from etp_deploy.training.shards import from_first, sum_over_processes
from etp_deploy.training.wrapping import plain_copy, unwrapped

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from etp_deploy.training.cost import Cost
    from etp_deploy.training.modules import Group


def sensitivity(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Return how much the loss depends on each module: the mean over batches of `(sum of w * dL/dw)` squared.

    The sum over a module's weights is the derivative of the loss as all of them shrink together, as the force makes
    them; a weight that two parts of the module hold counts twice, as it is pulled twice. The network is looked at in
    evaluation mode; its weights, gradients and mode stay as they are. Several processes sum up over the batches of all.

    Args:
        model: the network, not sharded.
        groups: the modules.
        batches: what `loss` takes, each alike in number of examples; small ones tell more.
        loss: of the network that it is given, without wrappers, and a batch: a scalar.

    Returns:
        For each group's name the modules' numbers, shape (n,), zero or above, in float64 on the CPU.

    Raises:
        UsageError: there are no batches, the loss is no number or does not reach a group, the network is sharded, or
            the groups cannot be meant.
        ModelError: a group does not fit the model.
    """
    modules = Modules(model, groups, 0.0, "module")
    _refuse_shards(modules)
    return modules.by_group(_sensitivity(modules, batches, loss))


def removal_order(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    cost: Cost,
    target: float,
    rounds: int = 12,
    least: float = 0.0,
) -> dict[str, Tensor]:
    """Return in what order modules had best go until a network costs what it may, for the pivot "network".

        cost = PlannedCost(blueprint, "macs")
        order = removal_order(model, groups, batches, loss, cost=cost, target=0.25)
        regularizer = TorqueRegularizer(model, groups=groups, norm="l2", pivot="network", importance=order)

    Round by round, at falling cost, those go whose sensitivity is least for what each saves; after each round both are
    asked again of the network without them. What is left at the end comes last, in the order of the last round. The
    network itself stays as it is.

    Args:
        model: the network, trained, not sharded.
        groups: the modules, with all of their weights: what of one is left out works on once it is gone.
        batches: see `sensitivity`; gone through once a round.
        loss: see `sensitivity`; it is given copies of the network.
        cost: how the network is priced without some modules, once a round for each group and some times more. It has
            to fall as modules go, and to say the same when it is asked again: measured latency does not.
        target: the wanted cost, relative to the dense network's: below what the network costs now.
        rounds: in how many steps the target is reached.
        least: the share of each group that stays, at least one module.

    Returns:
        For each group's name the modules' places in the order of removal, 0 for the first to go, shape (n,), float64.

    Raises:
        UsageError: an option cannot be meant, the target is out of reach, or see `sensitivity`.
        ModelError: a group does not fit the model.
    """
    if not 0 < target < 1:
        raise UsageError(f"{target} is no share of the cost", where="target", hint="above 0 and below 1")
    if rounds < 1 or not 0 <= least <= 1:
        raise UsageError("want at least one round, and a share to keep", where="rounds, least")
    if iter(batches) is batches:
        hint = "give a list: each round goes through them"
        raise UsageError("they can be gone through only once", where="batches", hint=hint)
    _refuse_shards(Modules(model, groups, 0.0, "module"))
    modules = Modules(plain_copy(model), groups, 0.0, "module")
    plan = _Plan(modules, cost, least)
    start = plan.ratio
    if start <= target:
        raise UsageError(
            f"the network costs {start:.3f} of the dense one already", where=f"target {target:g}"
        )
    for number in range(1, rounds + 1):
        plan.advance(_sensitivity(modules, batches, loss), start * (target / start) ** (number / rounds))
    if plan.ratio > target:
        hint = f"with the least that may stay of each group it is {plan.ratio:.3f} of the dense network's"
        raise UsageError("the cost is out of reach of these groups", where=f"target {target:g}", hint=hint)
    return modules.by_group(plan.places())


class _Plan:
    """What has gone so far, and in what order.

    Args:
        modules: of the copy that they go from.
        cost: prices it.
        least: the share of each group that stays.

    Attributes:
        ratio: the cost of what is left, relative to the dense network's.
    """

    def __init__(self, modules: Modules, cost: Cost, least: float) -> None:
        self._modules = modules
        self._cost = cost
        self._floors = [max(1, math.ceil(least * count)) for count in modules.layout.counts]
        self._gone = self._dead()
        self._order = torch.nonzero(self._gone).reshape(-1).tolist()
        #: what one module of each group saved when it was last asked
        self._savings = [0.0 for _ in self._floors]
        self._worth = torch.zeros(len(self._gone), dtype=torch.float64)
        self.ratio = self._without([])

    def _dead(self) -> Tensor:
        return torch.cat([dead.cpu() for dead in self._modules.dead().values()])

    def _without(self, places: Sequence[int]) -> float:
        """Return the cost once more modules are gone; the first process's answer holds for all."""
        gone = self._gone.clone()
        gone[list(places)] = True
        return from_first(lambda: self._cost.ratio(self._modules.model, self._modules.zeros(gone)))

    def advance(self, sensitivity: Tensor, wanted: float) -> None:
        """Let as few go as bring the cost down to what is wanted, or all that may.

        Args:
            sensitivity: of each module in a row.
            wanted: relative to the dense network's cost.
        """
        going: list[int] = []
        start = 0
        for number, count in enumerate(self._modules.layout.counts):
            live = [place for place in range(start, start + count) if not self._gone[place]]
            ranked = sorted(live, key=lambda place: float(sensitivity[place]))[
                : len(live) - self._floors[number]
            ]
            if len(live) > self._floors[number]:
                # over all at once, so that a price in steps is seen
                self._savings[number] = (self.ratio - self._without(ranked)) / len(ranked)
                going += ranked
            saving = self._savings[number]
            worth = sensitivity[live] / saving if saving > 0 else torch.full((len(live),), math.inf)
            self._worth[live] = worth.to(self._worth)
            start += count
        going.sort(key=lambda place: float(self._worth[place]))
        low, high, reached = 0, len(going), None
        while low < high:
            middle = (low + high) // 2
            found = self._without(going[:middle])
            if found <= wanted:
                high, reached = middle, found
            else:
                low = middle + 1
        self.ratio = self._without(going) if reached is None else reached
        self._remove(going[:low])

    def _remove(self, places: Sequence[int]) -> None:
        """Kill modules in the copy.

        Raises:
            UsageError: with them the last of another group went, which shares their weights.
        """
        self._order += places
        self._gone[list(places)] = True
        self._modules.zero(self._gone)
        taken = torch.nonzero(self._dead() & ~self._gone).reshape(-1).tolist()
        self._order += taken
        self._gone[taken] = True
        for name, gone in self._modules.by_group(self._gone).items():
            if gone.all():
                hint = "declare groups that do not hold each other's weights"
                raise UsageError("nothing is left of it once others are gone", where=name, hint=hint)

    def places(self) -> Tensor:
        """Return each module's place in the order of removal; what stays comes last."""
        staying = torch.nonzero(~self._gone).reshape(-1).tolist()
        order = self._order + sorted(staying, key=lambda place: float(self._worth[place]))
        return torch.tensor(order).argsort().double()


def _refuse_shards(modules: Modules) -> None:
    if modules.layout.weights(modules.model).sharded:
        raise UsageError("a sharded network is not known here", where="model", hint="ask before fully_shard")


def _sensitivity(
    modules: Modules, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    """Return the sensitivity of all modules in a row, float64, on the CPU."""
    layout, weights = modules.layout, modules.layout.weights(modules.model).parameters
    # data parallel wrappers wait for a backward that never comes
    model = unwrapped(modules.model)
    total, count, reached = torch.zeros(layout.total, dtype=torch.float64), 0, set()
    with _looked_at(model, weights):
        for batch in batches:
            value = loss(model, batch)
            gradients = (
                torch.autograd.grad(value, weights, allow_unused=True)
                if value.requires_grad
                else [None for _ in weights]
            )
            products = []
            for name, weight, gradient in zip(layout.names, weights, gradients, strict=True):
                own = weight.detach().to(wide(weight.dtype))
                products.append(torch.zeros_like(own) if gradient is None else own * gradient)
                if gradient is not None:
                    reached.add(name)
            total += layout.sums(products).cpu().double().square()
            count += 1
    # all processes go by the same numbers
    total, counted = sum_over_processes(total), sum_over_processes(torch.tensor(float(count)))
    if not counted:
        raise UsageError("there are no batches", where="batches")
    for group, own in zip(modules.groups, layout.split(total), strict=True):
        if count and not any(part.parameter in reached for part in group.parts):
            hint = "it has to be computed with the network that it is given"
            raise UsageError("the loss does not reach it", where=group.name, hint=hint)
        if not own.isfinite().all():
            raise UsageError("the loss or its gradients are no numbers", where=group.name)
    return total / counted


@contextmanager
def _looked_at(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Put a network into evaluation mode, with gradients for some parameters, and back."""
    training: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    wanted = [parameter.requires_grad for parameter in parameters]
    # cuDNN's recurrent layers have no backward in evaluation mode
    recurrent = any(isinstance(module, nn.RNNBase) for module in training)
    model.eval()
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=not recurrent):
            yield
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
        for module, before in training.items():
            module.training = before
