"""How precisely a direction may be read, and what that costs. Every ladder of today reads 16 bits, as given."""

from __future__ import annotations

BITS = (16, 8, 4, 2)
"""Bits a value, finest first: the order of every tensor that has a format axis."""
