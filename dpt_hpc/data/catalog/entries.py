"""The catalog: for each dataset its files with addresses and SHA-256, licence, citation, and options of ingest."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dpt_hpc.data.ingest import IngestOptions
from dpt_hpc.errors import ConfigError
from dpt_hpc.plain_text import from_yaml

OURS = Path(__file__).with_name("datasets.yaml")


FILE_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$"
"""A name within a directory, and no way out of it."""


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OtherForm(Model):
    """The same records in another file, which a mirror may hold instead (packed, for example)."""

    name: str = Field(pattern=FILE_NAME)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int


class RawFile(Model):
    """A file as it is published. name: how it is called here and in a mirror, wherever it comes from.

    url: http(s), or doi:DOI/FILE; None: no public address holds these bytes. sha256: None where none is known.
    size: bytes, None where it is not known.
    """

    name: str = Field(pattern=FILE_NAME)
    url: str | None
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")
    size: int | None
    also: OtherForm | None = None


class Entry(Model):
    """A dataset. labels: names and units after ingest. records: in the files; structures: after ingest, where that ran.

    energy_reference: whose zero its energies have, None where that is not known: datasets of unlike ones are not learnt
    from together. tried: whether the download was tried; ingested: whether the files were read with these options.
    ingest: options of `IngestOptions`; None: the files hold no structures.
    """

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    about: str
    labels: str
    records: int | None
    structures: int | None
    licence: str
    citation: str
    doi: str
    energy_reference: str | None = None
    tried: bool
    ingested: bool
    files: tuple[RawFile, ...] = Field(min_length=1)
    ingest: dict[str, Any] | None

    @property
    def options(self) -> IngestOptions | None:
        """How the files become a dataset; None if they hold no structures."""
        return None if self.ingest is None else IngestOptions(**self.ingest)

    @property
    def short_labels(self) -> str:
        """The labels of one line of a table: what every dataset states in one unit stands without it."""
        return self.labels.replace(" (eV), forces (eV/Å), stress (eV/Å³)", ", forces, stress")

    @property
    def size(self) -> int | None:
        """Bytes to download; None where one of the files' sizes is not known."""
        sizes = [file.size for file in self.files]
        return None if None in sizes else sum(size or 0 for size in sizes)

    @property
    def reference(self) -> str:
        """The citation with its DOI."""
        return f"{self.citation}. https://doi.org/{self.doi}"

    @property
    def unpinned(self) -> list[str]:
        """Names of the files whose SHA-256 is not known."""
        return [file.name for file in self.files if file.sha256 is None]

    @property
    def state(self) -> str:
        """In a few words what is certain about the files and what is not."""
        words = []
        if all(file.url is None for file in self.files):
            words.append("from a mirror only")
        elif not self.tried:
            words.append("download not tried")
        if self.unpinned:
            words.append("no checksum known")
        if self.ingest is not None and not self.ingested:
            words.append("ingest not tried")
        return ", ".join(words) or "tried"

    def lines(self) -> list[str]:
        """What `dpt-hpc data show` prints."""
        text = [
            f"{self.name}: {self.about}",
            f"labels: {self.labels or 'none'}",
            f"records: {'unknown' if self.records is None else f'{self.records:,}'}"
            + ("" if self.structures is None else f", of which {self.structures:,} structures after ingest"),
            f"licence: {self.licence}",
            f"cite: {self.reference}",
            f"state: {self.state}",
        ]
        for file in self.files:
            size = "size unknown" if file.size is None else f"{file.size:,} bytes"
            text.append(f"file {file.name}: {size}, sha256 {file.sha256 or 'unknown (get it with --unverified)'}")
            text.append(f"  {file.url or 'no public address: take it from a --mirror'}")
        if self.ingest is None:
            text.append("ingest: none, the files hold no structures (get them with --raw)")
        else:
            text.append(f"ingest: {', '.join(f'{k} {v}' for k, v in self.ingest.items()) or 'as the files say'}")
        return text


@dataclass(frozen=True)
class Catalog:
    """Entries by name, in the order of the file."""

    source: Path
    entries: dict[str, Entry]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries.values())

    def __getitem__(self, name: str) -> Entry:
        """The entry called `name`. Raises ConfigError that names the nearest ones."""
        if name not in self.entries:
            near = difflib.get_close_matches(name, self.entries, n=3, cutoff=0.4)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`dpt-hpc data list` shows all."
            raise ConfigError(f"dataset {name}: not in the catalog.\n{hint}")
        return self.entries[name]

    @classmethod
    def read(cls, path: Path | None = None) -> Catalog:
        """The catalog that comes with dpt_hpc, or another one of the same form. Raises ConfigError for a wrong file."""
        path = path or OURS
        try:
            raw = from_yaml(path.read_text(encoding="utf-8"))
            found = TypeAdapter(list[Entry]).validate_python(raw)
            for entry in found:
                _ = entry.options
        except OSError as error:
            raise ConfigError(f"catalog {path}: cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            places = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ConfigError("\n".join([f"catalog {path}: {len(places)} entries are wrong.", *places])) from None
        except ValueError as error:
            raise ConfigError(f"catalog {path}: not valid YAML.\n{error}") from None
        except TypeError as error:  # an option that ingest does not have
            raise ConfigError(f"catalog {path}: ingest: {error}.\nSee `dpt-hpc ingest --help`.") from None
        if len({entry.name for entry in found}) < len(found):
            raise ConfigError(f"catalog {path}: two entries have the same name.")
        return cls(path, {entry.name: entry for entry in found})
