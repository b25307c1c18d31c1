"""How a page of keys and values is stored: `formats` is the specification, whichever path runs."""

from .formats import FORMATS

__all__ = ["FORMATS"]
