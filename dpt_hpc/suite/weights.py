"""Whether a fine-tuning began from the weights that its row is about: those of its pre-training, or none."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from dpt_hpc.errors import DataError, DptError
from dpt_hpc.suite.plan import FinetuneCell, Plan, Start
from dpt_hpc.suite.records import FREE, other_options, pretraining_record, read_record
from dpt_hpc.train.checkpoint import load_card, single_file, weights_digest, weights_file
from dpt_hpc.train.durable import publish_file
from dpt_hpc.train.pretrained import find_pretrained
from dpt_hpc.train.run import finished_to
from dpt_hpc.train.run_dir import changed_options, read_settings
from dpt_hpc.train.shareable import shareable_model

UNRECORDED = "which weights it began from was not recorded by the early version that ran it: they were not compared"

LARGEST = 4 << 20
"""Bytes of a file of weights that goes among the records by itself: the paper's CGCNN has 1.1 MB, its TorchMD-Net 7 MB,
seven times. A larger one is taken up, too, where `dpt-hpc export` has put it."""


def began_from(run_dir: Path) -> str | None:
    """SHA-256 of the weights that the fine-tuning in `run_dir` began from; None: from scratch; "": not recorded."""
    facts = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    if pretrained := facts.get("pretrained"):
        return str(pretrained["digest"])
    return "" if facts.get("pretrained_from") else None  # of an early version


def weights_of(start: Start) -> Path | None:
    """What a fine-tuning begins from: a checkpoint of the pre-training's run, where that has ended, or else its file
    among the records; None where neither is there. Raises ConfigError if the run did not keep that checkpoint."""
    cell = start.cell
    if cell is None:
        return None
    if finished_to(cell.path, cell.config.training.epochs):
        return find_pretrained(str(cell.path), start.epochs)
    return kept_weights(start)


def kept_weights(start: Start) -> Path | None:
    """The file of a pre-training's weights among the records, if it is there and of the options configured. Raises
    DataError if it holds others than the pre-training's record tells of."""
    file = start.weights
    if file is None or not file.is_file() or start.cell is None:
        return None
    written = file.stat().st_mtime_ns
    if _card_differs(file, written, start):
        return None
    record, _ = pretraining_record(start.cell) if start.epochs is None else (None, None)
    recorded = record and record.get("weights_sha256")
    if recorded and recorded != _digest(file, written):
        raise DataError(
            f"{file}: not the weights (SHA-256 {_digest(file, written)[:12]}) that {start.cell.record} tells of "
            f"({recorded[:12]}).\nRestore both, or delete both to have the pre-training run again."
        )
    return file


def digest_of(start: Start) -> str:
    """SHA-256 of the weights of `start`, as they are or as the pre-training's record says. Raises ConfigError or
    DataError where they are neither at hand nor recorded, or damaged."""
    assert start.cell is not None
    checkpoint = weights_of(start)
    if checkpoint is None and start.epochs is None:
        record, _ = pretraining_record(start.cell)
        if record is not None and record.get("weights_sha256"):
            return str(record["weights_sha256"])
    file = weights_file(checkpoint or find_pretrained(str(start.cell.path), start.epochs))
    return _digest(file, file.stat().st_mtime_ns)


def fault_of(cell: FinetuneCell, run_dir: Path) -> str | None:
    """Why the run in `run_dir` says nothing about the weights of `cell`'s start, or None if it does.

    Three lines: what is wrong, why it matters, what to do.
    """
    began, start = began_from(run_dir), cell.start
    way_out = "Its error is no result of this row.\nDelete that directory to have it run again, or restore "
    if start.cell is None:
        if began is None:
            return None
        return f"{run_dir}: the baseline begins from scratch, but it began from pre-trained weights.\n{way_out}it."
    if began is None:
        return f"{run_dir}: began from scratch, not from the pre-training {start.cell.path}.\n{way_out}it."
    try:
        now = digest_of(start)
    except DptError as error:
        return f"{run_dir}: began from weights that cannot be compared: {str(error).splitlines()[0]}\n{way_out}those."
    if began in ("", now):
        return None
    return (
        f"{run_dir}: began from other weights (SHA-256 {began[:12]}) than those of {start.cell.path} are now "
        f"({now[:12]}).\n{way_out}the pre-training's checkpoint."
    )


