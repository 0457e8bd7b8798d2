"""Errors that are a user's to mend.

The message says what is wrong (with the value and the place: file, record, field, expected, got), why it matters where
that is not plain, and what to do. The command line prints the message alone and exits with `exit_code`.
"""


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
