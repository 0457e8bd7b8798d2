"""Being told to stop: Slurm's --signal, preemption and scancel send SIGUSR1 or SIGTERM. The run saves and asks to be
started again.

Light to import: it is the first thing that a rank does, since an early signal would else kill it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from dpt_hpc.errors import DptError

EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: all is saved; start the same command again, with --resume."""

_received: str | None = None
_starting = False


class Interrupted(DptError):
    """A signal has ended the run; what it had done is saved."""

    exit_code = EXIT_REQUEUE
    word = "stopped"


def listen() -> None:
    """From now on SIGTERM and SIGUSR1 raise Interrupted, and SIGCONT means nothing; after `ready` they are remembered.

    A second signal changes nothing: whoever sends it waits for the checkpoint, too. Outside of the main thread, where
    no handler can be set, it does nothing.
    """
    global _starting
    if threading.current_thread() is not threading.main_thread():
        return
    _starting = True
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _remember)
    signal.signal(
        signal.SIGCONT, signal.SIG_IGN
    )  # Slurm sends it beside the other; a stopped process goes on all the same


def ready() -> None:
    """From now on there is something to save: a signal is remembered, and ends the run at its next step."""
    global _starting
    _starting = False


def starting() -> bool:
    """Whether this process listens, but has nothing to save yet: it may end at any moment."""
    return _starting


def received() -> str | None:
    """The signal that has asked this process, or another rank, to stop; None while there was none."""
    return _received


def stop_too(name: str) -> None:
    """Take up the signal `name` that another rank has received."""
    global _received
    _received = _received or name


def forget() -> None:
    """As if no signal had come, and nobody had listened for one."""
    global _received, _starting
    _received, _starting = None, False


def nothing_to_save(name: str) -> Interrupted:
    """What the signal `name` means before the first step."""
    return Interrupted(
        f"told to stop ({name}) before the first step: there was nothing to save.\n"
        f"Go on with --resume: exit code {EXIT_REQUEUE} asks for it."
    )


def _remember(number: int, frame: FrameType | None) -> None:
    first = _received is None
    stop_too(signal.Signals(number).name)
    if _starting and first:
        raise nothing_to_save(signal.Signals(number).name)
