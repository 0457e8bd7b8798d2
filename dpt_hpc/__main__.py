"""The command line: thin verbs over the package, one message for a user's mistake, no traceback unless asked."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from dpt_hpc import __version__
from dpt_hpc.errors import ConfigError, DptError, EnvironmentFault

app = typer.Typer(
    name="dpt-hpc",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Pre-train graph neural networks on crystals by their derivatives, and fine-tune them to a property.",
    epilog="Start with `dpt-hpc quickstart`. `--debug` before a verb shows the traceback of an error.",
)
console = Console(highlight=False)

SECONDS_FOR_THE_FIRST_RANK = 3.0

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override an option, e.g. training.epochs=10.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in run_dir from its last checkpoint.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"dpt-hpc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What comes before the verb."""
    if debug:
        os.environ["DPT_HPC_DEBUG"] = "1"


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
) -> None:
    """Read structure files, check their labels, units and signs, and write a dataset of HDF5 shards."""
    from dpt_hpc.data.ingest import IngestOptions
    from dpt_hpc.data.ingest import ingest as run

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
        dtype=_one_of("--dtype", dtype, ("float64", "float32")),
        compression=_one_of("--compression", compression, (None, "gzip", "lzf")),
    )
    for line in run(sources, out, options).lines():
        console.print(line, markup=False, soft_wrap=True)


@app.command(epilog="Example: `dpt-hpc inspect data/mine`")
def inspect(dataset: Path, as_json: Json = False) -> None:
    """Counts, elements, label ranges, units and provenance of a dataset."""
    from dpt_hpc.data.inspect import inspect_dataset, render_summary

    summary = inspect_dataset(dataset)
    print(json.dumps(summary.as_json())) if as_json else console.print(render_summary(summary))


@app.command(epilog="Example: `dpt-hpc pretrain configs/pretrain/cgcnn_1_500_500.yaml --set data.path=data/mptrj`")
def pretrain(config: Path, overrides: Set = None, resume: Resume = False, quiet: Quiet = False) -> None:
    """Pre-train a network on energies, forces and stress, or by denoising."""
    from dpt_hpc.train import signals

    signals.listen()
    from dpt_hpc.train.config import PretrainConfig, load_config
    from dpt_hpc.train.heartbeat import watched
    from dpt_hpc.train.pretrain import pretrain as run
    from dpt_hpc.train.ranks import enter_world, leave_world

    ranks = enter_world()
    options = load_config(config, PretrainConfig, overrides or [])
    with watched(ranks, options.engine.rank_timeout, options.run_dir):
        run(options, ranks, resume=resume, quiet=quiet)
    leave_world()


@app.command(epilog="Example: `dpt-hpc finetune configs/finetune/cgcnn_jdft.yaml --set pretrained=runs/pretrain`")
def finetune(
    config: Path, overrides: Set = None, resume: Resume = False, quiet: Quiet = False, as_json: Json = False
) -> None:
    """Fine-tune a pre-trained network to a property, over several seeds; without one: the baseline."""
    from dpt_hpc.report import paper_reference
    from dpt_hpc.train import signals

    signals.listen()
    from dpt_hpc.train.config import FinetuneConfig, load_config
    from dpt_hpc.train.finetune import finetune as run
    from dpt_hpc.train.heartbeat import watched
    from dpt_hpc.train.ranks import enter_world, leave_world

    ranks = enter_world()
    options = load_config(config, FinetuneConfig, overrides or [])
    with watched(ranks, options.engine.rank_timeout, options.run_dir):
        summary = run(options, ranks, resume=resume, quiet=quiet or as_json)
    leave_world()
    if ranks.rank:
        return
    if as_json:
        print(json.dumps(summary))
    elif not quiet:
        keys = ("dataset", "structures", "unit", "network", "pooling")
        if paper := paper_reference(*(summary[key] for key in keys)):
            console.print(f"the paper: {', '.join(f'{k} {v:g}' for k, v in paper.items())} {summary['unit']}")


@app.command("run", hidden=True)
def run_config(config: Path, overrides: Set = None, resume: Resume = False, quiet: Quiet = False) -> None:
    """Run the verb that the config names: what `python -m dpt_hpc.launch` calls on every rank."""
    from dpt_hpc.train.config import PretrainConfig, kind_of

    verb = pretrain if kind_of(config) is PretrainConfig else finetune
    verb(config, overrides=overrides, resume=resume, quiet=quiet)


