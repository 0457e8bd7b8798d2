"""How many structures of the fine-tuning sets are in the pre-training sets, too, from what `data leaks` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpt_hpc.suite.facts import facts_of, read_json
from dpt_hpc.suite.plan import FinetuneCell


def leaks_in(files: Sequence[Path], cells: Sequence[FinetuneCell]) -> list[str]:
    """For each pre-training set that `cells` begin from a line on what it shares with their datasets, or that none of
    `files` is of it; datasets go by their digests. Empty without files, or where nothing was run."""
    if not files:
        return []
    lines, told = [], {}
    for file in files:
        if content := read_json(file):
            told[content["pretraining"]["digest"]] = content["downstream"]
        else:
            lines.append(f"Not checked for structures that a pre-training has seen: there is no {file.name}.")
    tested = {source["digest"] for cell in cells if (facts := facts_of(cell)) for source in facts["dataset"]}
    held: dict[str, tuple[str, list[bool]]] = {}
    for start in dict.fromkeys(cell.start.cell for cell in cells):
        if start is not None and (facts := facts_of(start)):
            for source in facts["dataset"]:
                held.setdefault(source["digest"], (source["name"], []))[1].append(start.config.data.exclude is not None)
    for digest, (name, excluding) in held.items():
        if digest not in told:
            lines.append(f"Not checked for structures that the pre-training set {name} has, too.")
            continue
        counts = [
            f"{Path(found['dataset']).name} {len(found['matches'])} of {found['structures']:,}"
            for found in told[digest]
            if found["digest"] in tested
        ]
        taken_out = "were taken out" if all(excluding) else "were taken out for some rows" if any(excluding) else ""
        if counts:
            lines.append(
                f"Structures that the pre-training set {name} has, too, and that {taken_out or 'were not taken out'}: "
                f"{', '.join(counts)}."
            )
    return lines
