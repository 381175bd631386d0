"""A rule with anything left out is noticed by one of its examples."""

from __future__ import annotations

import pytest
from rule_graphs import graph_failure, neighbours
from rule_mutants import EQUIVALENT, families, mutants, survives, unchanged

# how many mutants of each family the suite tries; the nightly command tries all
SAMPLE = 4


@pytest.mark.parametrize("family", families())
def test_mutants_are_noticed(family):
    """Of a family's mutants, a sample spread over its functions; the nightly command tries them all."""
    found = [mutant for mutant in mutants(family) if mutant.key not in EQUIVALENT]
    assert [mutant.key for mutant in found[:: -(-len(found) // SAMPLE)] if survives(mutant)] == []


def test_a_rule_as_it_is_goes_unnoticed():
    """Negative control: without a change nothing is noticed."""
    assert survives(unchanged("linear"))


def test_equivalent_mutants_are_mutants():
    """What is listed as equivalent is still there, each with its reason."""
    found = {mutant.key for family in families() for mutant in mutants(family)}
    assert set(EQUIVALENT) <= found
    assert all(EQUIVALENT.values())


@pytest.mark.parametrize("function", neighbours())
def test_rules_that_read_their_neighbours(function):
    """Graphs of several nodes come out equal, with exactly as much left as the rule should leave."""
    assert [graph_failure(case, stays) for case, stays in neighbours()[function]] == [None] * len(
        neighbours()[function]
    )
