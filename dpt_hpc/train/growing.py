"""An npz that is written piece by piece, so that it may be larger than the memory."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.train.durable import publish_file


class GrowingArrays:
    """Arrays that grow by rows. They are kept in a hidden folder beside `path` until `publish`.

    Pieces of one name have rows of one shape; text may be wider in one piece than in another.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, path.with_name(f".{path.name}.parts")
        shutil.rmtree(self._folder, ignore_errors=True)  # of a run that was killed here
        self._folder.mkdir(parents=True)
        self._pieces: dict[str, list[tuple[tuple[int, ...], np.dtype[Any]]]] = {}

    def add(self, pieces: Mapping[str, NDArray[Any]]) -> None:
        """Append rows to the arrays of these names. Raises OSError if they cannot be written."""
        for name, rows in pieces.items():
            self._pieces.setdefault(name, []).append((rows.shape, rows.dtype))
            with (self._folder / name).open("ab") as file:
                file.write(np.ascontiguousarray(rows).tobytes())

    def publish(self) -> None:
        """Write all of them into the npz, compressed, and rename it to its place once it is on the disk."""
        temporary = self._path.with_name(f".{self._path.name}")
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(self._pieces):
                with (
                    archive.open(f"{name}.npy", "w", force_zip64=True) as into,
                    (self._folder / name).open("rb") as own,
                ):
                    self._copy(self._pieces[name], own, into)
        publish_file(temporary, self._path)
        shutil.rmtree(self._folder)

    def discard(self) -> None:
        """Leave nothing behind."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _copy(pieces: list[tuple[tuple[int, ...], np.dtype[Any]]], own: Any, into: Any) -> None:
        dtype = np.result_type(*{dtype for _, dtype in pieces})
        shape = (sum(shape[0] for shape, _ in pieces), *pieces[0][0][1:])
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(into, header)
        for piece, found in pieces:
            rows = np.frombuffer(own.read(int(np.prod(piece)) * found.itemsize), dtype=found)
            into.write(rows.astype(dtype, copy=False).tobytes())
