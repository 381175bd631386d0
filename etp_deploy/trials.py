"""What two models are run on to compare them: drawn for several seeds and sizes, or given and varied."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from etp_deploy.inputs import draw_inputs, dynamic_dims, given_inputs, resolve_dims

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from etp_deploy.inputs import InputSpec


@dataclasses.dataclass(frozen=True)
class Trial:
    """One set of inputs.

    Args:
        dims: the size of each dynamic dimension, by name; of given arrays, what sets them apart.
        seed: of the random numbers; None where nothing is drawn.
        given: arrays by input name; None where they are drawn.
    """

    dims: dict[str, int]
    seed: int | None = None
    given: dict[str, np.ndarray] | None = None

    def feeds(self, specs: Sequence[InputSpec]) -> dict[str, np.ndarray]:
        """Return an array for each input."""
        if self.given is not None:
            return self.given
        return draw_inputs(specs, seed=self.seed or 0, dims=self.dims)


def plan_trials(
    specs: Sequence[InputSpec],
    *,
    samples: int,
    seed: int,
    dims: Mapping[str, int] | None = None,
    start: Mapping[str, int] | None = None,
) -> tuple[Trial, ...]:
    """Choose seeds and sizes: `samples` at the default sizes, then one for each other choice of sizes.

    The others are a larger batch, and, with a batch of 2, every other dimension shorter (odd) and longer than
    its default.

    Args:
        specs: the inputs.
        samples: how many trials at the default sizes.
        seed: of the first trial; the others count up.
        dims: sizes that stay as they are in every trial.
        start: default sizes other than those that suit any model.

    Raises:
        UsageError: when `dims` names no dynamic dimension.
    """
    default = resolve_dims(specs, dims={**(start or {}), **(dims or {})})
    pinned = _pinned(specs, dims or {})
    batch = {
        name for name in dynamic_dims(specs) if any(spec.shape[:1] == (name,) for spec in specs)
    } - pinned
    others = set(default) - batch - pinned
    choices = [default]
    if batch:
        choices.append({name: 3 if name in batch else size for name, size in default.items()})
    if others:
        for scale in (_shorter, _longer):
            sizes = {name: scale(size) if name in others else size for name, size in default.items()}
            choices.append({name: 2 if name in batch else size for name, size in sizes.items()})
    first = [Trial(default, seed + i) for i in range(samples)]
    return (*first, *(Trial(sizes, seed + samples + i) for i, sizes in enumerate(choices[1:])))


def _shorter(size: int) -> int:
    """Return an odd sequence length, or three quarters of a spatial size, which keeps factors of two."""
    return size * 3 // 4 if size % 32 == 0 else max(1, size // 2 - 1)


def _longer(size: int) -> int:
    return size * 3 // 2 if size % 32 == 0 else size * 2


def _pinned(specs: Sequence[InputSpec], dims: Mapping[str, int]) -> set[str]:
    """Return the names of the dimensions whose size the caller fixed."""
    places = {f"{spec.name}.{axis}": dim for spec in specs for axis, dim in enumerate(spec.shape)}
    return {str(places.get(name, name)) for name in dims}


def given_trials(
    specs: Sequence[InputSpec], given: Mapping[str, np.ndarray], *, samples: int
) -> tuple[Trial, ...]:
    """Vary given arrays as far as their meaning allows: all at once, then along a dynamic batch.

    Args:
        specs: the inputs.
        given: an array for each.
        samples: how many samples of the batch run alone besides; where there is one, it runs twice over.

    Raises:
        UsageError: when an array is missing or does not fit.
    """
    arrays = given_inputs(specs, given)
    whole = Trial(_sizes(specs, arrays), given=arrays)
    batch = _batch_name(specs)
    size = whole.dims.get(batch, 0)
    if not size:
        return (whole,)
    picked = [[0, 0]] if size == 1 else [[place] for place in range(min(size, samples))]
    return (
        whole,
        *(Trial({**whole.dims, batch: len(at)}, given=_taken(specs, arrays, batch, at)) for at in picked),
    )


def _sizes(specs: Sequence[InputSpec], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return the size that each named dimension has in the arrays."""
    return {
        dim: size
        for spec in specs
        for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


def _batch_name(specs: Sequence[InputSpec]) -> str:
    """Return the one name of a first axis, which no other size depends on; empty where there is none."""
    firsts = {spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], str)}
    if len(firsts) != 1:
        return ""
    (name,) = (str(first) for first in firsts)
    dims = {dim for spec in specs for dim in spec.shape if isinstance(dim, str) and dim != name}
    return "" if any(name in re.split(r"\W+", dim) for dim in dims) else name


def _taken(
    specs: Sequence[InputSpec], arrays: Mapping[str, np.ndarray], batch: str, places: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return the arrays of some samples: whatever axis the batch is."""
    taken = {}
    for spec in specs:
        array = arrays[spec.name]
        for axis, dim in enumerate(spec.shape):
            if dim == batch:
                array = array.take(places, axis)
        taken[spec.name] = array
    return taken
