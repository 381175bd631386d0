"""Groups from the surgery: what can only go together, asked of the exported network, as groups for the regulariser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from etp_deploy.errors import UsageError
from etp_deploy.surgery.analysis import settle
from etp_deploy.surgery.coupling import Coupling, couple
from etp_deploy.training.blueprint import Blueprint
from etp_deploy.training.modules import Group, Part, batch_norm_gains

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from etp_deploy.training.blueprint import Member

    Members = Mapping[tuple[str, int], Member]


def coupled_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    exporter: str | None = None,
    dynamic: Sequence[str] = (),
    blueprint: Blueprint | None = None,
) -> tuple[Group, ...]:
    """Return the groups of modules that the surgery can remove, each module with all that goes with it.

    The network is exported once and read by the surgery. A group holds the filters, neurons, units or heads of one
    width with everything that must go at the same time: every writer of a residual stream, the depthwise chain,
    both halves of a gated neuron, query, key and value of a head (of a key/value head with all of its queries),
    biases, the gains and biases of norms, and the columns that read them. What the surgery would have to keep (the
    network's outputs, the width of a LayerNorm) is not offered. Zeros on these groups are therefore never spent
    in vain.

    Args:
        model: the network.
        example_inputs: as `etp_deploy.exporting.export` takes them.
        exporter: "torchscript" (where None) or "dynamo".
        dynamic: axes of free size, such as "x.0=batch".
        blueprint: made before of this network; in place of an export, and of all that says how to.

    Raises:
        ExportError: the exporter fails.
        UsageError: an option cannot be meant, or the blueprint is of another network.
    """
    if blueprint is None:
        blueprint = Blueprint(model, example_inputs, exporter=exporter or "torchscript", dynamic=dynamic)
    elif dynamic or exporter is not None:
        where = "dynamic" if dynamic else "exporter"
        raise UsageError("the blueprint was exported before", where=where, hint="give it to Blueprint")
    blueprint.check(model)
    coupling = couple(blueprint.analysis())
    words = {int(word): module for module, word in enumerate(coupling.words)}
    members = blueprint.decode(coupling.lines, words)
    drafts = list(_drafts(coupling, members))
    names = _names(drafts)
    proven = _proven(blueprint, coupling, drafts, batch_norm_gains(model))
    return tuple(
        Group(name, draft.kind, draft.parts, deciding=sets)
        for name, draft, sets in zip(names, drafts, proven, strict=True)
    )


# how many of a group's writers, gains and readers are tried one by one
_SINGLES = 8


@dataclass(frozen=True)
class _Draft:
    """A group in the making: its modules' numbers in the coupling, and its parts with their roles."""

    kind: str
    modules: np.ndarray
    parts: tuple[Part, ...]
    roles: tuple[frozenset[str], ...]


def _drafts(coupling: Coupling, members: Members) -> list[_Draft]:
    """Put the modules of one axis that have weights in the same places into one group."""
    keys = list(members)
    inside = np.zeros((len(coupling.words), len(keys)), bool)
    for place, key in enumerate(keys):
        index = members[key].index
        inside[index[index >= 0], place] = True
    drafts = []
    taken = np.zeros(len(coupling.words), bool)
    for module in range(len(coupling.words)):
        if taken[module] or not inside[module].any():
            continue
        alike = (inside == inside[module]).all(axis=1) & (np.array(coupling.axes) == coupling.axes[module])
        taken |= alike
        modules = np.flatnonzero(alike)
        if modules.size < 2:
            continue
        local = np.full(len(coupling.words) + 1, -1)
        local[modules] = np.arange(modules.size)
        chosen = [key for place, key in enumerate(keys) if inside[module, place]]
        parts = tuple(_part(key, local[members[key].index]) for key in chosen)
        roles = tuple(frozenset(members[key].roles) for key in chosen)
        drafts.append(_Draft(coupling.kinds[module], modules, parts, roles))
    return drafts


def _part(key: tuple[str, int], index: np.ndarray) -> Part:
    name, axis = key
    if np.array_equal(index, np.arange(index.size)):
        return Part(name, axis, decisive=False)
    return Part(name, axis, decisive=False, index=tuple(index.tolist()))


def _names(drafts: Sequence[_Draft]) -> list[str]:
    """Name each group after the first weight that writes it."""
    names: list[str] = []
    for draft in drafts:
        pairs = zip(draft.parts, draft.roles, strict=True)
        writers = [part.parameter for part, roles in pairs if "writer" in roles]
        name = (writers or [draft.parts[0].parameter])[0].removesuffix(".weight")
        number = 2
        base = name
        while name in names:
            name, number = f"{base}:{number}", number + 1
        names.append(name)
    return names


def _proven(
    blueprint: Blueprint, coupling: Coupling, drafts: Sequence[_Draft], gains: frozenset[str]
) -> list[tuple[tuple[int, ...], ...]]:
    """Return for each group which of its parts make a module dead when these alone are zero, shown by planting.

    Tried are each writer, gain and reader by itself, and all of each together.
    """
    proven: list[list[tuple[int, ...]]] = [[] for _ in drafts]
    for role in ("writer", "gain", "reader"):
        together = [
            tuple(
                place
                for place, part in enumerate(draft.parts)
                if (part.parameter in gains if role == "gain" else role in draft.roles[place])
            )
            for draft in drafts
        ]
        longest = max((len(chosen) for chosen in together), default=0)
        tries = [[chosen[n : n + 1] for chosen in together] for n in range(min(longest, _SINGLES))]
        for sets in [*tries, together]:
            new = [
                () if any(set(chosen) >= set(known) for known in found) else chosen
                for chosen, found in zip(sets, proven, strict=True)
            ]
            for found, chosen, gone in zip(
                proven, new, _planted(blueprint, coupling, drafts, new), strict=True
            ):
                if chosen and gone:
                    found.append(chosen)
    return [tuple(found) for found in proven]


def _planted(
    blueprint: Blueprint,
    coupling: Coupling,
    drafts: Sequence[_Draft],
    sets: Sequence[tuple[int, ...]],
) -> list[bool]:
    """Zero some parts of every second module and say for each group whether these modules died."""
    if not any(sets):
        return [False] * len(sets)
    zero = np.zeros(blueprint.total, bool)
    for draft, chosen in zip(drafts, sets, strict=True):
        for place in chosen:
            part = draft.parts[place]
            shape, start = blueprint.shapes[part.parameter], blueprint.offsets[part.parameter]
            weight = zero[start : start + int(np.prod(shape))].reshape(shape)
            index = np.array(part.index if part.index is not None else range(shape[part.axis]))
            np.moveaxis(weight, part.axis, 0)[(index >= 0) & (index % 2 == 1)] = True
    analysis = blueprint.analysis(zero)
    state = analysis.state
    # carriers and equal counts come later and are no matter of life and death
    state.touched.extend(reversed(state.keep))
    state.apply_pins()
    settle(analysis)
    result = []
    for draft in drafts:
        alive = False
        for module in draft.modules[1::2]:
            for value, places in coupling.positions[module].items():
                constant = state.constant(value)
                kept = state.mask(value).reshape(-1)[places]
                known = np.zeros(1, bool) if constant is None else constant.known.reshape(-1)[places]
                alive |= bool((kept & ~known).any())
        result.append(not alive)
    return result


def removable_share(
    model: nn.Module, example_inputs: Any = None, *, blueprint: Blueprint | None = None, **options: Any
) -> float:
    """Return which share of a network's zero weights the surgery removes; 1 where none was spent in vain.

    Args:
        model: the network, with zeros.
        example_inputs: as `etp_deploy.exporting.export` takes them.
        blueprint: made before of this network; in place of the inputs.
        options: of `Blueprint`.

    Raises:
        ExportError: the exporter fails.
        UsageError: no weight is zero, or the blueprint is of another network.
    """
    if blueprint is None:
        blueprint = Blueprint(model, example_inputs, **options)
    elif options:
        raise UsageError(
            "the blueprint was exported before", where=", ".join(options), hint="give them to Blueprint"
        )
    zero = blueprint.zeros_of(model)
    if not zero.any():
        raise UsageError("no weight is zero", where=type(model).__name__)
    gone, _ = blueprint.removed(zero)
    return float(gone[zero].mean())
