"""The demo's images: scikit-learn's bundled handwritten digits, with one fixed split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Every fourth image is held out; fixed, so that accuracies of different runs compare.
_SPLIT_SEED = 0
_TEST_SHARE = 0.25


@dataclass(frozen=True)
class Digits:
    """Images and labels, split for training and test.

    Args:
        train_images: float32, shape (1347, 1, 8, 8), in [-1, 1].
        train_labels: int64, shape (1347,), in 0..9.
        test_images: float32, shape (450, 1, 8, 8), in [-1, 1].
        test_labels: int64, shape (450,), in 0..9.
    """

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def load_digits() -> Digits:
    """Load the 1,797 digits of 8x8 pixels; the split is the same in every call and balanced over the classes.

    Source: UCI "Optical Recognition of Handwritten Digits", as bundled with scikit-learn.
    """
    from sklearn.datasets import load_digits as bundled  # noqa: PLC0415 - slow, and only the demo needs it
    from sklearn.model_selection import train_test_split  # noqa: PLC0415

    raw = bundled()
    images = (raw.images / 8.0 - 1.0).astype(np.float32)[:, np.newaxis]
    labels = raw.target.astype(np.int64)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=_TEST_SHARE, random_state=_SPLIT_SEED, stratify=labels
    )
    return Digits(train_images, train_labels, test_images, test_labels)
