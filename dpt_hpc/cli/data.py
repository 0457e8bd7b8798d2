"""Verbs on datasets: ingest, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpt_hpc.cli.app import Json, Quiet, app, console, one_of, print_json
from dpt_hpc.errors import ConfigError


@app.command(epilog="Example: `dpt-hpc ingest relax.extxyz --out data/mine --max-atoms 64 --max-force 25`")
def ingest(
    sources: Annotated[list[str], typer.Argument(metavar="SRC...", help="Structure files.")],
    out: Annotated[Path, typer.Option(help="The dataset directory to write.")],
    file_format: Annotated[str | None, typer.Option("--format", help="Read every source as this format.")] = None,
    energy_kind: Annotated[str | None, typer.Option(help="total or per_atom.")] = None,
    energy_unit: Annotated[str | None, typer.Option(help="eV, meV, Ha, ...")] = None,
    forces_unit: Annotated[str | None, typer.Option(help="eV/A, Ha/Bohr, ...")] = None,
    stress_unit: Annotated[str | None, typer.Option(help="eV/A^3, GPa or kbar.")] = None,
    stress_sign: Annotated[str | None, typer.Option(help="tension_positive or compression_positive.")] = None,
    energy_key: Annotated[str | None, typer.Option(help="Name of the energy in the records.")] = None,
    forces_key: Annotated[str | None, typer.Option(help="Name of the forces in the records.")] = None,
    stress_key: Annotated[str | None, typer.Option(help="Name of the stress in the records.")] = None,
    target: Annotated[list[str] | None, typer.Option(metavar="NAME=UNIT", help="A property to learn.")] = None,
    id_key: Annotated[str | None, typer.Option(help="Field that holds a record's id.")] = None,
    group_key: Annotated[str | None, typer.Option(help="Field that names the material; else the formula.")] = None,
    require: Annotated[list[str] | None, typer.Option(help="A label that every record must have.")] = None,
    min_atoms: Annotated[int, typer.Option(help="Drop smaller structures; the paper drops those of one atom: 2.")] = 1,
    max_atoms: Annotated[int | None, typer.Option(help="Drop larger structures.")] = None,
    max_force: Annotated[float | None, typer.Option(help="Drop larger force components, eV/Å.")] = None,
    max_stress: Annotated[float | None, typer.Option(help="Drop larger stress components, GPa.")] = None,
    stride: Annotated[int, typer.Option(help="Keep every k-th record.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Stop after so many kept records of each source.")] = None,
    skip_broken: Annotated[bool, typer.Option(help="List broken records and go on, instead of refusing.")] = False,
    keep_duplicates: Annotated[bool, typer.Option(help="Keep records that repeat an earlier one.")] = False,
    check: Annotated[bool, typer.Option(help="Compare units and signs of the labels with each other.")] = True,
    dtype: Annotated[str, typer.Option(help="Of positions, forces, stress: float64 or float32.")] = "float64",
    compression: Annotated[str | None, typer.Option(help="gzip or lzf; none reads fastest.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the data, for the cards of models trained on it.")] = None,
    citation: Annotated[str | None, typer.Option(help="What whoever uses the data should cite.")] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Read structure files, check their labels, units and signs, and write a dataset of HDF5 shards."""
    from dpt_hpc.data.ingest import IngestOptions
    from dpt_hpc.data.ingest import ingest as run
    from dpt_hpc.data.progress import IngestProgress

    pairs = [pair.partition("=") for pair in target or []]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ConfigError(f"--target {wrong[0]}: expected NAME=UNIT, for example band_gap=eV.")
    options = IngestOptions(
        format=file_format,
        energy_kind=energy_kind,
        energy_unit=energy_unit,
        forces_unit=forces_unit,
        stress_unit=stress_unit,
        stress_sign=stress_sign,
        energy_key=energy_key,
        forces_key=forces_key,
        stress_key=stress_key,
        targets={name: unit for name, _, unit in pairs},
        id_key=id_key,
        group_key=group_key,
        require=tuple(require or ()),
        min_atoms=min_atoms,
        max_atoms=max_atoms,
        max_force=max_force,
        max_stress=max_stress,
        stride=stride,
        limit=limit,
        skip_broken=skip_broken,
        keep_duplicates=keep_duplicates,
        check=check,
        dtype=one_of("--dtype", dtype, ("float64", "float32")),
        compression=one_of("--compression", compression, (None, "gzip", "lzf")),
    )
    origin = {name: text for name, text in (("licence", licence), ("citation", citation)) if text}
    with IngestProgress(sources, file_format, quiet=quiet or as_json) as progress:
        report = run(sources, out, options, progress.told, origin=origin)
    if as_json:
        print_json(report.as_json())
    elif not quiet:
        for line in report.lines():
            console.print(line, markup=False, soft_wrap=True)


@app.command(epilog="Example: `dpt-hpc inspect data/mine`")
def inspect(dataset: Path, as_json: Json = False) -> None:
    """Counts, elements, label ranges, units and provenance of a dataset."""
    from dpt_hpc.data.inspect import inspect_dataset, render_summary

    summary = inspect_dataset(dataset)
    print_json(summary.as_json()) if as_json else console.print(render_summary(summary))
