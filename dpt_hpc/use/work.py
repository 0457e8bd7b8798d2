"""The verbs `models`, `predict`, `embed` and `export`: files in, a file out, whatever the number of structures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from dpt_hpc.data.progress import Progress, count_structures
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.train.checkpoint import find_checkpoint, load_card, model_files, single_file, weights_digest
from dpt_hpc.train.growing import GrowingArrays
from dpt_hpc.train.shareable import shareable_model
from dpt_hpc.use.doubts import reason
from dpt_hpc.use.files import read_structures
from dpt_hpc.use.model import Model
from dpt_hpc.use.outputs import check_suffix, writing

Say = Callable[[str], None]
ERRORS = {"energy_per_atom": "eV/atom", "forces": "eV/Å", "stress": "eV/Å³", "noise": "Å"}
"""Units of the errors that a pre-training reports."""
PIECE = 256
"""Embeddings that are written at a time."""
TOLD = 20
"""Broken records, and warnings for each reason, that are told; all are counted."""


class Told:
    """Tells the first few of each kind, and counts them all."""

    def __init__(self, say: Say, word: str) -> None:
        self.say, self.word = say, word
        self.of_kind: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return self.of_kind.total()

    def __call__(self, text: str, kind: str = "") -> None:
        self.of_kind[kind] += 1
        if self.of_kind[kind] <= TOLD:
            self.say(f"{self.word}: {text}")
        if self.of_kind[kind] == TOLD:
            self.say(f"{self.word}: any more of these are counted, not told")


def predict_files(
    model: Model,
    paths: Sequence[str | Path],
    out: Path,
    *,
    forces: bool = True,
    stress: bool = True,
    energies: bool = False,
    file_format: str | None = None,
    skip_broken: bool = False,
    force: bool = False,
    quiet: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Predict for every structure of `paths` into `out` (.extxyz, .csv or .json); returns a summary.

    One batch is in memory at a time, and `out` appears only when it is whole. skip_broken: leave out what cannot be
    read or answered, elements unknown to the network included. force: write over an `out` that is there. say: told of
    what is left out, and of warnings.

    Raises ConfigError for a name of `out` that tells no format or is taken, and as `Model.predict` and
    `read_structures` do.
    """
    check_suffix(out)
    model.check_request(energies=energies)
    _check_new(out, paths, force)
    broken, doubtful = Told(say, "left out"), Told(say, "warning")
    progress = Progress(None if quiet else count_structures(paths, file_format), quiet=quiet)
    leave_out = broken if skip_broken else None
    structures = read_structures(paths, file_format, leave_out)
    atoms = 0
    with writing(out, model) as writer:
        for structure, predicted in model.stream(
            structures, forces=forces, stress=stress, energies=energies, on_fault=leave_out
        ):
            writer.write(structure, predicted)
            atoms += structure.num_atoms
            for text in predicted.warnings:
                doubtful(f"{predicted.structure_id}: {text}", reason(text))
            progress.step()
        progress.close()
        _check_any(progress.count, broken.count, paths)
    return {
        "out": str(out),
        "structures": progress.count,
        "atoms": atoms,
        "left_out": broken.count,
        "warnings": doubtful.count,
        "seconds": round(progress.seconds, 3),
        "units": model.units,
        "model": str(model.path),
    }


