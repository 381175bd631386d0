"""Normalisations: channels that are divided by a norm over all of them, or centred and scaled together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import axis_size, frame_dims, has_labels, single_label
from etp_deploy.surgery.state import Cause, ConflictError, coordinates
from etp_deploy.surgery.statements.base import Edit, SetAttribute, SetInput, SliceInput, array_of
from etp_deploy.surgery.statements.pointwise import Pointwise
from etp_deploy.surgery.statements.slicing import cut

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import onnx_ir as ir

    from etp_deploy.surgery.shapes import Structure
    from etp_deploy.surgery.state import State
    from etp_deploy.surgery.statements.mapped import AxisMap

SCALE = 1


class Normed(Pointwise):
    """`y[..., c] = x[..., c] / norm of x[..., :]`, the norm being one that zeros do not change.

    The root of a mean of squares changes with the number of channels, and is kept as it is: of D channels let D'
    stay, and let the others hold constants a. Then `mean(x ** 2) + epsilon` over D is D' / D times
    `mean(x' ** 2) + (epsilon * D + sum(a ** 2)) / D'` over D', so that the scale takes sqrt(D / D') and epsilon
    the rest.

    Args:
        node: the node.
        axis: the axis of the norm.
        maps: as for `Pointwise`.
        epsilon: what is added to the mean of squares; None where the norm is a sum (Lp).
    """

    def __init__(
        self, node: ir.Node, axis: int, maps: Mapping[int, AxisMap], epsilon: float | None = None
    ) -> None:
        super().__init__(node, maps, constants="none")
        self.axis = axis
        self.epsilon = epsilon
        self.data = self._value(0)
        self.dims: tuple[int, ...] = ()

    def structure(self, state: State) -> None:
        """Remember which dimensions of the data's frame the norm is taken over."""
        super().structure(state)
        structure = state.structure(self.data)
        if structure is not None and self.links and has_labels(structure[self.axis]):
            self.dims = tuple(frame_dims(structure, self.axis))

    def constants(self, state: State) -> None:
        """Zero where the data or the scale is; zeros alone need an epsilon, or a norm that knows of zeros."""
        structure = state.structure(self.out)
        if structure is None or not self.links or self.epsilon == 0.0:
            return
        parts = [self.operand(state, index, structure) for index in self.maps]
        zero = np.logical_or.reduce(np.broadcast_arrays(*(known & (value == 0) for known, value in parts)))
        state.set_constant(self.out, zero, np.zeros((), parts[0][1].dtype))

    def _may_go(self, state: State) -> np.ndarray:
        """Return which channels of the data can be done without: zeros, or what epsilon can stand for."""
        constant = state.constant(self.data)
        if constant is None:
            return np.zeros((), bool)
        absorbed = self.epsilon is not None and self._one_norm(state)
        return np.asarray(constant.known if absorbed else constant.zero)

    def _one_norm(self, state: State) -> bool:
        """Return whether there are no other channels (heads) with norms of their own, which share the epsilon."""
        shape = state.mask(self.data).shape
        return all(extent == 1 or dim in self.dims for dim, extent in enumerate(shape))

    def spread(self, state: State) -> None:
        """A kept channel keeps all that is in its norm."""
        super().spread(state)
        if not self.dims:
            return
        kept = self._from_out(state.mask(self.out), 0, state.mask(self.data).ndim)
        wanted = kept.any(axis=self.dims, keepdims=True) & ~self._may_go(state)
        state.grow(self.data, wanted, Cause("in the norm of what stays at", self.node, self.out))

    def edits(self, state: State) -> Iterator[Edit]:
        """A mean over fewer channels is larger: scale and epsilon make up for it."""
        cuts = list(super().edits(state))
        layout, mask = state.layouts[self.data], state.mask(self.data)
        if self.epsilon is None or not self.dims or mask.all():
            yield from cuts
            return
        kept = float(np.prod([layout.shape[dim] for dim in self.dims]))
        total = float(np.prod([mask.shape[dim] for dim in self.dims]))
        if kept == total:
            yield from cuts
            return
        scale = array_of(self._value(SCALE))
        assert scale is not None
        for edit in cuts:
            scale = cut(scale, edit)
        yield SetInput(SCALE, (scale.astype(np.float64) * np.sqrt(total / kept)).astype(scale.dtype))
        constant = state.constant(self.data)
        squares = 0.0
        if constant is not None and self._one_norm(state):
            gone = np.where(constant.known & ~mask, constant.value, 0)
            squares = float(np.sum(gone.astype(np.float64) ** 2))
        yield SetAttribute("epsilon", (self.epsilon * total + squares) / kept)


