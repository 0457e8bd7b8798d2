"""What all verbs share: the application, its common options, and how an error ends it."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from typer.core import TyperGroup

from dpt_hpc import __version__
from dpt_hpc.errors import EXIT_CODES, ConfigError, DptError, EnvironmentFault, RankLost, did_you_mean
from dpt_hpc.train import signals
from dpt_hpc.train.interfaces import node_name
from dpt_hpc.train.world import place_so_far

Config = TypeVar("Config")
JOURNEY = {
    "Start": ("quickstart", "doctor"),
    "Data": ("data", "ingest", "inspect"),
    "Train": ("config", "pretrain", "finetune", "suite"),
    "Look": ("watch", "report", "evaluate"),
    "Use": ("models", "predict", "embed", "export"),
    "Measure": ("bench",),
}
"""The verbs as `--help` lists them: in the order in which a user meets them."""
EXIT_WRONG_USE = 2


class Journey(TyperGroup):
    """The verbs in the order and the panels of JOURNEY."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all verbs."""
        known = [name for names in JOURNEY.values() for name in names if name in self.commands]
        return known + [name for name in self.commands if name not in known]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb of that name, in its panel; None if there is none."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None:
            command.rich_help_panel = next((panel for panel, names in JOURNEY.items() if cmd_name in names), None)
        return command


app = typer.Typer(
    name="dpt-hpc",
    cls=Journey,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Pre-train graph neural networks on crystals by their derivatives, and fine-tune them to a property.",
    epilog="Example: `dpt-hpc quickstart`. Every verb explains itself: `dpt-hpc pretrain --help`.\n\n"
    "`--json` prints one JSON document on stdout and nothing else there; of an error "
    '`{"error": {"kind": ..., "message": ..., "exit_code": ...}}`.\n\n'
    f"Exit codes: {'; '.join(f'{code} {meaning}' for code, meaning in EXIT_CODES.items())}.",
)
console = Console(highlight=False)

SECONDS_FOR_THE_FIRST_RANK = 3.0

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override an option, e.g. training.epochs=10.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in run_dir from its last checkpoint.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]


def _print_version(asked: bool) -> None:
    if asked:
        console.print(f"dpt-hpc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; also after the verb.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """What comes before the verb."""
    if debug:
        os.environ["DPT_HPC_DEBUG"] = "1"


def one_of(option: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """`value`, if it is allowed. Raises ConfigError that names the option, what it may be, and the nearest of that."""
    if value not in allowed:
        names = [str(a) for a in allowed if a]
        raise ConfigError(f"{option} {value}: expected one of {', '.join(names)}.{did_you_mean(str(value), names)}")
    return value


def told_early(read: Callable[[], Config]) -> Callable[[], Config]:
    """`read`, done at once where this process is alone: a wrong option is told before torch is imported, and a config
    that comes through a pipe is read once. Several ranks must have met first, to agree on what is wrong."""
    if place_so_far()[1] > 1:
        return read
    options = read()
    return lambda: options


def print_json(content: Any) -> None:
    """One JSON document on stdout; what is not a number is null, and all is ASCII, whatever the locale."""
    try:
        text = json.dumps(content, allow_nan=False)
    except ValueError:  # NaN
        from dpt_hpc.train.monitor import finite

        text = json.dumps(finite(content))
    print(text)


def run_command_line(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Raises SystemExit for a user's error, with its exit code, after printing its message."""
    # Where a rank is gone, each call of torch's store would print a C++ trace; torch reads this when it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Å is no reason to end, where the locale has none
            stream.reconfigure(errors="replace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--debug" in words:
        words = ["--debug", *(word for word in words if word != "--debug")]
    as_json = "--json" in words
    try:
        app(args=words)
    except SystemExit as end:
        if as_json and end.code == EXIT_WRONG_USE:  # its words are on stderr; scripts look at stdout
            _print_error("UsageError", _said(end.__context__), EXIT_WRONG_USE)
        if end.code == signals.EXIT_INTERRUPTED:
            print("interrupted", file=sys.stderr)
        if end.code:
            raise
    except DptError as error:
        _fail(error, error.exit_code, as_json=as_json)
    except OSError as error:  # a full disk, a directory without permission: the machine's fault, not the program's
        named = error.filename is not None and error.strerror
        fault = EnvironmentFault(f"{error.filename}: {error.strerror}." if named else str(error))
        _fail(fault.with_traceback(error.__traceback__), fault.exit_code, as_json=as_json)
    except Exception as error:
        if place_so_far()[1] == 1:
            raise
        from dpt_hpc.train.failures import is_of_a_peer

        if is_of_a_peer(error):  # while starting, before the heartbeat watches
            first = (str(error).splitlines() or [type(error).__name__])[0]
            lost = RankLost(f"another rank is gone: {first}\nIts own message says why.")
            # All ranks meet it: rank 0 tells, and rank 1, if it is rank 0 that is gone.
            _fail(lost, lost.exit_code, as_json=as_json, silent=place_so_far()[0] > 1)
        # An error of the program: told in full, but the clean-up of libraries would wait for the other ranks.
        signals.end_with(None)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    finally:
        signals.leave_interrupt()


def _fail(error: DptError, code: int, *, as_json: bool, silent: bool = False) -> NoReturn:
    """Print one message, unless `silent`, and end this process. Of several ranks the first one speaks; another one
    speaks only if the launcher has not ended it by then, that is, if it failed alone."""
    signals.ready()  # a signal must not raise another error in the midst of this one
    told_to_stop = error.word != DptError.word
    rank, ranks = place_so_far()
    if rank:
        signals.end_with(code)  # the launcher's: the first rank has spoken, and left
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
    if ranks > 1:
        signals.end_with(None)
    if os.environ.get("DPT_HPC_DEBUG") and not told_to_stop:
        traceback.print_exception(error)
    place = f" (rank {rank} on {node_name()})" if rank else ""
    if not silent and not (rank and told_to_stop):
        if as_json and not rank:
            _print_error(type(error).__name__, str(error), code)
        else:
            err = Console(stderr=True, highlight=False, soft_wrap=True)
            err.print(f"{error.word}{place}: {error}", markup=False)
    if ranks > 1:
        # Without the clean-up of libraries, which would wait for the other ranks.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)


def _print_error(kind: str, message: str, code: int) -> None:
    print_json({"error": {"kind": kind, "message": message, "exit_code": code}})


def _said(error: Any) -> str:
    """What typer has said of a command line that it cannot read."""
    return error.format_message() if hasattr(error, "format_message") else "see stderr"
