"""Every example of every rule: slicing commutes, constants hold, what is not read does not matter."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from rule_harness import SEEDS, Trial, outcomes, verdict

from etp_deploy.surgery.examples import computed, example, weight
from etp_deploy.surgery.rules import covered, examples_of, registry
from etp_deploy.surgery.state import Cause
from etp_deploy.surgery.statements.base import SliceInput
from etp_deploy.surgery.statements.pointwise import Pointwise

EXAMPLES = [
    pytest.param(domain, operator, item, id=f"{operator}-{number}")
    for domain, operator in covered()
    for number, item in enumerate(examples_of(domain, operator))
]


@pytest.mark.parametrize(("domain", "operator", "item"), EXAMPLES)
def test_what_a_rule_says_of_its_examples_holds(domain, operator, item):
    """The cut node computes the kept slice, from what is kept alone, and claimed constants come out."""
    assert verdict(outcomes(domain, operator, item), removable=item.removable) is None


# negative controls: wrong rules are told apart


class Unsliced(Pointwise):
    """Forgets to cut the initializers."""

    def edits(self, state):
        """Cut nothing."""
        del state
        yield from ()


class Misplaced(Pointwise):
    """Cuts the wrong channels."""

    def edits(self, state):
        """Take each channel's neighbour."""
        for edit in super().edits(state):
            if isinstance(edit, SliceInput):
                yield SliceInput(edit.index, tuple((axis, (line + 1) % 6) for axis, line in edit.takes))
            else:
                yield edit


class Unread(Pointwise):
    """Says that each output channel is its neighbour's."""

    def structure(self, state):
        """Keep products of indices."""
        super().structure(state)
        state.product.add(self.out)

    def spread(self, state):
        """Keep as many channels as the output does, but others."""
        state.grow(self.node.inputs[0], np.roll(state.mask(self.out), 1, axis=1), Cause("", self.node))

    def layout(self, state):
        """Stand in order."""
        mask = state.mask(self.out)
        dims = set(range(mask.ndim))
        counts = [int(mask.any(axis=tuple(dims - {dim})).sum()) for dim in range(mask.ndim)]
        state.layouts[self.out] = np.flatnonzero(mask).reshape(counts)


def channelwise(node):
    """Map the batch and the channels of the first operand, and the channels of the others."""
    return {0: (0, 1, None, None), **dict.fromkeys(range(1, len(node.inputs)), (1,))}


ADDED = example(computed(2, 6, 3, 3), weight(6, 1, 1))
WRONG = {
    "slicing": (
        "Add",
        ADDED,
        lambda node: Unsliced(node, {0: (0, 1, 2, 3), 1: (1, 2, 3)}),
        "slicing does not commute|the cut node does not run",
    ),
    "other channels": (
        "Add",
        ADDED,
        lambda node: Misplaced(node, {0: (0, 1, 2, 3), 1: (1, 2, 3)}),
        "slicing does not commute",
    ),
    "constants": (
        "AveragePool",
        example(computed(2, 6, 4, 4), kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1),
        lambda node: Pointwise(node, channelwise(node), constants="pass"),
        "a claimed constant does not hold",
    ),
    "unread": (
        "Relu",
        example(computed(2, 6, 3)),
        lambda node: Unread(node, {0: (0, 1, 2)}, constants="none"),
        "what is not read matters",
    ),
    "sums": (
        "Relu",
        example(computed(2, 6, 3)),
        lambda node: Pointwise(node, {0: (0, 1, 2)}, stochastic=2),
        "entries that are said to sum to one do not",
    ),
    "axis that is read whole": (
        "LayerNormalization",
        example(computed(2, 5, 6), weight(6), weight(6)),
        lambda node: Pointwise(node, {0: (0, 1, 2), 1: (2,), 2: (2,)}, constants="none"),
        "what is not read matters|slicing does not commute",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_told_apart(name):
    """Negative control for each property: some seed finds it, with that property's words."""
    operator, item, wrong, words = WRONG[name]
    with mock.patch.dict(registry._RULES, {("", operator): wrong}):
        found = {outcome.failure.split(":")[0] for outcome in outcomes("", operator, item) if outcome.failure}
    assert found & set(words.split("|"))


def test_removable_is_told_apart():
    """An example that claims too much or too little is refused."""
    relu = example(computed(2, 6, 3))
    found = outcomes("", "Relu", relu)
    assert verdict(found, removable=True) is None
    assert "something is removed" in verdict(found, removable=False)
    found = outcomes("", "LRN", example(computed(2, 6, 3, 3), size=3))
    assert verdict(found, removable=False) is None
    assert "nothing can be removed" in verdict(found, removable=True)


def test_trials_plant_what_they_promise():
    """Over its seeds an example sees constants, zeros in weights, all orders, and sizes that are not known."""
    trials = [Trial("", "Add", ADDED, seed) for seed in SEEDS]
    assert {trial.order for trial in trials} == {"product", "nested", "permuted"}
    assert sum(trial.tensors[0].known.any() for trial in trials) >= 4
    assert any(trial.tensors[0].stochastic for trial in trials)
    symbols = [f.size.symbols for trial in trials for axis in trial.tensors[0].structure for f in axis]
    assert any(symbols)
