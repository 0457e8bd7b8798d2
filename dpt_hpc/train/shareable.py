"""A model to give away: the weights of a checkpoint, and a card that tells no place of the machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dpt_hpc.train.card import ModelCard
from dpt_hpc.train.checkpoint import find_checkpoint, load_card, load_weights


def shareable_model(path: str | Path) -> tuple[ModelCard, dict[str, Tensor]]:
    """Card and weights of a run's best checkpoint, or of a checkpoint; with the errors on the test part where these are
    the best weights of a concluded run. Raises DataError if there is no model at `path`."""
    checkpoint = find_checkpoint(path)
    card = load_card(checkpoint).shareable()
    test = _test_errors(checkpoint, card.training.get("epoch"))
    if test is not None:
        card = replace(card, training={**card.training, "test": test})
    return card, load_weights(checkpoint)


def _test_errors(checkpoint: Path, epoch: int | None) -> dict[str, float] | None:
    """Of a concluded run whose best weights these are."""
    results = checkpoint.parent.parent / "results.json"
    if checkpoint.is_file() or checkpoint.parent.name != "checkpoints" or not results.is_file():
        return None
    found = json.loads(results.read_text())
    best = (checkpoint.parent / "best").resolve() == checkpoint
    return found.get("test") if best and epoch in (None, found.get("best_epoch")) else None
