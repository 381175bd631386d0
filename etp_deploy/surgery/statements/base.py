"""The interface between an operator's statement and the stages of the surgery."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from etp_deploy.surgery.shapes import ONE, Size, Structure, axis_size, frame, frame_dims, is_parameter, plain
from etp_deploy.tensors import unshared

if TYPE_CHECKING:
    from collections.abc import Iterator

    import onnx_ir as ir

    from etp_deploy.surgery.state import State


@dataclass(frozen=True)
class SetInput:
    """Replace a node's initializer input by another array."""

    index: int
    array: np.ndarray


@dataclass(frozen=True)
class SliceInput:
    """Cut a node's initializer input: along each axis named, take these indices in this order."""

    index: int
    takes: tuple[tuple[int, np.ndarray], ...]


@dataclass(frozen=True)
class PickInput:
    """Leave an initializer whole for its other readers; this one takes these indices along each axis named."""

    index: int
    takes: tuple[tuple[int, np.ndarray], ...]


@dataclass(frozen=True)
class GatherInput:
    """Cut an initializer input whose axes cannot be cut one by one: `array.reshape(split)[indices].reshape(merged)`."""

    index: int
    split: tuple[int, ...]
    indices: tuple[np.ndarray, ...]
    merged: tuple[int, ...]


@dataclass(frozen=True)
class TakeEntries:
    """Take these entries of an initializer input (flat, in the new shape), and add to them.

    Attributes:
        index: the input.
        positions: which entries.
        added: what to add to them, None for nothing.
        slack: how much of a difference rounding makes to what is added.
    """

    index: int
    positions: np.ndarray
    added: np.ndarray | None = None
    slack: np.ndarray | None = None


@dataclass(frozen=True)
class SetAttribute:
    """Set an integer, float or integer-list attribute of a node; None removes it."""

    name: str
    value: int | float | tuple[int, ...] | None


@dataclass(frozen=True)
class SetShape:
    """Rewrite the entries of a target shape whose axes changed.

    Attributes:
        index: the input that holds it.
        sizes: each axis's new size, and the one before.
        copied: the axes that have the new size of the data's axis at the same place, which a Reshape's 0 copies.
    """

    index: int
    sizes: tuple[tuple[Size, Size], ...]
    copied: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SetSlice:
    """Set a Slice's bounds along one axis."""

    axis: int
    start: int
    stop: int
    step: int


@dataclass(frozen=True)
class AddVector:
    """Add a constant vector along an axis of a node's output."""

    axis: int
    vector: np.ndarray


@dataclass(frozen=True)
class Affine:
    """Multiply a node's output by a number and add an array (one entry for each kept channel)."""

    scale: float
    offset: np.ndarray | None


@dataclass(frozen=True)
class FreeShape:
    """Forget the shape that an input or output of a body declares."""

    value: ir.Value


@dataclass(frozen=True)
class Bypass:
    """Leave a node out: its output is its first input, entry by entry."""


Edit = (
    SetInput
    | SliceInput
    | PickInput
    | GatherInput
    | TakeEntries
    | SetAttribute
    | SetShape
    | SetSlice
    | AddVector
    | Affine
    | FreeShape
    | Bypass
)


class Statement:
    """How one node relates the channels of its inputs and outputs.

    The stages call the methods in this order: `structure` and `constants` once, walking forward; `spread` and
    `repair` until nothing grows; `layout` walking forward; `edits` at the end. Of a node with bodies, `enter`
    comes before the walk through them, which is repeated until `holds`, and `enter_layout` before their layout.
    """

    def __init__(self, node: ir.Node) -> None:
        self.node = node

    def enter(self, state: State) -> None:
        """Say what is known of the inputs of the node's bodies."""

    def holds(self, state: State) -> bool:
        """Say whether the bodies keep to what `enter` said, which says less the next time if not."""
        del state
        return True

    def structure(self, state: State) -> None:
        """Say which axes of the outputs are labelled, and pin what this node cannot let go."""
        raise NotImplementedError

    def constants(self, state: State) -> None:
        """Say which channels of the outputs are known constants."""

    def rewind(self, *, read: bool = True) -> None:
        """Forget what the masks and constants of an earlier fixpoint taught.

        Args:
            read: False makes all constant weights count as zero from now on, so that kept positions are carried
                only where channels are the same on both sides.
        """

    def spread(self, state: State) -> None:
        """Carry kept positions across the node, both ways."""

    def repair(self, state: State) -> bool:
        """Keep what a valid tensor needs beyond liveness (equal counts); say whether anything grew."""
        del state
        return False

    def enter_layout(self, state: State) -> None:
        """Say in which order the kept positions stand in the inputs of the node's bodies."""

    def layout(self, state: State) -> None:
        """Say in which order the kept positions stand in the outputs.

        Raises:
            ConflictError: where inputs that must line up do not.
        """
        for value in self.node.outputs:
            default_layout(state, value)

    def check(self, state: State) -> None:
        """Raise a conflict where the rewritten node could not express what its outputs' layouts say.

        Raises:
            ConflictError: with the tensors concerned.
        """

    def edits(self, state: State) -> Iterator[Edit]:
        """Yield what the rewrite must change at this node."""
        del state
        yield from ()


