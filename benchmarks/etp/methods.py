"""The methods under test: what pulls on the weights during the forced epochs, and what is ranked by afterwards.

All work alike but for the pull. The strength is a number without unit: with 1, the module that is the first to go just
reaches zero by the end of the forced epochs if it is of average size and no gradient defends it; where the pull is on
the squared norm, which reaches no zero, `exp(-2)` of it is left. Which module that is depends on the speed-up where the
pull depends on the distance from a pivot, so the torques are trained with for each speed-up; the pull of the others is
the same for all. So the same few strengths are offered to every method. All pulls are applied outside the optimiser.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import data
import torch
from pruning import FLOOR, choose, compacted, macs, uniform_share

from etp_deploy.errors import UsageError
from etp_deploy.training.dying import Modules
from etp_deploy.training.forces import PAPER_STEEPNESS, force_of
from etp_deploy.training.regularizers import make

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pruning import Unit
    from torch import Tensor, nn

    from etp_deploy.training import TorqueRegularizer
    from etp_deploy.training.forces import Force as Shape

#: What every method chooses from, on the validation examples; the ordered torques have variants in place of some.
STRENGTHS = (0.1, 0.3, 0.5, 1.0, 2.0, 3.0)
#: With a squared norm a pull of 1 leaves `exp(-2)` of a module.
SQUARED_PULL = 2.0


class OutOfReachError(Exception):
    """A method cannot reach the wanted speed-up, or does not know the network."""


@dataclass(frozen=True)
class Choice:
    """What is chosen for a method on the validation examples.

    Args:
        strength: see this module's text.
        variant: of a torque, one of `VARIANTS`; empty where the method has none.
    """

    strength: float
    variant: str = ""

    @property
    def name(self) -> str:
        """The choice in a file's name."""
        return f"{self.strength:g}{self.variant.replace(' ', '-')}"


@dataclass(frozen=True)
class Variant:
    """How a torque is set up.

    Args:
        pivot: "ordered", by norm at the start, unit by unit, or "network", by `removal_order` over all units.
        norm: that is pulled on.
        rise: the exponential grows by `exp(rise)` over the modules that stay, so that `s = rise / keep`; None for the
            paper's s = 5.
    """

    pivot: str
    norm: str
    rise: float | None


VARIANTS = {
    "norm": Variant("ordered", "l2", 2.5),
    "norm squared": Variant("ordered", "l2_squared", None),
    "sensitivity": Variant("network", "l2", 5.0),
    "sensitivity squared": Variant("network", "l2_squared", None),
}


@dataclass(frozen=True)
class Setting:
    """What a force is made for.

    Args:
        network: trained densely; the force works on this very object.
        units: what can be pruned from it.
        example: one sample.
        choice: how strong it is.
        pulls: sum of the learning rates of all forced steps.
        speedup: what the network is to be pruned to.
        removal: returns each unit's places in the order of removal for this speed-up, by sensitivity.
    """

    network: nn.Module
    units: Sequence[Unit]
    example: tuple[Tensor, ...]
    choice: Choice
    pulls: float
    speedup: float
    removal: Callable[[], Mapping[str, Tensor]]


