"""Verbs that show what there is: report, watch, quickstart."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dpt_hpc.cli.app import Json, app, console, print_json, run_command_line


@app.command(epilog="Example: `dpt-hpc report runs/baseline runs/finetuned --out report.html`")
def report(
    runs: list[Path],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    as_json: Json = False,
) -> None:
    """One self-contained HTML page of one or several runs."""
    from dpt_hpc.report import write_report

    page = write_report(runs, out)
    if as_json:
        print_json({"out": str(page), "runs": [str(run) for run in runs]})
    else:
        console.print(f"wrote {page}", markup=False, soft_wrap=True)


@app.command(
    epilog="Example: `dpt-hpc watch runs/pretrain`; of a run on another machine, there, and here "
    "`ssh -N -L 8765:localhost:8765 MACHINE`, then http://localhost:8765"
)
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, a fine-tuning, or a folder above several runs.")],
    host: Annotated[
        str, typer.Option(help="Address to serve at; others than this machine's own need the token it prints.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Else the first free one from 8765 on.")] = None,
) -> None:
    """Serve one page that follows a run, or shows a finished one, until Ctrl-C."""
    from dpt_hpc.watch.server import open_server

    with suppress(KeyboardInterrupt), open_server(run, host, port) as server:
        console.print(f"watching {run} at {server.address} (Ctrl-C ends it)", markup=False, soft_wrap=True)
        server.serve_forever()


@app.command(epilog="Example: `dpt-hpc quickstart --out runs/quickstart`")
def quickstart(
    out: Annotated[Path, typer.Option(help="Directory for everything that it writes.")] = Path("runs/quickstart"),
) -> None:
    """Ingest, pre-train, fine-tune with and without pre-training, report: on the data that ships with dpt_hpc."""
    from dpt_hpc.quickstart import run_quickstart

    run_quickstart(out, partial(console.print, soft_wrap=True), run_command_line)
