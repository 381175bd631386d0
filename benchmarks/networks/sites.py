"""Units that can die in somebody else's network: found by the names of its modules, killed, and cut out natively.

A site says which tensors hold a unit's entries. It serves twice: zeroing some of them plants dead structure, and
slicing all of them out of a copy gives the network as it would have been built without the units, whose exported
size is the floor that surgery has to reach.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SHARE = 0.4
# a value that moves by less than this along positions and samples is a constant
STILL = 1e-5
HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "heads",
    "num_kv_heads",
    "num_key_value_heads",
)
HEAD_SIZES = ("all_head_size", "embed_dim", "split_size", "inner_dim", "dim", "hidden_size")


@dataclasses.dataclass(frozen=True)
class End:
    """The entries of a site's units along one axis of one module.

    Args:
        suffix: the end of the module's (or parameter's) name, after the prefix that all ends of a site share.
        side: "out" (rows of a linear map or convolution, its bias, a normalisation's entries) or "in" (columns).
        unit: how many neighbouring entries belong to a unit.
        parts: into how many equal parts the axis is split, each holding entries of every unit.
        zero: which of the parts are zeroed by planting.
        within: which of a unit's entries are zeroed; None for all.
        optional: whether a network may do without.
        axis: of a parameter that is no module's weight; by default the last but one for "out", the last for "in".
    """

    suffix: str
    side: str = "out"
    unit: int = 1
    parts: int = 1
    zero: tuple[int, ...] = ()
    within: slice | None = None
    optional: bool = False
    axis: int | None = None

    def index(self, units: Sequence[int], size: int, parts: Sequence[int], within: slice | None) -> list[int]:
        """Return the entries of units along an axis of a size."""
        step = size // self.parts
        inside = range(self.unit)[within or slice(None)]
        return [part * step + unit * self.unit + k for part in parts for unit in units for k in inside]


@dataclasses.dataclass(frozen=True)
class Site:
    """What holds units of one kind.

    Args:
        kind: "neuron", "head" or "channel".
        ends: where their entries are; the first one is what the network is searched for.
        size: entries of one head, where modules count heads in attributes of their own.
        per: how many heads die together there.
        together: whether all places of the network lose the same units (something shared counts them).
        silent: whether the constants are zero after all (biases and normalisation are zeroed too).
        above: only places whose name holds this.
        by_hand: whether the library cannot build the network without the units (a width that it fixes from the
            number of heads): they stay in the native network, and what they take is subtracted from its size.
    """

    kind: str
    ends: tuple[End, ...]
    size: int = 0
    per: int = 1
    together: bool = False
    silent: bool = False
    above: str = ""
    by_hand: bool = False


def neurons(*up: str, down: str, **more: Any) -> Site:
    """Hidden neurons: rows of `up` (each of them, if gated), columns of `down`."""
    return Site("neuron", (*(End(name, zero=(0,)) for name in up), End(down, "in")), **more)


def heads(size: int, names: str, out: str, *ends: End, per: int = 1, **more: Any) -> Site:
    """Attention heads with separate projections, named "query key value"; `per` queries share a key and value."""
    query, key, value = names.split()
    usual = (
        End(value, unit=size, zero=(0,)),
        End(query, unit=size * per),
        End(key, unit=size),
        End(out, "in", size * per),
    )
    return Site("head", (*usual, *ends), size * per, per, **more)


def packed_heads(size: int, packed: str, out: str, **more: Any) -> Site:
    """Attention heads whose projection holds all queries, then all keys, then all values."""
    return Site("head", (End(packed, unit=size, parts=3, zero=(2,)), End(out, "in", size)), size, **more)


def mixed_heads(size: int, packed: str, out: str, *ends: End, **more: Any) -> Site:
    """Attention heads whose projection holds query, key and value head by head."""
    value = slice(2 * size, 3 * size)
    usual = (End(packed, unit=3 * size, zero=(0,), within=value), End(out, "in", size))
    return Site("head", (*usual, *ends), size, **more)


def channels(write: str, read: str, *norms: str, depthwise: str = "", **more: Any) -> Site:
    """Filters of a convolution with what normalises them, perhaps a depthwise one behind, and what reads them."""
    ends = [End(write, zero=(0,)), *(End(norm) for norm in norms)]
    ends += [End(depthwise, zero=(0,))] if depthwise else []
    return Site("channel", (*ends, End(read, "in")), **more)


@dataclasses.dataclass
class Place:
    """A site found in a network, with the units that die there.

    Where a zero-padded convolution reads constants that are not zero, one of them has to stay: the carrier.
    """

    site: Site
    prefix: str
    total: int
    dead: tuple[int, ...]
    carrier: int | None = None
    counted: int = 0

    @property
    def gone(self) -> tuple[int, ...]:
        """The units that the native network does without."""
        return tuple(unit for unit in self.dead if unit != self.carrier)


def find(net: nn.Module, sites: Sequence[Site], seed: int = 0) -> list[Place]:
    """Find all places of all sites, and choose what dies at each.

    Raises:
        LookupError: when a site is nowhere, which means that the library's names have changed.
    """
    random = np.random.default_rng(seed)
    found = []
    for site in sites:
        first = site.ends[0]
        names = [name for name, _ in (*net.named_modules(), *net.named_parameters())]
        at = [name for name in names if re.search(rf"(^|\.){re.escape(first.suffix)}$", name)]
        at = [name for name in at if site.above in name]
        prefixes = [name[: len(name) - len(first.suffix)] for name in at]
        prefixes = [prefix for prefix in prefixes if _complete(net, prefix, site)]
        if not prefixes:
            raise LookupError(f"nothing here is called {first.suffix}")
        chosen: tuple[int, ...] = ()
        for prefix in prefixes:
            tensor, axis = next(_tensors(_get(net, prefix + first.suffix), first))
            total = tensor.shape[axis] // first.parts // first.unit
            if not (site.together and chosen):
                count = max(1, int(total * SHARE))
                chosen = tuple(sorted(random.choice(total, count, replace=False).tolist()))
            found.append(Place(site, prefix, total, chosen))
    return found


def plant(net: nn.Module, places: Sequence[Place]) -> None:
    """Zero the dead units' writers; biases live on (somewhere clearly positive), unless the site is silent."""
    with torch.no_grad():
        for place in places:
            for end in place.site.ends:
                if not _has(net, place.prefix + end.suffix, end):
                    continue
                target = _get(net, place.prefix + end.suffix)
                if end.zero:
                    weight, axis = next(_tensors(target, end))
                    index = end.index(place.dead, weight.shape[axis], end.zero, end.within)
                    weight.index_fill_(axis, torch.tensor(index), 0.0)
                if place.site.silent and end.side == "out":
                    parameters = (item for item in _tensors(target, end) if isinstance(item[0], nn.Parameter))
                    for tensor, axis in parameters:
                        index = end.index(
                            place.dead, tensor.shape[axis], end.zero or range(end.parts), end.within
                        )
                        tensor.index_fill_(axis, torch.tensor(index), 0.0)


def native(net: nn.Module, places: Sequence[Place], run: Any) -> nn.Module:
    """Return a copy of a planted network without its dead units, their constants in the biases of what read them.

    Args:
        net: planted.
        places: what died.
        run: calls a network on an example.

    Raises:
        ArithmeticError: when a unit that should be a constant is none.
    """
    constants = _constants(net, places, run)
    small = copy.deepcopy(net)
    done: set[tuple[int, str]] = set()
    with torch.no_grad():
        for place in places:
            _choose_carrier(net, place, constants)
            for end in place.site.ends:
                name = place.prefix + end.suffix
                if not _has(small, name, end) or (id(_get(small, name)), end.side) in done:
                    continue
                done.add((id(_get(small, name)), end.side))
                if place.site.by_hand:
                    place.counted += _elements(_get(small, name), end, place.gone)
                    continue
                if end.side == "in" and name in constants:
                    _fold(_get(small, name), end, place, constants[name])
                _slice(small, name, end, place.gone)
            if place.site.size and not place.site.by_hand:
                _count(small, place, done)
    return small


def removable(places: Sequence[Place]) -> dict[str, int]:
    """Return how many units of each kind the native network does without."""
    counts: dict[str, int] = {}
    for place in places:
        counts[place.site.kind] = counts.get(place.site.kind, 0) + len(place.gone)
    return counts


def _count(net: nn.Module, place: Place, done: set[tuple[int, str]]) -> None:
    """Lower what the module of a projection knows of its heads."""
    holder = _get(net, (place.prefix + place.site.ends[0].suffix).rpartition(".")[0])
    size, gone = place.site.size, len(place.gone)
    for key, step in (*((key, 1) for key in HEAD_COUNTS), *((key, size) for key in HEAD_SIZES)):
        units = place.site.per if step == 1 else 1
        if getattr(holder, key, None) == place.total * step * units and (id(holder), key) not in done:
            done.add((id(holder), key))
            setattr(holder, key, (place.total - gone) * step * units)


def _get(net: nn.Module, name: str) -> Any:
    target: Any = net
    for part in filter(None, name.rstrip(".").split(".")):
        target = getattr(target, part)
    return target


def _has(net: nn.Module, name: str, end: End) -> bool:
    try:
        target = _get(net, name)
    except AttributeError:
        return False
    return any(True for _ in _tensors(target, end))


def _complete(net: nn.Module, prefix: str, site: Site) -> bool:
    return all(end.optional or _has(net, prefix + end.suffix, end) for end in site.ends)


def _tensors(target: Any, end: End) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the tensors of a module that hold a side's entries, each with its axis; the weight comes first."""
    if isinstance(target, torch.Tensor):
        usual = max(target.dim() - 2, 0) if end.side == "out" else target.dim() - 1
        yield target, usual if end.axis is None else end.axis
    elif isinstance(target, nn.Embedding):
        yield target.weight, 1
    elif isinstance(target, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the common base
        yield from ((tensor, 0) for tensor in (target.weight, target.bias, target.running_mean))
        yield target.running_var, 0
    elif type(target).__name__ == "Conv1D":  # GPT-2's, whose weight is transposed
        yield target.weight, 1 if end.side == "out" else 0
        if end.side == "out":
            yield target.bias, 0
    elif isinstance(getattr(target, "weight", None), torch.Tensor):
        transposed = isinstance(target, nn.ConvTranspose1d | nn.ConvTranspose2d)
        yield target.weight, int((end.side == "in") != transposed)
        if end.side == "out" and getattr(target, "bias", None) is not None:
            yield target.bias, 0


def _constants(net: nn.Module, places: Sequence[Place], run: Any) -> dict[str, torch.Tensor]:
    """Watch what comes in at the dead units of each reader.

    Returns:
        By the reader's name the constants of the dead units, entry by entry.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []
    for place in places:
        for end in place.site.ends:
            if end.side == "out" or not _has(net, place.prefix + end.suffix, end):
                continue
            target = _get(net, place.prefix + end.suffix)
            if not isinstance(target, nn.Module) or isinstance(target, nn.Embedding):
                continue
            name, axis = place.prefix + end.suffix, 1 if _is_convolution(target) else -1

            def watch(
                _: Any, given: Any, name: str = name, axis: int = axis, end: End = end, place: Place = place
            ) -> None:
                values = given[0].detach().movedim(axis, -1)
                index = end.index(place.dead, values.shape[-1], (0,), None)
                seen.setdefault(name, []).append(values[..., index].reshape(-1, len(index)))

            hooks.append(target.register_forward_pre_hook(watch))
    with torch.no_grad():
        run(net)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, values in seen.items():
        every = torch.cat(values)
        spread = (every - every[0]).abs().max() / max(1.0, float(every.abs().max()))
        if spread > STILL:
            raise ArithmeticError(f"what {name} reads of the dead units moves by {float(spread):.1e}")
        found[name] = every[0]
    return found


def _is_convolution(module: Any) -> bool:
    return isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _is_padded(module: Any) -> bool:
    if not _is_convolution(module):
        return False
    if isinstance(module.padding, str):
        return bool(module.padding == "same" and max(module.kernel_size) > 1)
    return any(bool(size) for size in module.padding)


def _choose_carrier(net: nn.Module, place: Place, constants: Mapping[str, torch.Tensor]) -> None:
    for end in place.site.ends:
        name = place.prefix + end.suffix
        read = end.side == "in" and name in constants
        if read and _is_padded(_get(net, name)) and bool(constants[name].any()):
            place.carrier = place.dead[int(constants[name].abs().argmax())]


def _fold(target: Any, end: End, place: Place, constant: torch.Tensor) -> None:
    """Add what dead units contribute to the carrier's column or a reader's bias, made where there is none."""
    weight, axis = next(_tensors(target, end))
    index = torch.tensor(end.index(place.dead, weight.shape[axis], (0,), None))
    columns = weight.index_select(axis, index).movedim(axis, -1)
    if _is_padded(target):
        if place.carrier is not None:
            at = place.dead.index(place.carrier)
            weight.select(axis, place.carrier).copy_(columns @ constant / constant[at])
        return
    if place.carrier is not None:
        constant = constant.clone()
        constant[place.dead.index(place.carrier)] = 0.0
    added = columns @ constant
    added = added.flatten(1).sum(1) if added.dim() > 1 else added
    if not bool(added.any()):
        return
    if getattr(target, "bias", None) is None:
        target.bias = nn.Parameter(torch.zeros(added.shape))
    target.bias += added


def _elements(target: Any, end: End, gone: Sequence[int]) -> int:
    """Return how many elements units have in a module."""
    return sum(
        tensor.numel()
        // tensor.shape[axis]
        * len(end.index(gone, tensor.shape[axis], range(end.parts), None))
        for tensor, axis in _tensors(target, end)
    )


def _slice(net: nn.Module, name: str, end: End, dead: Sequence[int]) -> None:
    target = _get(net, name)
    for tensor, axis in list(_tensors(target, end)):
        gone = set(end.index(dead, tensor.shape[axis], range(end.parts), None))
        index = torch.tensor([place for place in range(tensor.shape[axis]) if place not in gone])
        _replace(net, target, name, tensor, tensor.index_select(axis, index))
    if isinstance(target, nn.Module):
        _recount(target, end)


def _replace(net: nn.Module, target: Any, name: str, tensor: torch.Tensor, cut: torch.Tensor) -> None:
    holder = _get(net, name.rpartition(".")[0]) if isinstance(target, torch.Tensor) else target
    for key, own in (*holder.named_parameters(recurse=False), *holder.named_buffers(recurse=False)):
        if own is tensor:
            setattr(holder, key, nn.Parameter(cut) if isinstance(own, nn.Parameter) else cut)
            return


def _recount(module: nn.Module, end: End) -> None:
    """Bring a module's own numbers in line with its weight."""
    weight, axis = next(_tensors(module, end))
    size = weight.shape[axis]
    side = "out" if end.side == "out" else "in"
    for key in (f"{side}_features", f"{side}_channels", "num_features", "embedding_dim"):
        if hasattr(module, key):
            setattr(module, key, size)
    if hasattr(module, "nf") and end.side == "out":
        module.nf = size
    if getattr(module, "groups", 1) > 1 and isinstance(module, nn.Conv1d | nn.Conv2d):
        module.groups = module.in_channels = module.out_channels = size
