"""Draw the force on each module of a group under each form of torque.

python benchmarks/draw_forces.py docs/etp-forces.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from etp_deploy.training.drawing import Curve, curves
from etp_deploy.training.forces import (
    PAPER_STEEPNESS,
    REFERENCE_STEEPNESS,
    distances,
    force_of,
    steepness_for,
)

COUNT = 64


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the SVG file")
    first = distances(COUNT, 0)
    middle = distances(COUNT, "middle")
    forces = {
        "exponential, the paper's: exp(5 / n) ** d": force_of(first, "exponential", PAPER_STEEPNESS),
        "exponential, the reference code's: 1.01 ** (500 / n) ** d, slightly below": force_of(
            first, "exponential", REFERENCE_STEEPNESS
        ),
        "exponential from the middle": force_of(middle, "exponential", PAPER_STEEPNESS),
        "exponential for keep=0.25: exp(10 / n) ** d": force_of(first, "exponential", steepness_for(0.25)),
        "linear torque: d (none at the pivot)": force_of(first, "linear", 0),
        "uniform: L1, group lasso": force_of(first, "uniform", 0),
    }
    drawn = [Curve(name, list(enumerate(force.tolist()))) for name, force in forces.items()]
    title = f"Force on each of {COUNT} modules, logarithmic"
    parser.parse_args().out.write_text(curves(drawn, title=title, x="module", y="force", logarithmic=True))


if __name__ == "__main__":
    main()
