"""Which line of which parameter belongs to which module, compiled once, so that nothing loops over modules.

A *line* is one axis of one parameter with the module of each of its indices. All sums over modules are one
reduction a line and one `index_add` over all of them; all changes of weights are one broadcast a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from etp_deploy.errors import ModelError
from etp_deploy.training.shards import Kind, Weights, gather_back
from etp_deploy.training.wrapping import parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from etp_deploy.training.modules import Group, Part


# entries of a tensor that is made on the way: 1 MB of them
_CACHED = 1 << 18


@dataclass
class _Line:
    """One axis of one parameter.

    Attributes:
        parameter: position of the parameter in `Layout.names`.
        axis: the axis.
        slots: for each index its slot (a module's share in one part), or the number of slots where it has none.
        elements: weights of each index.
    """

    parameter: int
    axis: int
    slots: Tensor
    elements: int


@dataclass(frozen=True)
class _Maps:
    """A layout's index vectors on one device."""

    slots: Tensor
    modules: Tensor
    slot_module: Tensor
    lines: tuple[Tensor, ...] = field(default=())


class Layout:
    """The modules of all groups in one row, and where their weights lie.

    Args:
        model: the network, read for shapes.
        groups: the groups, in the order of the row.
        takes: which parts to read; None for all. Modules keep their places without them.

    Raises:
        ModelError: a group does not fit the model.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[Group], takes: Callable[[Part], bool] | None = None
    ) -> None:
        self.names: list[str] = []
        self._shapes: list[torch.Size] = []
        self.counts = [group.count(model) for group in groups]
        self.total = sum(self.counts)
        self.lines: list[_Line] = []
        self.blocks: list[list[slice]] = []
        modules: list[Tensor] = []
        place, slot = 0, 0
        for group, count in zip(groups, self.counts, strict=True):
            blocks = []
            for part in group.parts:
                weight = parameter(model, part.parameter)
                index = part.modules(weight)
                if takes is None or takes(part):
                    self._add(part.parameter, weight, part.axis, torch.where(index < 0, -1, index + slot))
                blocks.append(slice(slot, slot + count))
                modules.append(torch.arange(place, place + count))
                slot += count
            self.blocks.append(blocks)
            place += count
        self.slots = slot
        self._slot_module = torch.cat(modules)
        for line in self.lines:
            line.slots = torch.where(line.slots < 0, slot, line.slots)
        self._maps: dict[torch.device, _Maps] = {}
        weights = torch.zeros(slot + 1, dtype=torch.float64)
        for line in self.lines:
            ones = torch.full((len(line.slots),), float(line.elements), dtype=torch.float64)
            weights.index_add_(0, line.slots, ones)
        self.slot_elements = weights[:-1]
        #: weights of each module, shape (total,)
        self.elements = torch.zeros(self.total, dtype=torch.float64).index_add_(
            0, self._slot_module, self.slot_elements
        )

    def _add(self, name: str, weight: Tensor, axis: int, slots: Tensor) -> None:
        """Put a part's slots on a line of its parameter that is free at these places."""
        if name not in self.names:
            self.names.append(name)
            self._shapes.append(weight.shape)
        number = self.names.index(name)
        for line in self.lines:
            if (line.parameter, line.axis) == (number, axis) and not ((line.slots >= 0) & (slots >= 0)).any():
                line.slots = torch.where(slots >= 0, slots, line.slots)
                return
        self.lines.append(_Line(number, axis, slots, weight.numel() // weight.shape[axis]))

    def weights(self, model: nn.Module) -> Weights:
        """Return what this process holds of the parameters, in the order of `names`.

        Raises:
            ModelError: a parameter is gone or has another shape.
            UsageError: they are sharded in a manner that is not understood.
        """
        gather_back(model)
        found = [parameter(model, name) for name in self.names]
        for name, weight, shape in zip(self.names, found, self._shapes, strict=True):
            if weight.shape != shape:
                what = f"its shape was {tuple(shape)} and is {tuple(weight.shape)}"
                raise ModelError(what, where=name, hint="of the ways to shard, fully_shard keeps shapes")
        return Weights.held(model, found)

    def split(self, row: Tensor) -> tuple[Tensor, ...]:
        """Cut a row over all modules into one vector for each group."""
        return torch.split(row, self.counts)

    def maps(self, device: torch.device) -> _Maps:
        """Return the index vectors on a device."""
        if device not in self._maps:
            slot_module = torch.cat([self._slot_module, torch.tensor([self.total])])
            slots = torch.cat([line.slots for line in self.lines])
            modules = slot_module[slots]
            lengths = [len(line.slots) for line in self.lines]
            self._maps[device] = _Maps(
                slots.to(device),
                modules.to(device),
                slot_module[:-1].to(device),
                tuple(torch.split(modules.to(device), lengths)),
            )
        return self._maps[device]

    def reduce(self, weights: Weights, kind: Kind) -> Tensor:
        """Return a number for each slot: the sum of squares or of absolute values, or the largest absolute value.

        Args:
            weights: see `weights`.
            kind: what is computed, in float32 or wider.
        """
        order = {"squares": 2.0, "absolutes": 1.0, "largest": float("inf")}[kind]
        device = weights[0].device
        found: dict[tuple[int, int], Tensor] = {}
        vectors = []
        for line in self.lines:
            key = line.parameter, line.axis
            if key not in found:
                sums = _along_axis(weights[line.parameter], line.axis, order).to(device)
                found[key] = weights.widen(*key, sums)
            vectors.append(found[key])
        values = torch.cat(vectors)
        slots = self.maps(device).slots
        result = values.new_zeros(self.slots + 1)
        if kind == "largest":
            result.scatter_reduce_(0, slots, values, "amax")
        else:
            result.index_add_(0, slots, values.square_() if kind == "squares" else values)
        return weights.complete(result, kind)[:-1]

    def by_module(self, slots: Tensor) -> Tensor:
        """Add up a row over slots into a row over modules."""
        row = slots.new_zeros(self.total)
        return row.index_add_(0, self.maps(slots.device).slot_module, slots)

    def sums(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the sum over each module of tensors that lie as the parameters do, shape (total,).

        Args:
            tensors: in the order of `names`, whole.
        """
        vectors = []
        for line in self.lines:
            tensor = tensors[line.parameter]
            rest = [axis for axis in range(tensor.ndim) if axis != line.axis]
            vectors.append((tensor.sum(rest) if rest else tensor).to(tensors[0].device))
        values = torch.cat(vectors)
        result = values.new_zeros(self.total + 1)
        return result.index_add_(0, self.maps(values.device).modules, values)[:-1]

    def spread(self, row: Tensor, weights: Weights, *, rest: float = 0.0) -> list[list[Tensor]]:
        """Lay a row over modules out along the parameters.

        Args:
            row: a value for each module.
            weights: see `weights`.
            rest: the value of indices that belong to no module.

        Returns:
            For each parameter, and for each of its lines, the values shaped to broadcast against it.
        """
        maps = self.maps(row.device)
        extended = torch.cat([row, row.new_full((1,), rest)])
        vectors = torch.split(extended[maps.modules], [len(line.slots) for line in self.lines])
        result: list[list[Tensor]] = [[] for _ in self.names]
        for line, vector in zip(self.lines, vectors, strict=True):
            weight = weights[line.parameter]
            shape = [-1 if axis == line.axis else 1 for axis in range(weight.ndim)]
            own = weights.narrow(line.parameter, line.axis, vector.to(weight.device))
            result[line.parameter].append(own.reshape(shape))
        return result


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute in: float64 for itself, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _along_axis(weight: Tensor, axis: int, order: float) -> Tensor:
    """Return the norm of each index along an axis, shape (n,)."""
    if not weight.numel():  # a shard may hold nothing, of which there is no largest
        return weight.new_zeros(weight.shape[axis], dtype=wide(weight.dtype))
    rest = [other for other in range(weight.ndim) if other != axis]
    if not rest:
        return weight.detach().abs().to(wide(weight.dtype))
    if (
        order == 1 and weight.device.type == "cpu"
    ):  # what is in between stays in the cache: a third of the norm's time
        pieces: tuple[Tensor, ...] = torch.split(weight.detach(), max(1, _CACHED // weight[0].numel()))
        parts = [piece.abs().sum(rest, dtype=wide(weight.dtype)) for piece in pieces]
        return torch.cat(parts) if axis == 0 else torch.stack(parts).sum(0)
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), order, dim=rest, dtype=wide(weight.dtype))
    return norms
