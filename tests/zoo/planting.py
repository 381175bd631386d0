"""Planting: dead structure put into a network, and the widths of the network that can do without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from zoo.sites import Site, Widths


@dataclass(frozen=True)
class Planting:
    """Which units die, where and how.

    Args:
        position: "tail" or "scattered".
        zeros: "weights" (biases and normalisation live on: the dead are non-zero constants), "silent" (the
            same, with constants that a ReLU makes zero) or "all" (the dead are zero).
        side: "writer" (what makes the units is zero), "reader" (every weight that reads them is zero) or
            "mixed" (readers at every second site).
        kinds: which kinds of sites die; empty means all.
        share: how much of each width dies.
        whole: the key of one site that dies as a whole while all others live.
        odd: whether an odd number of each width is left.
    """

    position: str = "scattered"
    zeros: str = "weights"
    side: str = "writer"
    kinds: tuple[str, ...] = ()
    share: float = 0.4
    whole: str = ""
    odd: bool = False

    def __str__(self) -> str:
        """A test's name."""
        if self.whole:
            return f"whole-{self.whole}-{self.zeros}"
        what = {"writer": self.zeros, "reader": "reader", "mixed": f"{self.zeros}-mixed"}[self.side]
        return "-".join([self.position, what, *self.kinds])


@dataclass(frozen=True)
class Planted:
    """The widths that the planted network needs, without and with its carriers."""

    live: Widths
    widths: Widths

    @property
    def carriers(self) -> dict[str, int]:
        """How many channels of each width are kept as carriers (per group where the width is a group's)."""
        return {k: self.widths[k] - self.live[k] for k in self.live if self.widths[k] != self.live[k]}


def plant(net: nn.Module, planting: Planting, seed: int = 0, stay: tuple[str, ...] = ()) -> Planted:
    """Zero what the planting asks for, in place.

    A carrier is needed where a zero-padded convolution reads units that are non-zero constants: the sum over
    them differs at the border, so it cannot become a bias. One constant channel then stands for all of them.
    It costs the filter that makes it, its entries in bias and normalisation, and a column in everything that
    reads the same channels: exactly what the native network costs when that width is larger by one. Several
    such convolutions can share a carrier where they read the same channels (a residual stream; a skip that an
    encoder and a decoder read).

    Args:
        net: from the zoo, at full width.
        planting: what dies.
        seed: of the places.
        stay: kinds of sites whose non-zero constants are no constants in the exported file.

    Returns:
        The widths of the native network that computes the same.
    """
    rng = np.random.default_rng(seed)
    live, constant = dict(net.widths), []
    for place, site in enumerate(net.sites()):
        if not _dies(site, planting):
            continue
        units, count = _choose(site, planting, rng)
        live[site.key] -= count
        by_reader = planting.side == "reader" or (planting.side == "mixed" and place % 2 == 1)
        if (by_reader and site.readers) or not site.writers:
            for slot in site.readers:
                slot.zero(units)
        elif _silence(site, planting, units, units[::count]):
            constant.append(site)
            if site.kind in stay:
                live[site.key] += count
    widths = dict(live)
    for key in _carried(constant):
        widths[key] += 1
    # an axis that lost everything gets one channel back
    return Planted({k: max(1, v) for k, v in live.items()}, {k: max(1, v) for k, v in widths.items()})


def _dies(site: Site, planting: Planting) -> bool:
    """Whether the planting touches this site."""
    if planting.whole:
        return site.key == planting.whole
    return planting.share > 0 and (not planting.kinds or site.kind in planting.kinds)


def _silence(site: Site, planting: Planting, units: list[int], firsts: list[int]) -> bool:
    """Zero what writes these units; True where non-zero constants stay, one of them surely in each group."""
    for slot in site.writers:
        slot.zero(units)
    for shift in site.shifts:
        if planting.zeros == "all":
            shift.zero(units)
        elif planting.zeros == "silent":
            for unit in units:
                shift.lift(unit, -1.0)
        else:
            for unit in firsts:
                shift.lift(unit)
    return planting.zeros == "weights" and any(s.bias is not None or s.norm is not None for s in site.shifts)


def _choose(site: Site, planting: Planting, rng: np.random.Generator) -> tuple[list[int], int]:
    """Units in the whole axis that die, and how many of them in each group."""
    count = site.width if planting.whole else min(site.width - 1, max(1, int(site.width * planting.share)))
    if planting.odd and (site.width - count) % 2 == 0:
        count -= 1
    units = []
    for group in range(site.groups):
        if planting.position == "tail":
            chosen: Iterable[int] = range(site.width - count, site.width)
        else:
            chosen = sorted(rng.choice(site.width, count, replace=False).tolist())
        units += [group * site.width + u for u in chosen]
    return units, count


def _carried(sites: list[Site]) -> list[str]:
    """The fewest sites that keep a carrier, so that every padded reader of constants has one.

    Greedy, which is the optimum for chains and for skips that two readers share.
    """
    waiting = {reader for site in sites for reader in site.padded}
    chosen = []
    while waiting:
        best = max(sites, key=lambda s: len(waiting & set(s.padded)))
        chosen.append(best.key)
        waiting -= set(best.padded)
    return chosen