@app.command(epilog="Example: `dpt-hpc evaluate runs/pretrain data/mptrj --out runs/evaluation`")
def evaluate(
    checkpoint: str,
    data: list[str],
    target: Annotated[str | None, typer.Option(help="The property's name in the data, if it is another one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for predictions and results.")] = None,
    allow_unknown_elements: Annotated[bool, typer.Option(help="Predict for elements that were never seen.")] = False,
    as_json: Json = False,
) -> None:
    """Errors of a trained network (a run or a checkpoint) on a dataset."""
    from dpt_hpc.train.evaluate import evaluate_checkpoint

    errors = evaluate_checkpoint(
        checkpoint, tuple(data), target=target, out=out, allow_unknown_elements=allow_unknown_elements
    )
    if as_json:
        print(json.dumps(errors))
    else:
        for name, value in errors.items():
            console.print(f"{name:24} {value:.6g}")


@app.command(
    epilog="Example: `dpt-hpc doctor configs/pretrain/cgcnn_1_500_500.yaml`; in a job, on all its ranks, "
    "`srun python -m dpt_hpc.launch doctor CONFIG`"
)
def doctor(
    config: Annotated[Path | None, typer.Argument(help="The run to come; else the paper's on the sample data.")] = None,
    overrides: Set = None,
    limit: Annotated[float, typer.Option(min=1, help="Seconds for each check; a hanging one ends the doctor.")] = 300.0,
    as_json: Json = False,
) -> None:
    """Check software, ranks, network, files, gradients and checkpoints before a job; red lines end with exit code 4."""
    from dpt_hpc.doctor.examine import examine
    from dpt_hpc.train.config import kind_of, load_config
    from dpt_hpc.train.heartbeat import watched
    from dpt_hpc.train.ranks import enter_world, leave_world

    here = enter_world()
    file, changes = _or_sample(config, overrides)
    findings = []
    options: Any = load_config(file, kind_of(file), changes)  # type: ignore[type-var]
    with watched(here, options.engine.rank_timeout, options.run_dir):
        for finding in examine(options, here, limit):
            findings.append(finding)
            if here.rank == 0 and not as_json:
                console.print(finding.render(), soft_wrap=True)
    leave_world()
    bad = sum(finding.status == "bad" for finding in findings)
    if here.rank == 0 and as_json:
        print(json.dumps({"ok": not bad, "findings": [finding.as_json() for finding in findings]}))
    if bad:
        raise typer.Exit(EnvironmentFault.exit_code)


bench = typer.Typer(no_args_is_help=True, help="Benchmarks of this machine.")
app.add_typer(bench, name="bench")


