"""How many structures of the fine-tuning sets are in the pre-training sets, too, from what `data leaks` wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpt_hpc.suite.facts import facts_of, read_json
from dpt_hpc.suite.plan import FinetuneCell


def leaks_in(files: Sequence[Path], cells: Sequence[FinetuneCell]) -> list[str]:
    """For each pre-training set that `cells` begin from a line on what it shares with their datasets, and what of that
    none of `files` tells; datasets go by their digests. Empty without files, or where nothing was run."""
    if not files:
        return []
    lines = []
    told: dict[str, dict[str, str]] = {}  # by the digests of the two sets
    for file in files:
        if not (content := read_json(file)):
            lines.append(f"Not checked for structures that a pre-training has seen: there is no {file.name}.")
            continue
        known = told.setdefault(content["pretraining"]["digest"], {})
        for found in content["downstream"]:
            known[found["digest"]] = f"{len(found['matches'])} of {found['structures']:,}"
    tested = {s["digest"]: s["name"] for cell in cells for s in facts_of(cell).get("dataset", [])}
    held: dict[str, list[tuple[str, FinetuneCell]]] = {}
    for cell in cells:
        for source in facts_of(cell.start.cell).get("dataset", []) if cell.start.cell is not None else []:
            held.setdefault(source["digest"], []).append((source["name"], cell))
    for digest, begun in held.items():
        name = begun[0][0]
        known = told.get(digest, {})
        counts = [f"{tested[other]} {shared}" for other, shared in known.items() if other in tested]
        if counts:
            shared = f"Structures that the pre-training set {name} has, too{_left_out(begun)}"
            lines.append(f"{shared}: {', '.join(counts)}.")
        if missing := [other for key, other in tested.items() if key not in known]:
            rows = ", ".join(dict.fromkeys(cell.start.name for _, cell in begun))
            unchecked = f"Not checked for structures that the pre-training set {name} has, too"
            lines.append(f"{unchecked}: {', '.join(missing)}, in {rows}.")
    return lines


def _left_out(begun: Sequence[tuple[str, FinetuneCell]]) -> str:
    """What the pre-trainings left out of their set, by their own account."""
    starts = {cell.start.cell for _, cell in begun}
    files = [facts_of(s)["config"].get("data", {}).get("exclude") for s in starts if s is not None]
    names = dict.fromkeys(Path(f).name for own in files for f in ([own] if isinstance(own, str) else own or []))
    if not names:
        return ", and that were not taken out"
    some = "" if all(files) else " of some rows"
    return f" (data.exclude{some} left out what {', '.join(names)} names)"
