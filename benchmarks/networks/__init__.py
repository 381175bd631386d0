"""Small networks of many architectures, with what can die in each."""

from networks.language import LANGUAGE
from networks.vision import VISION

ENTRIES = {**LANGUAGE, **VISION}
NAMES = list(ENTRIES)
