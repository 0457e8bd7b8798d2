"""Verbs that use a trained network: models, predict, embed, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpt_hpc.cli.app import Json, Quiet, app, console, one_of, print_json

if TYPE_CHECKING:
    from dpt_hpc.use import Model

Files = Annotated[list[Path], typer.Argument(metavar="FILES...", help="Structure files, directories, datasets.")]
Checkpoint = Annotated[Path, typer.Argument(help="A run, a checkpoint, an exported model, or a name (dpt-hpc models).")]
Format = Annotated[str | None, typer.Option("--format", help="Read every file as this format.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Precision = Annotated[str | None, typer.Option("--dtype", help="float32 or float64; else that of the weights.")]
Unknown = Annotated[bool, typer.Option("--allow-unknown-elements", help="Predict for elements never seen.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Tell broken records and go on.")]
Force = Annotated[bool, typer.Option("--force", help="Write over what is there.")]
Budget = Annotated[int, typer.Option(min=1, help="Directed edges of a batch; more need more memory.")]
EDGES = 400_000


@app.command(epilog="Example: `dpt-hpc models`, which ship with dpt_hpc; `dpt-hpc models runs/pretrain`, its card")
def models(
    model: Annotated[
        Path | None, typer.Argument(help="A name, a run, a checkpoint, or an exported model, to show its card.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Pre-trained models by name, or the card of any: its network, data, licence, settings and errors."""
    from dpt_hpc.train.checkpoint import load_card
    from dpt_hpc.train.shipped import shipped_models
    from dpt_hpc.use.work import describe

    if model is not None:
        card = load_card(model)
        if as_json:
            print_json(card.content())
        else:
            print(card.text(), end="")
        return
    found = [describe(name, file) for name, file in shipped_models().items()]
    if as_json:
        print_json(found)
        return
    for facts in found:
        console.print(facts.pop("name"), style="bold", markup=False)
        reached = [f"{key.replace('_', ' ')} {e['mae']:.3g} {e['unit']}" for key, e in facts.pop("errors").items()]
        facts[f"{facts.pop('part')} errors"] = ", ".join(reached) + " (mean absolute)"
        facts["epoch"] = f"{facts['epoch']}, the best of {facts.pop('epochs')}"
        for key, value in facts.items():
            console.print(f"  {key:14} {value}", soft_wrap=True, markup=False)
    console.print(
        "predict, embed, evaluate, export, the calculator and `pretrained` of a fine-tuning take a name in place of a "
        "run. `dpt-hpc models NAME`: its card.",
        soft_wrap=True,
    )


@app.command(
    epilog="Example: `dpt-hpc predict runs/pretrain *.cif -o energies.csv`; "
    "`dpt-hpc predict model.safetensors relax.extxyz -o out.extxyz --energies`"
)
def predict(
    checkpoint: Checkpoint,
    files: Files,
    out: Annotated[Path, typer.Option("--out", "-o", help="What to write: .extxyz, .csv or .json.")],
    forces: Annotated[
        bool, typer.Option(help="Forces, too; without forces and stress it is 2.5 times as fast.")
    ] = True,
    stress: Annotated[bool, typer.Option(help="Stress, too.")] = True,
    energies: Annotated[bool, typer.Option("--energies", help="Energies of the atoms, too.")] = False,
    file_format: Format = None,
    device: Device = "auto",
    dtype: Precision = None,
    edge_budget: Budget = EDGES,
    allow_unknown_elements: Unknown = False,
    skip_broken: SkipBroken = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Energies, forces and stress, or the property that a network learnt, of any number of structures in files."""
    from dpt_hpc.use.work import predict_files

    model = _load(checkpoint, device, dtype, edge_budget, allow_unknown_elements)
    summary = predict_files(
        model,
        files,
        out,
        forces=forces,
        stress=stress,
        energies=energies,
        file_format=file_format,
        skip_broken=skip_broken,
        force=force,
        quiet=quiet or as_json,
        say=_say,
    )
    rate = summary["structures"] / max(summary["seconds"], 1e-9)
    _conclude(summary, f"{summary['atoms']} atoms, {rate:.3g} structures/s", quiet=quiet, as_json=as_json)


@app.command(
    epilog="Example: `dpt-hpc embed runs/pretrain data/mine -o features.npz`, then numpy.load and scikit-learn"
)
def embed(
    checkpoint: Checkpoint,
    files: Files,
    out: Annotated[Path, typer.Option("--out", "-o", help="The .npz to write.")],
    atoms: Annotated[bool, typer.Option("--atoms", help="Embeddings of the atoms, too.")] = False,
    file_format: Format = None,
    device: Device = "auto",
    dtype: Precision = None,
    edge_budget: Budget = EDGES,
    allow_unknown_elements: Unknown = False,
    skip_broken: SkipBroken = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What a network knows of structures before its read-out, as arrays: features for another model."""
    from dpt_hpc.use.work import embed_files

    model = _load(checkpoint, device, dtype, edge_budget, allow_unknown_elements)
    summary = embed_files(
        model,
        files,
        out,
        atoms=atoms,
        file_format=file_format,
        skip_broken=skip_broken,
        force=force,
        quiet=quiet or as_json,
        say=_say,
    )
    _conclude(summary, f"{summary['features']} features", quiet=quiet, as_json=as_json)


@app.command(
    epilog="Example: `dpt-hpc export runs/pretrain -o model/`; `dpt-hpc export runs/pretrain -o cgcnn.safetensors`"
)
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="A directory, or a file that ends with .safetensors.")],
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Weights and their card, without the optimiser and the places of files: a model to share."""
    from dpt_hpc.use.work import export as run

    summary = run(checkpoint, out, force=force)
    if as_json:
        print_json(summary)
    else:
        units = ", ".join(summary["units"])
        console.print(f"wrote {out}: {summary['network']}, {summary['parameters']} parameters; gives {units}")


def _load(checkpoint: Path, device: str, dtype: str | None, edge_budget: int, allow_unknown_elements: bool) -> Model:
    from dpt_hpc.use import load

    return load(
        checkpoint,
        device=device,
        dtype=one_of("--dtype", dtype, (None, "float32", "float64")),
        allow_unknown_elements=allow_unknown_elements,
        edge_budget=edge_budget,
    )


def _conclude(summary: dict[str, Any], more: str, *, quiet: bool, as_json: bool) -> None:
    if as_json:
        print_json(summary)
    elif not quiet:
        doubts = "".join(f", {summary[key]} {text}" for key, text in DOUBTS.items() if summary.get(key))
        console.print(f"wrote {summary['out']}: {summary['structures']} structures, {more}{doubts}", soft_wrap=True)


DOUBTS = {"left_out": "left out", "warnings": "warnings"}


def _say(text: str) -> None:
    print(text, file=sys.stderr)
