"""What rules read from a node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from etp_deploy.surgery.rules.registry import RefusedError
from etp_deploy.surgery.statements.base import array_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from etp_deploy.surgery.statements.mapped import AxisMap


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return an attribute's value, or the default that the operator's definition gives."""
    found = node.attributes.get(name)
    return default if found is None or found.value is None else found.value


def rank(value: ir.Value | None) -> int:
    """Return a tensor's rank.

    Raises:
        RefusedError: where it is not known.
    """
    if value is None or value.shape is None:
        raise RefusedError("shapes are not known here")
    return len(value.shape)


def static(value: ir.Value | None, axis: int) -> int:
    """Return the number of indices along an axis.

    Raises:
        RefusedError: where it is not known before the model runs.
    """
    rank(value)
    assert value is not None
    assert value.shape is not None
    dim = value.shape[axis]
    if not isinstance(dim, int):
        raise RefusedError("the size of an axis is not known before the model runs")
    return dim


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, or None where the node has fewer or omits it."""
    return node.inputs[index] if index < len(node.inputs) else None


def constant_at(node: ir.Node, index: int, what: str) -> np.ndarray:
    """Return the array of an input that must be an initializer.

    Raises:
        RefusedError: where it is computed.
    """
    array = array_of(input_at(node, index))
    if array is None:
        raise RefusedError(f"{what} computed while the model runs")
    return array


def normal_axis(axis: int, of_rank: int) -> int:
    """Return an axis counted from the front."""
    return axis + of_rank if axis < 0 else axis


def broadcast_maps(node: ir.Node) -> dict[int, AxisMap]:
    """Return numpy's alignment of all inputs' axes with the output's."""
    out = rank(node.outputs[0])
    maps: dict[int, AxisMap] = {}
    for index, value in enumerate(node.inputs):
        if value is not None:
            own = rank(value)
            maps[index] = tuple(range(out - own, out))
    return maps


def same_axes(count: int, *without: int) -> AxisMap:
    """Return the map of a tensor whose axes are the output's, except some that are read whole."""
    return tuple(None if axis in without else axis for axis in range(count))