@bench.command(
    epilog="Examples: `dpt-hpc bench scaling --ranks 1,2 --predict`; in a job `srun -n 64 dpt-hpc bench scaling "
    "CONFIG --out DIR`, once for each size, then `dpt-hpc bench scaling --out DIR --only-report --predict`"
)
def scaling(
    config: Annotated[Path | None, typer.Argument(help="A pre-training; else the paper's on the sample data.")] = None,
    overrides: Set = None,
    mode: Annotated[str, typer.Option(help="weak: structures per rank stay; strong: structures per step.")] = "weak",
    ranks: Annotated[str | None, typer.Option(help="Start so many, e.g. 1,2,4; else use those that are there.")] = None,
    structures: Annotated[int | None, typer.Option(min=1, help="Of a step of one rank; else the batch size.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="To measure, once plainly and once by parts.")] = 10,
    warm_up: Annotated[int, typer.Option(min=0, help="Steps before that.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of each rank that is started.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for what is measured.")] = Path("runs/scaling"),
    only_measure: Annotated[bool, typer.Option("--only-measure", help="Report later, with --only-report.")] = False,
    only_report: Annotated[bool, typer.Option("--only-report", help="Measure nothing; join what is in --out.")] = False,
    predict: Annotated[bool, typer.Option("--predict", help="The curve to 16,000 ranks.")] = False,
    clock: Annotated[str, typer.Option(help="Of the work predicted from: wall; cpu, on a busy machine.")] = "wall",
    latency: Annotated[float, typer.Option(min=0, help="Of the network predicted for, seconds.")] = 5e-6,
    bandwidth: Annotated[float, typer.Option(min=1, help="Of each rank there, bytes/s.")] = 12.5e9,
    file_system: Annotated[float | None, typer.Option(min=1, help="Bytes/s for all ranks; else enough.")] = None,
    checkpoint_minutes: Annotated[float, typer.Option(min=0.1, help="Between two checkpoints there.")] = 30.0,
    jitter: Annotated[float, typer.Option(min=0, help="Deviation of a rank's step time, as a share.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Structures per second on growing numbers of ranks, where the time goes, and which term bends the curve."""
    from dpt_hpc.report.scaling import write_scaling_report
    from dpt_hpc.scaling.bench import conclude, measure_each, measure_here, rank_counts
    from dpt_hpc.scaling.predict import Network
    from dpt_hpc.train.config import PretrainConfig, load_config
    from dpt_hpc.train.heartbeat import watched
    from dpt_hpc.train.ranks import enter_world, leave_world

    kind: Any = _one_of("--mode", mode, ("weak", "strong"))
    here = enter_world()
    counts = rank_counts(ranks, here)
    if not only_report:
        file, changes = _or_sample(config, overrides)
        options = load_config(file, PretrainConfig, changes)
        if counts:
            words = [str(file), "--mode", mode, "--steps", str(steps), "--warm-up", str(warm_up), "--out", str(out)]
            words += [] if structures is None else ["--structures", str(structures)]
            words += [word for change in changes for word in ("--set", change)]
            say = partial(Console(stderr=True, highlight=False).print, markup=False)
            measure_each(counts, kind, ["bench", "scaling", *words, "--only-measure"], out, threads, say)
        else:
            with watched(here, options.engine.rank_timeout, options.run_dir):
                measure_here(options, kind, structures, here, out, warm_up=warm_up, steps=steps)
    leave_world()
    if here.rank or only_measure:
        return
    conditions = {"file_system": file_system, "checkpoint_minutes": checkpoint_minutes, "jitter": jitter}
    network = Network(latency, bandwidth)
    by: Any = _one_of("--clock", clock, ("wall", "cpu"))
    result = conclude(kind, out, counts, predict=predict, network=network, conditions=conditions, clock=by)
    text = write_scaling_report(result, out)
    print(json.dumps(result) if as_json else text)


def _or_sample(config: Path | None, overrides: list[str] | None) -> tuple[Path, list[str]]:
    """The config that is meant: the one given, or the paper's pre-training on the data that ships with dpt_hpc."""
    from dpt_hpc.quickstart import PACKAGE, configs

    if config is not None:
        return config, overrides or []
    sample = f"data.path={PACKAGE / 'sample' / 'mlearn'}"
    return configs() / "pretrain" / "cgcnn_1_500_500.yaml", [sample, "data.split.by=structure", *(overrides or [])]


@app.command(epilog="Example: `dpt-hpc report runs/baseline runs/finetuned --out report.html`")
def report(
    runs: list[Path], out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html")
) -> None:
    """One self-contained HTML page of one or several runs."""
    from dpt_hpc.report import write_report

    console.print(f"wrote {write_report(runs, out)}")


@app.command(epilog="Example: `dpt-hpc quickstart --out runs/quickstart`")
def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for everything that it writes.")] = Path("runs/quickstart"),
) -> None:
    """Ingest, pre-train, fine-tune with and without pre-training, report: on the data that ships with dpt_hpc."""
    from dpt_hpc.quickstart import run_quickstart

    run_quickstart(out, partial(console.print, soft_wrap=True), run_command_line)


def _one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ConfigError(f"{option} {value}: expected one of {', '.join(str(a) for a in allowed if a)}.")
    return value


def run_command_line(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Raises SystemExit for a user's error, with its exit code, after printing its message."""
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as end:
        if end.code:
            raise
    except DptError as error:
        _fail(error, error.exit_code)
    except OSError as error:  # a full disk, a directory without permission: the machine's fault, not the program's
        _fail(error, EnvironmentFault.exit_code)
    except Exception:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        # An error of the program: told in full, but the clean-up of libraries would wait for the other ranks.
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _fail(error: Exception, code: int) -> NoReturn:
    """Print one message and end this process. Of several ranks the first one speaks; another one speaks only if the
    launcher has not ended it by then, that is, if it failed alone."""
    word = getattr(error, "word", DptError.word)
    told_to_stop = word != DptError.word
    if os.environ.get("DPT_HPC_DEBUG") and not told_to_stop:
        raise error
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if rank:
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    place = f" (rank {rank} on {platform.node()})" if rank else ""
    if not (rank and told_to_stop):
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"{word}{place}: {error}", markup=False)
    if ranks > 1:
        # Without the clean-up of libraries, which would wait for the other ranks.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def main() -> None:
    """The console script."""
    run_command_line()


if __name__ == "__main__":
    main()
