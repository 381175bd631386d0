"""How hard each module of a group is pulled: distances from a pivot, and what force they make."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from etp_deploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

Force = Literal["exponential", "linear", "uniform"]
Place = Literal["middle", "largest", "ordered", "network"]
Pivot = int | Place
#: The pivots that look at an importance.
RANKING = ("largest", "ordered", "network")

#: lambda = exp(5 / n), the paper's steepness.
PAPER_STEEPNESS = 5.0
#: lambda = 1.01 ** (500 / n), the reference code's.
REFERENCE_STEEPNESS = 500 * math.log(1.01)


def steepness_for(keep: float) -> float:
    """Return the steepness s that a wanted keep ratio asks for: `s = 2.5 / keep`.

    With it the force at the first module beyond the kept share is `exp(2.5)`, 12 times the pivot's, whatever the
    share is. The paper's s = 5 is that of keep = 0.5; keeping a quarter asks for s = 10.

    Args:
        keep: the wanted share of modules, above 0 and at most 1.

    Raises:
        UsageError: the share lies outside.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"{keep} is no share of modules", where="keep", hint="above 0, at most 1")
    return PAPER_STEEPNESS / 2 / keep


def distances(count: int, pivot: Pivot, importance: Tensor | None = None, *, where: str = "") -> Tensor:
    """Return how far each of `count` modules lies from the pivot, shape (count,), float64.

    Args:
        count: number of modules.
        pivot: an index (negative from the end) or "middle", from which distance is counted in places; "largest",
            the place of the most important; "ordered", where distance is the rank by importance and the most
            important is 0. For "network" see `network_distances`.
        importance: of the modules, needed by "largest" and "ordered"; what is equal ranks by place.
        where: names the group in errors.

    Raises:
        UsageError: there is no such pivot.
    """
    places = torch.arange(count, dtype=torch.float64)
    if pivot == "network" or (isinstance(pivot, str) and pivot not in get_args(Place)):
        raise UsageError(f"{pivot!r} is no pivot", where=f"pivot of {where}")
    if pivot in {"largest", "ordered"}:
        if importance is None:
            raise UsageError(f"{pivot!r} needs an importance", where=f"pivot of {where}")
        ranks = _ranks(importance)
        if pivot == "ordered":
            return ranks
        pivot = int(ranks.argmin())
    origin = count // 2 if pivot == "middle" else int(pivot)
    if not -count <= origin < count:
        raise UsageError(f"there is no module {origin} among {count}", where=f"pivot of {where}")
    return (places - origin % count).abs()


def network_distances(importance: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return distances by rank over the modules of all groups, each group's in units of its own places.

    A module that ranks r among all N of the network lies `r * n / N` from the pivot in its group of n, so that
    `lambda = exp(s / n)` makes the force `exp(s * r / N)`: two modules of one rank are pulled alike wherever they
    are, and a group that holds what matters little loses more than others.

    Args:
        importance: of each group's modules, shape (n,), comparable over groups.
    """
    counts = [len(one) for one in importance]
    ranks = _ranks(torch.cat([one.detach().cpu().double() for one in importance]))
    return tuple(row * (len(row) / len(ranks)) for row in torch.split(ranks, counts))


def _ranks(importance: Tensor) -> Tensor:
    """Return each module's rank, 0 for the most important, float64; what is equal ranks by place."""
    order = torch.argsort(importance.detach().cpu().double(), descending=True, stable=True)
    places = torch.arange(len(order), dtype=torch.float64)
    return torch.empty(len(order), dtype=torch.float64).index_copy_(0, order, places)


def force_of(distance: Tensor, force: Force, steepness: float) -> Tensor:
    """Return the force at each distance: `exp(steepness * d / n)`, `d`, or 1 everywhere.

    Args:
        distance: shape (n,), see `distances`.
        force: "exponential", "linear" or "uniform".
        steepness: s in `lambda = exp(s / n)`.
    """
    if force == "linear":
        return distance
    if force == "uniform":
        return torch.ones_like(distance)
    return torch.exp(distance * (steepness / len(distance)))
