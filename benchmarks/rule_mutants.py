"""Mutants of all rules against the rules' own examples: the nightly command.

Every statement, guard and argument of a rule has an example that notices its absence; a mutant that none notices is
printed, unless it is known to be equivalent.

    python benchmarks/rule_mutants.py --family convolution
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from rule_mutants import EQUIVALENT, families, mutants, survives


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", choices=families(), help="only these families of rules")
    options = parser.parse_args()
    started = time.monotonic()
    counts: dict[str, collections.Counter[str]] = {}
    for family in options.family or families():
        count = counts[family] = collections.Counter()
        for mutant in mutants(family):
            alive = survives(mutant)
            known = mutant.key in EQUIVALENT
            kind = "noticed" if not alive else ("equivalent" if known else "unnoticed")
            count[kind] += 1
            if kind == "unnoticed":
                print(f"unnoticed: {family}.{mutant.function}: {mutant.change}", flush=True)
    print(f"{'family':<16} {'mutants':>8} {'noticed':>8} {'equivalent':>11} {'unnoticed':>10}")
    for family, count in counts.items():
        row = (count["noticed"], count["equivalent"], count["unnoticed"])
        print(f"{family:<16} {sum(row):>8} {row[0]:>8} {row[1]:>11} {row[2]:>10}")
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 1 if any(count["unnoticed"] for count in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
