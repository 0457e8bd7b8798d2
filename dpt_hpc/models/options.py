"""What the options of all networks have in common, and how they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from dpt_hpc.models.readout import Pooling
from dpt_hpc.ops import Backend

SHARED_LEAST = {
    "max_neighbors": 1,
    "max_images": 0,
    "num_elements": 1,
    "hidden": 1,
    "layers": 0,
    "readout_hidden": 1,
    "readout_layers": 0,
    "table_knots": 8,
}


@dataclass(frozen=True)
class NetworkOptions:
    """Options that every network has. A network's own class gives them their defaults, says what they mean for it, and
    adds its own; its `name`, a Literal, tells it apart.

    least: smallest values of its integer options, where they are not SHARED_LEAST · positive: options that must be more
    than zero.

    Raises ValueError for a value out of its range.
    """

    least: ClassVar[Mapping[str, int]] = {}
    positive: ClassVar[tuple[str, ...]] = ("cutoff",)

    name: str = ""
    cutoff: float = 8.0
    max_neighbors: int | None = 250
    max_images: int | None = None
    num_elements: int = 100
    hidden: int = 128
    layers: int = 3
    readout_hidden: int = 128
    readout_layers: int = 1
    pooling: Pooling = "add"
    filters: Literal["exact", "table"] = "exact"
    table_knots: int = 512
    backend: Backend = "native"

    def __post_init__(self) -> None:
        for name in self.positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name, least in (SHARED_LEAST | dict(self.least)).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, which this module does not import
