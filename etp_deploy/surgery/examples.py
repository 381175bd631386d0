"""Examples that rules carry: one node each, as a document for readers and as a case for the generic properties."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

EXAMPLE_OPSET = 22


@dataclass(frozen=True)
class Operand:
    """One input of an example's node.

    Attributes:
        role: "computed" (a tensor whose channels may be dead), "weight" (a float initializer, drawn at random),
            "indices" (a computed integer tensor, drawn at random) or "literal" (an initializer given entry by entry).
        shape: its shape.
        dtype: its numpy data type.
        array: a literal's entries.
        below: what indices are drawn below.
        copied: whether indices are copied for each channel, so that their channels go where the data's go.
    """

    role: Literal["computed", "weight", "indices", "literal"]
    shape: tuple[int, ...]
    dtype: str = "float32"
    array: tuple[Any, ...] = ()
    below: int = 0
    copied: bool = False


@dataclass(frozen=True)
class Example:
    """A node of the rule's operator.

    Attributes:
        operands: its inputs in order, None for an omitted one.
        attributes: its attributes; a numpy array stands for a tensor.
        outputs: how many outputs it has.
        operator: which of the rule's operators it is for; None for each of them.
        opset: the version of the default operator set.
        removable: whether some channel of some operand or output can be removed; a rule that only says why
            nothing can go carries an example with False.
    """

    operands: tuple[Operand | None, ...]
    attributes: dict[str, Any]
    outputs: int = 1
    operator: str | None = None
    opset: int = EXAMPLE_OPSET
    removable: bool = True


def computed(*shape: int, dtype: str = "float32") -> Operand:
    """Return an operand that other nodes compute."""
    return Operand("computed", shape, dtype)


def weight(*shape: int, dtype: str = "float32") -> Operand:
    """Return an initializer of random numbers; the properties plant zeros in it."""
    return Operand("weight", shape, dtype)


def indices(*shape: int, below: int, dtype: str = "int64", copied: bool = False) -> Operand:
    """Return a computed tensor of integers from 0 up to a bound; on request with channels that can be removed."""
    return Operand("indices", shape, dtype, below=below, copied=copied)


def literal(array: Any, dtype: str = "int64") -> Operand:
    """Return an initializer with given entries (axes, sizes, bounds; statistics that must be positive)."""
    given = np.asarray(array, dtype)
    return Operand("literal", given.shape, dtype, tuple(given.reshape(-1).tolist()))


def example(
    *operands: Operand | None,
    outputs: int = 1,
    operator: str | None = None,
    opset: int = EXAMPLE_OPSET,
    removable: bool = True,
    **attributes: Any,
) -> Example:
    """Return an example; what is not named above is an attribute of the node."""
    return Example(operands, attributes, outputs, operator, opset, removable)
