"""Parameters as this process holds them: whole, or a part of each, as `fully_shard` leaves it.

The one place that knows which indices of a parameter are here. Sums over modules are taken over what is here and
completed over the processes; changes of weights touch what is here. Everything else reads as if weights were whole.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor, distributed

from etp_deploy.errors import EtpError, UsageError
from etp_deploy.training.wrapping import sharded_modules

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

Kind = Literal["squares", "absolutes", "largest"]


@dataclass(frozen=True)
class _Window:
    """What this process holds of one parameter.

    Attributes:
        starts: the first index along each axis.
        counted: whether it enters sums; not so where another process holds the same.
    """

    starts: tuple[int, ...]
    counted: bool


class Weights(Sequence[Tensor]):
    """What this process holds of some parameters; the tensors share the parameters' memory.

    Args:
        parameters: tensors, taken as whole. See `Weights.held` for those of a network.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        self._tensors = self.parameters
        self._windows: tuple[_Window, ...] = ()
        self._groups: tuple[distributed.ProcessGroup, ...] = ()

    @classmethod
    def held(cls, model: nn.Module, parameters: Sequence[nn.Parameter]) -> Weights:
        """Return the local parts of a network's parameters.

        Args:
            model: the network.
            parameters: as it holds them now.

        Raises:
            UsageError: they are sharded in a manner that is not understood.
        """
        result = cls(parameters)
        found = [weight for weight in parameters if is_sharded(weight)]
        if found:
            _check(model, found)
            result._split(cast("Any", found[0]).device_mesh)
        return result

    def _split(self, mesh: Any) -> None:
        """Take the local parts of all parameters on one mesh of processes."""
        axes = sorted({axis for weight in self.parameters for axis in _split_over(weight)})
        self._groups = tuple(mesh.get_group(axis) for axis in axes)
        with torch.no_grad():  # so that the local part is no node of a graph
            self._tensors = tuple(_local(weight) for weight in self.parameters)
        here = mesh.get_coordinate()
        self._windows = tuple(
            _Window(
                _starts(weight, mesh),
                all(here[axis] == 0 for axis in axes if axis not in _split_over(weight)),
            )
            for weight in self.parameters
        )

    @overload
    def __getitem__(self, place: int) -> Tensor: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, place: int | slice) -> Tensor | Sequence[Tensor]:
        return self._tensors[place]

    def __len__(self) -> int:
        return len(self._tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._tensors)

    @property
    def sharded(self) -> bool:
        """Whether this process holds parts."""
        return bool(self._windows)

    def gradient(self, number: int) -> Tensor | None:
        """Return the gradient of what is here of a parameter, None where it has none."""
        gradient = self.parameters[number].grad
        return gradient if gradient is None or not self._windows else _local(gradient)

    def widen(self, number: int, axis: int, vector: Tensor) -> Tensor:
        """Return numbers for the indices that are here as numbers for all, zero where nothing is known.

        Args:
            number: which parameter.
            axis: the axis that they lie along.
            vector: a number for each index of this axis that is here.
        """
        if not self._windows:
            return vector
        window = self._windows[number]
        whole = vector.new_zeros(self.parameters[number].shape[axis])
        if window.counted:
            whole.narrow(0, window.starts[axis], len(vector)).copy_(vector)
        return whole

    def narrow(self, number: int, axis: int, vector: Tensor) -> Tensor:
        """Return numbers for all indices along an axis as numbers for those that are here."""
        if not self._windows:
            return vector
        return vector.narrow(0, self._windows[number].starts[axis], self[number].shape[axis])

    def places(self, number: int, axis: int, places: Tensor) -> Tensor:
        """Return those of some indices along an axis that are here, counted from the first one here."""
        if not self._windows:
            return places
        moved = places - self._windows[number].starts[axis]
        return moved[(moved >= 0) & (moved < self[number].shape[axis])]

    def complete(self, row: Tensor, kind: Kind) -> Tensor:
        """Return a row of sums (or of largest values) over what is here as one over the whole weights."""
        operation = distributed.ReduceOp.MAX if kind == "largest" else distributed.ReduceOp.SUM
        for group in self._groups:
            distributed.all_reduce(row, operation, group)
        return row


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a part of one that several processes hold."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has such a tensor has loaded it
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with all of its parts; every process has to ask."""
    return cast("Any", tensor).full_tensor() if is_sharded(tensor) else tensor


def gather_back(model: nn.Module) -> None:
    """Let a network that `fully_shard` was applied to hold its shards, not the copies that a forward leaves."""
    for module in sharded_modules(model):
        cast("Any", module).reshard()


def is_first() -> bool:
    """Return whether this process is the one that writes and prints: the only one, or that of rank 0."""
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _alone() -> bool:
    """Whether there is no other process."""
    started = distributed.is_available() and distributed.is_initialized()
    return not started or distributed.get_world_size() == 1


def from_first(compute: Callable[[], float]) -> float:
    """Return what the first process computes, on every process, so that none goes a way of its own.

    Raises:
        EtpError: as the first process raised it.
    """
    if _alone():
        return compute()
    answer: list[float | tuple[type[EtpError], str, str, str]] = [0.0]
    if is_first():
        try:
            answer = [compute()]
        except EtpError as error:
            answer = [(type(error), error.message, error.where, error.hint)]
    distributed.broadcast_object_list(answer)
    if isinstance(answer[0], tuple):
        kind, message, where, hint = answer[0]
        raise kind(message, where=where, hint=hint)
    return answer[0]


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of what all processes have, on the CPU; the tensor itself where there is one alone."""
    if _alone():
        return tensor
    parts: list[Tensor | None] = [None for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, tensor)
    return torch.stack([part for part in parts if part is not None]).sum(0)


def _local(tensor: Tensor) -> Tensor:
    return cast("Any", tensor).to_local() if is_sharded(tensor) else tensor


def _split_over(weight: Tensor) -> tuple[int, ...]:
    """Return the axes of the mesh over which a parameter is cut."""
    if not is_sharded(weight):
        return ()
    placements = cast("Any", weight).placements
    return tuple(axis for axis, placement in enumerate(placements) if not placement.is_replicate())


def _starts(weight: Tensor, mesh: Any) -> tuple[int, ...]:
    """Return the first index along each axis of what this process holds: axes are cut as `torch.chunk` does."""
    starts = [0] * weight.ndim
    for axis in _split_over(weight):
        cut = cast("Any", weight).placements[axis].dim
        chunk = -(-weight.shape[cut] // mesh.size(axis))
        starts[cut] = min(mesh.get_local_rank(axis) * chunk, weight.shape[cut])
    return tuple(starts)


def _check(model: nn.Module, weights: Sequence[Tensor]) -> None:
    """Refuse what is not one plain cut along an axis for each axis of one mesh.

    Raises:
        UsageError: it is something else.
    """
    where, hint = type(model).__name__, "shard with fully_shard on one mesh"
    if any(cast("Any", weight).device_mesh != cast("Any", weights[0]).device_mesh for weight in weights):
        raise UsageError("its parameters are sharded over several meshes", where=where, hint=hint)
    for weight in weights:
        placements = cast("Any", weight).placements
        cuts = [placements[axis] for axis in _split_over(weight)]
        plain = all(type(cut).__name__ == "Shard" for cut in cuts)
        if not plain or len({cut.dim for cut in cuts}) < len(cuts):
            raise UsageError(f"a parameter is sharded as {placements}", where=where, hint=hint)
