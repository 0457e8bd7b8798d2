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


class Interrupted(DptError):
    """A signal has ended the run; what it had done is saved."""

    exit_code = EXIT_REQUEUE
    word = "stopped"


def listen() -> None:
    """From now on SIGTERM and SIGUSR1 are remembered, and end the run at its next step; SIGCONT means nothing.

    A second signal changes nothing: whoever sends it waits for the checkpoint, too. Outside of the main thread, where
    no handler can be set, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _remember)
    signal.signal(
        signal.SIGCONT, signal.SIG_IGN
    )  # Slurm sends it beside the other; a stopped process goes on all the same


def received() -> str | None:
    """The signal that has asked this process, or another rank, to stop; None while there was none."""
    return _received


def stop_too(name: str) -> None:
    """Take up the signal `name` that another rank has received."""
    global _received
    _received = _received or name


def forget() -> None:
    """As if no signal had come."""
    global _received
    _received = None


def _remember(number: int, frame: FrameType | None) -> None:
    stop_too(signal.Signals(number).name)
