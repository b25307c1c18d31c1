"""What a value may be: said beside the field that holds it, checked in one place.

Records travel in files that people edit, and are made from flags and from Python too. So every field carries its limit
as metadata, and `check_fields` holds a record to all of them when it is made, before anything is allocated for it.
Types are strict: a whole number is an int and no bool or float; a number may be written as an int, is never a bool and
is always finite.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeVar

_KEY = "limit"
_Record = TypeVar("_Record")


def shown(value: object) -> str:
    """`value` for an error: on one line and short, however long, deep or strange it is."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlist = short.maxtuple = short.maxdict = 8
    return " ".join(short.repr(value).split())


def refused(name: str, expected: object, got: object, remedy: str = "correct it") -> ValueError:
    """The one line about a value that may not be what it is."""
    return ValueError(f"{name}: expected {expected}, got {shown(got)}; {remedy}")


class Limit(ABC):
    """What one value may be; as text it says what is expected."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def take(self, name: str, value: Any) -> Any:
        """`value` as plain Python has it (int, float, str, bool, tuple, dict). Raises ValueError, naming it."""


@dataclass(frozen=True)
class Whole(Limit):
    """A whole number, ends included."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"a whole number in [{self.least}, {self.most}]"

    def take(self, name: str, value: Any) -> int:
        if not isinstance(value, Integral) or isinstance(value, bool) or not self.least <= int(value) <= self.most:
            raise refused(name, self, value)
        return int(value)


@dataclass(frozen=True)
class Number(Limit):
    """A finite number, ends included unless said."""

    least: float
    most: float
    above: bool = False
    """`least` itself is too little."""
    below: bool = False
    """`most` itself is too much."""

    def __str__(self) -> str:
        return f"a number in {'(' if self.above else '['}{self.least:g}, {self.most:g}{')' if self.below else ']'}"

    def take(self, name: str, value: Any) -> float:
        if not isinstance(value, Real) or isinstance(value, bool) or not self._holds(value):
            raise refused(name, self, value)
        return float(value)

    def _holds(self, value: Any) -> bool:
        # No conversion before: a whole number may be larger than any float.
        inside = self.least <= value <= self.most
        return inside and not (self.above and value == self.least) and not (self.below and value == self.most)


@dataclass(frozen=True)
class Choice(Limit):
    """One of a few values, of the very same type."""

    among: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.among))}"

    def take(self, name: str, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in self.among):
            raise refused(name, self, value)
        return value


@dataclass(frozen=True)
class Text(Limit):
    """Text of so many characters."""

    least: int = 1
    most: int = 4096

    def __str__(self) -> str:
        return f"text of {self.least} to {self.most} characters"

    def take(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not self.least <= len(value) <= self.most:
            raise refused(name, self, value)
        return value


@dataclass(frozen=True)
class Flag(Limit):
    """True or false."""

    def __str__(self) -> str:
        return "true or false"

    def take(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise refused(name, self, value)
        return value


@dataclass(frozen=True)
class Made(Limit):
    """An object of a class of ours, which has checked itself."""

    of: type

    def __str__(self) -> str:
        return f"a {self.of.__name__}"

    def take(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.of):
            raise refused(name, self, value)
        return value


@dataclass(frozen=True)
class Record(Limit):
    """A record of ours, or its fields by name, as JSON has them."""

    of: type

    def __str__(self) -> str:
        return f"a {self.of.__name__}"

    def take(self, name: str, value: Any) -> Any:
        return value if isinstance(value, self.of) else read_record(self.of, value, name)


@dataclass(frozen=True)
class Maybe(Limit):
    """Nothing, or what `of` allows."""

    of: Limit

    def __str__(self) -> str:
        return f"{self.of}, or none"

    def take(self, name: str, value: Any) -> Any:
        return None if value is None else self.of.take(name, value)


@dataclass(frozen=True)
class Several(Limit):
    """A list, which becomes a tuple."""

    of: Limit
    least: int
    most: int
    ascending: bool = False
    """No entry is less than the one before it."""
    distinct: bool = False
    """Nor equal to it: strictly ascending."""

    def __str__(self) -> str:
        count = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        order = "strictly ascending, " if self.distinct else "ascending, " if self.ascending else ""
        return f"a list of {count}, {order}each {self.of}"

    def take(self, name: str, value: Any) -> tuple[Any, ...]:
        listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
        if not listed or not self.least <= len(value) <= self.most:
            raise refused(name, self, value)
        found = tuple(self.of.take(f"{name}[{i}]", entry) for i, entry in enumerate(value))
        ordered = self.ascending or self.distinct
        if ordered and any(b < a or (self.distinct and a == b) for a, b in pairwise(found)):
            raise refused(name, self, value)
        return found


@dataclass(frozen=True)
class Entries(Limit):
    """Values by name, each with a limit of its own: no other name, and where `complete` none left out."""

    of: Mapping[str, Limit]
    complete: bool = True

    def __str__(self) -> str:
        return f"values by name ({', '.join(self.of) or 'none'})"

    def take(self, name: str, value: Any) -> dict[str, Any]:
        _check_names(name, value, self.of, complete=self.complete)
        return {key: limit.take(_dotted(name, key), value[key]) for key, limit in self.of.items() if key in value}


def limited(limit: Limit) -> dict[str, Limit]:
    """Metadata of a dataclass field that has this limit."""
    return {_KEY: limit}


def limits_of(record: Any) -> dict[str, Limit]:
    """The limit of every field of a dataclass, or of its instance, by name."""
    return {field.name: field.metadata[_KEY] for field in fields(record)}


def check_fields(record: Any, where: str = "") -> None:
    """Hold every field of a dataclass to its limit and keep what it stands for in plain Python.

    `where` is the record's own name, before those of its fields. Raises ValueError, naming the first field that is not
    within its limit.
    """
    for name, limit in limits_of(record).items():
        object.__setattr__(record, name, limit.take(_dotted(where, name), getattr(record, name)))


def read_record(record: type[_Record], values: Any, where: str) -> _Record:
    """The record whose fields are `values`, by name, as JSON has them, none left out.

    Raises ValueError for anything that is no such record.
    """
    _check_names(where, values, limits_of(record), complete=True)
    return record(**values)


def _check_names(where: str, values: Any, limits: Mapping[str, Limit], *, complete: bool) -> None:
    allowed = ", ".join(limits) or "none"
    if not isinstance(values, Mapping):
        raise refused(where, f"values by name ({allowed})", values)
    unknown = [name for name in values if name not in limits]
    if unknown:
        raise refused(where or "names", f"names among {allowed}", unknown, "leave out what is not")
    missing = [name for name in limits if name not in values]
    if missing and complete:
        raise ValueError(f"{_dotted(where, missing[0])}: expected {limits[missing[0]]}, got none; add it")


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
