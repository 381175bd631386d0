"""Physical pruning of a PyTorch network along declared units, and its way back to full size.

A unit is what goes as one piece: the library's `Group` says which weights the force acts on, and `slices` names
everything else that the same modules occupy (biases, running statistics, the columns of all readers).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from etp_deploy.training import Cost, Group
from etp_deploy.training.cost import with_zeros
from etp_deploy.training.dying import Modules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from torch import Tensor

    from etp_deploy.training import Part

#: No method may take more than this share of a unit's modules: a layer that is gone cannot be fine-tuned.
FLOOR = 1 / 16


@dataclass(frozen=True)
class Unit:
    """Modules that go together.

    Args:
        group: the weights that the force acts on and that the ranking looks at.
        slices: every other tensor of the state that holds the same modules.
        gains: the BatchNorm gain, for network slimming; None where there is none.
    """

    group: Group
    slices: tuple[Part, ...] = ()
    gains: tuple[Part, ...] = ()

    def readers(self) -> Group:
        """Return the same modules as their readers alone hold them: once all of these are zero, they are gone."""
        own = [part for part in (*self.group.parts, *self.slices) if part.axis == 1]
        parts = tuple(replace(part, decisive=False) for part in own)
        return Group(self.group.name, self.group.kind, parts)

    def count(self, model: nn.Module) -> int:
        """Return how many modules there are."""
        return self.group.count(model)

    def staying(self, model: nn.Module, share: float) -> int:
        """Return how many stay of a share, which may be too little."""
        return max(self.least(model), round(share * self.count(model)))

    def least(self, model: nn.Module) -> int:
        """Return how many must stay."""
        return max(1, math.ceil(FLOOR * self.count(model)))


def kept_indices(
    model: nn.Module, units: Sequence[Unit], keep: Mapping[str, Tensor]
) -> dict[str, list[Tensor]]:
    """Return for each tensor of the state which indices of each axis stay.

    Args:
        model: at full size.
        units: all units.
        keep: for each unit's name which modules stay, a boolean tensor.
    """
    state = model.state_dict()
    indices: dict[str, list[Tensor]] = {}
    for unit in units:
        for part in (*unit.group.parts, *unit.slices):
            size = state[part.parameter].shape
            axes = indices.setdefault(part.parameter, [torch.arange(extent) for extent in size])
            if len(axes[part.axis]) != size[part.axis]:
                raise ValueError(f"{part.parameter}: two units share axis {part.axis}")
            if part.section is not None or part.index is not None:
                raise ValueError(f"{part.parameter}: only axes that read as whole modules are known here")
            view = torch.arange(size[part.axis]).view(part.split or (size[part.axis],))
            chosen = keep[unit.group.name].nonzero().flatten()
            axes[part.axis] = view.index_select(part.position, chosen).flatten()
    return indices


def compacted(model: nn.Module, units: Sequence[Unit], keep: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a network that has the kept modules only."""
    small = copy.deepcopy(model)
    for name, axes in kept_indices(model, units, keep).items():
        path, _, leaf = name.rpartition(".")
        owner = small.get_submodule(path)
        tensor = getattr(owner, leaf).detach()[torch.meshgrid(*axes, indexing="ij")].clone()
        if isinstance(getattr(owner, leaf), nn.Parameter):
            setattr(owner, leaf, nn.Parameter(tensor))
        else:
            setattr(owner, leaf, tensor)
    return small


@torch.no_grad()
def expanded(
    small: nn.Module, full: nn.Module, units: Sequence[Unit], keep: Mapping[str, Tensor]
) -> nn.Module:
    """Return a network of full size whose missing modules are zero: what training with a dead set leaves."""
    large = copy.deepcopy(full)
    own, state = small.state_dict(), large.state_dict()
    indices = kept_indices(full, units, keep)
    for name, tensor in state.items():
        if name in indices:
            tensor.fill_(1.0 if name.endswith("running_var") else 0.0)
            tensor[torch.meshgrid(*indices[name], indexing="ij")] = own[name]
        else:
            tensor.copy_(own[name])
    return large


def macs(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Return the multiply-accumulates of convolutions and matrix products for the example."""
    training = model.training
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*example)
    model.train(training)
    return int(counter.get_total_flops()) // 2


class Multiplications(Cost):
    """The multiply-accumulates of what is left of a network, over those of all of it.

    Args:
        model: at full size.
        units: all units.
        example: one sample.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], example: tuple[Tensor, ...]) -> None:
        self._model = model
        self._units = units
        self._example = example
        self._dense = macs(model, example)

    def ratio(self, model: nn.Module, zero: np.ndarray) -> float:
        """Return the ratio without the modules that nobody reads."""
        readers = [unit.readers() for unit in self._units]
        dead = Modules(with_zeros(model, zero), readers, 0.0, "module").dead()
        keep = {name: ~gone for name, gone in dead.items()}
        return macs(compacted(self._model, self._units, keep), self._example) / self._dense


def choose(
    model: nn.Module,
    units: Sequence[Unit],
    scores: Mapping[str, Tensor],
    example: tuple[Tensor, ...],
    speedup: float,
) -> dict[str, Tensor]:
    """Return which modules stay: those of the lowest score go until the wanted speed-up is just met.

    Args:
        model: at full size.
        units: all units.
        scores: for each unit's name a number for each module, comparable over units.
        example: one sample.
        speedup: dense MACs over what may be left.

    Raises:
        ValueError: what may go is too little for the speed-up.
    """
    order: list[tuple[float, str, int]] = []
    for unit in units:
        values = scores[unit.group.name].double()
        ranked = values.argsort(stable=True).tolist()
        removable = ranked[: len(ranked) - unit.least(model)]
        order += [(float(values[module]), unit.group.name, module) for module in removable]
    order.sort(key=lambda entry: entry[0])
    wanted = macs(model, example) / speedup

    def keep_after(removed: int) -> dict[str, Tensor]:
        keep = {unit.group.name: torch.ones(unit.count(model), dtype=torch.bool) for unit in units}
        for _, name, module in order[:removed]:
            keep[name][module] = False
        return keep

    low, high = 0, len(order)
    if macs(compacted(model, units, keep_after(high)), example) > wanted:
        raise ValueError(f"a speed-up of {speedup} is out of reach")
    while low < high:
        middle = (low + high) // 2
        if macs(compacted(model, units, keep_after(middle)), example) <= wanted:
            high = middle
        else:
            low = middle + 1
    return keep_after(high)


def uniform_share(
    model: nn.Module, units: Sequence[Unit], example: tuple[Tensor, ...], speedup: float
) -> float:
    """Return the largest share of its modules that every unit can keep at a speed-up, to 1/64.

    Args:
        model: at full size.
        units: all units.
        example: one sample.
        speedup: dense MACs over what may be left.
    """
    wanted = macs(model, example) / speedup

    def left(share: float) -> int:
        keep = {}
        for unit in units:
            count = unit.count(model)
            keep[unit.group.name] = torch.arange(count) < unit.staying(model, share)
        return macs(compacted(model, units, keep), example)

    low, high = 0, 64
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if left(middle / 64) <= wanted else (low, middle)
    return low / 64
