"""The ladder of an adapter: every rung below the exact one reads a prefix of an ordered list of directions.

adapter   PEFT's folder -> A, B, scale
factors   A, B -> singular directions, and the table of what every rung reads
formats   how many bits a direction may be read at
store     a ladder on disk, and whatever a user calls an adapter -> a ladder
"""

from .adapter import Adapter, LoraFactors, load_adapter
from .factors import Ladder, LadderFactors, build_ladder, svd_factors
from .store import load_ladder, open_ladder, save_ladder

__all__ = [
    "Adapter",
    "Ladder",
    "LadderFactors",
    "LoraFactors",
    "build_ladder",
    "load_adapter",
    "load_ladder",
    "open_ladder",
    "save_ladder",
    "svd_factors",
]
