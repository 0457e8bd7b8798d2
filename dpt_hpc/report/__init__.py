"""Runs in, one self-contained HTML page out; and the paper's numbers to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpt_hpc.report.paper import paper_reference

__all__ = ["paper_reference", "write_report"]


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write one HTML page about run directories (pre-training, fine-tuning over seeds, evaluations), finished or not.

    The page needs no network, no JavaScript and no other file. Returns its path: `out`, or `out`/report.html if `out`
    is a directory. Raises DataError for a directory without a run and for a damaged file, naming file and line.
    """
    from dpt_hpc.report.page import write_page  # matplotlib: half a second that a look at the paper need not pay

    return write_page(runs, out)
