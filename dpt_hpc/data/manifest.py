"""dataset.json: what a dataset directory holds, and the proof that it is whole.

It is written last, under a temporary name that is then renamed: a directory without it is no dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from dpt_hpc.errors import DataError

SCHEMA_VERSION = 1
MANIFEST_NAME = "dataset.json"
UNITS: Mapping[str, str] = {
    "positions": "Å",
    "cell": "Å",
    "energy": "eV, total of the cell",
    "forces": "eV/Å",
    "stress": "eV/Å³, (1/V) dE/dstrain, tension positive",
}
"""Units of every dataset, whatever its source had."""


@dataclass(frozen=True)
class Shard:
    """One HDF5 file of a dataset: name within the directory, SHA-256 of its bytes, size, contents.

    content: SHA-256 of the values in it (`columns.content_digest`); "" in datasets of early versions.
    """

    file: str
    sha256: str
    num_bytes: int
    num_structures: int
    num_atoms: int
    content: str = ""


@dataclass(frozen=True)
class Manifest:
    """The contents of dataset.json.

    property_units: unit of each named property. edge_estimate: how it was made (cutoff Å, max_neighbors, formula).
    statistics: counts and ranges of elements and labels. provenance: sources, options, what was dropped and why.
    """

    num_structures: int
    num_atoms: int
    shards: tuple[Shard, ...]
    property_units: Mapping[str, str]
    edge_estimate: Mapping[str, Any]
    statistics: Mapping[str, Any]
    provenance: Mapping[str, Any]
    units: Mapping[str, str] = field(default_factory=lambda: dict(UNITS))
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of the shards' contents: equal digests, equal data, by whichever release ingested."""
        hashes = [shard.content or shard.sha256 for shard in self.shards]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def write(self, directory: Path) -> None:
        """Publish the dataset: write dataset.json atomically."""
        text = json.dumps({**asdict(self), "digest": self.digest}, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(directory / MANIFEST_NAME, text.encode())

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read dataset.json. Raises DataError if it is missing, unreadable, or of another schema version."""
        path = directory / MANIFEST_NAME
        if not directory.exists():
            raise DataError(
                f"dataset {directory}: no such directory.\nMake it with `dpt-hpc ingest SRC --out {directory}`."
            )
        if not path.is_file():
            if directory.is_dir() and any(directory.glob("shard_*.h5*")):
                raise DataError(
                    f"dataset {directory}: {MANIFEST_NAME} is missing: its ingest did not finish.\n"
                    "Run the same `dpt-hpc ingest` again; it clears what the other left."
                )
            raise DataError(
                f"dataset {directory}: {MANIFEST_NAME} is missing: this is no dataset.\n"
                "Name a directory that `dpt-hpc ingest` wrote."
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            version = raw["schema_version"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: cannot be read: {error!r}.\nIngest the data again.") from None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}.\n"
                "It was written by another version of dpt_hpc: ingest the data again, or use that version."
            )
        try:
            shards = tuple(Shard(**entry) for entry in raw["shards"])
            known = {f.name for f in fields(cls)} - {"shards"}
            return cls(shards=shards, **{key: raw[key] for key in known})
        except (TypeError, KeyError) as error:
            raise DataError(f"{path}: a field is missing or unknown: {error}.\nIngest the data again.") from None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


COPY_AGAIN = "Copy it again from where the dataset came, or ingest again."


def verify_shard(path: Path, shard: Shard, by_hash: bool) -> None:
    """Raise DataError if a shard's file is missing, of another size, not to be read, or (by_hash) not the bytes that
    were written."""
    try:
        if not path.is_file():
            raise DataError(f"shard {path}: is missing.\n{COPY_AGAIN}")
        size = path.stat().st_size
        found = sha256_of(path) if by_hash and size == shard.num_bytes else shard.sha256
    except OSError as error:  # that of a broken disk, or of a server that has gone, names no file
        raise unreadable(path, error) from None
    if size != shard.num_bytes:
        raise DataError(
            f"shard {path}: has {size} bytes, expected {shard.num_bytes}: truncated or replaced.\n{COPY_AGAIN}"
        )
    if found != shard.sha256:
        raise DataError(
            f"shard {path}: SHA-256 is {found[:16]}..., expected {shard.sha256[:16]}...: its bytes have changed.\n"
            f"Training would learn from garbage. {COPY_AGAIN}"
        )


def unreadable(path: Path, error: OSError) -> DataError:
    """The message for a shard that the system does not read."""
    return DataError(
        f"shard {path}: cannot be read on {os.uname().nodename}: {error.strerror or error}.\n"
        f"If other nodes can read it, mend the mount of this one. {COPY_AGAIN}"
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Rename `temporary` to `path` and flush the directory entry."""
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
