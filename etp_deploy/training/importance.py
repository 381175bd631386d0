"""Which modules a network can do without: how its loss depends on them, and in what order they had best go.

Sources: the first-order criterion of Molchanov et al., "Importance Estimation for Neural Network Pruning" (CVPR 2019);
that it has to be asked again as modules go, or whole layers are lost, Tanaka et al., "Pruning neural networks without
any data by iteratively conserving synaptic flow" (NeurIPS 2020).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from etp_deploy.errors import UsageError
from etp_deploy.training.dying import Modules
from etp_deploy.training.wrapping import plain_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, nn

    from etp_deploy.training.cost import Cost
    from etp_deploy.training.layout import Layout
    from etp_deploy.training.modules import Group

# what one module less saves of the network's cost counts as at least this much
_LEAST_SAVING = 1e-12


def sensitivity(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Return how much the loss depends on each module: the mean over batches of `(sum of w * dL/dw)` squared.

    The sum over a module's weights is the derivative of the loss as all of them shrink together, as the force makes
    them. The network is looked at in evaluation mode; its weights, gradients and mode stay as they are.

    Args:
        model: the network.
        groups: the modules.
        batches: what `loss` takes, each alike in number of examples; small ones tell more.
        loss: of the network and a batch: a scalar.

    Returns:
        For each group's name the modules' numbers, shape (n,), zero or above, in float64 on the CPU.

    Raises:
        UsageError: there are no batches, the network is sharded, or the groups cannot be meant.
        ModelError: a group does not fit the model.
    """
    modules = Modules(model, groups, 0.0, "module")
    return modules.by_group(_sensitivity(modules.layout, model, batches, loss))


def removal_order(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Any],
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
        model: the network, trained.
        groups: the modules, with all of their weights: what of one is left out works on once it is gone.
        batches: see `sensitivity`; gone through once a round.
        loss: see `sensitivity`.
        cost: how the network is priced without some modules; asked once a round for each group, and some times more.
        target: the wanted cost, relative to the network's as it is: above 0 and below 1.
        rounds: in how many steps the target is reached.
        least: the share of each group that stays, at least one module.

    Returns:
        For each group's name the modules' places in the order of removal, 0 for the first to go, shape (n,), float64.

    Raises:
        UsageError: an option cannot be meant, or the target is out of reach.
        ModelError: a group does not fit the model.
    """
    if not 0 < target < 1:
        raise UsageError(f"{target} is no share of the cost", where="target", hint="above 0 and below 1")
    if rounds < 1 or not 0 <= least <= 1:
        raise UsageError("want at least one round, and a share to keep", where="rounds, least")
    twin = plain_copy(model)
    modules = Modules(twin, groups, 0.0, "module")
    plan = _Plan(modules, cost, least)
    for number in range(1, rounds + 1):
        plan.advance(_sensitivity(modules.layout, twin, batches, loss), target ** (number / rounds))
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
    """

    def __init__(self, modules: Modules, cost: Cost, least: float) -> None:
        self._modules = modules
        self._cost = cost
        counts = modules.layout.counts
        self._least = [max(1, -int(-least * count // 1)) for count in counts]
        self._gone = torch.cat([dead.cpu() for dead in modules.dead().values()])
        self._order = torch.nonzero(self._gone).reshape(-1).tolist()
        self._dense = self._price(self._gone)
        self._worth = torch.zeros(len(self._gone), dtype=torch.float64)
        self.ratio = 1.0

    def _price(self, gone: Tensor) -> float:
        return self._cost.ratio(self._modules.model, self._modules.zeros(gone))

    def _without(self, places: Iterable[int]) -> float:
        """Return the cost, relative to that at the start, once more modules are gone."""
        gone = self._gone.clone()
        gone[list(places)] = True
        return self._price(gone) / self._dense

    def advance(self, sensitivity: Tensor, wanted: float) -> None:
        """Let as few go as bring the cost down to what is wanted, or all that may.

        Args:
            sensitivity: of each module in a row.
            wanted: relative to the cost at the start.
        """
        going, start = [], 0
        for count, least in zip(self._modules.layout.counts, self._least, strict=True):
            own = range(start, start + count)
            live = [place for place in own if not self._gone[place]]
            start += count
            if len(live) <= least:
                continue
            saved = max(self.ratio - self._without(live[:1]), _LEAST_SAVING)
            self._worth[own.start : own.stop] = sensitivity[own.start : own.stop] / saved
            ranked = sorted(live, key=lambda place: float(self._worth[place]))
            going += ranked[: len(live) - least]
        going.sort(key=lambda place: float(self._worth[place]))
        low, high = 0, len(going)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._without(going[:middle]) <= wanted else (middle + 1, high)
        self._order += going[:low]
        self._gone[going[:low]] = True
        self.ratio = self._price(self._gone) / self._dense
        for name, dead in self._modules.by_group(self._gone).items():
            self._modules.kill(name, torch.nonzero(dead).reshape(-1).tolist())

    def places(self) -> Tensor:
        """Return each module's place in the order of removal; what stays comes last."""
        staying = torch.nonzero(~self._gone).reshape(-1).tolist()
        order = self._order + sorted(staying, key=lambda place: float(self._worth[place]))
        places = torch.arange(len(order), dtype=torch.float64)
        return torch.empty_like(places).index_copy_(0, torch.tensor(order), places)


def _sensitivity(
    layout: Layout, model: nn.Module, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    """Return the sensitivity of all modules in a row, float64, on the CPU."""
    weights = layout.weights(model)
    if weights.sharded:
        raise UsageError("a sharded network is not known here", where="model", hint="ask before fully_shard")
    total, count = torch.zeros(layout.total, dtype=torch.float64), 0
    with _looked_at(model, weights.parameters):
        for batch in batches:
            gradients = torch.autograd.grad(loss(model, batch), weights.parameters, allow_unused=True)
            products = [
                torch.zeros_like(weight) if gradient is None else weight.detach() * gradient
                for weight, gradient in zip(weights.parameters, gradients, strict=True)
            ]
            total += layout.sums(products).cpu().double().square()
            count += 1
    if not count:
        raise UsageError("there are no batches", where="batches")
    return total / count


@contextmanager
def _looked_at(model: nn.Module, parameters: Sequence[Tensor]) -> Iterator[None]:
    """Put a network into evaluation mode, with gradients for some parameters, and back."""
    training: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    wanted = [parameter.requires_grad for parameter in parameters]
    model.eval()
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
        for module, before in training.items():
            module.training = before
