"""Verbs on configs: config init, show, check, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from dpt_hpc.cli.app import Json, Set, app, console, one_of, print_json
from dpt_hpc.errors import ConfigError

config = typer.Typer(
    no_args_is_help=True,
    help="Write, read and check configs, and the job files that run them.",
    epilog="Example: `dpt-hpc config init pretrain --out mine.yaml`, then `dpt-hpc config check mine.yaml`",
)
app.add_typer(config, name="config")

Task = Annotated[str, typer.Argument(metavar="TASK", help="pretrain or finetune.")]


def _kind(task: str) -> Any:
    from dpt_hpc.train.config import FinetuneConfig, PretrainConfig

    kinds = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
    return kinds[one_of("TASK", task, tuple(kinds))]


@config.command(epilog="Example: `dpt-hpc config init pretrain --network torchmd_et --out mine.yaml`")
def init(
    task: Task,
    network: Annotated[str | None, typer.Option(help="cgcnn, torchmd_et, ...")] = None,
    objective: Annotated[str | None, typer.Option(help="derivatives, derivative_denoising, ...")] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; else it is printed.")] = None,
) -> None:
    """A config with every option, its default and its meaning."""
    from dpt_hpc.train.config_template import members, template

    kind, chosen = _kind(task), {}
    for option, name, value in (("--network", "model", network), ("--objective", "objective", objective)):
        if value is not None:
            chosen[name] = one_of(option, value, tuple(members(kind, name)))
    text = template(kind, chosen)
    if out is None:
        print(text, end="")
        return
    if out.exists():
        raise ConfigError(f"--out {out}: exists already.\nName a new file, or remove this one.")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    console.print(f"wrote {out}: put your run_dir and data.path there, then dpt-hpc config check {out}", soft_wrap=True)


@config.command(epilog="Example: `dpt-hpc config show configs/pretrain/cgcnn_1_500_500.yaml --set training.epochs=5`")
def show(file: Path, overrides: Set = None, as_json: Json = False) -> None:
    """A config as a run would take it: every default spelled out."""
    content = _load(file, overrides).model_dump(mode="json")
    if as_json:
        print_json(content)
    else:
        print(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), end="")


@config.command(epilog="Example: `dpt-hpc config check mine.yaml --set data.path=data/mine`")
def check(file: Path, overrides: Set = None, as_json: Json = False) -> None:
    """Whether a config is valid, and its data and files are there. Starts nothing; `pretrain --check` tries a step."""
    options = _load(file, overrides)
    # Only now: these import torch, and a wrong option is told before that.
    from dpt_hpc.data.leaks import read_exclusion
    from dpt_hpc.data.shards import Dataset
    from dpt_hpc.train.compat import differences
    from dpt_hpc.train.parts import make_split, target_values
    from dpt_hpc.train.pretrained import find_pretrained

    dataset = Dataset.open(options.data.path, verify=False)
    found: dict[str, Any] = {"file": str(file), "task": options.task}
    if getattr(options, "pretrained", None) is not None:
        found["pretrained"] = str(find_pretrained(options.pretrained, options.pretrained_epochs))
    if hasattr(options.objective, "target"):
        target_values(dataset, options.objective.target)
    seed = options.seeds[0] if hasattr(options, "seeds") else options.seed
    excluded = None if options.data.exclude is None else read_exclusion(options.data.exclude, dataset)
    split = make_split(dataset, options.data.split, options.objective, seed, options.data.path, excluded)
    found |= {part: len(getattr(split, part)) for part in ("train", "validation", "test")}
    found["unlike_the_paper"] = differences(options.compat, options) or None
    if as_json:
        print_json(found)
        return
    if "pretrained" in found:
        console.print(f"pre-trained: {found['pretrained']}", soft_wrap=True)
    sizes = f"{found['train']} / {found['validation']} / {found['test']}"
    console.print(f"{file}: valid; {sizes} structures to train, validate, test", soft_wrap=True)
    if found["unlike_the_paper"]:
        console.print(found["unlike_the_paper"], soft_wrap=True)


@config.command(epilog="Example: `dpt-hpc config schema pretrain > pretrain.schema.json`")
def schema(task: Task) -> None:
    """The JSON schema of a config, with which an editor completes and checks it."""
    from dpt_hpc.train.config_template import schema as schema_of

    print(json.dumps(schema_of(_kind(task)), indent=1, ensure_ascii=False))


def _load(file: Path, overrides: list[str] | None) -> Any:
    from dpt_hpc.train.config_file import load_any_config

    return load_any_config(file, overrides or [])
