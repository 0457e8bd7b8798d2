"""Checkpoints: one directory, whole or absent, that any number of ranks, ZeRO stage and engine can go on from.

checkpoints/step_00001234/  model.safetensors      weights (the averaged ones where EMA is on)
                            model.yaml             the network's options, and what it was trained on
                            optimizer.safetensors  the optimiser's moments, whole, by the names of the weights
                            state.pt               counters, schedule, best loss, generator, config, EMA and raw weights
                            manifest.json          size and SHA-256 of each of them: written last
checkpoints/last, checkpoints/best                 symbolic links, replaced in one step

No file is loaded by pickle: state.pt is read with weights_only. train/writer.py publishes and prunes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import EnergyModel, ModelOptions, build_model, model_options
from dpt_hpc.structure import SYMBOLS

WEIGHTS = "model.safetensors"
CARD = "model.yaml"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.pt"
MANIFEST = "manifest.json"

FORMAT = 2
"""1 held the optimiser as its engine wrote it, sharded over the ranks of the run."""


@dataclass(frozen=True)
class ModelCard:
    """What a set of weights is. elements: atomic numbers in its training data. trained_on: free facts."""

    options: ModelOptions
    elements: tuple[int, ...]
    trained_on: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds, copied off the device: training goes on while it is written.

    weights: what is exported. optimizer: `Engine.optimizer_state()`. state: all else that a resumed run needs.
    """

    card: ModelCard
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @classmethod
    def of(
        cls, card: ModelCard, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> Snapshot:
        return cls(card, _copied(dict(weights)), _copied(dict(optimizer)), _copied(dict(state)))


def write_checkpoint(directory: Path, snapshot: Snapshot) -> None:
    """Write all files of a checkpoint into `directory`, made here, and see them onto the disk.

    Raises OSError that names the file.
    """
    directory.mkdir(parents=True)
    state = io.BytesIO()
    torch.save(snapshot.state, state)
    # As bytes first: the libraries' own writers report a full disk as an error of the program.
    files = {
        **model_files(snapshot.card, snapshot.weights),
        OPTIMIZER: safetensors_bytes(snapshot.optimizer),
        STATE: state.getvalue(),
    }
    entries = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in files.items()}
    manifest = {"format": FORMAT, "epoch_ended": _epoch_ended(snapshot.state), "files": entries}
    files[MANIFEST] = json.dumps(manifest, indent=1).encode()
    for name, content in files.items():
        _write(directory / name, content)
    fsync(directory)


def model_files(card: ModelCard, weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """model.safetensors and model.yaml."""
    content = {
        "model": asdict(card.options),
        "elements": [SYMBOLS[z] for z in card.elements],
        "trained_on": card.trained_on,
    }
    return {
        WEIGHTS: safetensors_bytes({k: v.detach().cpu().contiguous() for k, v in weights.items()}),
        CARD: yaml.safe_dump(content, sort_keys=False).encode(),
    }


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: the file, and how it differs from its manifest; None for a whole one.

    Raises ConfigError for one of an earlier format.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_bytes())
        entries = manifest["files"].items()
    except FileNotFoundError:
        if (checkpoint / STATE).exists() and not (checkpoint / OPTIMIZER).exists():
            raise ConfigError(
                f"checkpoint {checkpoint}: of format 1, this version continues runs of format {FORMAT} only.\n"
                "Its optimiser is divided over the ranks that wrote it. Its weights still load: evaluate them, or "
                "fine-tune from them (pretrained=DIR).\n"
                "Finish the run with the version that began it, or start it anew with --set run_dir=DIR."
            ) from None
        return f"{MANIFEST} is missing" if checkpoint.is_dir() else "is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if manifest.get("format") != FORMAT:
        raise ConfigError(
            f"checkpoint {checkpoint}: of format {manifest.get('format')}, this version reads format {FORMAT}.\n"
            "Resume with the version of dpt_hpc that wrote it."
        )
    for name, expected in entries:
        try:
            content = (checkpoint / name).read_bytes()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if len(content) != expected["bytes"]:
            return f"{name} has {len(content)} bytes, expected {expected['bytes']}"
        if hashlib.sha256(content).hexdigest() != expected["sha256"]:
            return f"{name} has changed since it was written"
    return None


def load_state(checkpoint: Path) -> dict[str, Any]:
    """The `state` of a checkpoint; tensors and plain values only, nothing is executed."""
    state: dict[str, Any] = torch.load(checkpoint / STATE, weights_only=True)
    return state


def load_optimizer(checkpoint: Path) -> dict[str, Tensor]:
    """What `Engine.optimizer_state` gave when the checkpoint was made."""
    moments: dict[str, Tensor] = load_file(checkpoint / OPTIMIZER)
    return moments


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


def fsync(path: Path) -> None:
    """See a file, or the entries of a directory, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from None


def _epoch_ended(state: Mapping[str, Any]) -> int | None:
    return state["epoch"] - 1 if state["step_in_epoch"] == 0 and state["epoch"] > 1 else None


def _copied(value: Any) -> Any:
    """`value` with every tensor in it copied, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    return value
