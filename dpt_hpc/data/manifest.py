"""dataset.json: what a dataset directory holds, and the proof that it is whole.

It is written last, under a temporary name that is then renamed: a directory without it is no dataset.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dpt_hpc.errors import DataError
from dpt_hpc.plain_text import from_json
from dpt_hpc.structure import SYMBOLS

Count = Annotated[int, Field(ge=0, strict=True)]

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
COPY_AGAIN = "Copy it again from where the dataset came, or ingest again."


@dataclass(frozen=True)
class Shard:
    """One HDF5 file of a dataset: name within the directory, SHA-256 of its bytes, size, contents.

    content: SHA-256 of the values in it (`columns.content_digest`); "" in datasets of early versions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    num_bytes: Count
    num_structures: Annotated[int, Field(ge=1, strict=True)]
    num_atoms: Count
    content: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""


@dataclass(frozen=True)
class Manifest:
    """The contents of dataset.json.

    property_units: unit of each named property. edge_estimate: how it was made (cutoff Å, max_neighbors, formula).
    statistics: counts and ranges of elements and labels. provenance: sources, options, what was dropped and why.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}

    num_structures: Count
    num_atoms: Count
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
        """Read dataset.json. Raises DataError if it is missing, unreadable, contradicts itself, or is of another schema
        version."""
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
            raw = from_json(path.read_bytes())
            version = raw["schema_version"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: cannot be read: {error!r}.\nIngest the data again.") from None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path}: schema_version is {version!r}, expected {SCHEMA_VERSION}.\n"
                "It was written by another version of dpt_hpc: ingest the data again, or use that version."
            )
        digest = raw.pop("digest", None)
        try:
            found = TypeAdapter(cls).validate_python(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(
                f"{path}: {place}: {first['msg']}; got {first['input']!r:.80}.\nIngest the data again."
            ) from None
        if found.num_structures == 0 or not found.shards:
            raise DataError(f"dataset {directory}: is empty (0 structures).\nIngest again with looser filters.")
        if (fault := found._contradiction(digest)) is not None:
            raise DataError(f"{path}: {fault}: it was altered after it was written.\n{COPY_AGAIN}")
        return found

    def _contradiction(self, digest: Any) -> str | None:
        """What in a manifest does not fit the rest of it."""
        for name in ("num_structures", "num_atoms"):
            stated, summed = getattr(self, name), sum(getattr(shard, name) for shard in self.shards)
            if stated != summed:
                return f"{name} is {stated}, but its shards have {summed}"
        if len({shard.file for shard in self.shards}) < len(self.shards):
            return "two of its shards are one file"
        if self.units != UNITS:
            return f"units are {dict(self.units)}, expected {dict(UNITS)}"
        statistics = self.statistics
        if unknown := [name for name in ("labels", "elements", "ranges") if not isinstance(statistics.get(name), dict)]:
            return f"statistics has no {unknown[0]}"
        if unknown := [symbol for symbol in statistics["elements"] if symbol not in SYMBOLS[1:]]:
            return f"statistics.elements names {unknown[0]!r}, which is no element"
        if digest != self.digest:
            return f"digest is {digest!r:.80}, but its shards have {self.digest}"
        return None


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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
