"""Which stretches of an arena are free: first fit, neighbours joined."""

from __future__ import annotations


class Free:
    """The free stretches of `size` bytes, all lengths and starts multiples of `alignment`."""

    def __init__(self, size: int, alignment: int) -> None:
        self.size, self.alignment = size, alignment
        self._stretches: list[tuple[int, int]] = [(0, size)] if size else []
        """(start, length), ascending"""

    @property
    def left(self) -> int:
        """Bytes free."""
        return sum(length for _, length in self._stretches)

    def take(self, length: int) -> int:
        """Start of the first stretch of `length` bytes, now taken. Raises MemoryError where there is none."""
        length = -(-length // self.alignment) * self.alignment
        for i, (start, free) in enumerate(self._stretches):
            if free >= length:
                rest = [(start + length, free - length)] if free > length else []
                self._stretches[i : i + 1] = rest
                return start
        longest = max((free for _, free in self._stretches), default=0)
        raise MemoryError(
            f"adapters: expected {length} bytes in one stretch, got {longest} of {self.left} that are free; evict "
            "others, lower resident_rung, or make the store larger"
        )

    def give(self, start: int, length: int) -> None:
        """Free a stretch that was taken."""
        length = -(-length // self.alignment) * self.alignment
        stretches = sorted([*self._stretches, (start, length)])
        joined = stretches[:1]
        for own in stretches[1:]:
            before, size = joined[-1]
            if before + size == own[0]:
                joined[-1] = (before, size + own[1])
            else:
                joined.append(own)
        self._stretches = joined
