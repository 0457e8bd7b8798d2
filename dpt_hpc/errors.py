"""Errors that are a user's to mend.

The message says what is wrong (with the value and the place: file, record, field, expected, got), why it matters where
that is not plain, and what to do. The command line prints the message alone and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODES = {
    0: "done",
    1: "a config, an option or a name is wrong",
    2: "the command line cannot be read",
    3: "data, a label or a checkpoint is wrong",
    4: "the machine or the installation lacks something",
    75: "told to stop, all saved: start again with --resume",
    76: "another rank was lost: start again with --resume",
    130: "Ctrl-C",
}
"""What each exit code of the command line means. Launch files queue a job again on 75 and 76."""


class DptError(Exception):
    """Base of every error that the command line reports without a traceback."""

    exit_code = 1
    word = "error"
    """What the message begins with."""


class ConfigError(DptError):
    """A config file, a `--set` override or a combination of options is wrong."""


class DataError(DptError):
    """A structure file, a label or a shard is wrong. structure: its place in the batch at hand, where that is known."""

    exit_code = 3

    def __init__(self, message: str, structure: int | None = None) -> None:
        super().__init__(message)
        self.structure = structure


class EnvironmentFault(DptError):
    """The machine or the installation lacks something, or contradicts itself."""

    exit_code = 4


class RankLost(EnvironmentFault):
    """Another rank of the run is gone: killed, stopped or cut off. The same command goes on with --resume, and launch
    files start it again."""

    exit_code = 76


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """A sentence that names the one of `known` that `word` is nearest to, after a space; nothing if none is near."""
    names = {str(name).lower(): str(name) for name in known}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    return f" Did you mean {names[near[0]]}?" if near else ""
