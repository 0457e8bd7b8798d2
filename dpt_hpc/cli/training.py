"""Verbs that train and judge a network: pretrain, finetune, run, evaluate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dpt_hpc.cli.app import Json, Quiet, Resume, Set, app, console


@app.command(epilog="Example: `dpt-hpc pretrain configs/pretrain/cgcnn_1_500_500.yaml --set data.path=data/mptrj`")
def pretrain(config: Path, overrides: Set = None, resume: Resume = False, quiet: Quiet = False) -> None:
    """Pre-train a network on energies, forces and stress, or by denoising."""
    from dpt_hpc.train import signals

    signals.listen()
    from dpt_hpc.train.config import PretrainConfig
    from dpt_hpc.train.config_file import load_config
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
    from dpt_hpc.train.config import FinetuneConfig
    from dpt_hpc.train.config_file import load_config
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
    from dpt_hpc.train.config import PretrainConfig
    from dpt_hpc.train.config_file import kind_of

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
