"""Being told to stop: Slurm's --signal, preemption and scancel send SIGUSR1 or SIGTERM, Ctrl-C sends SIGINT. The run
saves, and asks to be started again unless it was a person who stopped it.

Light to import: it is the first thing that a rank does, since an early signal would else kill it.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from dpt_hpc.errors import DptError, RankLost
from dpt_hpc.train.world import place_so_far

EXIT_REQUEUE = 75
"""EX_TEMPFAIL of sysexits.h: all is saved; start the same command again, with --resume."""
EXIT_INTERRUPTED = 130
"""What shells give to Ctrl-C: nobody starts it again."""
SAVING = b"stopping: the step at hand is finished and saved; Ctrl-C once more ends at once, saving nothing more\n"

_received: str | None = None
_starting = _accompanied = _peers = False


class Interrupted(DptError):
    """A signal has ended the run; what it had done is saved."""

    word = "stopped"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.exit_code = EXIT_INTERRUPTED if _received == signal.SIGINT.name else EXIT_REQUEUE


def listen(*, peers: bool = False) -> None:
    """From now on SIGTERM, SIGUSR1 and Ctrl-C end this process with the code of `code_of`, and SIGCONT means nothing.

    peers: whether this is one of several ranks of a run.
    After `accompanied`, the heartbeat ends all ranks together; after `ready`, they end at their next step. A second
    signal changes nothing: whoever sends it waits for the checkpoint, too; but a second Ctrl-C ends at once. Outside of
    the main thread, where no handler can be set, it does nothing.
    """
    global _starting, _accompanied, _peers
    if threading.current_thread() is not threading.main_thread():
        return
    _starting, _accompanied, _peers = True, False, peers
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _remember)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        signal.signal(signal.SIGINT, _remember)
    # Slurm sends it beside the other; a stopped process goes on all the same.
    signal.signal(signal.SIGCONT, signal.SIG_IGN)


def leave_interrupt() -> None:
    """From now on Ctrl-C is Python's again: there is nothing to save any more."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _remember:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with(code: int | None) -> None:
    """From now on SIGTERM and SIGUSR1 end this process at once with exit code `code`; None: they mean nothing.

    For a process that is about to end with an error: a signal must not end it with another one.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(0 if code is None else code)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN if code is None else end)


def accompanied() -> None:
    """From now on other ranks are told, by a thread that looks for what was received."""
    global _accompanied
    _accompanied = True


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
    global _received, _starting, _accompanied, _peers
    _received, _starting, _accompanied, _peers = None, False, False, False


def code_of(name: str) -> int:
    """The exit code of a rank that the signal `name` ends before the first step."""
    if name == signal.SIGINT.name:
        return EXIT_INTERRUPTED
    # Where one of several ranks is gone, launchers send SIGTERM to the others: that is no wish to go on later.
    return RankLost.exit_code if _peers and name == signal.SIGTERM.name else EXIT_REQUEUE


def how_to_go_on(code: int) -> str:
    """What to do after an end with `code`."""
    return f"Go on with --resume{'' if code == EXIT_INTERRUPTED else f': exit code {code} asks for it'}."


def nothing_to_save(name: str) -> str:
    """What the signal `name` means before the first step."""
    return (
        f"{Interrupted.word}: told to stop ({name}) before the first step: there was nothing to save.\n"
        f"{how_to_go_on(code_of(name))}"
    )


def _remember(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    stop_too(name)
    if _starting and not _accompanied:
        # Not by an exception: it could come up in the middle of an import, or of a library that is no Python.
        if place_so_far()[0] == 0:
            os.write(2, f"{nothing_to_save(name)}\n".encode())
        os._exit(code_of(name))
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)
        if place_so_far()[0] == 0:
            os.write(2, SAVING)
