from pathlib import Path

from dpt_hpc.data.ingest.units import Units
from dpt_hpc.structure import Structure


class Consistency:
    def __init__(self, path: Path, units: Units) -> None:
        self.s: list[Structure] = []

    def show(self, structure: Structure) -> None: ...
    def conclude(self) -> list[str]:
        return []
