"""Exponential torque: a penalty that pulls modules to zero, the harder the farther they lie from a pivot.

Source: "Exponential Torque Pruning" (arXiv 2506.22015). The defaults are the paper's plain recipe; the
reference code's formula, linear torque (Gupta et al., WACV 2024) and everything else is an option.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from etp_deploy.errors import UsageError
from etp_deploy.training.modules import Group, discover, parameter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Force = Literal["exponential", "linear"]
Norm = Literal["l2_squared", "mean_l1", "l2"]
Clip = Literal["weight", "module"]

#: lambda = exp(5 / n), the paper's steepness.
PAPER_STEEPNESS = 5.0
#: lambda = 1.01 ** (500 / n), the reference code's.
REFERENCE_STEEPNESS = 500 * math.log(1.01)
#: The reference code's clipping threshold, in units of a weight.
REFERENCE_THRESHOLD = 5e-4


@dataclass(frozen=True)
class GroupStatistics:
    """How far a group has come.

    Args:
        name: the group.
        kind: what its modules are: channels, neurons, heads.
        total: number of modules.
        dead: modules in which some decisive part is exactly zero.
        max_norm: largest L2 norm of a module, all parts together.
        mean_norm: mean of these norms.
    """

    name: str
    kind: str
    total: int
    dead: int
    max_norm: float
    mean_norm: float


class TorqueRegularizer:
    """Torque on the prunable modules of a network.

    Module i of a group of n lies `d_i = |i - pivot|` from the pivot and is pulled with the force
    `f_i = lambda ** d_i`, `lambda = exp(steepness / n)` (exponential) or `f_i = d_i` (linear). The penalty is
    `beta * sum over groups, sum over i, of f_i * size(w_i)`, with w_i all weights of the module.

        regularizer = TorqueRegularizer(model, beta=1e-4, exclude=["classifier"])
        for epoch in range(epochs):
            for x, y in batches:
                loss = criterion(model(x), y) + regularizer.penalty()
                ...
            regularizer.clip()

    The parameters are looked up by name at each call, so the model may be moved or reloaded in between.

    Args:
        model: the network.
        beta: strength of the penalty.
        force: "exponential" (the paper's) or "linear" (Gupta et al.; the module at the pivot feels none).
        norm: size of a module: "l2_squared", the sum of squares (the paper's); "mean_l1", the mean of
            absolute values (the reference code's); "l2", the root of the sum of squares, whose pull does not
            fade as the module shrinks.
        pivot: index of the module that torque is measured from, negative from the end, for every group that
            names none itself; "middle" for the middle one.
        threshold: magnitude below which `clip` zeroes.
        steepness: s in `lambda = exp(s / n)`; None for the paper's 5, or for the reference code's
            500 * ln(1.01) = 4.975 where the norm is "mean_l1".
        clip_by: what `clip` zeroes: "weight", each single weight below the threshold (the paper's and the
            reference code's), or "module", a whole module in which some decisive part has a root mean square
            below.
        groups: the modules; None to discover them.
        exclude: layers that the discovery leaves out, such as the classifier.
        include_bias: whether discovered modules hold their layer's bias.
        include_norm: whether discovered modules hold the gain of the BatchNorm after their layer.

    Raises:
        UsageError: an option cannot be meant, or there is nothing to prune.
        ModelError: a group does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        beta: float = 1e-4,
        force: Force = "exponential",
        norm: Norm = "l2_squared",
        pivot: int | Literal["middle"] = 0,
        threshold: float = REFERENCE_THRESHOLD,
        steepness: float | None = None,
        clip_by: Clip = "weight",
        groups: Sequence[Group] | None = None,
        exclude: Sequence[str] = (),
        include_bias: bool = False,
        include_norm: bool = False,
    ) -> None:
        _check_choice("force", force, get_args(Force))
        _check_choice("norm", norm, get_args(Norm))
        _check_choice("clip_by", clip_by, get_args(Clip))
        for option, value in (("beta", beta), ("threshold", threshold)):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{value} is neither zero nor positive", where=option)
        if groups is None:
            groups = discover(model, exclude=exclude, include_bias=include_bias, include_norm=include_norm)
        elif exclude or include_bias or include_norm:
            raise UsageError("only discovered groups can be changed", where="groups", hint="declare them so")
        if not groups:
            raise UsageError("the model has nothing to prune", hint="declare groups")
        if len({group.name for group in groups}) != len(groups):
            raise UsageError("two groups have the same name", where="groups")
        self.model = model
        self.beta = beta
        self.threshold = threshold
        self.groups = tuple(groups)
        self._norm: Norm = norm
        self._clip_by: Clip = clip_by
        if steepness is None:
            steepness = REFERENCE_STEEPNESS if norm == "mean_l1" else PAPER_STEEPNESS
        self._forces = tuple(
            _forces(group, group.count(model), force=force, pivot=pivot, steepness=steepness)
            for group in groups
        )
        self._frozen: tuple[Tensor, ...] | None = None

    def forces(self, group: str) -> Tensor:
        """Return the force on each module of a group, shape (n,), without beta.

        Raises:
            UsageError: there is no such group.
        """
        for candidate, force in zip(self.groups, self._forces, strict=True):
            if candidate.name == group:
                return force.clone()
        raise UsageError("there is no such group", where=group)

    def penalty(self) -> Tensor:
        """Return `beta` times the torque of all modules: a differentiable scalar, in float32 or better.

        Source: section "Exponential torque" of the paper; add it to the loss of each step.
        """
        torques = [
            torch.dot(self._sizes(group), self._force(index, group))
            for index, group in enumerate(self.groups)
        ]
        return self.beta * torch.stack(torques).sum()

    @torch.no_grad()
    def shrink(self, rate: float) -> None:
        """Apply the torque to the weights themselves: one proximal step, in place of `penalty` in the loss.

        An optimiser that divides by a running gradient norm (Adam) turns the penalty's gradient into steps of
        about its learning rate however small the gradient is; weights then circle around zero at that
        distance and never settle. The proximal step leaves the optimiser out. It scales a module by `1 / (1 +
        2 t f_i)` (l2_squared) or `max(0, 1 - t f_i / norm)` (l2), or moves each of its m weights by `t f_i /
        m` towards zero and no farther (mean_l1), with `t = rate * beta`. The last two reach exact zeros.

        Args:
            rate: the optimiser's learning rate at this step; call it after the optimiser's step.
        """
        for index, group in enumerate(self.groups):
            pull = rate * self.beta * self._force(index, group)
            if self._norm == "mean_l1":
                pull = pull / self._elements(group)
                for view, axis in self._views(group):
                    step = _along(pull, view, axis).to(view.dtype)
                    view.copy_(view.sign() * (view.abs() - step).clamp_(min=0))
                continue
            if self._norm == "l2_squared":
                factor = 1 / (1 + 2 * pull)
            else:
                pull = pull * math.sqrt(self._elements(group))
                factor = (1 - pull / self._squares(group).sqrt().clamp(min=1e-30)).clamp(min=0)
            for view, axis in self._views(group):
                view.mul_(_along(factor, view, axis).to(view.dtype))

    @torch.no_grad()
    def clip(self) -> int:
        """Set what lies below the threshold to exact zero; call it after each epoch.

        Source: the paper's reference code, single weights below 5e-4. See `clip_by` for whole modules.

        Returns:
            Number of dead modules over all groups, those that were dead before included.
        """
        for group in self.groups:
            if self._clip_by == "module":
                self._zero(group, self._below(group, self.threshold))
                continue
            for view, _ in self._views(group):
                view.masked_fill_(view.abs() < self.threshold, 0.0)
        return sum(int(self._dead(group).sum()) for group in self.groups)

    @torch.no_grad()
    def freeze(self) -> int:
        """Remember the modules that are dead now and zero all of their parts; `hold` keeps them so.

        Returns:
            Number of dead modules over all groups.
        """
        self._frozen = tuple(self._dead(group) for group in self.groups)
        self.hold()
        return sum(int(dead.sum()) for dead in self._frozen)

    @torch.no_grad()
    def hold(self) -> None:
        """Zero the frozen modules again; call it after each optimiser step that follows `freeze`.

        Gradients alone would not do: an optimiser's momentum moves weights whose gradient is zero.

        Raises:
            UsageError: nothing was frozen.
        """
        if self._frozen is None:
            raise UsageError("nothing is frozen", hint="call freeze() before hold()")
        for group, dead in zip(self.groups, self._frozen, strict=True):
            self._zero(group, dead)

    @torch.no_grad()
    def dead(self) -> dict[str, Tensor]:
        """Return for each group which modules are dead, shape (n,): a decisive part is exactly zero."""
        return {group.name: self._dead(group) for group in self.groups}

    @torch.no_grad()
    def statistics(self) -> tuple[GroupStatistics, ...]:
        """Return counts and norms of each group, in the groups' order."""
        return tuple(self._statistics(group) for group in self.groups)

    def _statistics(self, group: Group) -> GroupStatistics:
        norms = self._squares(group).sqrt()
        dead = int(self._dead(group).sum())
        return GroupStatistics(
            group.name, group.kind, norms.numel(), dead, float(norms.max()), float(norms.mean())
        )

    def _views(self, group: Group) -> Iterator[tuple[Tensor, int]]:
        for part in group.parts:
            yield part.view(parameter(self.model, part.parameter))

    def _force(self, index: int, group: Group) -> Tensor:
        """Return a group's forces on the device that its parameters are on now."""
        weight = parameter(self.model, group.parts[0].parameter)
        return self._forces[index].to(device=weight.device, dtype=_wide(weight.dtype))

    def _elements(self, group: Group) -> int:
        return sum(view.numel() // view.shape[axis] for view, axis in self._views(group))

    def _squares(self, group: Group) -> Tensor:
        """Return the sum of squares of each module, shape (n,)."""
        return torch.stack([_reduce(view, axis, square=True) for view, axis in self._views(group)]).sum(0)

    def _sizes(self, group: Group) -> Tensor:
        """Return each module's size in the chosen norm, shape (n,)."""
        if self._norm == "mean_l1":
            sums = [_reduce(view, axis, square=False) for view, axis in self._views(group)]
            return torch.stack(sums).sum(0) / self._elements(group)
        squares = self._squares(group)
        if self._norm == "l2_squared":
            return squares
        # the root has no slope at zero: a module that is dead feels no force and must not make a NaN
        alive = squares > 0
        roots = torch.where(alive, torch.where(alive, squares, 1.0).sqrt(), 0.0)
        return roots * math.sqrt(self._elements(group))

    def _below(self, group: Group, threshold: float) -> Tensor:
        """Return which modules have a decisive part with a root mean square below a threshold, or of zero."""
        below = []
        for part, (view, axis) in zip(group.parts, self._views(group), strict=True):
            if part.decisive:
                mean = _reduce(view, axis, square=True) / (view.numel() // view.shape[axis])
                below.append((mean.sqrt() < threshold) | _all_zero(view, axis))
        return torch.stack(below).any(0) if below else self._all_dead(group)

    def _dead(self, group: Group) -> Tensor:
        dead = [
            _all_zero(view, axis)
            for part, (view, axis) in zip(group.parts, self._views(group), strict=True)
            if part.decisive
        ]
        return torch.stack(dead).any(0) if dead else self._all_dead(group)

    def _all_dead(self, group: Group) -> Tensor:
        """Return which modules are zero throughout, for a group in which no part decides alone."""
        return torch.stack([_all_zero(view, axis) for view, axis in self._views(group)]).all(0)

    def _zero(self, group: Group, modules: Tensor) -> None:
        for view, axis in self._views(group):
            view.masked_fill_(_along(modules, view, axis), 0.0)


def _forces(
    group: Group, count: int, *, force: Force, pivot: int | Literal["middle"], steepness: float
) -> Tensor:
    """Return the force on each of `count` modules, shape (count,), float64 for exactness."""
    wanted = pivot if group.pivot is None else group.pivot
    origin = count // 2 if wanted == "middle" else wanted
    if not -count <= origin < count:
        raise UsageError(f"there is no module {origin} among {count}", where=f"pivot of {group.name}")
    distance = (torch.arange(count, dtype=torch.float64) - origin % count).abs()
    return distance if force == "linear" else torch.exp(distance * (steepness / count))


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{value!r} is none of {', '.join(choices)}", where=option)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _reduce(view: Tensor, axis: int, *, square: bool) -> Tensor:
    """Return the sum of squares or of absolute values along all axes but one, shape (n,)."""
    wide = view.to(_wide(view.dtype))
    terms = wide.square() if square else wide.abs()
    rest = [other for other in range(view.ndim) if other != axis]
    return terms.sum(rest) if rest else terms


def _all_zero(view: Tensor, axis: int) -> Tensor:
    rest = [other for other in range(view.ndim) if other != axis]
    return (view == 0).all(rest) if rest else view == 0


def _along(values: Tensor, view: Tensor, axis: int) -> Tensor:
    """Return values of shape (n,) shaped to broadcast along one axis of a view."""
    return values.reshape([-1 if other == axis else 1 for other in range(view.ndim)])
