"""Small networks of many architectures, with what can die in each."""

from zoo.networks import ZOO

from networks.graphs import GRAPHS
from networks.language import LANGUAGE
from networks.series import SERIES
from networks.vision import VISION

ENTRIES = {**GRAPHS, **VISION, **SERIES, **LANGUAGE}
NAMES = [*ENTRIES, *(f"zoo: {name}" for name in ZOO)]