def embed_files(
    model: Model,
    paths: Sequence[str | Path],
    out: Path,
    *,
    atoms: bool = False,
    file_format: str | None = None,
    skip_broken: bool = False,
    force: bool = False,
    quiet: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Embeddings of every structure of `paths` into the npz `out`; returns a summary. Raises as `predict_files`.

    Keys: structure_ids (S,) · num_atoms (S,) · structures (S,F), the mean over the atoms; with `atoms` also atoms (A,F)
    and atomic_numbers (A,), the structures one after the other.
    """
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: expected a name that ends with .npz.")
    _check_new(out, paths, force)
    broken = Told(say, "left out")
    progress = Progress(None if quiet else count_structures(paths, file_format), quiet=quiet)
    out.parent.mkdir(parents=True, exist_ok=True)
    file = GrowingArrays(out)
    try:
        leave_out = broken if skip_broken else None
        pairs = model.stream_embeddings(read_structures(paths, file_format, leave_out), on_fault=leave_out)
        while piece := list(islice(pairs, PIECE)):
            rows = {
                "structure_ids": np.array([structure.structure_id for structure, _ in piece]),
                "num_atoms": np.array([structure.num_atoms for structure, _ in piece]),
                "structures": np.stack([embedding.structure for _, embedding in piece]),
            }
            if atoms:
                rows["atoms"] = np.concatenate([embedding.atoms for _, embedding in piece])
                rows["atomic_numbers"] = np.concatenate([s.atomic_numbers.numpy() for s, _ in piece])
            file.add(rows)
            for _ in piece:
                progress.step()
        progress.close()
        _check_any(progress.count, broken.count, paths)
        file.publish()
    except BaseException:
        file.discard()
        raise
    return {
        "out": str(out),
        "structures": progress.count,
        "features": model.network.num_scalars,
        "left_out": broken.count,
        "seconds": round(progress.seconds, 3),
        "model": str(model.path),
    }


def describe(name: str, path: str | Path) -> dict[str, Any]:
    """What a user chooses a model by: what it is and gives, what it learnt from and how far, its mean absolute errors,
    licence, and the digest that runs which begin from it record."""
    card = load_card(path)
    learnt, training = card.trained_on, card.training
    part = "test" if "test" in training else "validation"
    reached = training.get(part) or {}
    errors = {
        key: {"mae": value, "unit": unit}
        for key, unit in ERRORS.items()
        if (value := reached.get(f"{key}_mae")) is not None
    }
    return {
        "name": name,
        "network": card.options.name,
        "gives": ", ".join(card.units),
        "elements": len(card.elements),
        "data": "; ".join(data.get("citation") or data["name"] for data in learnt["dataset"]),
        "structures": learnt["split"]["train"],
        "epoch": training["epoch"],
        "epochs": training["epochs"],
        "part": part,
        "errors": errors,
        "licence": "; ".join(data.get("licence", "unknown") for data in learnt["dataset"]),
        "weights_sha256": weights_digest(path),
    }


def export(path: str | Path, out: Path, *, force: bool = False) -> dict[str, Any]:
    """The best weights of a run, or those of a checkpoint, as a model to share; returns a summary.

    out: a directory (model.safetensors and model.yaml), or one file that ends with .safetensors, with the card in its
    header. The card tells no place of the machine, and the errors on the test part where the run has been concluded.
    force: write over an earlier export. Raises DataError if there is no model at `path`, ConfigError if `out` is there.
    """
    checkpoint = find_checkpoint(path)
    card, weights = shareable_model(checkpoint)
    single = out.suffix == ".safetensors"
    files = {out: single_file(card, weights)} if single else {out / n: c for n, c in model_files(card, weights).items()}
    for file in files:
        _check_free(file, force)
    (out.parent if single else out).mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        temporary = file.with_name(f".{file.name}.partial")
        temporary.write_bytes(content)
        temporary.replace(file)
    return {
        "out": str(out),
        "from": str(checkpoint),
        "bytes": sum(map(len, files.values())),
        "parameters": sum(w.numel() for name, w in weights.items() if name.startswith("network.")),
        "network": asdict(card.options)["name"],
        "units": card.units,
    }


def _check_free(file: Path, force: bool) -> None:
    if file.exists() and not force:
        raise ConfigError(f"--out: {file} is there already.\nName another place, or write over it: --force.")


def _check_new(out: Path, paths: Sequence[str | Path], force: bool) -> None:
    if out.is_dir() or any(out.resolve() == Path(path).resolve() for path in paths):
        what = "is a directory" if out.is_dir() else "is one of the files to read"
        raise ConfigError(f"--out {out}: {what}.\nName another file.")
    _check_free(out, force)


def _check_any(count: int, left_out: int, paths: Sequence[str | Path]) -> None:
    if not count:
        why = f"all {left_out} records are broken" if left_out else "there is no structure"
        raise DataError(f"{', '.join(map(str, paths))}: {why}.\nCheck the files.")