def finetuning_record(cell: FinetuneCell) -> tuple[dict[str, Any] | None, str | None]:
    """The record of a fine-tuning, and None; where it is no result of its cell, or does not go with what was run here:
    None, and why. Raises DataError for a broken one."""
    record = read_record(cell)
    if record is None:
        return None, None
    fault = _unfit(cell, record)
    seeds = ", ".join(record["test_mae"])
    return (None, f"its record of the seeds {seeds} is not used: {fault}") if fault else (record, None)


def keep_weights(plan: Plan) -> list[Path]:
    """Put the weights of all that was pre-trained here among the records, up to LARGEST; returns the files written."""
    written = []
    for start in dict.fromkeys(cell.start for cell in plan.cells):
        cell, file = start.cell, start.weights
        if cell is None or file is None or not finished_to(cell.path, cell.config.training.epochs):
            continue
        try:
            checkpoint = find_pretrained(str(cell.path), start.epochs)
            if file.is_file() and weights_digest(file) == weights_digest(checkpoint):
                continue
            card, weights = shareable_model(checkpoint)
            if start.epochs is not None:  # what so short a run would have exported
                card = replace(card, training={**card.training, "epochs": start.epochs})
            content = single_file(card, weights)
        except DptError:  # not kept, or deleted, or damaged: whoever begins from it is told
            continue
        if len(content) <= LARGEST or file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{uuid4().hex[:8]}")  # workers end together
            temporary.write_bytes(content)
            publish_file(temporary, file)
            written.append(file)
    return written


def _unfit(cell: FinetuneCell, record: dict[str, Any]) -> str | None:
    """Why a record is no result of its cell, or is not to be joined with the seeds that were run here."""
    if changed := other_options(cell, record):
        return changed[0]
    if record["faults"]:
        return str(record["faults"][0])
    began = record["pretrained_sha256"] or ("" if UNRECORDED in record["notes"] else None)
    if (cell.start.cell is None) != (began is None):
        return "it began from pre-trained weights" if began is not None else "it began from scratch"
    if began:
        try:
            now = digest_of(cell.start)
        except DptError:  # a record of an early version, and no weights
            now = began
        if now != began:
            return f"it began from other weights (SHA-256 {began[:12]}) than those of the pre-training ({now[:12]})"
    for run_dir in (cell.path / f"seed_{seed}" for seed in cell.config.seeds):
        if not finished_to(run_dir, cell.config.training.epochs):
            continue
        sources = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["dataset"]
        if [s["digest"] for s in sources] != [s["digest"] for s in record["dataset"]]:
            return "it is of other data than the seeds that were run here"
        if changed := changed_options(cell.config, read_settings(run_dir / "config.yaml"), free=FREE):
            return f"the seeds that were run here have other options: {changed[0]}"
        if (here := began_from(run_dir)) != began and "" not in (here, began):
            return "it began from other weights than the seeds that were run here"
    return None


@lru_cache(maxsize=256)
def _digest(file: Path, changed: int) -> str:
    """changed: the time at which the file was written; another one is another file."""
    return weights_digest(file)


@lru_cache(maxsize=256)
def _card_differs(file: Path, changed: int, start: Start) -> bool:
    """Whether the pre-training that a file of weights is of had other options than that of `start`."""
    assert start.cell is not None
    config, card = start.cell.config, load_card(file)
    now = type(config).model_validate(replace(card, config=config.model_dump(mode="json")).shareable().config)
    return bool(changed_options(now, card.config, free=FREE))
