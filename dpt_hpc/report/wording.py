"""Quantities, units and numbers as the report prints them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from dpt_hpc.structure import GPA_PER_EV_A3

NO_BREAK = "\u00a0"
MINUS = "\u2212"


@dataclass(frozen=True)
class Quantity:
    """A label as the report shows it: values are multiplied by `factor` to be in `unit`, errors by `error_factor` to
    be in `error_unit`. rows: what a row of predictions is, in words."""

    label: str
    name: str
    unit: str
    factor: float
    error_unit: str
    error_factor: float
    rows: str

    @property
    def metric(self) -> str:
        return f"{self.label}_mae"


ENERGY = Quantity("energy_per_atom", "Energy per atom", "eV/atom", 1.0, "meV/atom", 1000.0, "structures")
FORCES = Quantity("forces", "Forces", "eV/Å", 1.0, "eV/Å", 1.0, "force components")
STRESS = Quantity("stress", "Stress", "GPa", GPA_PER_EV_A3, "GPa", GPA_PER_EV_A3, "stress components")
NOISE = Quantity("noise", "Noise", "Å", 1.0, "Å", 1.0, "displacement components")


def target_quantity(name: str, unit: str) -> Quantity:
    """The property of a fine-tuning, in its dataset's unit ("" where none is known)."""
    title = name.replace("_", " ").strip()
    return Quantity("target", title[:1].upper() + title[1:] or "Property", unit, 1.0, unit, 1.0, "structures")


def number(value: Any, digits: int = 3) -> str:
    """`digits` significant digits; "—" for what is missing, in words what is not finite."""
    if value is None:
        return "—"
    value = float(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    if -4 <= exponent < 6:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    else:
        text = f"{value / 10.0**exponent:.{digits - 1}f}{NO_BREAK}×{NO_BREAK}10{superscript(exponent)}"
    return text.replace("-", MINUS)


def short(value: float) -> str:
    """A number for a narrow cell."""
    return "<0.001" if 0 < value < 1e-3 else number(value)


def r_squared(value: float) -> str:
    """A coefficient of determination: three decimals, four close to 1."""
    if not math.isfinite(value):
        return "—"
    return f"{value:.{4 if value > 0.99 else 3}f}".replace("-", MINUS)


def superscript(integer: int) -> str:
    """An exponent in superscript digits."""
    return str(integer).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def quantity(value: Any, unit: str, digits: int = 3) -> str:
    """A number with its unit; words have none."""
    text = number(value, digits)
    return f"{text}{NO_BREAK}{unit}" if unit and value is not None and math.isfinite(value) else text


def mean_and_std(mean: Any, std: Any) -> tuple[str, str]:
    """Both to the same decimal: that of the second significant digit of the deviation."""
    if mean is None or std is None or not math.isfinite(mean) or not math.isfinite(std) or std <= 0:
        return number(mean), number(std)
    decimals = 1 - math.floor(math.log10(std))
    if decimals > 6 or decimals < -1:
        return number(mean), number(std, 2)
    return tuple(f"{v:,.{max(0, decimals)}f}".replace("-", MINUS) for v in (mean, std))  # type: ignore[return-value]


def percent(value: float | None, digits: int = 0) -> str:
    """A signed percentage."""
    if value is None or not math.isfinite(value):
        return "—"
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return f"{text}{NO_BREAK}%"


def count(value: Any, singular: str, plural: str | None = None) -> str:
    """1 seed, 5 seeds."""
    noun = singular if value == 1 else plural or f"{singular}s"
    return f"{integer(value)}{NO_BREAK}{noun}"


def integer(value: Any) -> str:
    """With separators of thousands; "—" for what is missing."""
    return "—" if value is None else f"{int(value):,}"


def duration(seconds: Any) -> str:
    """In the two largest units that matter."""
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds):
        return "—"
    if seconds < 1:
        return f"{seconds:.2g}{NO_BREAK}s"
    whole = round(seconds)
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    found: list[tuple[int, str]] = []
    for name, size in units:
        amount, whole = divmod(whole, size)
        if amount or found:
            found.append((amount, name))
    return " ".join(f"{amount}{NO_BREAK}{name}" for amount, name in found[:2] if amount)


def moment(value: Any) -> str:
    """An ISO time or a Unix time, in UTC to the minute."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        time = datetime.fromtimestamp(value, timezone.utc)
    else:
        try:
            time = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        except ValueError:
            return "—" if value in (None, "") else str(value)
        if time.tzinfo is not None:
            time = time.astimezone(timezone.utc)
    return f"{time:%Y-%m-%d %H:%M}" + (" UTC" if time.tzinfo else "")


def listing(words: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def weights_ratio(objective: Mapping[str, Any]) -> str:
    """The loss weights of energy, forces and stress as the paper writes them: 1 : 500 : 500."""
    weights = [objective.get(f"{label}_weight") for label in ("energy", "forces", "stress")]
    return f"{NO_BREAK}:{NO_BREAK}".join("?" if w is None else f"{float(w):g}" for w in weights)


def flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested options as dotted names and printed values."""
    found: list[tuple[str, str]] = []
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            found += flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, Mapping) for v in value):
            for i, entry in enumerate(value, 1):
                found += flat(entry, f"{prefix}{key}.{i}.")
        else:
            found.append((f"{prefix}{key}", plain(value)))
    return found


def plain(value: Any) -> str:
    """A setting as a reader writes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(v) for v in value)
    return str(value)
