"""Removal, round after round, until nothing more goes.

A tensor that is dead as a whole is given one channel back. What that channel holds, and what it reads, can keep others
from being seen for what they are: constants, or read by nobody. In what is left after the removal they are; so where
channels were given back, that is analysed as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from etp_deploy.surgery.boundaries import without_unused
from etp_deploy.surgery.plan import plan
from etp_deploy.surgery.prepare import prepare
from etp_deploy.surgery.rewrite import restore_interface, rewrite

if TYPE_CHECKING:
    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis, Fill
    from etp_deploy.surgery.plan import Layer, RemovalPlan

# after this many rounds what is left stays; two have always been enough
MOST_ROUNDS = 8


@dataclass(frozen=True)
class Rest:
    """What a removal leaves.

    Attributes:
        model: what is left; the original where nothing could go and everything is used.
        layers: a row for each layer, with how many there were in the original.
        analysis: of what is left, where more than the first plan went; None where that was all.
    """

    model: ir.Model
    layers: tuple[Layer, ...]
    analysis: Analysis | None


def carry_out(prepared: ir.Model, removal: RemovalPlan, original: ir.Model, fill: Fill | None) -> Rest:
    """Remove what a plan says, and what can go after that.

    Args:
        prepared: the model that was planned on; it is used up.
        removal: the plan.
        original: the model that was prepared.
        fill: the alignment policy.

    Raises:
        PlanError: where channels that stay cannot be lined up.
    """
    if not removal.edits:
        return Rest(without_unused(original), removal.layers, None)
    rows, further = removal.layers, False
    for _ in range(MOST_ROUNDS):
        rewrite(prepared, removal.edits)
        restore_interface(prepared, original)
        if not (removal.given_back or further):
            break
        following = prepare(prepared)
        removal, analysis = plan(following.graph, fill)
        if not removal.edits:
            return Rest(prepared, rows, analysis if further else None)
        prepared, rows, further = following, merged_rows(rows, removal.layers), True
    return Rest(prepared, rows, None)


def merged_rows(rows: tuple[Layer, ...], later: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """Return the rows of two removals, one after the other, as those of one."""
    found = {row.name: row for row in later}
    known = {row.name for row in rows}
    merged = [_merged(row, found[row.name]) if row.name in found else row for row in rows]
    return (*merged, *(row for row in later if row.name not in known))


def _merged(row: Layer, later: Layer) -> Layer:
    """Return one row of two: what died last counts as what it was last seen to be."""
    dead = row.removed + later.constant + later.unread
    more = max(dead - row.constant - row.unread, 0)
    constant = min(row.constant + min(more, later.constant), dead)
    return replace(row, constant=constant, unread=dead - constant, kept=later.kept, reasons=later.reasons)
