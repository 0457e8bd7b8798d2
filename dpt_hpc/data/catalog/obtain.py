"""Files of the catalog from a mirror or from their address, checked; and the datasets that they become."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpt_hpc.data.catalog.entries import Entry, OtherForm, RawFile
from dpt_hpc.data.ingest import IngestReport, ingest
from dpt_hpc.data.manifest import MANIFEST_NAME, Manifest, sha256_of, write_atomically
from dpt_hpc.data.progress import IngestProgress
from dpt_hpc.errors import ConfigError, DataError

Say = Callable[[str], None]
Progress = Callable[[int, int | None], None]
RAW = "raw"
"""Folder beside the datasets in which their files are kept."""


@dataclass(frozen=True)
class Sources:
    """Where files come from. mirror: a directory with their names somewhere in it, asked instead of the network.

    unverified: take files whose SHA-256 is not known. progress: called while a file is downloaded.
    """

    mirror: Path | None = None
    unverified: bool = False
    progress: Progress | None = None


@dataclass(frozen=True)
class Obtained:
    """A file that is here: its path, address, digest, whether that was compared with a known one, and its way here."""

    path: Path
    url: str | None
    sha256: str
    verified: bool
    how: str


def obtain(file: RawFile, folder: Path, sources: Sources, say: Say) -> Obtained:
    """`file`, checked: the one in `folder` if it is there, else that of the mirror, else downloaded into `folder`.

    Raises ConfigError for a file without known digest unless `sources.unverified`; DataError for one with another
    digest, or that is nowhere to be had; and as `download` does.
    """
    if file.sha256 is None and not sources.unverified:
        raise ConfigError(
            f"{file.name}: no SHA-256 of this file is known, so nothing would tell a wrong one.\n"
            "Take it nevertheless with --unverified; its digest is printed, and kept with the dataset."
        )
    here = folder / file.name
    if here.exists():
        return _checked(file, here, "already there", say)
    if sources.mirror is not None:
        return _from_mirror(file, sources.mirror, say)
    if file.url is None:
        raise DataError(
            f"{file.name}: no public address holds this file.\n"
            "Name a directory that has it: --mirror DIR, or DPT_HPC_MIRROR."
        )
    from dpt_hpc.data.catalog.download import download

    say(f"{file.name}: from {file.url}")
    return _checked(file, download(file, folder, sources.progress), "downloaded", say)


def _checked(file: RawFile | OtherForm, path: Path, how: str, say: Say) -> Obtained:
    found = sha256_of(path)
    if file.sha256 is not None and found != file.sha256:
        raise DataError(
            f"{path}: SHA-256 is {found}, expected {file.sha256}: not the file of that name, or damaged.\n"
            "Delete it and run the same command again, or name another --mirror."
        )
    told = "as pinned" if file.sha256 else "NOT VERIFIED, none is known"
    say(f"{path.name}: {how}, {path.stat().st_size:,} bytes, sha256 {found} ({told})")
    return Obtained(path, getattr(file, "url", None), found, file.sha256 is not None, how)


def _from_mirror(file: RawFile, mirror: Path, say: Say) -> Obtained:
    """The file of that name anywhere in the mirror; where several have it, the one with the right digest."""
    if not mirror.is_dir():
        raise ConfigError(f"--mirror {mirror}: no such directory.\nFill one with `dpt-hpc data mirror DIR NAME`.")
    forms: list[RawFile | OtherForm] = [file, *([file.also] if file.also else [])]
    wrong: DataError | None = None
    for form in forms:
        for path in _called(form.name, mirror):
            try:
                found = _checked(form, path, "from the mirror", say)
            except DataError as error:
                wrong = wrong or error
            else:
                return Obtained(found.path, file.url, found.sha256, found.verified, found.how)
    if wrong is not None:
        raise wrong
    names = " nor ".join(form.name for form in forms)
    raise DataError(
        f"--mirror {mirror}: has no {names}.\n"
        "Add it where there is internet with `dpt-hpc data mirror DIR NAME`, or leave --mirror out to download it."
    )


def _called(name: str, folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        if name in names:
            yield Path(place) / name


def get_dataset(
    entry: Entry, out: Path, sources: Sources, say: Say, *, raw: bool = False, quiet: bool = True
) -> IngestReport | None:
    """Make the dataset `out`/NAME of the files of `entry`; with `raw`, only put the files into `out`/raw/NAME.

    Files are downloaded to that folder, and read where a mirror has them. The dataset's provenance then has licence,
    citation, addresses and digests. quiet: do not say how far the ingest is. Returns None where nothing was ingested.
    Raises as `obtain` and `ingest` do, and DataError if `out`/NAME is a dataset of something else.
    """
    target, folder = out / entry.name, out / RAW / entry.name
    options = entry.options
    if options is None and not raw:
        raise ConfigError(f"{entry.name}: its files hold no structures.\nGet them with --raw.")
    if not raw and _is_there(entry, target):
        say(f"{target}: already there.")
        return None
    found = [obtain(file, folder, sources, say) for file in entry.files]
    if raw:
        for one in found:
            _place(one.path, folder)
        say(f"{folder}: {len(found)} file{'s' if len(found) > 1 else ''}")
        report = None
    else:
        paths = [one.path for one in found]
        with IngestProgress(paths, options.format if options else None, total=entry.records, quiet=quiet) as progress:
            report = ingest(paths, target, options, progress.told, origin=origin(entry, found))
    say(f"licence: {entry.licence}")
    say(f"cite: {entry.reference}")
    return report


def origin(entry: Entry, found: Sequence[Obtained]) -> dict[str, Any]:
    """What dataset.json says of where a dataset comes from; `dpt-hpc inspect` shows it."""
    return {
        "catalog": entry.name,
        "licence": entry.licence,
        "citation": entry.reference,
        "doi": entry.doi,
        **({} if entry.energy_reference is None else {"energy_reference": entry.energy_reference}),
        "raw_files": [
            {"file": one.path.name, "url": one.url, "sha256": one.sha256, "verified": one.verified, "how": one.how}
            for one in found
        ],
    }


def _is_there(entry: Entry, target: Path) -> bool:
    if not (target / MANIFEST_NAME).exists():
        return False
    if Manifest.read(target).provenance.get("catalog") == entry.name:
        return True
    raise DataError(
        f"dataset {target}: is already there, and not made of the catalog's {entry.name}.\n"
        "Name another directory with --out."
    )


def _place(path: Path, folder: Path) -> None:
    if path.parent != folder:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{path.name}"
        shutil.copyfile(path, temporary)
        temporary.replace(folder / path.name)


def fill_mirror(entries: Sequence[Entry], mirror: Path, sources: Sources, say: Say) -> list[str]:
    """Put the files of `entries` into `mirror`/NAME, and SHA256SUMS beside them; files that are there are kept.

    Returns what could not be had, with the reason: the others are there nevertheless. Raises EnvironmentFault for a
    network or a disk that does not work: it would not for the next file either.
    """
    failed, digests = [], {}
    for entry in entries:
        for file in entry.files:
            try:
                found = obtain(file, mirror / entry.name, sources, say)
            except (ConfigError, DataError) as error:
                failed.append(f"{entry.name}: {str(error).splitlines()[0]}")
                continue
            _place(found.path, mirror / entry.name)
            digests[f"{entry.name}/{found.path.name}"] = found.sha256
    if digests:
        before = mirror / "SHA256SUMS"
        if before.exists():
            old = (line.split("  ", 1) for line in before.read_text().splitlines() if "  " in line)
            digests = {name: digest for digest, name in old} | digests
        write_atomically(before, "".join(f"{d}  {name}\n" for name, d in sorted(digests.items())).encode())
    return failed
