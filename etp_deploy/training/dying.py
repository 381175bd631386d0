"""Modules and their end: which are dead, clipping, freezing and killing them, whatever pulled them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from etp_deploy.errors import UsageError
from etp_deploy.training.layout import Layout
from etp_deploy.training.shards import Weights, whole
from etp_deploy.training.wrapping import named_parameters, parameter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from torch import nn

    from etp_deploy.training.modules import Group

Clip = Literal["weight", "module"]


@dataclass(frozen=True)
class GroupStatistics:
    """How far a group has come.

    Args:
        name: the group.
        kind: what its modules are: channels, neurons, heads.
        total: number of modules.
        dead: modules in which some decisive part is exactly zero.
        min_norm: least L2 norm of a module, all parts together.
        max_norm: largest of these norms.
        mean_norm: mean of these norms.
    """

    name: str
    kind: str
    total: int
    dead: int
    min_norm: float
    max_norm: float
    mean_norm: float


class Modules:
    """The modules of some groups in a network, dead or alive.

    Args:
        model: the network.
        groups: the modules.
        threshold: magnitude below which `clip` zeroes.
        clip_by: whether that is each weight's, or a module's root mean square.

    Raises:
        UsageError: there are no groups, or two of one name.
        ModelError: a group does not fit the model.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], threshold: float, clip_by: Clip) -> None:
        if not groups:
            raise UsageError("the model has nothing to prune", hint="declare groups")
        if len({group.name for group in groups}) != len(groups):
            raise UsageError("two groups have the same name", where="groups")
        self.model = model
        self.threshold = threshold
        self.groups = tuple(groups)
        self._clip_by: Clip = clip_by
        #: where the modules' weights lie, all groups in one row
        self.layout = Layout(model, groups)
        self._frozen: Tensor | None = None
        self._held: list[tuple[int, int, Tensor]] = []

    def _number(self, group: str) -> int:
        for number, candidate in enumerate(self.groups):
            if candidate.name == group:
                return number
        raise UsageError("there is no such group", where=group)

    @torch.no_grad()
    def clip(self) -> int:
        """Set what lies below the threshold to exact zero; call it after each epoch.

        Source: the paper's reference code, single weights below 5e-4. See `clip_by` for whole modules.

        Returns:
            Number of dead modules over all groups, those that were dead before included.
        """
        layout, weights = self.layout, self.layout.weights(self.model)
        if self._clip_by == "module":
            below = layout.reduce(weights, "squares") / layout.slot_elements.clamp(min=1).to(
                weights[0].device
            )
            small = (below.sqrt() < self.threshold) | (layout.reduce(weights, "largest") == 0)
            self.zero(self._decided(small))
        else:
            everywhere = torch.ones(layout.total, dtype=torch.bool, device=weights[0].device)
            for weight, lines in zip(weights, layout.spread(everywhere, weights), strict=True):
                small = weight.abs() < self.threshold
                for covered in lines:
                    weight.masked_fill_(small & covered, 0.0)
        return int(self._dead().sum())

    @torch.no_grad()
    def freeze(self) -> int:
        """Remember the modules that are dead now and zero all of their parts; `hold` keeps them so.

        Returns:
            Number of dead modules over all groups.
        """
        self._set_frozen(self._dead())
        self.hold()
        assert self._frozen is not None
        return int(self._frozen.sum())

    def _set_frozen(self, dead: Tensor) -> None:
        """Remember modules, and the places of their weights, so that holding them touches nothing else."""
        self._frozen = dead
        maps = self.layout.maps(dead.device)
        gone = torch.cat([dead, dead.new_zeros(1)])
        self._held = []
        for line, modules in zip(self.layout.lines, maps.lines, strict=True):
            places = torch.nonzero(gone[modules]).reshape(-1)
            if len(places):
                self._held.append((line.parameter, line.axis, places))

    @torch.no_grad()
    def hold(self) -> None:
        """Zero the frozen modules again; call it after each optimiser step that follows `freeze`.

        Gradients alone would not do: an optimiser's momentum moves weights whose gradient is zero.

        Raises:
            UsageError: nothing was frozen.
        """
        if self._frozen is None:
            raise UsageError("nothing is frozen", hint="call freeze() before hold()")
        weights = self.layout.weights(self.model)
        for number, axis, places in self._held:
            here = weights.places(number, axis, places.to(weights[number].device))
            weights[number].index_fill_(axis, here, 0.0)

    @torch.no_grad()
    def kill(self, group: str, indices: Iterable[int]) -> None:
        """Zero modules of a group as a whole, all of their parts.

        Args:
            group: the group's name.
            indices: which of its modules.

        Raises:
            UsageError: there is no such group or module.
        """
        chosen = [int(index) for index in indices]
        number = self._number(group)
        count = self.layout.counts[number]
        if any(not 0 <= index < count for index in chosen):
            raise UsageError(f"there are {count} modules", where=group)
        device = self.layout.weights(self.model)[0].device
        row = torch.zeros(self.layout.total, dtype=torch.bool, device=device)
        row[torch.tensor(chosen, dtype=torch.int64, device=device) + sum(self.layout.counts[:number])] = True
        self.zero(row)

    def marks(self, modules: Tensor) -> dict[str, Tensor]:
        """Return which weights belong to some modules, by parameter.

        Args:
            modules: for each module of all groups in a row, whether it counts.
        """
        weights = self.layout.weights(self.model)
        row, whole = modules.to(weights[0].device), Weights(weights.parameters)
        result = {}
        for name, weight, lines in zip(self.layout.names, whole, self.layout.spread(row, whole), strict=True):
            marked = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
            for line in lines:
                marked |= line
            result[name] = marked
        return result

    @torch.no_grad()
    def zeros(self, killed: Tensor | None = None) -> np.ndarray:
        """Return which weights of the network are zero, flat, in the order of `named_parameters`.

        Args:
            killed: for each module of all groups in a row, whether its weights count as zero; None for none.
        """
        marks = {} if killed is None else self.marks(killed)
        # a tied weight has several names, of which a group may use any
        marked: dict[nn.Parameter, Tensor] = {}
        for name, mark in marks.items():
            weight = parameter(self.model, name)
            marked[weight] = marked[weight] | mark if weight in marked else mark
        parts = []
        for _, weight in named_parameters(self.model):
            zero = whole(weight.detach() == 0)
            if weight in marked:
                zero = zero | marked[weight]
            parts.append(zero.reshape(-1).cpu())
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def dead(self) -> dict[str, Tensor]:
        """Return for each group which modules are dead, shape (n,): a decisive part is exactly zero."""
        return self.by_group(self._dead())

    def by_group(self, row: Tensor) -> dict[str, Tensor]:
        """Return a row over all modules as each group's own, by its name."""
        parts = self.layout.split(row)
        return {group.name: part for group, part in zip(self.groups, parts, strict=True)}

    def _dead(self) -> Tensor:
        weights = self.layout.weights(self.model)
        return self._decided(self.layout.reduce(weights, "largest") == 0)

    def _decided(self, zero: Tensor) -> Tensor:
        """Return which modules are dead, shape (total,), given which slots are."""
        present = self.layout.slot_elements.to(zero.device) > 0
        dead = []
        for group, blocks in zip(self.groups, self.layout.blocks, strict=True):
            found = []
            for chosen in group.deciding_sets():
                zeros = torch.stack([zero[blocks[place]] for place in chosen]).all(0)
                found.append(zeros & torch.stack([present[blocks[place]] for place in chosen]).any(0))
            dead.append(torch.stack(found).any(0))
        return torch.cat(dead)

    @torch.no_grad()
    def zero(self, modules: Tensor) -> None:
        """Zero modules as a whole, all of their parts.

        Args:
            modules: for each module of all groups in a row, whether it goes.
        """
        weights = self.layout.weights(self.model)
        row = modules.to(weights[0].device)
        for weight, lines in zip(weights, self.layout.spread(row, weights), strict=True):
            for line in lines:
                weight.masked_fill_(line, 0.0)

    @torch.no_grad()
    def statistics(self) -> tuple[GroupStatistics, ...]:
        """Return counts and norms of each group, in the groups' order."""
        layout = self.layout
        squares = layout.by_module(layout.reduce(layout.weights(self.model), "squares"))
        norms, dead = layout.split(squares.sqrt()), layout.split(self._dead())
        return tuple(
            GroupStatistics(
                group.name,
                group.kind,
                total=len(own),
                dead=int(gone.sum()),
                min_norm=float(own.min()),
                max_norm=float(own.max()),
                mean_norm=float(own.mean()),
            )
            for group, own, gone in zip(self.groups, norms, dead, strict=True)
        )
