"""What a reader yields: records in the source's own units, or the reason why a record is broken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LABEL_LIKE = re.compile(r"energy|force|stress|virial|^y$|^y_", re.IGNORECASE)
UNIT_LIKE = re.compile(r"units?$", re.IGNORECASE)


@dataclass
class Record:
    """One structure as its source states it: labels in the source's units and signs.

    name: where it is within the file ("record 17", "mp-123/0-4"). positions (N,3), cell (3,3), pbc (3,), numbers (N,);
    energy, forces (N,3), stress (3,3) or Voigt (6,) xx yy zz yz xz xy; virial (3,3) = -V stress. properties: the named
    targets. structure_id and group are empty where the source has none. ignored: fields that look like labels but were
    not read. stated_units: the units that the record itself states for energy, forces and stress, as written. fields:
    names of the fields that may hold its id or its group.
    """

    name: str
    numbers: NDArray[Any]
    positions: Array
    cell: Array
    pbc: NDArray[np.bool_] = field(default_factory=lambda: np.ones(3, dtype=bool))
    energy: float | None = None
    forces: Array | None = None
    stress: Array | None = None
    virial: Array | None = None
    properties: Mapping[str, float] = field(default_factory=dict)
    structure_id: str = ""
    group: str = ""
    ignored: tuple[str, ...] = ()
    stated_units: Mapping[str, str] = field(default_factory=dict)
    fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A record that cannot be read, and why; rest_lost: nor can what follows it in the file."""

    name: str
    reason: str
    rest_lost: bool = False


class RecordError(Exception):
    """Raised by readers for one record; the text is the reason."""


def numeric(value: Any, what: str, shape: tuple[int, ...] | None = None) -> Array:
    """`value` as a float64 array of `shape` (-1 matches any length). Raises RecordError with what was got."""
    try:
        found = np.asarray(value)
        if found.dtype.kind in "bcmM" and found.size:  # true is no 1, a date no number, and a complex one has no place
            raise TypeError(f"{found.ravel()[0]}")
        array = found.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RecordError(f"{what}: not numbers: {error}") from None
    if shape is not None and (
        array.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, array.shape, strict=True))
    ):
        wanted = "x".join("N" if n == -1 else str(n) for n in shape) or "a number"
        raise RecordError(f"{what}: shape is {array.shape}, expected {wanted}")
    return array


def flags(value: Any, what: str) -> NDArray[np.bool_]:
    """`value` as three booleans, which may be written as 0 and 1. Raises RecordError."""
    array = np.asarray(value)
    if array.shape != (3,) or array.dtype.kind not in "biu" or ((array != 0) & (array != 1)).any():
        raise RecordError(f"{what}: is {value!r:.60}, expected three of true and false")
    return array.astype(bool)


def scalar(value: Any, what: str) -> float:
    """`value` as a float. Raises RecordError."""
    return float(numeric(value, what, ()))


def label_like(keys: Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    """Keys that look like labels and were not taken: what a user may have meant to be read."""
    used = set(taken)
    return tuple(key for key in keys if key not in used and LABEL_LIKE.search(key) and not UNIT_LIKE.search(key))


def stated_units(fields: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, str]:
    """What fields such as stress_unit say of the labels that `keys` names (label -> key), if the labels are there."""
    found = {}
    for label, key in keys.items():
        names = (f"{name}_unit{s}" for name in (key, label, label.removesuffix("s")) for s in ("", "s"))
        stated = next((fields[name] for name in names if isinstance(fields.get(name), str)), None)
        if stated is not None and fields.get(key) is not None:
            found[label] = str(stated)
    return found
