"""Verbs that show what there is: report, quickstart."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dpt_hpc.cli.app import app, console, run_command_line


@app.command(epilog="Example: `dpt-hpc report runs/baseline runs/finetuned --out report.html`")
def report(
    runs: list[Path], out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html")
) -> None:
    """One self-contained HTML page of one or several runs."""
    from dpt_hpc.report import write_report

    console.print(f"wrote {write_report(runs, out)}")


@app.command(epilog="Example: `dpt-hpc quickstart --out runs/quickstart`")
def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for everything that it writes.")] = Path("runs/quickstart"),
) -> None:
    """Ingest, pre-train, fine-tune with and without pre-training, report: on the data that ships with dpt_hpc."""
    from dpt_hpc.quickstart import run_quickstart

    run_quickstart(out, partial(console.print, soft_wrap=True), run_command_line)
