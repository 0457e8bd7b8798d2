"""Verbs for a machine and its jobs: doctor, bench."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dpt_hpc.cli.app import Json, Set, app, console, one_of, print_json, told_early
from dpt_hpc.errors import EnvironmentFault


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
    from dpt_hpc.train.config_file import load_any_config

    file, changes = or_sample(config, overrides)
    read = told_early(lambda: load_any_config(file, changes))
    from dpt_hpc.doctor.examine import examine
    from dpt_hpc.train.heartbeat import watched
    from dpt_hpc.train.ranks import enter_world, leave_world

    here = enter_world()
    findings = []
    options = read()
    with watched(here, options.engine.rank_timeout, options.run_dir):
        for finding in examine(options, here, limit):
            findings.append(finding)
            if here.rank == 0 and not as_json:
                console.print(finding.render(), soft_wrap=True)
    leave_world()
    bad = sum(finding.status == "bad" for finding in findings)
    if here.rank == 0 and as_json:
        print_json({"ok": not bad, "findings": [finding.as_json() for finding in findings]})
    if bad:
        raise typer.Exit(EnvironmentFault.exit_code)


bench = typer.Typer(
    no_args_is_help=True,
    help="Benchmarks of this machine.",
    epilog="Example: `dpt-hpc bench scaling --ranks 1,2 --predict`",
)
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
    from dpt_hpc.train.config import PretrainConfig
    from dpt_hpc.train.config_file import load_config

    kind: Any = one_of("--mode", mode, ("weak", "strong"))
    file, changes = or_sample(config, overrides)
    read = told_early(lambda: None if only_report else load_config(file, PretrainConfig, changes))
    from dpt_hpc.report.scaling import write_scaling_report
    from dpt_hpc.scaling.bench import conclude, measure_each, measure_here, rank_counts
    from dpt_hpc.scaling.predict import Network
    from dpt_hpc.train.heartbeat import watched
    from dpt_hpc.train.ranks import enter_world, leave_world

    here = enter_world()
    counts = rank_counts(ranks, here)
    if (options := read()) is not None:
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
    by: Any = one_of("--clock", clock, ("wall", "cpu"))
    result = conclude(kind, out, counts, predict=predict, network=network, conditions=conditions, clock=by)
    text = write_scaling_report(result, out)
    print_json(result) if as_json else print(text)


def or_sample(config: Path | None, overrides: list[str] | None) -> tuple[Path, list[str]]:
    """The config that is meant: the one given, or the paper's pre-training on the data that ships with dpt_hpc."""
    if config is not None:
        return config, overrides or []
    from dpt_hpc.quickstart import PACKAGE, configs

    sample = f"data.path={PACKAGE / 'sample' / 'mlearn'}"
    return configs() / "pretrain" / "cgcnn_1_500_500.yaml", [sample, "data.split.by=structure", *(overrides or [])]
