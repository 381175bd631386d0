"""Which edits change anything: a plan of cuts that take all there is, in the order in which it stands, is none.

Unless they meet: the rewrite makes one initializer of cuts that come out equal.
"""

from __future__ import annotations

from collections import defaultdict
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.statements.base import (
    FreeShape,
    GatherInput,
    PickInput,
    SetAttribute,
    SetInput,
    SetShape,
    SliceInput,
    TakeEntries,
    array_of,
    taken,
)
from etp_deploy.surgery.stored import stored
from etp_deploy.tensors import is_deferred

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

    from etp_deploy.surgery.statements.base import Edit


def moot(node: ir.Node, edit: Edit) -> bool:
    """Return whether an edit leaves its node as it is; what a body declares is given up for another's sake."""
    value = _input(node, edit)
    match edit:
        case SliceInput(_, takes) | PickInput(_, takes):
            return takes_all(value, takes)
        case SetInput(_, array):
            return holds(value, array)
        case GatherInput(merged=shape) | TakeEntries(positions=np.ndarray(shape=shape), added=None):
            return _moves_nothing(value, edit, shape)
        case SetShape(_, sizes):
            return all(size == old for size, old in sizes)
        case SetAttribute(name, wanted):
            there = node.attributes.get(name)
            return (None if there is None else _plain(there.value)) == _plain(wanted)
        case _:
            return isinstance(edit, FreeShape)


def joins(edits: Iterable[tuple[ir.Node, tuple[Edit, ...]]]) -> bool:
    """Return whether some edits, all of them moot, cut initializers that hold the same."""
    kinds: dict[tuple[object, ...], dict[bytes, ir.Value]] = defaultdict(dict)
    for node, changes in edits:
        for change in changes:
            value = _input(node, change)
            tensor = None if value is None else value.const_value
            if value is None or tensor is None or stored(value) is not None or is_deferred(tensor):
                continue
            kind = kinds[tensor.dtype, tuple(tensor.shape.numpy())]
            if kind.setdefault(sha256(tensor.tobytes()).digest(), value) is not value:
                return True
    return False


def _input(node: ir.Node, edit: Edit) -> ir.Value | None:
    """Return the input that an edit is about, None where it is about none or one that is not there."""
    index: int = getattr(edit, "index", len(node.inputs))
    return node.inputs[index] if index < len(node.inputs) else None


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list | tuple) else value


def takes_all(value: ir.Value | None, takes: tuple[tuple[int, np.ndarray], ...]) -> bool:
    """Return whether a cut takes all indices of an initializer in their order."""
    if value is None or value.const_value is None:
        return False
    shape = value.const_value.shape.numpy()
    return all(in_order(line, shape[axis]) for axis, line in takes)


def in_order(places: np.ndarray, count: int) -> bool:
    """Return whether places are those from 0 on, so many."""
    return places.size == count and np.array_equal(places.reshape(-1), np.arange(count))


def holds(value: ir.Value | None, array: np.ndarray) -> bool:
    """Return whether an initializer holds exactly an array, bit by bit."""
    old = array_of(value)
    return (
        old is not None
        and old.dtype == array.dtype
        and old.shape == array.shape
        and np.ascontiguousarray(old).tobytes() == np.ascontiguousarray(array).tobytes()
    )


def _moves_nothing(value: ir.Value | None, edit: Edit, shape: tuple[int, ...]) -> bool:
    old = array_of(value)
    if old is None or old.shape != tuple(shape):
        return False
    positions = taken(edit, old.shape)
    return positions is not None and in_order(positions, old.size)
