"""Typed access to one JSON object: values are checked when they are read; errors name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from exafuse.errors import ConfigError
from exafuse.strict_json import shorten


class Missing:
    """Marks a field without a default; its one instance is ``REQUIRED``."""


REQUIRED: Final = Missing()


class Fields:
    """The fields of one JSON object.

    ``bool`` is not an integer, ``"32"`` is not a number, ``32.0`` is not an integer, ``null`` is
    a value only where the method says so. Every method takes the default for an absent key and
    raises ``ConfigError`` for anything else than what it promises to return. ``unread()`` lists
    the keys that nothing asked for.
    """

    def __init__(self, values: Mapping[str, object], file: str, prefix: str = "") -> None:
        self._values = values
        self._read: set[str] = set()
        self.file = file
        self.prefix = prefix

    def error(self, key: str, expected: str, got: str | None = None) -> ConfigError:
        """A ConfigError that names file and field; ``got`` defaults to the field's value."""
        if got is None:
            got = shorten(self._values[key]) if key in self._values else "no such field"
        return ConfigError(f"{self.file}: {self.prefix}{key}: expected {expected}, got {got}")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self._get(key) is not None

    def present(self, key: str) -> bool:
        """Whether the key is there, null included."""
        return key in self._values

    def known(self) -> set[str]:
        """Keys that are there or have been asked for."""
        return self._read.union(self._values)

    def unread(self) -> list[str]:
        """Keys that no method has been asked for, in the file's order."""
        return [key for key in self._values if key not in self._read]

    def integer(self, key: str, default: int | Missing, low: int, high: int) -> int:
        """An integer in [low, high]."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(key, f"an integer from {low:,} to {high:,}")
        return value

    def optional_integer(self, key: str, default: int | None, low: int, high: int) -> int | None:
        """An integer in [low, high], or null."""
        return (
            None if self._get(key, default) is None else self.integer(key, default or 0, low, high)
        )

    def number(
        self, key: str, default: float | Missing, low: float, high: float, *, above: bool = False
    ) -> float:
        """A finite number in [low, high], or in (low, high] with ``above``."""
        value = self._get(key, default)
        # Compared before the conversion: an int beyond the float range must not overflow, and the
        # negated comparison also catches NaN.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
            or (above and value == low)
        ):
            border = f"above {low:g}" if above else f"from {low:g}"
            raise self.error(key, f"a number {border} to {high:g}")
        return float(value)

    def optional_number(
        self, key: str, low: float, high: float, *, above: bool = False
    ) -> float | None:
        """A finite number as ``number``, or None where the key is absent or null."""
        return self.number(key, REQUIRED, low, high, above=above) if self.has(key) else None

    def boolean(self, key: str, default: bool | Missing) -> bool:
        """true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def optional_boolean(self, key: str) -> bool | None:
        """true or false, or None where the key is absent or null."""
        return self.boolean(key, REQUIRED) if self.has(key) else None

    def string(self, key: str, default: str | Missing) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def strings(self, key: str) -> tuple[str, ...] | None:
        """A list of strings, or None where the key is absent or null."""
        values = self._list(key, "a list of strings")
        if values is None:
            return None
        if not all(isinstance(value, str) for value in values):
            raise self.error(key, "a list of strings")
        return tuple(str(value) for value in values)

    def numbers(self, key: str, length: int, low: float, high: float) -> tuple[float, ...] | None:
        """A list of ``length`` finite numbers in (low, high], or None where absent or null."""
        expected = f"a list of {length} numbers above {low:g} to {high:g}"
        values = self._list(key, expected)
        if values is None:
            return None
        if len(values) != length:
            raise self.error(key, expected, f"{len(values)} of them")
        result = []
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise self.error(key, expected)
            if not low < value <= high:
                raise self.error(key, expected, shorten(value))
            result.append(float(value))
        return tuple(result)

    def integers(self, key: str, default: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
        """One integer or a list of them, each in [low, high]; null means none."""
        expected = f"an integer or a list of integers, each from {low:,} to {high:,}"
        value = self._get(key, default)
        if value is None:
            return ()
        values = value if isinstance(value, list | tuple) else [value]
        if any(
            isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high for v in values
        ):
            raise self.error(key, expected)
        return tuple(values)

    def section(self, key: str) -> Fields | None:
        """The fields of a nested object, or None where the key is absent or null."""
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise self.error(key, "an object")
        return Fields(value, self.file, f"{self.prefix}{key}.")

    def raw(self, key: str) -> object:
        """The unchecked value; None where absent. For keys that are refused or reported, never
        used."""
        return self._get(key)

    def _get(self, key: str, default: object = None) -> object:
        self._read.add(key)
        return self._values.get(key, default)

    def _list(self, key: str, expected: str) -> list[object] | None:
        value = self._get(key)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.error(key, expected)
        return list(value)
