"""From samples to a verdict: the session is the unit, the log ratio its value.

Runs within a session share its memory layout and so its bias (about one percent); treating runs as
independent calls equal models different in a fifth of all trials. Every interval here is over sessions.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

# 99 % because the interval is looked at after every session from the fifth on.
CONFIDENCE = 0.99
MIN_SESSIONS = 5
EQUAL_WITHIN = 0.01
PERCENTILES = (50, 90, 95, 99)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A ratio of times with its confidence interval; NaN bounds where there are too few sessions.

    Args:
        ratio: geometric mean over sessions of contender time over baseline time; below 1 is faster.
        low: lower bound.
        high: upper bound.
        sessions: how many sessions it rests on.
    """

    ratio: float
    low: float
    high: float
    sessions: int

    @property
    def spread(self) -> float:
        """Farthest that the interval reaches from one, as a log ratio; infinite where it is unknown."""
        if math.isnan(self.low):
            return math.inf
        return max(abs(math.log(self.low)), abs(math.log(self.high)))


def log_ratio_interval(logs: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Student's t interval on log ratios, one per session, given back as ratios."""
    values = np.asarray(logs, dtype=float)
    count = len(values)
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if count < 2:
        return Interval(math.exp(mean), math.nan, math.nan, count)
    half = t_quantile(count - 1, 0.5 + confidence / 2) * float(values.std(ddof=1)) / math.sqrt(count)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), count)


def verdict(interval: Interval, control: Interval) -> str:
    """Say "faster", "slower" or "undecided" of the contender.

    A difference counts when its interval excludes one, it rests on enough sessions, and it is larger than
    anything that the same model against itself may have shown at the same time.
    """
    if interval.sessions < MIN_SESSIONS or math.isnan(interval.low):
        return "undecided"
    if abs(math.log(interval.ratio)) <= control.spread:
        return "undecided"
    if interval.high < 1:
        return "faster"
    return "slower" if interval.low > 1 else "undecided"


def equal(interval: Interval, within: float = EQUAL_WITHIN) -> bool:
    """Whether any difference is known to be negligible."""
    return interval.sessions >= MIN_SESSIONS and interval.spread < math.log1p(within)


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Percentiles, mean, least and number of samples."""
    values = np.asarray(samples, dtype=float)
    found = {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)}
    return {**found, "mean": float(values.mean()), "min": float(values.min()), "samples": len(values)}


def t_quantile(degrees: int, probability: float) -> float:
    """Quantile of Student's t."""
    # not scipy.stats, which takes two seconds to import
    from scipy.special import stdtrit  # noqa: PLC0415 - half a second

    return float(stdtrit(degrees, probability))
