"""Which checkpoint of a pre-training a fine-tuning begins from."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.plain_text import from_json
from dpt_hpc.train.checkpoint import MANIFEST, find_checkpoint
from dpt_hpc.train.run import finished_to
from dpt_hpc.train.run_dir import read_settings


def find_pretrained(path: str, epochs: int | None) -> Path:
    """A checkpoint from itself, or a run's best one; with `epochs`, the best of the run's first so many epochs.

    That is what a run of `epochs` epochs would have exported: the schedule does not know how many are to come. Raises
    DataError where there is no checkpoint, ConfigError where the run has not ended (its best one may yet be another),
    is shorter than `epochs`, or did not keep that checkpoint.
    """
    if epochs is None:
        found = find_checkpoint(path)
        _check_ended(Path(path), found)
        return found
    log = Path(path) / "metrics.jsonl"
    if not log.is_file():
        raise ConfigError(
            f"pretrained_epochs is {epochs}, but pretrained {path} is not the directory of a run: no metrics.jsonl.\n"
            "Give the run, not one of its checkpoints, or set pretrained_epochs to null."
        )
    losses = _losses(log)
    if epochs not in losses:
        raise ConfigError(
            f"pretrained_epochs is {epochs}, but the run {path} has {max(losses, default=0)} epoch(s).\n"
            "Train it further (--resume --set training.epochs=N), or set pretrained_epochs to fewer."
        )
    first = {epoch: math.inf if loss is None else loss for epoch, loss in losses.items() if epoch <= epochs}
    best = min(first, key=lambda epoch: (first[epoch], epoch))
    kept = [p.parent for p in sorted((Path(path) / "checkpoints").glob(f"step_*/{MANIFEST}")) if _ended(p) == best]
    if not kept:
        raise ConfigError(
            f"pretrained_epochs is {epochs}: the best of the first {epochs} epochs of {path} is epoch {best}, whose "
            "checkpoint was not kept.\n"
            "Pre-train with checkpoint.keep_every_epochs=1, which keeps that of every epoch."
        )
    return find_checkpoint(kept[-1])


def _losses(log: Path) -> dict[int, float | None]:
    """The validation loss after each epoch. Raises DataError for a damaged log."""
    losses: dict[int, float | None] = {}
    for number, line in enumerate(log.read_bytes().splitlines(), 1):
        if b'"kind": "epoch"' not in line:
            continue
        try:
            record = from_json(line)
            epoch, loss = int(record["epoch"]), record["validation"]["loss"]
            losses |= {epoch: None if loss is None else float(loss)} if epoch >= 1 else {}
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{log}:{number}: not the record of an epoch: {error!r}.\nRestore the file.") from None
    return losses


def _check_ended(run: Path, checkpoint: Path) -> None:
    """Raises ConfigError if `run` is the directory of a run that has not come to the last epoch of its config."""
    if not (run / "config.yaml").is_file():
        return  # a checkpoint or an exported model, or checkpoints without their run
    training = read_settings(run / "config.yaml").get("training") or {}
    if not finished_to(run, training.get("epochs", 1)):
        raise ConfigError(
            f"pretrained {run}: this run has not ended, it lacks the results of its last epoch.\n"
            "Its best checkpoint may yet change, and seeds that begin later would begin from other weights.\n"
            f"Take it to its end (--resume), or name the checkpoint itself: pretrained={checkpoint}."
        )


def _ended(manifest: Path) -> int | None:
    """The epoch at whose end a checkpoint was made; None for one of the midst of an epoch."""
    epoch = json.loads(manifest.read_text()).get("epoch_ended")
    return epoch if isinstance(epoch, int) else None