class Force(Protocol):
    """A method at work on one network."""

    def pull(self, rate: float) -> None:
        """Act on the weights after an optimiser's step."""
        ...

    def pruned(self) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Return the small network, and which modules of each unit it kept; None where it has its own groups."""
        ...


class Pulling:
    """A method of the library: a regulariser for each unit, so that each is pulled on the scale of its own weights.

    Args:
        setting: what it is made for.
        method: as `etp_deploy.training.regularizers.make` knows it.
        options: for `make`.
    """

    def __init__(self, setting: Setting, method: str, options: Mapping[str, Any]) -> None:
        self.setting = setting
        self.method = method
        #: what of each unit stays where all units lose the same share
        share = uniform_share(setting.network, setting.units, setting.example, setting.speedup)
        self.share = max(share, FLOOR)
        self.regularizers = {unit.group.name: self._regularizer(unit, options) for unit in setting.units}
        #: the force on the first module of each unit that is to go
        self.edges = {unit.group.name: self._edge(unit) for unit in setting.units}
        for unit in setting.units:
            self.regularizers[unit.group.name].beta = self._beta(unit)

    def _regularizer(self, unit: Unit, options: Mapping[str, Any]) -> TorqueRegularizer:
        try:
            return make(self.method, self.setting.network, groups=(unit.group,), **options)
        except UsageError as error:
            raise OutOfReachError(str(error)) from error

    def _edge(self, unit: Unit) -> float:
        forces = self.regularizers[unit.group.name].forces(unit.group.name).sort().values
        staying = unit.staying(self.setting.network, self.share)
        return float(forces[min(staying, len(forces) - 1)])

    def _beta(self, unit: Unit) -> float:
        """Return what makes the strength mean the same in every unit."""
        setting, regularizer = self.setting, self.regularizers[unit.group.name]
        parts = unit.gains if self.method == "slimming" else unit.group.parts
        elements = sum(setting.network.get_parameter(part.parameter).numel() for part in parts)
        mean = float(regularizer.scores()[unit.group.name].square().mean())
        size = mean / (elements / unit.count(setting.network))
        return setting.choice.strength * size**0.5 / (setting.pulls * self.edges[unit.group.name])

    def _unit(self, force: Tensor, name: str) -> float:
        """Return what pulls are compared in among modules that are zero: the largest."""
        del name
        return float(force.max())

    def pull(self, rate: float) -> None:
        """Take the proximal step of every unit."""
        for regularizer in self.regularizers.values():
            regularizer.shrink(rate)

    def scores(self) -> dict[str, Tensor]:
        """Return each module's norm after the pull, as a share of its unit's mean.

        Modules that are zero come in the order of the pull that they felt, each unit's in a unit of its own. Gains are
        compared as they are.
        """
        found = {}
        for name, regularizer in self.regularizers.items():
            norms = regularizer.scores()[name].double()
            force = regularizer.forces(name)
            share = norms if self.method == "slimming" else norms / norms.mean().clamp(min=1e-30)
            found[name] = torch.where(norms > 0, share, -force / self._unit(force, name))
        return found

    def pruned(self) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Remove the modules of the lowest scores."""
        setting = self.setting
        try:
            keep = choose(setting.network, setting.units, self.scores(), setting.example, setting.speedup)
        except ValueError as error:
            raise OutOfReachError(str(error)) from error
        return compacted(setting.network, setting.units, keep), keep


class Torque(Pulling):
    """A torque in one of its variants.

    Args:
        setting: what it is made for; its choice names the variant.
        shape: of the force over the distance.
    """

    def __init__(self, setting: Setting, shape: Shape) -> None:
        self.shape: Shape = shape
        self.variant = VARIANTS[setting.choice.variant]
        method = "etp" if shape == "exponential" else "linear_torque"
        super().__init__(setting, method, {"norm": self.variant.norm})

    @cached_property
    def order(self) -> Mapping[str, Tensor]:
        """Each unit's places in the order of removal."""
        return self.setting.removal()

    @cached_property
    def staying(self) -> float:
        """The share of a unit's modules, or of all where they are ordered over the network, that stays."""
        setting = self.setting
        if self.variant.pivot != "network":
            return self.share
        keep = choose(setting.network, setting.units, self.order, setting.example, setting.speedup)
        return float(torch.cat(list(keep.values())).double().mean())

    @property
    def steepness(self) -> float:
        """That of the exponential."""
        return PAPER_STEEPNESS if self.variant.rise is None else self.variant.rise / self.staying

    @cached_property
    def whole(self) -> TorqueRegularizer:
        """The torque over all units at once, for its forces."""
        options = {"pivot": "network", "importance": self.order, **self._rise()}
        groups = [unit.group for unit in self.setting.units]
        return make(self.method, self.setting.network, groups=groups, **options)

    def _rise(self) -> dict[str, float]:
        return {"steepness": self.steepness} if self.shape == "exponential" else {}

    def _regularizer(self, unit: Unit, options: Mapping[str, Any]) -> TorqueRegularizer:
        if self.variant.pivot != "network":
            return super()._regularizer(unit, {**options, "pivot": "ordered", **self._rise()})
        regularizer = super()._regularizer(unit, options)
        regularizer.load_state_dict(
            {**regularizer.state_dict(), "forces": self.whole.forces(unit.group.name)}
        )
        return regularizer

    def _edge(self, unit: Unit) -> float:
        if self.variant.pivot != "network":
            return super()._edge(unit)
        count = unit.count(self.setting.network)
        distance = torch.full((count,), self.staying * count, dtype=torch.float64)
        return float(force_of(distance, self.shape, self.steepness)[0])

    def _unit(self, force: Tensor, name: str) -> float:
        """Return the pull at the edge, so that what lies as far beyond it in one order goes alike."""
        del force
        return self.edges[name]

    def _beta(self, unit: Unit) -> float:
        if self.variant.norm != "l2_squared":
            return super()._beta(unit)
        name = unit.group.name
        return self.setting.choice.strength * SQUARED_PULL / (2 * self.setting.pulls * self.edges[name])


