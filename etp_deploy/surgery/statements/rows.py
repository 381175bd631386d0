"""Rows of constants: along axes that a contraction passes over, each index holds constants of its own."""

from __future__ import annotations

import numpy as np


def distinct(known: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first of all rows that are the same, and for each row which of these it is.

    Args:
        known: where entries are known, the rows along the first dimension.
        value: what they hold, 0 where not known.
    """
    seen: dict[bytes, int] = {}
    which = [
        seen.setdefault(one.tobytes() + other.tobytes(), row)
        for row, (one, other) in enumerate(zip(known, value, strict=True))
    ]
    return np.unique(which, return_inverse=True)


def shared(known: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which entries are known and the same in all rows, and their values, 0 for the others."""
    alike = known.all(axis=0) & (value.min(axis=0) == value.max(axis=0))
    return alike, np.where(alike, value[0], 0.0)
