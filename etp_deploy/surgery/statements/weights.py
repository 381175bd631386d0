"""The weight of a contraction, whatever the operator's order of axes, and what it reads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from etp_deploy.surgery.shapes import Axis, has_labels


@dataclass(frozen=True)
class Weight:
    """Where a contraction finds its weight and what its axes mean.

    Attributes:
        index: the weight's input number.
        out: the axis of output channels.
        contracted: the axis of input channels (of each group).
        groups: how many groups there are.
        transposed: whether the groups lie along the input axis (ConvTranspose) instead of the output axis.
    """

    index: int
    out: int
    contracted: int
    groups: int = 1
    transposed: bool = False

    def grouped(self, array: np.ndarray) -> np.ndarray:
        """Bring a weight into (group, output of the group, input of the group, kernel...)."""
        if self.transposed:  # (group * input, output of the group, kernel...)
            split = array.reshape(self.groups, array.shape[0] // self.groups, *array.shape[1:])
            return np.swapaxes(split, 1, 2)
        moved = np.moveaxis(array, (self.out, self.contracted), (0, 1))
        return moved.reshape(self.groups, moved.shape[0] // self.groups, *moved.shape[1:])

    def ungrouped(self, grouped: np.ndarray) -> np.ndarray:
        """Bring it back into the operator's order."""
        if self.transposed:
            split = np.swapaxes(grouped, 1, 2)
            return np.ascontiguousarray(split.reshape(-1, *split.shape[2:]))
        moved = grouped.reshape(-1, *grouped.shape[2:])
        return np.ascontiguousarray(np.moveaxis(moved, (0, 1), (self.out, self.contracted)))

    def by_label(self, grouped: np.ndarray, axis: Axis) -> np.ndarray:
        """View a grouped weight as (group, output, labelled input position, all the rest in its own axes).

        Args:
            grouped: from `grouped`.
            axis: the contracted axis of the data, with one labelled factor.
        """
        if len(axis) == 1:
            return grouped
        sizes = [factor.size.coefficient for factor in axis]
        place = next(place for place, factor in enumerate(axis) if factor.labelled)
        split = grouped.reshape(*grouped.shape[:2], *sizes, *grouped.shape[3:])
        return np.moveaxis(split, place + 2, 2)

    def flattened(self, array: np.ndarray, axis: Axis) -> np.ndarray:
        """Return a weight as (group, output, labelled input position, all the rest).

        Args:
            array: the weight.
            axis: the contracted axis of the data; its unlabelled factors (space after a Flatten) go to the rest.
        """
        grouped = self.grouped(array)
        groups, outputs = grouped.shape[:2]
        sizes = [factor.size.static for factor in axis]
        known = [size for size in sizes if size is not None]
        if not has_labels(axis):
            return grouped.reshape(groups, outputs, 1, -1)
        if self.groups > 1 or len(known) < len(sizes):
            return grouped.reshape(groups, outputs, grouped.shape[2], -1)
        inner = int(np.prod(known))
        # of no channels there is nothing that a size could be told from
        split = grouped.reshape(
            groups, outputs, *known, math.prod(grouped.shape[2:]) // inner if inner else 1
        )
        order = [place + 2 for place, factor in enumerate(axis) if factor.labelled]
        rest = [place + 2 for place, factor in enumerate(axis) if not factor.labelled]
        labels = int(np.prod([factor.size.coefficient for factor in axis if factor.labelled]))
        turned = np.transpose(split, [0, 1, *order, *rest, split.ndim - 1])
        left = int(np.prod([split.shape[place] for place in (*rest, -1)]))
        return turned.reshape(groups, outputs, labels, left)


class Reads:
    """Which output channels read which input channels, a bit each: a quarter of a weight's bytes would be too many.

    Args:
        nonzero: where the weight is not zero, as (group, output of the group, input of the group).
    """

    def __init__(self, nonzero: np.ndarray) -> None:
        self.shape: tuple[int, int, int] = (nonzero.shape[0], nonzero.shape[1], nonzero.shape[2])
        # bits are packed along whichever axis lies closest in memory
        self._packed = 1 if 0 < nonzero.strides[1] < nonzero.strides[2] else 2
        self._bits = np.packbits(np.moveaxis(nonzero, self._packed, 2), axis=2)

    def inputs(self, outputs: np.ndarray) -> np.ndarray:
        """Return which inputs any of some outputs reads, as (group, input), from a mask (group, output)."""
        return self._met(outputs, along=1)

    def outputs(self, inputs: np.ndarray) -> np.ndarray:
        """Return which outputs read any of some inputs, as (group, output), from a mask (group, input)."""
        return self._met(inputs, along=2)

    def _met(self, mask: np.ndarray, along: int) -> np.ndarray:
        if along == self._packed:
            return np.asarray((self._bits & np.packbits(mask, axis=1)[:, None, :]).any(axis=2))
        if mask.shape[0] == 1:
            rows = np.bitwise_or.reduce(self._bits[0][mask[0]], axis=0)[None]
        else:
            rows = np.bitwise_or.reduce(np.where(mask[:, :, None], self._bits, 0), axis=1)
        return np.unpackbits(rows, axis=1, count=self.shape[self._packed]).view(bool)


def merged_places(axis: Axis, columns: np.ndarray) -> np.ndarray:
    """Return the places along a weight's input axis, which may be a product with space, of labelled positions.

    Args:
        axis: the contracted axis of the data, with one labelled factor.
        columns: the labelled positions to take, in order.
    """
    if len(axis) == 1:
        return columns
    sizes = [factor.size.coefficient for factor in axis]
    position = next(place for place, factor in enumerate(axis) if factor.labelled)
    places = np.arange(int(np.prod(sizes))).reshape(sizes)
    return np.take(places, columns, axis=position).reshape(-1)
