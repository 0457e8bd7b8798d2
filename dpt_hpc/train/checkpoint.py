"""Checkpoints: complete, published atomically, and weights that load without pickle.

checkpoints/step_00001234/  model.safetensors   weights (the averaged ones where EMA is on)
                            model.yaml          the network's options, and what it was trained on
                            state.pt            counters, schedule, best loss, generator, EMA and raw weights
                            optimizer.pt | deepspeed/
checkpoints/last, checkpoints/best              symbolic links, replaced in one step
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.models import EnergyModel, ModelOptions, build_model, model_options
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.engine import Engine

WEIGHTS = "model.safetensors"
CARD = "model.yaml"
STATE = "state.pt"


@dataclass(frozen=True)
class ModelCard:
    """What a set of weights is. elements: atomic numbers in its training data. trained_on: free facts."""

    options: ModelOptions
    elements: tuple[int, ...]
    trained_on: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run_dir: Path, step: int, engine: Engine, card: ModelCard, weights: dict[str, Tensor], state: dict[str, Any]
) -> Path:
    """Write a checkpoint under a temporary name, then rename it: a directory called step_* is whole.

    Every rank calls it. weights: what is exported. state: all else that a resumed run needs.
    """
    directory = run_dir / "checkpoints"
    final = directory / f"step_{step:08d}"
    partial = directory / f".partial_{step:08d}"
    if engine.rank == 0:
        for left in directory.glob(".partial_*"):  # of a killed process, or a full disk
            shutil.rmtree(left)
        partial.mkdir(parents=True)
        export_model(partial, card, weights)
        torch.save(state, partial / STATE)
    engine.ranks.barrier()
    engine.save(partial)
    engine.ranks.barrier()
    if engine.rank == 0:
        for path in partial.rglob("*"):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _fsync(directory)
    engine.ranks.barrier()
    return final


def point(run_dir: Path, name: str, checkpoint: Path) -> None:
    """Let checkpoints/`name` point at `checkpoint`, in one step."""
    link = run_dir / "checkpoints" / name
    temporary = link.with_name(f".{name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(checkpoint.name)
    os.replace(temporary, link)
    _fsync(link.parent)


def prune(run_dir: Path, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints and those that `last` and `best` point at."""
    directory = run_dir / "checkpoints"
    pointed = {(directory / name).resolve().name for name in ("last", "best")}
    steps = sorted(directory.glob("step_*"))
    for path in steps[: max(len(steps) - keep, 0)]:
        if path.name not in pointed:
            shutil.rmtree(path)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` of a checkpoint; tensors and plain values only, nothing is executed."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, weights_only=True)
    return state


def export_model(directory: Path, card: ModelCard, weights: dict[str, Tensor]) -> None:
    """model.safetensors and model.yaml."""
    save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, directory / WEIGHTS)
    content = {
        "model": asdict(card.options),
        "elements": [SYMBOLS[z] for z in card.elements],
        "trained_on": card.trained_on,
    }
    (directory / CARD).write_text(yaml.safe_dump(content, sort_keys=False))


def find_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory from itself, or a run's best (else last) one. Raises DataError if there is none."""
    path = Path(path)
    candidates = [path, path / "checkpoints" / "best", path / "checkpoints" / "last"]
    for candidate in candidates:
        if (candidate / WEIGHTS).is_file() and (candidate / CARD).is_file():
            return candidate.resolve()
    raise DataError(
        f"{path}: neither a checkpoint ({WEIGHTS} and {CARD}) nor a run with checkpoints/best in it.\n"
        "Give the directory of a run, or of one of its checkpoints."
    )


def load_card(path: str | Path) -> ModelCard:
    """The card of a checkpoint or run."""
    checkpoint = find_checkpoint(path)
    content = yaml.safe_load((checkpoint / CARD).read_text())
    try:
        options = model_options(content["model"])
        elements = tuple(SYMBOLS.index(symbol) for symbol in content["elements"])
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{checkpoint / CARD}: not a model card of this version of dpt_hpc: {error}") from None
    return ModelCard(options, elements, content.get("trained_on", {}))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The exported weights of a checkpoint or run."""
    weights: dict[str, Tensor] = load_file(find_checkpoint(path) / WEIGHTS)
    return weights


def load_model(path: str | Path) -> EnergyModel:
    """The trained network of a checkpoint or run, in eval mode, on the CPU."""
    weights = load_weights(path)
    model = build_model(load_card(path).options).to(weights["scale"].dtype)
    model.load_state_dict(weights)
    return model.eval()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
