"""Cutting initializers by the order in which channels stand in a tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import Structure, frame_dims, single_label
from etp_deploy.surgery.statements.base import Edit, GatherInput, SliceInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def take_channels(
    index: int,
    structure: Structure,
    coords: Mapping[int, np.ndarray],
    links: Sequence[tuple[int, int]],
) -> Iterator[Edit]:
    """Yield the edit that cuts one initializer.

    Args:
        index: which input of the node it is.
        structure: its structure, the labelled axes being those to cut.
        coords: for each labelled dimension of its frame, the index wanted at each place of the reduced tensor.
        links: pairs of the initializer's frame dimension and the reduced tensor's.
    """
    to_own = dict(links)
    separable: list[tuple[int, np.ndarray]] = []
    for axis in range(len(structure)):
        dims = [dim for dim in frame_dims(structure, axis) if dim in coords]
        if not dims:
            continue
        if not single_label(structure[axis]):
            separable = []
            break
        line = _line(coords[dims[0]], to_own[dims[0]])
        if line is None:
            separable = []
            break
        separable.append((axis, line))
    if separable:
        yield SliceInput(index, tuple(separable))
        return
    yield GatherInput(index, *_open_indices(structure, coords, to_own))


def _line(coordinate: np.ndarray, dim: int) -> np.ndarray | None:
    """Return a coordinate as a vector if it varies along one dimension only."""
    others = tuple(other for other in range(coordinate.ndim) if other != dim)
    low, high = coordinate.min(axis=others), coordinate.max(axis=others)
    return low if np.array_equal(low, high) else None


def _open_indices(
    structure: Structure, coords: Mapping[int, np.ndarray], to_own: Mapping[int, int]
) -> tuple[tuple[int, ...], tuple[np.ndarray, ...], tuple[int, ...]]:
    """Return the shape to split into, one index array a dimension, and the shape to merge into."""
    split = tuple(factor.size.coefficient for axis in structure for factor in axis)
    rank = len(split)
    places = {to_own[dim]: dim for dim in coords}
    indices: list[np.ndarray] = []
    for dim in range(rank):
        if dim not in coords:
            indices.append(np.arange(split[dim]).reshape([-1 if d == dim else 1 for d in range(rank)]))
            continue
        coordinate = coords[dim]
        others = tuple(other for other in range(coordinate.ndim) if other not in places)
        reduced = coordinate.min(axis=others, keepdims=True)
        shape = [1] * rank
        kept = sorted(places)
        for place in kept:
            shape[places[place]] = reduced.shape[place]
        squeezed = reduced.reshape([reduced.shape[place] for place in kept])
        indices.append(np.transpose(squeezed, np.argsort([places[place] for place in kept])).reshape(shape))
    full = np.broadcast_shapes(*(item.shape for item in indices))
    merged, position = [], 0
    for axis in structure:
        merged.append(int(np.prod(full[position : position + len(axis)], dtype=np.int64)))
        position += len(axis)
    return split, tuple(indices), tuple(merged)


def cut(array: np.ndarray, edit: Edit) -> np.ndarray:
    """Return what an edit leaves of an initializer.

    Args:
        array: the initializer.
        edit: a cut of it, as `take_channels` yields them.
    """
    match edit:
        case SliceInput(_, takes):
            for axis, line in takes:
                array = np.take(array, line, axis=axis)
            return array
        case GatherInput(_, split, indices, merged):
            return np.asarray(array.reshape(split)[indices].reshape(merged))
        case _:
            raise TypeError(f"no cut: {type(edit).__name__}")
