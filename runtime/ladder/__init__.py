"""The ladder of an adapter: every rung below the exact one reads a prefix of an ordered list of directions.

adapter   PEFT's folder -> A, B, scale
formats   how a direction is written in few bits, and read back at 2, 4, 8 or 16
banks     directions in banks, and what every rung reads of them
factors   A, B -> singular directions, and the exact ones
store     a ladder on disk, and whatever a user calls an adapter -> a ladder
version1  ladders saved before there were banks
"""

from .adapter import Adapter, LoraFactors, load_adapter
from .banks import KINDS, Bank, Directions, Ladder, Range
from .factors import build_ladder, svd_factors
from .store import load_ladder, open_ladder, save_ladder

__all__ = [
    "KINDS",
    "Adapter",
    "Bank",
    "Directions",
    "Ladder",
    "LoraFactors",
    "Range",
    "build_ladder",
    "load_adapter",
    "load_ladder",
    "open_ladder",
    "save_ladder",
    "svd_factors",
]