def floating(dtype: np.dtype) -> bool:
    """Return whether numbers of a type are floating-point ones (bfloat16 is none of numpy's own)."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def default_layout(state: State, value: ir.Value) -> None:
    """Lay out a tensor of which all stays."""
    structure = state.structure(value)
    shape = frame(structure) if structure is not None else ()
    state.layouts[value] = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)


def opset_of(node: ir.Node) -> int:
    """Return the version of the default operator set that a node is read under."""
    return 1 if node.graph is None else int(node.graph.opset_imports.get("", 1))


# from this operator set on, a softmax runs along one axis, the last unless it says otherwise
_SOFTMAX_OF_ONE_AXIS = 13


def softmax_axis(node: ir.Node, rank: int) -> int | None:
    """Return the one axis along which a Softmax (or LogSoftmax, Hardmax) runs; None where it runs over several.

    Before opset 13 it ran over all axes from the one it names, which is the second by default.
    """
    single = opset_of(node) >= _SOFTMAX_OF_ONE_AXIS
    axis = node.attributes.get_int("axis", -1 if single else 1)
    axis = axis + rank if axis < 0 else axis
    return axis if single or axis == rank - 1 else None


def set_plain(state: State, value: ir.Value) -> None:
    """Give an output the structure in which nothing can be removed."""
    state.set_structure(value, None if value.shape is None else plain(value.shape))


def array_of(value: ir.Value | None) -> np.ndarray | None:
    """Return an initializer's array, or None for any other tensor.

    External data is mapped anew at each call and unmapped with the array: hold on to none, and memory follows the
    largest tensor, not the model.
    """
    if value is None or not is_parameter(value) or value.const_value is None:
        return None
    return unshared(value.const_value).numpy()


def writable(target: ir.Value | None) -> bool:
    """Return whether the entries of a target shape can be changed one by one."""
    producer = None if target is None else target.producer()
    return array_of(target) is not None or (producer is not None and producer.op_type == "Concat")


def new_sizes(structure: Structure, reduced: tuple[int, ...]) -> tuple[tuple[Size, Size], ...]:
    """Return each axis's size after the removal, and before."""
    sizes = []
    for axis, factors in enumerate(structure):
        size = ONE
        for factor, dim in zip(factors, frame_dims(structure, axis), strict=True):
            size = size * (Size(reduced[dim]) if factor.labelled else factor.size)
        sizes.append((size, axis_size(factors)))
    return tuple(sizes)


def new_target(literal: np.ndarray, edit: SetShape) -> np.ndarray | None:
    """Return a constant target with the changed entries replaced; None where it would need two that are open."""
    values = [int(entry) for entry in literal]
    for position, (size, old) in enumerate(edit.sizes):
        if values[position] == -1 or (values[position] != 0 and size == old):
            continue
        # an entry of 0 copies the input's size, which may have changed although the output's did not
        if size.static is not None:
            values[position] = size.coefficient
        elif values[position] == 0 and position in edit.copied:
            continue
        elif -1 not in values:
            values[position] = -1
        else:
            return None
    return np.array(values, np.int64)


def cut_size(edit: Edit, value: ir.Value) -> tuple[int, bytes]:
    """Return how many elements an edit leaves of an initializer, and a digest of which they are."""
    assert value.const_value is not None
    match edit:
        case SetInput(_, array):
            content = f"{array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes()
            return array.size, hashlib.sha256(content).digest()
        case SliceInput(_, takes):
            size = int(value.const_value.size)
            for axis, line in takes:
                size = size // value.const_value.shape.numpy()[axis] * line.size
            return size, b"".join(bytes([axis]) + line.tobytes() for axis, line in takes)
        case GatherInput(_, _, indices, merged):
            return int(np.prod(merged)), b"".join(index.tobytes() for index in indices)
        case TakeEntries(_, positions, added, _):
            content = positions.tobytes() + (b"" if added is None else added.tobytes())
            return positions.size, hashlib.sha256(content).digest()
        case _:
            return 0, b""


def taken(edit: Edit, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return which entries (flat, in the new shape) an edit leaves of an initializer; None where it sets others."""
    positions: np.ndarray
    match edit:
        case SliceInput(_, takes):
            positions = np.arange(int(np.prod(shape))).reshape(shape)
            for axis, line in takes:
                positions = np.take(positions, line, axis=axis)
            return positions
        case GatherInput(_, split, indices, merged):
            positions = np.arange(int(np.prod(shape))).reshape(split)[indices].reshape(merged)
            return positions
        case TakeEntries():
            return edit.positions
        case _:
            return None