class Cut:
    """No force: what the order says goes before the first of the forced epochs, which then are fine-tuning.

    Args:
        setting: what it is made for; its choice names the variant whose order is cut by.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        network, units, example = setting.network, setting.units, setting.example
        if VARIANTS[setting.choice.variant].pivot == "network":
            self.keep = choose(network, units, setting.removal(), example, setting.speedup)
        else:
            self.keep = self._uniform()
        self.modules = Modules(network, [unit.readers() for unit in units], 0.0, "module")
        self.pull(0.0)

    def _uniform(self) -> dict[str, Tensor]:
        """Keep the modules of the largest norms, the same share of every unit."""
        network, units = self.setting.network, self.setting.units
        share = max(uniform_share(network, units, self.setting.example, self.setting.speedup), FLOOR)
        norms = make("group_lasso", network, groups=[unit.group for unit in units]).scores()
        keep = {}
        for unit in units:
            own = norms[unit.group.name]
            best = own.argsort(descending=True, stable=True)[: unit.staying(network, share)]
            keep[unit.group.name] = torch.zeros(len(own), dtype=torch.bool).index_fill_(0, best, True)
        return keep

    def pull(self, rate: float) -> None:
        """Take what is cut away again."""
        del rate
        for name, keep in self.keep.items():
            self.modules.kill(name, (~keep).nonzero().flatten().tolist())

    def pruned(self) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Remove it."""
        return compacted(self.setting.network, self.setting.units, self.keep), self.keep