class Centred(Pointwise):
    """`y = (x - mean) / deviation * scale + bias`, mean and deviation over some axes: what is in one mean stays whole.

    Args:
        node: the node.
        maps: as for `Pointwise`.
        over: the axes of the mean.
        groups: how many groups the channels of axis 1 are in, each with a mean of its own; None where they are
            not in groups.
        by_group: the inputs that hold one entry for each group.
        affine: the inputs of scale and bias, where there are any.
        epsilon: what is added to the variance.
    """

    def __init__(
        self,
        node: ir.Node,
        maps: Mapping[int, AxisMap],
        *,
        over: tuple[int, ...],
        groups: int | None = None,
        by_group: tuple[int, ...] = (),
        affine: tuple[int, int] | None = None,
        epsilon: float,
    ) -> None:
        super().__init__(node, maps, constants="none")
        self.data = self._value(0)
        self.over = over
        self.groups = groups
        self.by_group = by_group
        self.affine = affine
        self.epsilon = epsilon
        self.dims: tuple[int, ...] = ()
        self.channels: int | None = None

    # structure

    def structure(self, state: State) -> None:
        """Remember the dimensions of the means, and of the groups' channels."""
        super().structure(state)
        structure = state.structure(self.data)
        if structure is None or not self.links:
            return
        self.dims = tuple(dim for axis in self.over for dim in frame_dims(structure, axis))
        if self.groups is None or not has_labels(structure[1]):
            return
        if single_label(structure[1]) and axis_size(structure[1]).coefficient % self.groups == 0:
            self.channels = frame_dims(structure, 1)[0]
        else:
            state.pin(self.data, 1, "groups of channels that are merged with another axis", self.node)

    def _rows(self, array: np.ndarray, reduce: np.ufunc) -> np.ndarray:
        """Reduce an array over the data's frame over each mean, at full size again."""
        result = np.asarray(reduce.reduce(array, axis=self.dims, keepdims=True)) if self.dims else array
        if self.channels is not None and self.groups is not None:
            shape = list(result.shape)
            shape[self.channels : self.channels + 1] = [self.groups, -1]
            grouped = reduce.reduce(result.reshape(shape), axis=self.channels + 1, keepdims=True)
            result = np.broadcast_to(grouped, result.reshape(shape).shape).reshape(result.shape)
        return np.asarray(np.broadcast_to(result, array.shape))

    # constants

    def constants(self, state: State) -> None:
        """Where all that is in one mean is zero, or where the scale is, the bias comes out.

        Other constants do not: ONNX Runtime's mean of equal numbers is not that number, and dividing what is left
        by the root of epsilon makes it large.
        """
        structure = state.structure(self.out)
        if structure is None or not self.links or self.epsilon <= 0.0:
            return
        constant = state.constant(self.data)
        dims = len(state.mask(self.out).shape)
        zero = np.zeros((1,) * dims, bool)
        if constant is not None:
            zero = self._to_out(self._rows(constant.zero, np.logical_and), 0, dims, np.logical_and)
        known, value = np.ones((), bool), np.zeros((), np.float32)
        if self.affine is not None:
            scale_known, scale = self._of_channels(state, self.affine[0], structure)
            known, value = self._of_channels(state, self.affine[1], structure)
            zero = zero | (scale_known & (scale == 0))
        state.set_constant(self.out, zero & known, value)

    def _of_channels(self, state: State, index: int, structure: Structure) -> tuple[np.ndarray, np.ndarray]:
        """Return where the scale or the bias is known and its entries, in the output's dimensions."""
        if index not in self.by_group:
            return self.operand(state, index, structure)
        array = array_of(self.node.inputs[index])
        size = axis_size(structure[1]).static
        shape = [1] * len(state.mask(self.out).shape)
        if array is None or size is None or self.channels is None:
            return np.zeros(shape, bool), np.zeros(shape, np.float32)
        shape[frame_dims(structure, 1)[0]] = size
        return np.ones((), bool), np.repeat(array, size // array.size).reshape(shape)

    # masks

    def spread(self, state: State) -> None:
        """What is in one mean stays whole."""
        super().spread(state)
        if not self.dims and self.channels is None:
            return
        kept = np.broadcast_to(
            self._from_out(state.mask(self.out), 0, state.mask(self.data).ndim), state.mask(self.data).shape
        )
        cause = Cause("in one mean and variance with what stays at", self.node, self.out)
        state.grow(self.data, self._rows(kept, np.logical_or), cause)

    # layout

    def layout(self, state: State) -> None:
        """Groups stand one after the other, each in one piece."""
        super().layout(state)
        if self.channels is not None:
            self._group_order(state)

    def _group_order(self, state: State) -> np.ndarray:
        """Return the groups that stay, in the order in which they stand."""
        assert self.channels is not None
        assert self.groups is not None
        shape = state.mask(self.data).shape
        own = coordinates(state.layouts[self.data], shape)[self.channels]
        others = tuple(dim for dim in range(own.ndim) if dim != self.channels)
        low, high = own.min(axis=others), own.max(axis=others)
        width = shape[self.channels] // self.groups
        if not np.array_equal(low, high) or low.size % width:
            raise ConflictError([self.data, self.out])
        rows = low.reshape(-1, width) // width
        if (rows != rows[:, :1]).any():
            raise ConflictError([self.data, self.out])
        return np.asarray(rows[:, 0])

    # edits

    def edits(self, state: State) -> Iterator[Edit]:
        """Fix the number of groups, and cut what holds an entry for each."""
        yield from super().edits(state)
        if self.channels is None:
            return
        order = self._group_order(state)
        if not np.array_equal(order, np.arange(self.groups or 0)):
            yield SetAttribute("num_groups", len(order))
            yield from (SliceInput(index, ((0, order),)) for index in self.by_group)
