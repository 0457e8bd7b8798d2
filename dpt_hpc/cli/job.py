"""The verb config job: a job file that ships with dpt_hpc, with this machine's Python and the wanted size in it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dpt_hpc.cli.app import console, one_of
from dpt_hpc.cli.config import config
from dpt_hpc.errors import ConfigError
from dpt_hpc.quickstart import shipped

FILES = {
    "slurm": "slurm.sbatch",
    "suite": "suite.sbatch",
    "scaling": "scaling.sbatch",
    "pbs": "pbs.sh",
    "mpirun": "mpirun.sh",
    "deepspeed": "deepspeed.sh",
    "local": "local.sh",
}
START = {
    "slurm": "sbatch FILE CONFIG",
    "suite": "sbatch --array=0-9 FILE CONFIG",
    "scaling": "sbatch FILE CONFIG",
    "pbs": "qsub -v CONFIG=CONFIG FILE",
}


def _kinds(incomplete: str) -> list[str]:
    return [kind for kind in FILES if kind.startswith(incomplete)]


@config.command(
    epilog="Example: `dpt-hpc config job slurm --nodes 2 --ranks-per-node 4 --time 12:00:00 --out job.sbatch`, then "
    "`sbatch job.sbatch CONFIG`"
)
def job(
    kind: Annotated[str, typer.Argument(metavar="KIND", help=", ".join(FILES), autocompletion=_kinds)],
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes.")] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="As many as a node has GPUs, if any.")] = None,
    cores_per_rank: Annotated[int | None, typer.Option(min=1, help="A node's cores over its ranks.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs.")] = None,
    time: Annotated[str | None, typer.Option(help="Wall time, e.g. 12:00:00.")] = None,
    account: Annotated[str | None, typer.Option(help="Whom the job is charged to.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition of Slurm, or queue of PBS.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; else it is printed.")] = None,
) -> None:
    """A job file for a cluster, or a script for one machine, that starts `dpt-hpc run CONFIG` on every rank."""
    source = shipped("launch") / FILES[one_of("KIND", kind, tuple(FILES))]
    size = {"nodes": nodes, "ranks": ranks_per_node, "cores": cores_per_rank, "gpus": gpus_per_node}
    text = with_options(kind, source, {**size, "time": time, "account": account, "partition": partition})
    if out is None:
        print(text, end="")
        return
    if out.exists():
        raise ConfigError(f"--out {out}: exists already.\nName a new file, or remove this one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    out.chmod(0o755)
    start = START.get(kind, "bash FILE CONFIG").replace("FILE", str(out))
    console.print(f"wrote {out}; start it with: {start}", markup=False, soft_wrap=True)


def with_options(kind: str, source: Path, options: Mapping[str, Any]) -> str:
    """The text of the job file `source`, with the `options` that are not None in its directives and defaults.

    Raises ConfigError for an option that this kind of job has no place for.
    """
    text = source.read_text(encoding="utf-8")
    text = text.replace("${PYTHON:-.venv/bin/python}", f"${{PYTHON:-{sys.executable}}}")
    text = text.replace("${LAUNCH:-launch}", f"${{LAUNCH:-{source.parent}}}")
    asked = {name: value for name, value in options.items() if value is not None}
    if source.suffix == ".sbatch":
        for name, value in asked.items():
            text = _directive(text, "#SBATCH --", f"{SLURM[name]}=", str(value))
        return text
    if kind == "pbs":
        return _pbs(text, asked)
    if "RANKS=${RANKS:-2}" in text and "ranks" in asked:
        text = text.replace("RANKS=${RANKS:-2}", f"RANKS=${{RANKS:-{asked.pop('ranks')}}}")
    if asked:
        option = {"ranks": "ranks-per-node", "cores": "cores-per-rank", "gpus": "gpus-per-node"}
        name = next(iter(asked))
        raise ConfigError(f"--{option.get(name, name)}: {kind} asks no scheduler for anything.\nLeave it out.")
    return text


SLURM = {
    "nodes": "nodes",
    "ranks": "ntasks-per-node",
    "cores": "cpus-per-task",
    "gpus": "gpus-per-node",
    "time": "time",
    "account": "account",
    "partition": "partition",
}


def _pbs(text: str, asked: Mapping[str, Any]) -> str:
    ranks, cores = asked.get("ranks", 1), asked.get("cores", 1)
    gpus = f":ngpus={asked['gpus']}" if "gpus" in asked else ""
    chunk = f"{asked.get('nodes', 1)}:ncpus={ranks * cores}{gpus}:mpiprocs={ranks}:ompthreads={cores}"
    if {"nodes", "ranks", "cores", "gpus"} & set(asked):
        text = _directive(text, "#PBS -l ", "select=", chunk)
    for name, directive in (("time", "-l walltime="), ("account", "-A "), ("partition", "-q ")):
        if name in asked:
            text = _directive(text, "#PBS ", directive, str(asked[name]))
    return text


def _directive(text: str, mark: str, name: str, value: str) -> str:
    """`text` with the line `mark``name``value`, in place of the one of that name, or before the first directive."""
    line = f"{mark}{name}{value}"
    if re.search(rf"^{re.escape(mark + name)}", text, flags=re.MULTILINE):
        return re.sub(rf"^{re.escape(mark + name)}.*$", lambda _: line, text, count=1, flags=re.MULTILINE)
    return re.sub(rf"^(?={re.escape(mark.split()[0])} )", lambda _: f"{line}\n", text, count=1, flags=re.MULTILINE)
