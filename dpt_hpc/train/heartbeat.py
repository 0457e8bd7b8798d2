"""No rank waits for ever for one that is gone: every rank beats, every rank watches the next one.

Each rank writes a count into the ranks' store and reads that of the next rank, in a ring: a constant load on each, and
whole nodes may fall silent at once. Whoever finds a rank silent writes the verdict, by name, and all others read it and
end. Rounds are counted, not seconds: a job that is suspended as a whole and goes on later has missed none.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from torch import distributed

from dpt_hpc.errors import DptError, RankLost
from dpt_hpc.train import signals
from dpt_hpc.train.failures import ERROR_LOG, is_of_a_peer
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.writer import wait_for_writers

ROUNDS_IN_TIMEOUT = 12
SILENT_ROUNDS = 8
"""After so many rounds without a beat a rank is given up; what is left of the timeout is for telling the others."""
SUSPECT_ROUNDS = 3
"""The same, once a collective call has failed on some rank: one of them is gone, and only its name is not known."""
ROUNDS_TO_HEAR = 2
"""So long the ranks wait for each other to have read the verdict."""
SECONDS_FOR_THE_TELLER = 5.0
"""The others leave a little later: a launcher ends all ranks when the first one leaves, also the one that speaks."""

SECONDS_TO_CLOSE = 2.0

VERDICT, HEARD, STOP, SUSPICION = "verdict", "heard", "stop", "suspicion"


class Verdict(TypedDict):
    """Why all ranks end, and with which exit code."""

    text: str
    code: int


class Heartbeat:
    """Watches over the ranks of a run from its making until `close`.

    timeout: seconds within which the loss of a rank ends this process. run_dir: where the reason is written down.
    """

    def __init__(self, ranks: Ranks, timeout: float, run_dir: Path) -> None:
        store: Any = ranks.store  # torch's types do not know `clone`
        # A connection of its own: a call that waits in another thread would hold up the beats.
        self._store = distributed.PrefixStore("heartbeat", store.clone())
        self._own_store = distributed.PrefixStore("heartbeat", store)
        """The main thread's."""
        self._ranks, self._run_dir = ranks, run_dir
        self._interval = timeout / ROUNDS_IN_TIMEOUT
        self._places: list[str] = ranks.all_gather(ranks.world.place)
        self._next = (ranks.rank + 1) % ranks.size
        self._parent = os.getppid()
        self._rounds = 0
        self._closing = threading.Event()
        self._not_counted = threading.Lock()
        """Taken once, by whoever counts this rank among those that have heard the verdict."""
        if ranks.rank == 0:
            for key in (VERDICT, STOP, SUSPICION):
                self._store.set(key, "")
        self._store.set(f"beat {ranks.rank}", "0")
        ranks.barrier()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._guard)]
        for thread in self._threads:
            thread.start()
        signals.accompanied()

    def close(self) -> None:
        """End the watch: this rank has come to its end."""
        self._closing.set()
        for thread in self._threads:  # one inside a call of the store would outlive the interpreter, and abort it
            thread.join(SECONDS_TO_CLOSE)

    def blame(self, error: BaseException) -> None:
        """Tell all ranks that this one ends with `error`, unless one has been blamed already; until they have heard."""
        code = error.exit_code if isinstance(error, DptError) else RankLost.exit_code if is_of_a_peer(error) else 1
        first = (str(error).splitlines() or [""])[0]
        own: Verdict = {"text": f"{self._place(self._ranks.rank)}: {type(error).__name__}: {first}", "code": code}
        with suppress(RuntimeError):
            self._write_verdict(self._own_store, own)
            self._closing.set()  # this process ends with an error of its own
            self._wait_until_heard(self._own_store, code)

    def wait_for_verdict(self) -> None:
        """A collective call has failed here: let the watch find out which rank is gone. It ends this process then."""
        with suppress(RuntimeError):
            self._own_store.set(SUSPICION, "yes")
        time.sleep(self._interval * ROUNDS_IN_TIMEOUT)

    def _beat(self) -> None:
        seen, silent, broken, told = "", 0, 0, False
        keys = [f"beat {self._next}", VERDICT, STOP, SUSPICION]
        while not self._closing.wait(self._interval):
            try:
                self._store.set(f"beat {self._ranks.rank}", str(self._rounds))
                beat, verdict, stop, suspicion = (value.decode() for value in self._store.multi_get(keys))
                if signals.received() and not told:
                    told = True
                    self._store.set(STOP, signals.received() or "")
            except RuntimeError:
                broken += 1
                if broken >= SUSPECT_ROUNDS:
                    self._end_without_store("its connection is broken")
                continue
            self._rounds, broken = self._rounds + 1, 0
            if verdict:
                self._end(**json.loads(verdict), store=self._store)
            if stop:
                signals.stop_too(stop)
                if signals.starting():  # the main thread may wait for another rank, and hear of nothing
                    self._end_starting(stop)
            silent = silent + 1 if beat == seen else 0
            seen = beat
            if silent >= (SUSPECT_ROUNDS if suspicion else SILENT_ROUNDS):
                self._condemn(
                    self._next, f"no sign of life for {silent * self._interval:.0f} s: dead, stopped or cut off"
                )
            if self._is_orphan():
                self._condemn(self._ranks.rank, "its launcher is gone, and nobody would end it any more")

    def _guard(self) -> None:
        """Watches the thread above, whose calls wait for ever where the store's process is stopped."""
        rounds, stuck = -1, 0
        while not self._closing.wait(self._interval):
            stuck = stuck + 1 if self._rounds == rounds else 0
            rounds = self._rounds
            if stuck > SILENT_ROUNDS:
                self._end_without_store(f"no answer for {stuck * self._interval:.0f} s")

    def _condemn(self, rank: int, reason: str) -> None:
        text = f"{self._place(rank)}: {reason}.\nThe other ranks end. Go on from the last checkpoint with --resume."
        own: Verdict = {"text": text, "code": RankLost.exit_code}
        verdict = own
        with suppress(RuntimeError):
            verdict = self._write_verdict(self._store, own)
        self._end(**verdict, tell=verdict == own, store=self._store)

    def _end_starting(self, signal: str) -> None:
        """All ranks end, since one of them was told to stop before there was anything to save."""
        own: Verdict = {"text": signals.nothing_to_save(signal), "code": signals.code_of(signal)}
        verdict = own
        with suppress(RuntimeError):
            verdict = self._write_verdict(self._store, own)
            if verdict == own:
                print(verdict["text"], file=sys.stderr, flush=True)
        self._end(**verdict, store=self._store)

    @staticmethod
    def _write_verdict(store: Any, own: Verdict) -> Verdict:
        """The verdict that holds: this one, unless there is an earlier one."""
        verdict: Verdict = json.loads(store.compare_set(VERDICT, "", json.dumps(own)))
        return verdict

    def _wait_until_heard(self, store: Any, code: int) -> None:
        """Until all ranks that are left have read the verdict, or had the time to: the store ends with rank 0, and
        the launcher ends all when the first one leaves."""
        mine = 1 if self._not_counted.acquire(blocking=False) else 0
        wanted = self._ranks.size - (code == RankLost.exit_code)
        until = time.monotonic() + ROUNDS_TO_HEAR * self._interval
        with suppress(RuntimeError):
            while store.add(HEARD, mine) < wanted and time.monotonic() < until:
                mine = 0
                time.sleep(0.05 + self._ranks.size / 4000)

    def _end_without_store(self, reason: str) -> None:
        # Nobody can be asked whether it has spoken already: one rank of each node does.
        world = self._ranks.world
        text = (
            f"{self._place(0)}, which keeps the heartbeats of all: {reason}. It is dead or stopped, or cut off from "
            f"{world.place}.\n"
            "The other ranks end. Go on from the last checkpoint with --resume."
        )
        self._end(text, RankLost.exit_code, tell=world.rank == 1 or world.local_rank == 0)

    def _end(self, text: str, code: int, *, tell: bool = False, store: Any = None) -> None:
        """End this process from whatever thread, whatever the others are doing, but not without its checkpoint.

        store: the thread's, where it can be reached.
        """
        if self._closing.is_set():
            return
        until = time.monotonic() + self._interval * (ROUNDS_IN_TIMEOUT - SILENT_ROUNDS)
        signals.ready()  # the launcher's signal says nothing new
        try:
            if tell:
                self._tell(text)
            if store is not None:
                self._wait_until_heard(store, code)
            if not tell:
                time.sleep(SECONDS_FOR_THE_TELLER)
            wait_for_writers(until)
        finally:
            os._exit(code)

    def _tell(self, text: str) -> None:
        if (self._run_dir / "config.yaml").exists():
            with suppress(OSError), (self._run_dir / ERROR_LOG).open("a") as log:
                log.write(f"{self._place(self._ranks.rank)} tells: {text}\n")
        with suppress(OSError):  # the launcher may be gone, and the pipe to it
            print(f"error: {text}", file=sys.stderr, flush=True)

    def _place(self, rank: int) -> str:
        return self._places[rank]

    def _is_orphan(self) -> bool:
        return self._ranks.world.launched and orphaned(self._parent)


def orphaned(parent: int) -> bool:
    """Whether `parent`, a launcher's process on this node, has died."""
    return parent > 1 and os.getppid() != parent


def _end_as_orphan(parent: int, timeout: float) -> None:
    """A launcher's only rank ends with it: nobody else would end it, and a job that is queued again meets it."""
    while not orphaned(parent):
        time.sleep(timeout / ROUNDS_IN_TIMEOUT)
    os._exit(RankLost.exit_code)


@contextmanager
def watched(ranks: Ranks, timeout: float, run_dir: str) -> Iterator[None]:
    """Run a block on all ranks; the loss of one ends the others within `timeout` seconds, with its name."""
    if ranks.size == 1:
        if ranks.world.launched:
            threading.Thread(target=_end_as_orphan, args=(os.getppid(), timeout), daemon=True).start()
        yield
        return
    heartbeat = Heartbeat(ranks, timeout, Path(run_dir))
    try:
        yield
        ranks.barrier()
    except Exception as error:
        if is_of_a_peer(error):
            heartbeat.wait_for_verdict()
        if not isinstance(error, signals.Interrupted):
            heartbeat.blame(error)
        raise
    finally:
        heartbeat.close()
