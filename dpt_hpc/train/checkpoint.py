"""Checkpoints: one directory, whole or absent, that any number of ranks, ZeRO stage and engine can go on from.

checkpoints/step_00001234/  model.safetensors      weights (the averaged ones where EMA is on)
                            model.yaml             the card: the network, its data, its errors (train/card.py)
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import EnergyModel, build_model
from dpt_hpc.plain_text import from_json
from dpt_hpc.train.card import ModelCard
from dpt_hpc.train.durable import fsync
from dpt_hpc.train.shipped import shipped_models

WEIGHTS = "model.safetensors"
CARD = "model.yaml"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.pt"
MANIFEST = "manifest.json"

DIGEST = "sha256"
"""Key in the header of an exported model."""
GET_AGAIN = "Export the model again, or get it again from where it came."

FORMAT = 2
"""1 held the optimiser as its engine wrote it, sharded over the ranks of the run."""


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
    return {WEIGHTS: safetensors_bytes(_plain(weights)), CARD: card.text().encode()}


def single_file(card: ModelCard, weights: Mapping[str, Tensor]) -> bytes:
    """A model in one file: safetensors with the card, and a digest of weights and card, in its header."""
    text = card.text()
    return safetensors_bytes(_plain(weights), metadata={CARD: text, DIGEST: _digest(text, _plain(weights))})


def _digest(card: str, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a card and of names, types, shapes and bytes of weights."""
    found = hashlib.sha256(card.encode())
    for name, weight in sorted(weights.items()):
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        found.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: the file, and how it differs from its manifest; None for a whole one.

    Raises ConfigError for one of an earlier format.
    """
    try:
        manifest = from_json((checkpoint / MANIFEST).read_bytes())
        entries = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in manifest["files"].items()}
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
    if set(entries) != {WEIGHTS, CARD, OPTIMIZER, STATE}:
        return f"{MANIFEST} lists other files than those of a checkpoint: {', '.join(entries) or 'none'}"
    for name, (size, digest) in entries.items():
        try:
            content = (checkpoint / name).read_bytes()
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
        if len(content) != size:
            return f"{name} has {len(content)} bytes, expected {size}"
        if hashlib.sha256(content).hexdigest() != digest:
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
    """A checkpoint directory from itself, or a run's best (else last) one; a single exported file; or the file of a
    model that ships with dpt_hpc, from its name, unless something of that name is there.

    Raises DataError if there is none.
    """
    path = Path(path)
    shipped = {} if path.exists() else shipped_models()
    path = shipped.get(str(path), path)
    if path.name == CARD and path.with_name(WEIGHTS).is_file():
        path = path.parent
    if path.is_file() and (_header(path).get(CARD) is not None or path.with_name(CARD).is_file()):
        return path.resolve()
    candidates = [path, path / "checkpoints" / "best", path / "checkpoints" / "last"]
    for candidate in candidates:
        if (candidate / WEIGHTS).is_file() and (candidate / CARD).is_file():
            return candidate.resolve()
    if not path.exists():
        names = f", or one that ships with dpt_hpc: {', '.join(shipped)}" if shipped else ""
        raise DataError(f"{path}: no such file or directory.\nGive a run, a checkpoint, an exported model{names}.")
    seeds = sorted(p.name for p in path.glob("seed_*") if (p / "checkpoints").is_dir()) if path.is_dir() else []
    if seeds:
        raise DataError(
            f"{path}: a fine-tuning of {len(seeds)} seeds, each with a network of its own.\n"
            f"Name one of them, for example {path / seeds[0]}."
        )
    if path.is_file():
        raise DataError(
            f"{path}: no exported model: it has no model card, neither in it nor beside it ({CARD}).\n"
            "Make one with `dpt-hpc export RUN -o FILE.safetensors`."
        )
    raise DataError(
        f"{path}: neither a checkpoint ({WEIGHTS} and {CARD}) nor a run with checkpoints/best in it.\n"
        "Give the directory of a run, or of one of its checkpoints."
    )


def weights_file(path: str | Path) -> Path:
    """The file that holds the weights of a checkpoint, run or exported model."""
    checkpoint = find_checkpoint(path)
    return checkpoint if checkpoint.is_file() else checkpoint / WEIGHTS


def load_card(path: str | Path) -> ModelCard:
    """The card of a checkpoint, run or exported model. Raises DataError if it is none of this version, or damaged."""
    checkpoint = find_checkpoint(path)
    _check_unchanged(checkpoint, CARD)
    text = _header(checkpoint).get(CARD) if checkpoint.is_file() else None
    if text is not None:
        return ModelCard.parse(text, checkpoint)
    place = (checkpoint.parent if checkpoint.is_file() else checkpoint) / CARD
    try:
        return ModelCard.parse(place.read_text(encoding="utf-8"), place)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not a model card of this version of dpt_hpc: {error}") from None


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The exported weights of a checkpoint, run or exported model. Raises DataError for a damaged file."""
    file = weights_file(path)
    if file.name == WEIGHTS:  # beside a model in one file, a manifest is of something else
        _check_unchanged(file.parent, WEIGHTS)
    try:
        weights: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise _damaged(file, error) from None
    header = _header(file)  # files of early versions have no digest
    if DIGEST in header and header[DIGEST] != _digest(header.get(CARD, ""), weights):
        raise DataError(f"{file}: has changed since it was exported.\n{GET_AGAIN}")
    return weights


def weights_digest(path: str | Path) -> str:
    """SHA-256 of the weights alone, in the form of a checkpoint's model.safetensors: an exported model has that of the
    checkpoint which it was made of, whatever its card says. Raises DataError for a damaged file."""
    return hashlib.sha256(safetensors_bytes(load_weights(path))).hexdigest()


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> EnergyModel:
    """The trained network of a checkpoint, run or exported model, in eval mode, on the CPU; with its head, if any.

    dtype: to compute in; None for that of the weights. Raises DataError if weights and card are not of one network.
    """
    weights = load_weights(path)
    with_head = any(name.startswith("noise_head.") for name in weights)
    try:
        model = build_model(load_card(path).options, noise_head=with_head).to(dtype or weights["scale"].dtype)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        raise DataError(
            f"{weights_file(path)}: not the weights of the network that its card describes: {first} ...\n{GET_AGAIN}"
        ) from None
    return model.eval()


def _check_unchanged(checkpoint: Path, name: str) -> None:
    """Raises DataError if the manifest beside a file of a checkpoint says that it was another one."""
    try:
        expected = from_json((checkpoint / MANIFEST).read_bytes())["files"][name]["sha256"]
    except (OSError, NotADirectoryError):  # an exported model has none
        return
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"checkpoint {checkpoint}: {MANIFEST} cannot be read: {error!r}.\n{GET_AGAIN}") from None
    if hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != expected:
        raise DataError(f"checkpoint {checkpoint}: {name} has changed since it was written.\n{GET_AGAIN}")


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}


def _header(file: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors."""
    try:
        with safe_open(file, framework="pt") as opened:
            return dict(opened.metadata() or {})
    except SafetensorError as error:
        raise _damaged(file, error) from None


def _damaged(file: Path, error: SafetensorError) -> DataError:
    return DataError(f"{file}: not a whole safetensors file: {error}.\n{GET_AGAIN}")


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
