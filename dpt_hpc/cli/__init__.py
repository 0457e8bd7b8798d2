"""The command line: thin verbs over the package, one message for a user's mistake, no traceback unless asked.

A verb is a function of one of these modules; `--help` lists them in the order of the imports.
"""

from dpt_hpc.cli.app import app, run_command_line

from dpt_hpc.cli import data, datasets, config, job, training, suite, use, jobs, showing  # isort: skip  # noqa: F401

__all__ = ["app", "main", "run_command_line"]


def main() -> None:
    """The console script."""
    run_command_line()
