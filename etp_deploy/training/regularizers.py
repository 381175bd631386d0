"""The pruning methods by name, all behind the interface of `TorqueRegularizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from etp_deploy.errors import UsageError
from etp_deploy.training.layout import Layout
from etp_deploy.training.modules import batch_norm_gains, discover
from etp_deploy.training.regularizer import TorqueRegularizer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from etp_deploy.training.forces import Force, Pivot
    from etp_deploy.training.modules import Group, Part

#: What each method that is a force and a norm sets; options given by hand come first.
FORCES: Mapping[str, Mapping[str, Any]] = {
    "etp": {"force": "exponential", "norm": "l2_squared"},
    "etp_reference": {"force": "exponential", "norm": "mean_l1"},
    "linear_torque": {"force": "linear", "norm": "l2_squared"},
    "l1": {"force": "uniform", "norm": "l1"},
    "group_lasso": {"force": "uniform", "norm": "l2"},
}
#: All methods.
METHODS = (*FORCES, "slimming", "greg")


def make(
    method: str,
    model: nn.Module,
    groups: Sequence[Group] | None = None,
    beta: float = 1e-4,
    **options: Any,
) -> TorqueRegularizer:
    """Return the regulariser of a pruning method.

    Args:
        method: "etp", exponential torque (arXiv 2506.22015: squared L2, `exp(5 / n)`); "etp_reference", as in its
            code (mean L1, `1.01 ** (500 / n)`); "linear_torque" (Gupta et al., WACV 2024); "l1", the sum of
            absolute weights; "group_lasso", `sqrt(m) * ||w||`; "slimming", the absolute gains of BatchNorms
            (Liu et al., ICCV 2017); "greg", growing regularisation (GReg-1: Wang et al., ICLR 2021).
        model: the network.
        groups: the modules; None to discover them.
        beta: strength; for "greg" what its factor grows by at each `advance()`.
        options: further ones of `TorqueRegularizer`, and for "greg" `keep` and `ceiling`.

    Raises:
        UsageError: there is no such method, or an option cannot be meant.
        ModelError: a group does not fit the model.
    """
    if method == "slimming":
        return SlimmingRegularizer(model, groups=groups, beta=beta, **options)
    if method == "greg":
        return GrowingRegularizer(model, groups=groups, beta=beta, **options)
    if method not in FORCES:
        raise UsageError(f"there is no method {method!r}", hint=f"one of {', '.join(METHODS)}")
    return TorqueRegularizer(model, groups=groups, beta=beta, **{**FORCES[method], **options})


class SlimmingRegularizer(TorqueRegularizer):
    """Network slimming: L1 on the gains of BatchNorms, which make a module's importance.

    Groups without such a gain are left out: the method has nothing to say of them.

    Args:
        model: the network.
        groups: the modules, gains among their parts; None to discover them.
        exclude: layers that the discovery leaves out.
        include_bias: whether discovered modules hold their layer's bias.
        options: of `TorqueRegularizer`.

    Raises:
        UsageError: no group holds a gain, or an option cannot be meant.
        ModelError: a group does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        groups: Sequence[Group] | None = None,
        exclude: Sequence[str] = (),
        include_bias: bool = False,
        **options: Any,
    ) -> None:
        if groups is None:
            groups = discover(model, exclude=exclude, include_bias=include_bias, include_norm=True)
        elif exclude or include_bias:
            raise UsageError("only discovered groups can be changed", where="groups", hint="declare them so")
        self._gains = batch_norm_gains(model)
        groups = [group for group in groups if any(self._is_gain(part) for part in group.parts)]
        if not groups:
            raise UsageError("no group holds the gain of a BatchNorm", where="slimming")
        if options.get("importance") is not None:
            left = {group.name for group in groups}
            options["importance"] = {n: own for n, own in options["importance"].items() if n in left}
        super().__init__(model, groups=groups, **{"force": "uniform", "norm": "l1", **options})

    def _is_gain(self, part: Part) -> bool:
        return part.parameter in self._gains

    def _pulled_layout(self) -> Layout:
        """Only gains feel the force."""
        return Layout(self.model, self.groups, takes=self._is_gain)


class GrowingRegularizer(TorqueRegularizer):
    """Growing regularisation, GReg-1: the least important modules feel `factor / 2 * ||w||^2`, others nothing.

    Which these are is decided when the regulariser is made: in each group the share `1 - keep` with the least L1
    norms. The factor starts at zero and grows by beta at each `advance`, up to a ceiling.

    Args:
        model: the network.
        beta: what the factor grows by.
        keep: the share of each group that feels nothing.
        ceiling: where the factor ends, zero or above.
        options: of `TorqueRegularizer`; force, norm, pivot, importance, relative and steepness are the method's own and
            refused.

    Raises:
        UsageError: an option cannot be meant.
        ModelError: a group does not fit the model.
    """

    def __init__(
        self, model: nn.Module, *, beta: float = 1e-4, keep: float = 0.5, ceiling: float = 1.0, **options: Any
    ) -> None:
        if not 0 < keep <= 1:
            raise UsageError(f"{keep} is no share of modules", where="keep", hint="above 0, at most 1")
        if not ceiling >= 0:
            raise UsageError(f"{ceiling} is neither zero nor positive", where="ceiling")
        own = {"force", "norm", "pivot", "importance", "relative", "steepness"} & options.keys()
        if own:
            raise UsageError("growing regularisation has its own", where=", ".join(sorted(own)))
        self._keep = keep
        self.ceiling = ceiling
        self.intervals = 0
        super().__init__(model, beta=beta, force="uniform", norm="l2_squared", **options)

    def _initial_forces(
        self, force: Force, pivot: Pivot, steepness: float, importance: tuple[Tensor, ...] | None
    ) -> Tensor:
        """Return one half for the modules that are to go, zero for those that stay."""
        del force, pivot, steepness, importance
        with torch.no_grad():
            sums = self.layout.reduce(self.layout.weights(self.model), "absolutes")
        forces = []
        for norms in self.layout.split(self.layout.by_module(sums).cpu().double()):
            going = len(norms) - max(1, round(self._keep * len(norms)))
            order = torch.argsort(norms, stable=True)
            forces.append(torch.zeros_like(norms).index_fill_(0, order[:going], 0.5))
        return torch.cat(forces)

    @property
    def strength(self) -> float:
        """The factor: beta times the intervals so far, up to the ceiling."""
        return min(self.ceiling, self.beta * self.intervals)

    def advance(self) -> None:
        """Let the factor grow once."""
        self.intervals += 1

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs, the intervals so far among it."""
        return {**super().state_dict(), "intervals": self.intervals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            UsageError: the checkpoint is of other groups or another method.
        """
        super().load_state_dict(state)
        self.intervals = int(state["intervals"])
