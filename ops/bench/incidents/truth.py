"""What really happened in a run: the fault, when it began, and what may be named as its cause.

Written beside the folder of logs, never into it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

FILE = "truth.json"

Value = str | float | bool | tuple[float, float]


class Cause(msgspec.Struct, frozen=True):
    """A column of ``requests`` with its value, a range for a number; ``component`` with a part of
    the system, or ``event`` with what it says; ``slot`` with a place of the supervisor.
    """

    dimension: str
    value: Value


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """``onset`` is in seconds since 1970. The first of ``causes`` is the cause, the others say the
    same of this run in other words; a healthy run has none.
    """

    name: str
    kind: str
    seed: int
    symptom: str
    onset: float | None = None
    causes: list[Cause] = []
    requests: int = 0
    """That clients sent."""
    load_average: float = 0.0
    """Of the machine, at the end."""

    @property
    def is_healthy(self) -> bool:
        return not self.causes

    def names(self, dimension: str, value: object) -> bool:
        """Whether a finding that blames ``value`` of ``dimension`` is right."""
        return any(
            dimension == cause.dimension and _is_same(cause.value, value) for cause in self.causes
        )

    def names_any(self, blamed: Mapping[str, object]) -> bool:
        return any(self.names(dimension, value) for dimension, value in blamed.items())


def _is_same(true: Value, named: object) -> bool:
    """A range is meant by any bucket that begins or ends in it."""
    if isinstance(true, tuple):
        bounds = _bounds(named)
        return bounds is not None and bounds[0] <= true[1] and bounds[1] >= true[0]
    if isinstance(true, bool) or isinstance(named, bool):
        return str(true).lower() == str(named).lower()
    return str(true) == str(named)


def _bounds(named: object) -> tuple[float, float] | None:
    """Of a number, a pair, or a bucket's name: ``512-1023``, ``>=512``, ``<16``."""
    match named:
        case bool():
            return None
        case int() | float():
            return float(named), float(named)
        case [low, high]:
            return _limit(low, -float("inf")), _limit(high, float("inf"))
        case str():
            return _bounds_of_name(named)
        case _:
            return None


def _limit(value: Any, open_end: float) -> float:
    return open_end if value is None else float(value)


def _bounds_of_name(name: str) -> tuple[float, float] | None:
    text = name.strip().replace("–", "-").replace("≥", ">=").replace("≤", "<=")
    try:
        if text.startswith(">"):
            return float(text.lstrip(">= ")), float("inf")
        if text.startswith("<"):
            return -float("inf"), float(text.lstrip("<= "))
        if text.endswith("+"):
            return float(text[:-1]), float("inf")
        low, _, high = text.partition("-")
        return float(low), float(high or low)
    except ValueError:
        return None


def read(folder: Path) -> Truth:
    """Of the run in ``folder``.

    Raises: FileNotFoundError, msgspec.DecodeError.
    """
    return msgspec.json.decode((folder / FILE).read_bytes(), type=Truth)


def write(folder: Path, truth: Truth) -> None:
    (folder / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(truth), indent=1) + b"\n")
