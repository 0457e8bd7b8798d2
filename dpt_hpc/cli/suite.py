"""The verb suite: many pre-trainings and fine-tunings, and their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dpt_hpc.cli.app import Json, Quiet, app, console, print_json


@app.command(
    epilog="Example: `dpt-hpc suite configs/suite/paper.yaml`, in as many shells, ranks of srun or jobs of an array as "
    "there are cores or GPUs; `dpt-hpc suite configs/suite/paper.yaml --status`"
)
def suite(
    config: Path,
    run_dir: Annotated[str | None, typer.Option(help="Instead of the file's run_dir.")] = None,
    status: Annotated[bool, typer.Option("--status", help="Tell what is done, running and missing.")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Run nothing; write the tables of what is there.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory of the tables, or of the records; else RUN_DIR/tables.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Pre-train and fine-tune all that the file names, beside other workers, and write tables like the paper's."""
    from dpt_hpc.suite.plan import plan_suite
    from dpt_hpc.train import signals

    signals.listen()
    plan = plan_suite(config, run_dir)
    if status:
        from dpt_hpc.suite.status import as_json as state_of
        from dpt_hpc.suite.status import describe

        print_json(state_of(plan)) if as_json else print("\n".join(describe(plan)))
        return
    from dpt_hpc.suite.outcome import write_outcome

    failed = None
    if not tables:
        from dpt_hpc.suite.work import CellsFailed, alone, work

        try:
            work(plan, alone(), _silent if as_json else _say, quiet=quiet or as_json)
        except CellsFailed as fault:  # what the others found is shown all the same
            failed = fault
    written = write_outcome(plan, out or plan.run_dir / "tables", f"dpt-hpc suite {config} --tables")
    if as_json and failed is None:
        print_json({"run_dir": str(plan.run_dir), "written": [str(path) for path in written]})
    elif not (quiet or as_json):
        _say(f"wrote {written[0]}")
    if failed is not None:
        raise failed


def _say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _silent(line: str) -> None:
    """Where stdout is for one JSON document alone."""
