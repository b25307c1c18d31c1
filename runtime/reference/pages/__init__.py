"""KV cache of 16-token pages, each in a format that fits how hard its text is; see `cache` for the flow of a pass."""

from .cache import PagedCache

__all__ = ["PagedCache"]
