"""Two arrays that should be equal: how far apart they are, and whether that is more than rounding.

An error counts relative to the *scale* of the reference: its largest finite magnitude, as rounding errors of
sums are relative to the largest terms and not to each result. Fill values that stand apart (attention masks
of -1e9) would make that scale meaningless: they are left out of it and compared each relative to itself.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

RTOL = 1e-5
ATOL = 1e-9
# Fill values: at least this large, and this many times larger than everything below them.
_FILL = 1e4
_FILL_GAP = 1e4
# Of formats with fewer bits, the tolerance is this many units of their last place.
_EPSILONS = 4.0


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far an array is from its reference.

    Args:
        max_abs: largest absolute difference; infinite where the arrays cannot be compared.
        max_rel: largest difference relative to the scale; 0 where nothing differs.
        reason: why it is more than the tolerance allows; empty when it is not.
    """

    max_abs: float
    max_rel: float
    reason: str


def format_rtol(dtype: Any) -> float:
    """Return the relative tolerance that a floating-point format's own rounding calls for.

    Args:
        dtype: a numpy or ml_dtypes type; anything but a narrow floating-point type gives `RTOL`.
    """
    kind = np.dtype(dtype)
    if kind.kind in "fV" and kind.itemsize <= 2 and _is_float(kind):
        return max(RTOL, _EPSILONS * float(ml_dtypes.finfo(kind).eps))  # type: ignore[no-untyped-call]
    return RTOL


def difference(reference: Any, other: Any, *, rtol: float = RTOL, atol: float = ATOL) -> Difference:
    """Compare two arrays: `|reference - other| <= atol + rtol * scale` must hold everywhere.

    Integers, booleans and text must be equal, NaN and infinities at the same places.

    Args:
        reference: the array to hold to, of any shape.
        other: the array in question.
        rtol: allowed error relative to the scale.
        atol: allowed absolute error.
    """
    if not isinstance(reference, np.ndarray) or not isinstance(other, np.ndarray):
        return Difference(np.inf, np.inf, "is no tensor and cannot be compared")
    if reference.dtype != other.dtype:
        return Difference(np.inf, np.inf, f"has type {other.dtype} instead of {reference.dtype}")
    if reference.shape != other.shape:
        return Difference(np.inf, np.inf, f"has shape {list(other.shape)} instead of {list(reference.shape)}")
    if not (_is_float(reference.dtype) or reference.dtype.kind == "c"):
        return _exact(reference, other)
    wide = np.complex128 if reference.dtype.kind == "c" else np.float64
    return _rounded(reference.astype(wide), other.astype(wide), rtol=rtol, atol=atol)


def _is_float(dtype: Any) -> bool:
    return bool(dtype.kind == "f" or (dtype.kind == "V" and dtype.name.startswith(("bfloat", "float"))))


def _exact(reference: np.ndarray, other: np.ndarray) -> Difference:
    unequal = reference != other
    count = int(np.count_nonzero(unequal))
    if not count:
        return Difference(0.0, 0.0, "")
    error = np.inf
    if reference.dtype.kind in "iub":
        a, b = reference[unequal].astype(np.float64), other[unequal].astype(np.float64)
        error = float(np.max(np.abs(a - b)))
    return Difference(error, np.inf, f"differs in {count} of {reference.size} values that must be equal")


def _rounded(reference: np.ndarray, other: np.ndarray, *, rtol: float, atol: float) -> Difference:
    finite = np.isfinite(reference)
    # Equal covers infinities of one sign; NaN must meet NaN.
    same = (reference == other) | (np.isnan(reference) & np.isnan(other))
    misplaced = int(np.count_nonzero(~same & ~(finite & np.isfinite(other))))
    if misplaced:
        return Difference(
            np.inf, np.inf, f"has NaN or infinity at {misplaced} places where the other has not"
        )
    magnitude = np.abs(reference[finite])
    error = np.abs(reference[finite] - other[finite])
    if not error.size:
        return Difference(0.0, 0.0, "")
    typical = magnitude < _fill_values_from(magnitude)
    scales = np.where(typical, np.max(magnitude[typical], initial=0.0), magnitude)
    relative = np.divide(error, scales, out=np.where(error > 0, np.inf, 0.0), where=scales > 0)
    max_abs, max_rel = float(error.max()), float(relative.max())
    excess = error > atol + rtol * scales
    if not excess.any():
        return Difference(max_abs, max_rel, "")
    worst = float(relative[excess].max())
    what = f"differs by {float(error[excess].max()):.3g}, {worst:.3g} relative to its scale"
    return Difference(max_abs, max_rel, f"{what}, at {int(excess.sum())} of {reference.size} places")


def _fill_values_from(magnitude: np.ndarray) -> float:
    """Return the magnitude from which on values are fill values; infinite when there are none."""
    above = np.unique(magnitude[magnitude > 0])
    apart = (above[1:] >= _FILL) & (above[1:] / above[:-1] >= _FILL_GAP)
    return float(above[1:][apart][0]) if apart.any() else np.inf
