"""Carriers: one kept constant channel that stands for all removed ones where zero padding tells borders apart.

Tensors joined by elementwise operators (a residual stream) share their channels, so one carrier can serve every
convolution that reads any of them; the choice falls on the channel that serves most.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from etp_deploy.surgery.shapes import is_parameter
from etp_deploy.surgery.statements.contraction import Contraction
from etp_deploy.surgery.statements.pointwise import Pointwise

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

    from etp_deploy.surgery.analysis import Analysis


def keep_carriers(analysis: Analysis) -> bool:
    """Keep one more carrier for each group of tensors that needs one; return whether any was needed."""
    needs: dict[object, list[tuple[Contraction, np.ndarray]]] = defaultdict(list)
    streams: dict[ir.Value, ir.Value] | None = None
    for says in analysis.statements.values():
        if not isinstance(says, Contraction):
            continue
        wanted = says.carriers_needed(analysis.state)
        if not wanted.any():
            continue
        streams = _streams(analysis) if streams is None else streams
        # groups keep a carrier each, at places of their own: no other tensor's choice helps them
        key = says if wanted.shape[0] > 1 else streams.get(says.data, says.data)
        needs[key].append((says, wanted))
    for consumers in needs.values():
        # the carrier of one group may serve the next
        lacking = [
            (says, wanted) for says, _ in consumers if (wanted := says.carriers_needed(analysis.state)).any()
        ]
        if lacking:
            _choose(analysis, lacking)
            analysis.spread()
    return bool(needs)


def _choose(analysis: Analysis, consumers: list[tuple[Contraction, np.ndarray]]) -> None:
    served = np.sum([wanted for _, wanted in consumers], axis=0)
    weakest = np.full(served.shape, np.inf)
    for says, wanted in consumers:
        magnitude = np.abs(says.held(analysis.state))
        weakest = np.where(wanted, np.minimum(weakest, magnitude / magnitude.max()), weakest)
    weakest = np.where(np.isinf(weakest), 0, weakest)
    first = consumers[0][0]
    chosen = np.zeros(served.shape, bool)
    for group in range(served.shape[0]):
        if served[group].any():
            best = served[group] == served[group].max()
            chosen[group, np.argmax(np.where(best, weakest[group], -1))] = True
    first.keep_carriers(analysis.state, chosen)


def _streams(analysis: Analysis) -> dict[ir.Value, ir.Value]:
    """Return, for each tensor, one that stands for all tensors whose channels are the same, index by index."""
    parent: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        while parent.get(value, value) is not value:
            value = parent[value]
        return value

    for says in analysis.statements.values():
        if isinstance(says, Pointwise):
            for value in _whole_operands(analysis, says):
                parent[find(value)] = find(says.out)
    return {value: find(value) for value in analysis.state.keep}


def _whole_operands(analysis: Analysis, says: Pointwise) -> Iterable[ir.Value]:
    """Yield the computed operands whose labelled axes are exactly the output's."""
    out = analysis.state.mask(says.out)
    for index, links in says.links.items():
        value = says.node.inputs[index]
        if value is None or is_parameter(value):
            continue
        own = analysis.state.mask(value)
        if links and own.size == out.size and len(links) == sum(extent > 1 for extent in out.shape):
            yield value
