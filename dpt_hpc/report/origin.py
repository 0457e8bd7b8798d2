"""Where a dataset came from, as its manifest tells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpt_hpc.report.wording import flat, integer

TELLING = ("licen", "citation", "cite", "doi", "reference", "url", "author", "demonstration")
"""Parts of names under which a provenance speaks of its rights and origin."""


def origin(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance of a dataset.json for the page.

    rights: licence, citation and the like, wherever they stand. files: a row per source file. records: everything.
    """
    provenance = manifest.get("provenance")
    if not isinstance(provenance, Mapping):
        return {"rights": [], "files": [], "records": []}
    sources = provenance.get("sources")
    files = [_file(s) for s in sources if isinstance(s, Mapping)] if isinstance(sources, list) else []
    return {
        "rights": list(dict.fromkeys(_rights(provenance))),
        "files": files if all(f["file"] for f in files) else [],
        "records": flat(provenance),
    }


def _rights(value: Any) -> Iterator[tuple[str, str]]:
    for key, text in flat(value):
        name = key.rpartition(".")[2]
        if any(part in name.lower() for part in TELLING) and text not in ("none", ""):
            yield name.replace("_", " ").capitalize(), text


def _file(source: Mapping[str, Any]) -> dict[str, str]:
    dropped = source.get("dropped")
    reasons = [f"{integer(n)} {reason}" for reason, n in dropped.items()] if isinstance(dropped, Mapping) else []
    return {
        "file": str(source.get("file") or ""),
        "format": str(source.get("format") or "—"),
        "records": _count(source.get("records")),
        "kept": _count(source.get("kept")),
        "dropped": "; ".join(reasons) or "none",
        "units": str(source.get("units") or "—"),
    }


def _count(value: Any) -> str:
    return integer(value) if isinstance(value, int) else "—"
