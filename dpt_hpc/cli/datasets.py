"""Verbs on the catalog of public datasets (list, show, get, mirror), and leaks between datasets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from dpt_hpc.cli.app import Json, Quiet, app, console, one_of, print_json
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.quickstart import PACKAGE

if TYPE_CHECKING:
    from dpt_hpc.data.progress import Progress

SHOWN = 10
"""Structures of a dataset that `leaks` prints; the file has all."""

data = typer.Typer(
    no_args_is_help=True,
    help="Public datasets by name, mirrors of them, and leaks between datasets.",
    epilog="Example: `dpt-hpc data list`, then `dpt-hpc data get jdft`",
)
app.add_typer(data, name="data")


def _names(incomplete: str) -> list[str]:
    """Names of the catalog for the shell's completion, which does not wait for torch."""
    entries = yaml.safe_load((PACKAGE / "data" / "catalog" / "datasets.yaml").read_text(encoding="utf-8"))
    return [entry["name"] for entry in entries if entry["name"].startswith(incomplete)]


CatalogFile = Annotated[Path | None, typer.Option("--catalog", help="Another catalog of the same form.")]
Mirror = Annotated[
    Path | None,
    typer.Option("--mirror", envvar="DPT_HPC_MIRROR", help="Take the files from this directory, not the internet."),
]
Name = Annotated[str, typer.Argument(help="A name of the catalog.", autocompletion=_names)]
Names = typer.Argument(metavar="NAME...", help="Names of the catalog.", autocompletion=_names)
Unverified = Annotated[
    bool, typer.Option("--unverified", help="Take files whose SHA-256 is not known, and print what it is.")
]


def _say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _silent(line: str) -> None:
    """For --quiet, and where stdout is for one JSON document alone."""


@data.command("list", epilog="Example: `dpt-hpc data list`")
def list_datasets(catalog: CatalogFile = None, as_json: Json = False) -> None:
    """Names, sizes, labels and licences, and what of it could not be tried."""
    from dpt_hpc.data.catalog import Catalog

    entries = list(Catalog.read(catalog))
    if as_json:
        print_json([{**entry.model_dump(mode="json"), "state": entry.state} for entry in entries])
        return
    _say(f"{'name':24}{'records':>10}{'MB':>8}  {'labels':36} state")
    for entry in entries:
        size = "?" if entry.size is None else f"{entry.size / 1e6:.1f}"
        records = "" if entry.records is None else f"{entry.records:,}"
        _say(f"{entry.name:24}{records:>10}{size:>8}  {entry.short_labels:36} {entry.state}")
    _say("`dpt-hpc data show NAME`: files, checksums, licence, citation. `dpt-hpc data get NAME`: the dataset.")


@data.command(epilog="Example: `dpt-hpc data show jdft`")
def show(name: Name, catalog: CatalogFile = None, as_json: Json = False) -> None:
    """Files, addresses, checksums, licence, citation, and the options of its ingest."""
    from dpt_hpc.data.catalog import Catalog

    entry = Catalog.read(catalog)[name]
    if as_json:
        print_json({**entry.model_dump(mode="json"), "state": entry.state})
        return
    for line in entry.lines():
        _say(line)


