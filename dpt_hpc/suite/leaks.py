"""How many structures of the fine-tuning sets are in the pre-training sets, too, from what `data leaks` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpt_hpc.suite.facts import facts_of, read_json
from dpt_hpc.suite.plan import FinetuneCell


def leaks_in(file: Path | None, cells: Sequence[FinetuneCell]) -> list[str]:
    """A line on the datasets of `cells`, if all of them were fine-tuned after the same pre-training set that `file`
    was written for; datasets go by their digests. None without a file, or where nothing was run."""
    if file is None:
        return []
    told = read_json(file)
    if not told:
        return [f"Not checked for structures that a pre-training has seen: there is no {file.name}."]
    pretraining = told["pretraining"]
    starts = [facts_of(start) for start in {c.start.cell for c in cells if c.start.cell is not None}]
    if pretraining["digest"] not in (source["digest"] for facts in starts if facts for source in facts["dataset"]):
        return []
    run = {source["digest"] for cell in cells if (facts := facts_of(cell)) for source in facts["dataset"]}
    counts = [
        f"{Path(found['dataset']).name} {len(found['matches'])} of {found['structures']:,}"
        for found in told["downstream"]
        if found["digest"] in run
    ]
    if not counts:
        return []
    name = Path(pretraining["dataset"]).name
    return [f"Structures that the pre-training set {name} has, too, and that were not taken out: {', '.join(counts)}."]