class DepGraph:
    """Torch-Pruning's GroupNormPruner: its own dependency graph, regulariser, importance and removal.

    Its pull on the weights is taken from the gradients that it makes, and applied outside the optimiser as all
    others. Heads are removed as whole heads.
    """

    #: How finely the pruned share is searched: steps of the whole, and steps of a step.
    shares = (48, 8)

    def __init__(self, setting: Setting) -> None:
        path = str(data.fetch("torch-pruning"))
        if path not in sys.path:
            sys.path.append(path)
        import torch_pruning  # noqa: PLC0415 - from the cache, for this method alone

        self.library = torch_pruning
        self.setting = setting
        self.pruner = self._pruner(setting.network, 0.5)

    def _pruner(self, network: nn.Module, share: float) -> Any:
        """Return a pruner of a network that removes a share of its channels and heads in one step."""
        heads = {
            layer: layer.out_features // size
            for module in network.modules()
            if (size := getattr(module, "attention_head_size", getattr(module, "size", None))) is not None
            for name, layer in module.named_children()
            if name in {"query", "key", "value", "linear"}
        }
        last = [module for name, module in network.named_modules() if name in {"classifier", "project"}]
        frozen = [parameter for parameter in network.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            # it follows gradients, and would take what has none for absent
            parameter.requires_grad_(True)
        pruner = self.library.pruner.GroupNormPruner(
            network,
            self.setting.example,
            importance=self.library.importance.GroupMagnitudeImportance(p=2, normalizer="mean"),
            reg=1.0,
            global_pruning=True,
            pruning_ratio=share,
            head_pruning_ratio=share,
            max_pruning_ratio=15 / 16,
            ignored_layers=last,
            # its default dictionaries are shared by all pruners
            in_channel_groups={},
            out_channel_groups={},
            num_heads=heads,
            prune_num_heads=bool(heads),
            prune_head_dims=not heads,
        )
        for parameter in frozen:
            parameter.requires_grad_(False)
        return pruner

    @torch.no_grad()
    def pull(self, rate: float) -> None:
        """Shrink the weights by what the pruner would have added to their gradients."""
        network = self.setting.network
        parameters = [parameter for parameter in network.parameters() if parameter.grad is not None]
        for parameter in parameters:
            parameter.grad.zero_()
        self.pruner.regularize(network)
        for parameter in parameters:
            share = rate * self.setting.choice.strength / self.setting.pulls
            parameter.sub_(share * parameter.grad)

    def pruned(self) -> tuple[nn.Module, dict[str, Tensor] | None]:
        """Raise the share of channels and heads until the MACs are met, coarsely and then finely.

        Halving the interval would not do: near its most the pruner spares whole layers.
        """
        speedup = self.setting.speedup
        wanted = macs(self.setting.network, self.setting.example) / speedup
        coarse, fine = self.shares
        shares = (place / coarse for place in range(1, coarse))
        first = next((share for share in shares if self._left(share)[1] <= wanted), None)
        if first is None:
            raise OutOfReachError(f"a speed-up of {speedup:g} is out of reach")
        for place in range(fine):
            small, left = self._left(first - (fine - 1 - place) / (coarse * fine))
            if left <= wanted:
                break
        small.zero_grad(set_to_none=True)
        return small, None

    def _left(self, share: float) -> tuple[nn.Module, int]:
        """Return the network without a share of its channels and heads, and its MACs."""
        small = copy.deepcopy(self.setting.network)
        frozen = {name for name, parameter in small.named_parameters() if not parameter.requires_grad}
        self._pruner(small, share).step()
        for name, parameter in small.named_parameters():
            parameter.requires_grad_(name not in frozen)
        try:
            return small, macs(small, self.setting.example)
        except RuntimeError as error:
            raise OutOfReachError(f"what Torch-Pruning leaves does not run: {error}") from error


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Args:
        name: as in the results.
        title: for readers.
        force: puts it to work.
        aims: whether its pull depends on the speed-up.
        choices: what is tried on the validation examples: as many for all.
    """

    name: str
    title: str
    force: Callable[[Setting], Force]
    aims: bool = False
    choices: tuple[Choice, ...] = tuple(Choice(strength) for strength in STRENGTHS)


def _pulling(method: str, **options: Any) -> Callable[[Setting], Force]:
    return lambda setting: Pulling(setting, method, options)


#: What a torque chooses from: as many as the others.
ORDERED = tuple(
    Choice(strength, variant)
    for variant, one in VARIANTS.items()
    for strength in ((1.0,) if one.norm == "l2_squared" else (0.5, 1.0))
)

METHODS = {
    method.name: method
    for method in (
        Method(
            "etp",
            "ETP, ordered",
            lambda setting: Torque(setting, "exponential"),
            aims=True,
            choices=ORDERED,
        ),
        Method(
            "linear",
            "linear torque, ordered",
            lambda setting: Torque(setting, "linear"),
            aims=True,
            choices=ORDERED,
        ),
        Method("lasso", "group lasso", _pulling("group_lasso")),
        Method("l1", "L1", _pulling("l1")),
        Method("slimming", "network slimming", _pulling("slimming")),
        Method("depgraph", "DepGraph", DepGraph),
        Method("etp-index", "ETP, by index", _pulling("etp", norm="l2"), aims=True),
        Method("linear-index", "linear torque, by index", _pulling("linear_torque", norm="l2"), aims=True),
        Method(
            "cut",
            "cut at the start, no force",
            Cut,
            aims=True,
            choices=(Choice(0.0, "norm"), Choice(0.0, "sensitivity")),
        ),
    )
}