@data.command(epilog="Example: `dpt-hpc data get jdft --out data`, which makes data/jdft")
def get(
    names: Annotated[list[str], Names],
    out: Annotated[Path, typer.Option(help="The dataset becomes OUT/NAME, its files OUT/raw/NAME.")] = Path("data"),
    raw: Annotated[bool, typer.Option("--raw", help="Only get the files.")] = False,
    mirror: Mirror = None,
    unverified: Unverified = False,
    catalog: CatalogFile = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Download the files, compare their SHA-256, and ingest them with the right units, signs and targets."""
    from dpt_hpc.data.catalog import RAW, Catalog, Sources, get_dataset
    from dpt_hpc.data.progress import Progress

    silent, found, made = quiet or as_json, Catalog.read(catalog), []
    for entry in [found[name] for name in names]:
        with Progress(None, quiet=silent, unit="MB") as progress:
            sources = Sources(mirror, unverified, _in_megabytes(progress))
            report = get_dataset(entry, out, sources, _silent if silent else _say, raw=raw, quiet=silent)
        for line in report.lines() if report is not None and not silent else ():
            _say(line)
        made.append({"name": entry.name, "out": str(out / RAW / entry.name if raw else out / entry.name)})
    if as_json:
        print_json(made)


@data.command(epilog="Example: `dpt-hpc data mirror /project/mirror jdft phonons`, where there is internet")
def mirror(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What --mirror will name.")],
    names: Annotated[list[str] | None, Names] = None,
    everything: Annotated[bool, typer.Option("--all", help="All files that have an address and a checksum.")] = False,
    source: Annotated[Path | None, typer.Option("--mirror", help="Copy them from another mirror.")] = None,
    unverified: Unverified = False,
    catalog: CatalogFile = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fill a directory with the files of datasets, checked, for machines without internet."""
    from dpt_hpc.data.catalog import Catalog, Sources, fill_mirror
    from dpt_hpc.data.progress import Progress

    found = Catalog.read(catalog)
    if everything == bool(names):
        raise ConfigError("data mirror: name the datasets, or say --all.")
    chosen = [found[name] for name in names or ()]
    if everything:
        chosen = [e for e in found if all((f.url or source) and (f.sha256 or unverified) for f in e.files)]
    silent = quiet or as_json
    with Progress(None, quiet=silent, unit="MB") as progress:
        sources = Sources(source, unverified, _in_megabytes(progress))
        failed = fill_mirror(chosen, directory, sources, _silent if silent else _say)
    if failed:
        raise DataError(
            "\n".join([f"{directory}: {len(failed)} file{'s' if len(failed) > 1 else ''} missing.", *failed])
            + "\nThe others are there. `dpt-hpc data show NAME` says where a file is to be had."
        )
    if as_json:
        print_json({"mirror": str(directory), "names": [entry.name for entry in chosen]})


@data.command(
    epilog="Example: `dpt-hpc data leaks data/pretrain data/jdft data/phonons --out leaks.json`; then pre-train with "
    "`--set data.exclude=leaks.json`"
)
def leaks(
    pretraining: Annotated[Path, typer.Argument(help="The dataset of the pre-training.")],
    downstream: Annotated[list[Path], typer.Argument(help="Datasets to look for in it.")],
    run: Annotated[
        Path | None, typer.Option("--run", help="Only the test part of this fine-tuning (all seeds), or of one seed.")
    ] = None,
    by: Annotated[
        str, typer.Option(help="structure: of like composition and geometry; composition: that alone.")
    ] = "structure",
    whole_materials: Annotated[
        bool,
        typer.Option(
            "--whole-materials/--found-only",
            help="Leave out all structures of a material of which one was found, or that one only. A material is a "
            "group that is not merely a formula.",
        ),
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Write what is found as JSON, for data.exclude.")] = None,
    as_json: Json = False,
) -> None:
    """Structures of downstream datasets that a pre-training dataset holds: tests on them would flatter."""
    from dpt_hpc.data.leaks import find_leaks, leaks_as_json, part_tested_by, to_exclude
    from dpt_hpc.data.manifest import write_atomically
    from dpt_hpc.data.progress import Progress
    from dpt_hpc.data.shards import Dataset

    kind: Any = one_of("--by", by, ("structure", "composition"))
    if run is not None and len(downstream) > 1:
        raise ConfigError(f"data leaks: --run {run} is of one dataset, but {len(downstream)} are named.")
    held, found = Dataset.open(pretraining), []
    for path in downstream:
        dataset = Dataset.open(path)
        part = None if run is None else part_tested_by(run, dataset)
        names = (str(path), "all" if run is None else f"test part of {run}")
        with Progress(None, quiet=as_json, unit="pairs") as progress:
            found.append(find_leaks(held, dataset, part, by=kind, names=names, progress=progress.go_on))
    exclusion = to_exclude(held, found, whole_materials=whole_materials)
    content = leaks_as_json(held, str(pretraining), kind, found, exclusion)
    if out is not None:
        write_atomically(out, json.dumps(content, indent=1, ensure_ascii=False).encode())
    if as_json:
        print_json(content)
        return
    for leak in found:
        _say(leak.line())
        for match in leak.matches[:SHOWN]:
            _say(f"  {match.structure_id}: {', '.join(match.found_as)}")
        if len(leak.matches) > SHOWN:
            _say(f"  and {len(leak.matches) - SHOWN} more (--out FILE lists all)")
    for line in exclusion.lines(len(held), out, "--by composition"):
        _say(line)


def _in_megabytes(progress: Progress) -> Callable[[int, int | None], None]:
    """What a download calls with its bytes."""
    return lambda done, total: progress.go_on(done // 10**6, None if total is None else total // 10**6)
