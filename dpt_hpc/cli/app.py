"""What all verbs share: the application, its common options, and how an error ends it."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from dpt_hpc import __version__
from dpt_hpc.errors import ConfigError, DptError, EnvironmentFault, RankLost
from dpt_hpc.train import signals
from dpt_hpc.train.interfaces import node_name
from dpt_hpc.train.world import place_so_far

app = typer.Typer(
    name="dpt-hpc",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Pre-train graph neural networks on crystals by their derivatives, and fine-tune them to a property.",
    epilog="Start with `dpt-hpc quickstart`. `--debug` before a verb shows the traceback of an error.",
)
console = Console(highlight=False)

SECONDS_FOR_THE_FIRST_RANK = 3.0

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override an option, e.g. training.epochs=10.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in run_dir from its last checkpoint.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"dpt-hpc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What comes before the verb."""
    if debug:
        os.environ["DPT_HPC_DEBUG"] = "1"


def one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """`value`, if it is allowed. Raises ConfigError that names the option and what it may be."""
    if value not in allowed:
        raise ConfigError(f"{option} {value}: expected one of {', '.join(str(a) for a in allowed if a)}.")
    return value


def run_command_line(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Raises SystemExit for a user's error, with its exit code, after printing its message."""
    # Where a rank is gone, each call of torch's store would print a C++ trace; torch reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments))
    except SystemExit as end:
        if end.code:
            raise
    except DptError as error:
        _fail(error, error.exit_code)
    except OSError as error:  # a full disk, a directory without permission: the machine's fault, not the program's
        _fail(error, EnvironmentFault.exit_code)
    except Exception as error:
        if place_so_far()[1] == 1:
            raise
        from dpt_hpc.train.failures import is_of_a_peer

        if is_of_a_peer(error):  # while starting, before the heartbeat watches
            first = (str(error).splitlines() or [type(error).__name__])[0]
            lost = RankLost(f"another rank is gone: {first}\nIts own message says why.")
            # All ranks meet it: rank 0 tells, and rank 1, if it is rank 0 that is gone.
            _fail(lost, lost.exit_code, silent=place_so_far()[0] > 1)
        # An error of the program: told in full, but the clean-up of libraries would wait for the other ranks.
        signals.end_with(None)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _fail(error: Exception, code: int, *, silent: bool = False) -> NoReturn:
    """Print one message, unless `silent`, and end this process. Of several ranks the first one speaks; another one
    speaks only if the launcher has not ended it by then, that is, if it failed alone."""
    signals.ready()  # a signal must not raise another error in the midst of this one
    word = getattr(error, "word", DptError.word)
    told_to_stop = word != DptError.word
    if os.environ.get("DPT_HPC_DEBUG") and not told_to_stop:
        raise error
    rank, ranks = place_so_far()
    if rank:
        signals.end_with(code)  # the launcher's: the first rank has spoken, and left
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    if ranks > 1:
        signals.end_with(None)
    place = f" (rank {rank} on {node_name()})" if rank else ""
    if not silent and not (rank and told_to_stop):
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"{word}{place}: {error}", markup=False)
    if ranks > 1:
        # Without the clean-up of libraries, which would wait for the other ranks.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
