"""Exponential torque: a penalty that pulls modules to zero, the harder the farther they lie from a pivot.

Source: "Exponential Torque Pruning" (arXiv 2506.22015). The defaults are the paper's plain recipe; the
reference code's formula, linear torque (Gupta et al., WACV 2024) and everything else is an option.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from etp_deploy.errors import UsageError
from etp_deploy.training.dying import Clip, Modules
from etp_deploy.training.forces import (
    PAPER_STEEPNESS,
    RANKING,
    REFERENCE_STEEPNESS,
    Force,
    Pivot,
    distances,
    force_of,
    network_distances,
    steepness_for,
)
from etp_deploy.training.layout import wide
from etp_deploy.training.modules import Group, discover
from etp_deploy.training.penalty import penalty
from etp_deploy.training.pulls import Norm, Pull

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from etp_deploy.training.layout import Layout
    from etp_deploy.training.shards import Weights

#: The reference code's clipping threshold, in units of a weight.
REFERENCE_THRESHOLD = 5e-4


class TorqueRegularizer(Modules):
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

    A weight that two parts of one module hold (a recurrent unit's row and column cross) counts twice in its size.

    The parameters are looked up by name at each call, so the model may be moved or reloaded in between.

    Args:
        model: the network.
        beta: strength of the penalty; an attribute that may be changed at any time.
        force: "exponential" (the paper's), "linear" (Gupta et al.; the module at the pivot feels none) or
            "uniform" (1 everywhere: with the norm "l2" group lasso).
        norm: size of a module: "l2_squared", the sum of squares (the paper's); "mean_l1", the mean of
            absolute values (the reference code's); "l1", their sum; "l2", the root of the sum of squares times
            the root of the number of weights, whose pull does not fade as the module shrinks.
        pivot: what torque is measured from, for every group that says nothing itself: an index, negative from
            the end; "middle"; by importance when the regulariser is made, "largest" (the place of the most
            important), "ordered" (distance is the rank in the group) or "network" (the rank over all groups).
        importance: of each group's modules, shape (n,), for the pivots that go by it, such as
            `etp_deploy.training.removal_order` finds; None for the norms (of "network", in units of their
            group's mean).
        relative: whether a group is pulled in units of the root mean square of its weights when the regulariser is
            made, so that one beta means the same in layers of large and of small weights: with the norm "l2" a
            module of average size that no gradient defends is zero once `beta * f_i` times the sum of the rates is 1.
        threshold: magnitude below which `clip` zeroes.
        steepness: s in `lambda = exp(s / n)`; None for the paper's 5, or for the reference code's
            500 * ln(1.01) = 4.975 where the norm is "mean_l1". Of the exponential force alone.
        keep: the wanted share of modules, in place of the steepness: `s = 2.5 / keep`.
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
        pivot: Pivot = 0,
        importance: Mapping[str, Tensor] | None = None,
        relative: bool = False,
        threshold: float = REFERENCE_THRESHOLD,
        steepness: float | None = None,
        keep: float | None = None,
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
        _check_force(force, pivot, steepness, keep)
        if relative and norm == "l2_squared":
            raise UsageError("the pull of a squared norm is relative by itself", where="relative")
        if groups is None:
            groups = discover(model, exclude=exclude, include_bias=include_bias, include_norm=include_norm)
        elif exclude or include_bias or include_norm:
            raise UsageError("only discovered groups can be changed", where="groups", hint="declare them so")
        super().__init__(model, groups, threshold, clip_by)
        self.beta = beta
        self._norm: Norm = norm
        self._pulled = self._pulled_layout()
        if keep is not None:
            steepness = steepness_for(keep)
        elif steepness is None:
            steepness = REFERENCE_STEEPNESS if norm == "mean_l1" else PAPER_STEEPNESS
        self._start = self._norms()
        given = None if importance is None else self._checked(importance, force, pivot)
        self._forces = self._initial_forces(force, pivot, steepness, given)
        if relative:
            self._forces *= self._scales()

    def _pulled_layout(self) -> Layout:
        """Return the layout of the weights that feel the force and make a module's size; all, here."""
        return self.layout

    def _initial_forces(
        self, force: Force, pivot: Pivot, steepness: float, importance: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Return the force on every module, shape (total,), float64 for exactness."""
        forces = [force_of(distance, force, steepness) for distance in self._distances(pivot, importance)]
        row = torch.cat(forces)
        if not row.float().isfinite().all():
            raise UsageError(f"{steepness} makes forces that are no numbers in float32", where="steepness")
        return row

    def _pivots(self, pivot: Pivot) -> list[Pivot]:
        """Return each group's own pivot, or the regulariser's."""
        return [pivot if group.pivot is None else group.pivot for group in self.groups]

    def _distances(self, pivot: Pivot, given: tuple[Tensor, ...] | None) -> list[Tensor]:
        """Return how far each group's modules lie from the pivot."""
        pivots = self._pivots(pivot)
        importance = given or self.layout.split(self._start)
        ranked: Sequence[Tensor] = ()
        if "network" in pivots:
            ranked = network_distances(given or list(self.relative_scores().values()))
        return [
            ranked[number] if wanted == "network" else distances(len(own), wanted, own, where=group.name)
            for number, (group, wanted, own) in enumerate(zip(self.groups, pivots, importance, strict=True))
        ]

    def _scales(self) -> Tensor:
        """Return the root mean square of its group's weights for each module, 1 where they are all zero."""
        squares = self._pulled.split(self._start.cpu().double().square())
        elements = self._pulled.split(self._pulled.elements)
        means = [own.sum() / count.sum().clamp(min=1) for own, count in zip(squares, elements, strict=True)]
        scales = [mean.sqrt() if mean > 0 else torch.ones_like(mean) for mean in means]
        return torch.cat(
            [scale.expand(count) for scale, count in zip(scales, self.layout.counts, strict=True)]
        )

    def _checked(self, importance: Mapping[str, Tensor], force: Force, pivot: Pivot) -> tuple[Tensor, ...]:
        """Return the importance of each group's modules.

        Raises:
            UsageError: it is not of these groups, holds what is no number, or no pivot goes by it.
        """
        pivots = self._pivots(pivot)
        if force == "uniform" or not any(wanted in RANKING for wanted in pivots):
            raise UsageError("no pivot goes by it", where="importance", hint=f"one of {', '.join(RANKING)}")
        names = {group.name for group in self.groups}
        if importance.keys() != names:
            differing = ", ".join(sorted(importance.keys() ^ names))
            raise UsageError(f"it is not of these groups: {differing}", where="importance")
        found = tuple(torch.as_tensor(importance[g.name]).detach().cpu().double() for g in self.groups)
        for group, count, own in zip(self.groups, self.layout.counts, found, strict=True):
            if own.shape != (count,) or not own.isfinite().all():
                raise UsageError(f"want {count} numbers", where=f"importance of {group.name}")
        return found

    def forces(self, group: str) -> Tensor:
        """Return the force on each module of a group, shape (n,), without beta; `relative` has its scale in it.

        Raises:
            UsageError: there is no such group.
        """
        return self.layout.split(self._forces)[self._number(group)].clone()

    # the force

    @property
    def strength(self) -> float:
        """What the forces are multiplied by: beta."""
        return self.beta

    def advance(self) -> None:
        """Tell that an update interval has passed; only growing regularisation does something then."""

    def _pull(self) -> tuple[Pull, Weights]:
        """Return the force, and the weights it is at work on."""
        weights = self._pulled.weights(self.model)
        pulls = (self.strength * self._forces).to(device=weights[0].device, dtype=wide(weights[0].dtype))
        return Pull(self._pulled, self._norm, pulls), weights

    def penalty(self) -> Tensor:
        """Return `beta` times the torque of all modules: a differentiable scalar, in float32 or better.

        Source: section "Exponential torque" of the paper; add it to the loss of each step. Its gradient is
        computed in closed form, in one pass over the weights, and cannot be differentiated again.

        Raises:
            UsageError: the network is sharded.
        """
        pull, weights = self._pull()
        if weights.sharded:
            hint = "call add_gradients() after backward, or shrink(rate) after the optimiser's step"
            raise UsageError(
                "the shards of a network have no penalty of their own", where="penalty", hint=hint
            )
        return penalty(pull, weights)

    @torch.no_grad()
    def add_gradients(self, scale: float = 1.0) -> None:
        """Add the penalty's gradient to the parameters' own, in place of `penalty` in the loss.

        Call it after `backward` and before the optimiser's step; parameters without a gradient are left alone.
        It saves the value of the penalty, which nobody may want to know, and the memory of its gradient.

        Args:
            scale: what the loss was multiplied by, such as a gradient scaler's factor.
        """
        pull, weights = self._pull()
        pull.add_gradients(weights, scale)

    @torch.no_grad()
    def shrink(self, rate: float) -> None:
        """Apply the torque to the weights themselves: one proximal step, in place of `penalty` in the loss.

        An optimiser that divides by a running gradient norm (Adam) turns the penalty's gradient into steps of
        about its learning rate however small the gradient is; weights then circle around zero at that
        distance and never settle. The proximal step leaves the optimiser out. It scales a module by `1 / (1 +
        2 t f_i)` (l2_squared) or `max(0, 1 - t f_i sqrt(m) / ||w_i||)` (l2), or moves each of its m weights by
        `t f_i / m` (mean_l1) or `t f_i` (l1) towards zero and no farther, with `t = rate * beta`. All but the
        first reach exact zeros. A weight that belongs to two modules feels both: the forces add up, the factors
        of "l2" multiply.

        Args:
            rate: the optimiser's learning rate at this step; call it after the optimiser's step.
        """
        pull, weights = self._pull()
        pull.shrink(weights, rate)

    # what to look at

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Return the importance of each group's modules: the L2 norm over all parts that feel the force."""
        return self.by_group(self._norms())

    def _norms(self) -> Tensor:
        layout = self._pulled
        return layout.by_module(layout.reduce(layout.weights(self.model), "squares")).sqrt()

    @torch.no_grad()
    def relative_scores(self) -> dict[str, Tensor]:
        """Return the scores in units of their group's mean at the start, so that groups can be compared."""
        starts = self.by_group(self._start)
        scores = self.scores().items()
        return {name: row / starts[name].to(row).mean().clamp(min=1e-30) for name, row in scores}

    # checkpoints

    def _identity(self) -> dict[str, Any]:
        """Return what a checkpoint has to agree about."""
        groups = [[group.name, count] for group, count in zip(self.groups, self.layout.counts, strict=True)]
        return {"groups": groups, "method": [type(self).__name__, self._norm]}

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs beside the model: strength, forces, norms at the start, the frozen."""
        return {
            **self._identity(),
            "beta": self.beta,
            "threshold": self.threshold,
            "forces": self._forces.clone(),
            "start": self._start.clone(),
            "frozen": None if self._frozen is None else self._frozen.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned of a regulariser with the same groups and method.

        Raises:
            UsageError: the groups, the method or its norm are others.
        """
        for what, own in self._identity().items():
            if state.get(what) != own:
                raise UsageError(f"the checkpoint is of other {what}", where=what)
        self.beta, self.threshold = float(state["beta"]), float(state["threshold"])
        self._forces, self._start = state["forces"].clone(), state["start"].clone()
        self._frozen, self._held = None, []
        if state["frozen"] is not None:
            device = self.layout.weights(self.model)[0].device
            self._set_frozen(state["frozen"].to(device))


def _check_force(force: Force, pivot: Pivot, steepness: float | None, keep: float | None) -> None:
    """Refuse options that the force would not look at."""
    if steepness is not None and keep is not None:
        raise UsageError("either the steepness or the keep ratio makes the force", where="keep")
    if steepness is not None and not steepness >= 0:
        raise UsageError(f"{steepness} is neither zero nor positive", where="steepness")
    if force != "exponential" and not (steepness is None and keep is None):
        where = "keep" if steepness is None else "steepness"
        raise UsageError(f"the {force} force has no steepness", where=where, hint="it is the exponential's")
    if force == "uniform" and pivot != 0:
        raise UsageError("the uniform force has no pivot", where="pivot", hint="it pulls everywhere alike")


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{value!r} is none of {', '.join(choices)}", where=option)
