"""Verbs that train and judge a network: pretrain, finetune, run, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dpt_hpc.cli.app import Json, Quiet, Resume, Set, app, console, print_json, told_early
from dpt_hpc.train.world import place_so_far

Check = Annotated[
    bool,
    typer.Option(
        "--check", help="Try everything, a few steps included; say what memory and time it takes; write nothing."
    ),
]


@app.command(
    epilog="Example: `dpt-hpc pretrain configs/pretrain/cgcnn_1_500_500.yaml --set data.path=data/mptrj`; first with "
    "`--check`"
)
def pretrain(
    config: Path,
    overrides: Set = None,
    resume: Resume = False,
    check: Check = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pre-train a network on energies, forces and stress, or by denoising."""
    _train(config, "pretrain", overrides, resume=resume, check=check, quiet=quiet, as_json=as_json)


@app.command(epilog="Example: `dpt-hpc finetune configs/finetune/cgcnn_jdft.yaml --set pretrained=runs/pretrain`")
def finetune(
    config: Path,
    overrides: Set = None,
    resume: Resume = False,
    check: Check = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a pre-trained network to a property, over several seeds; without one: the baseline."""
    _train(config, "finetune", overrides, resume=resume, check=check, quiet=quiet, as_json=as_json)


@app.command("run", hidden=True, epilog="Example: `dpt-hpc run configs/pretrain/cgcnn_1_500_500.yaml`")
def run_config(
    config: Path,
    overrides: Set = None,
    resume: Resume = False,
    check: Check = False,
    quiet: Quiet = False,
    as_json: Json = False,
    array: Annotated[int | None, typer.Option(min=0, help="A job of an array: its seed, in run_dir/array_N.")] = None,
) -> None:
    """Run the verb that the config names: what `python -m dpt_hpc.launch` calls on every rank."""
    _train(config, None, overrides, resume=resume, check=check, quiet=quiet, as_json=as_json, array=array)


def _train(
    config: Path,
    task: str | None,
    overrides: list[str] | None,
    *,
    resume: bool,
    check: bool,
    quiet: bool,
    as_json: bool,
    array: int | None = None,
) -> None:
    """What pretrain, finetune and run share. task: None for the one that the config names."""
    from dpt_hpc.train import signals

    peers = place_so_far()[1] > 1
    signals.listen(peers=peers)
    from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
    from dpt_hpc.train.config_file import TASKS, load_any_config, load_config, of_an_array

    def read() -> PretrainConfig | FinetuneConfig:
        kind: Any = TASKS.get(task or "")
        options: Any = load_config(config, kind, overrides or []) if kind else load_any_config(config, overrides or [])
        return options if array is None else of_an_array(options, array)

    read = told_early(read)
    from dpt_hpc.data.group import agree
    from dpt_hpc.train.finetune import finetune
    from dpt_hpc.train.heartbeat import watched
    from dpt_hpc.train.pretrain import pretrain
    from dpt_hpc.train.ranks import enter_world, leave_world
    from dpt_hpc.train.starts import count_start

    ranks = enter_world()
    options = agree(ranks, read)
    run_dir, first = Path(options.run_dir), ranks.rank == 0
    if check:
        from dpt_hpc.doctor.rehearsal import lines, rehearse

        with watched(ranks, options.engine.rank_timeout, options.run_dir):
            figures = rehearse(options, ranks, resume=resume)
        leave_world()
        if first:
            print_json(figures) if as_json else console.print("\n".join(lines(figures)), markup=False, soft_wrap=True)
        return
    agree(ranks, lambda: count_start(run_dir, options.checkpoint.max_fruitless_starts) if first else None)
    summary: dict[str, Any] | None = None
    with watched(ranks, options.engine.rank_timeout, options.run_dir):
        if isinstance(options, PretrainConfig):
            pretrain(options, ranks, resume=resume, quiet=quiet or as_json)
        else:
            summary = finetune(options, ranks, resume=resume, quiet=quiet or as_json)
    leave_world()
    if first and as_json:
        print_json({"run_dir": options.run_dir, **json.loads((run_dir / "results.json").read_text())})
    elif first and summary:
        _tell(summary, quiet=quiet)


def _tell(summary: dict[str, Any], *, quiet: bool) -> None:
    from dpt_hpc.report import paper_reference

    if not quiet:
        keys = ("dataset", "structures", "unit", "network", "pooling")
        if paper := paper_reference(*(summary[key] for key in keys)):
            console.print(f"the paper: {', '.join(f'{k} {v:g}' for k, v in paper.items())} {summary['unit']}")


@app.command(epilog="Example: `dpt-hpc evaluate runs/pretrain data/mptrj --out runs/evaluation`")
def evaluate(
    checkpoint: str,
    data: list[str],
    target: Annotated[str | None, typer.Option(help="The property's name in the data, if it is another one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory for predictions and results.")] = None,
    allow_unknown_elements: Annotated[bool, typer.Option(help="Predict for elements that were never seen.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Errors of a trained network (a run or a checkpoint) on a dataset."""
    from dpt_hpc.train.evaluate import evaluate_checkpoint

    errors = evaluate_checkpoint(
        checkpoint,
        tuple(data),
        target=target,
        out=out,
        allow_unknown_elements=allow_unknown_elements,
        quiet=quiet or as_json,
    )
    if as_json:
        print_json(errors)
    else:
        for name, value in errors.items():
            console.print(f"{name:24} {value:.6g}")
