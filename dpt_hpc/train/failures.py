"""What a run leaves when it goes wrong: the structures of a step that is not finite, and the traceback of its error."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import distributed

from dpt_hpc.errors import DptError
from dpt_hpc.train.monitor import write_json
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.signals import Interrupted

DIVERGED = "diverged.json"
ERROR_LOG = "error.log"
NAMED = 20
"""Structures that a message names; the file has them all."""
SECONDS_FOR_THE_FIRST_RANK = 1.0
SECONDS_OF_ONE_ERROR = 30.0


class DivergedError(DptError):
    """The loss or its gradient is not finite."""


class Divergence:
    """Steps whose loss or gradient is not finite: counted, told and written to run_dir/diverged.json.

    limit: how many may be skipped in a run.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, limit: int) -> None:
        self.path, self.ranks, self.limit = run_dir / DIVERGED, ranks, limit
        self.skipped = 0

    def skip(
        self, *, epoch: int, step: int, loss: float, grad_norm: float, own_loss: float, structures: list[str]
    ) -> None:
        """Tell of a step that has changed nothing; every rank calls it.

        loss, grad_norm: of the whole step. own_loss, structures: of this rank. Raises DivergedError, on every rank,
        beyond the limit.
        """
        shares = self.ranks.all_gather((own_loss, structures))
        if self.ranks.rank == 0:
            found = {
                "epoch": epoch,
                "step": step,
                "loss": _told(loss),
                "grad_norm": _told(grad_norm),
                "ranks": [{"rank": r, "loss": _told(own), "structures": s} for r, (own, s) in enumerate(shares)],
            }
            self._write(found)
        what = f"epoch {epoch}, step {step}: loss {loss:g}, gradient norm {grad_norm:g}: not finite"
        if self.skipped >= self.limit:
            before = f" ({self.skipped} such step(s) were skipped before it)" if self.skipped else ""
            names = [s for _, own in shares for s in own]
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            raise DivergedError(
                f"{what}{before}.\nStructures of the step: {', '.join(names[:NAMED])}{more}\n"
                f"{self.path} has the loss of each rank. Look at the labels with `dpt-hpc inspect`, lower "
                "optimizer.learning_rate, or filter at ingest."
            )
        self.skipped += 1
        if self.ranks.rank == 0:
            count = f"{self.skipped} of at most {self.limit}"
            print(f"warning: {what}; skipped, {count}. Its structures are in {self.path}.", file=sys.stderr)

    def _write(self, found: dict[str, Any]) -> None:
        # A run that went back to a checkpoint comes to later steps again.
        before = json.loads(self.path.read_text())["steps"] if self.path.exists() else []
        with suppress(OSError):  # a full disk must not hide what is wrong
            write_json(self.path, {"steps": [*(s for s in before if s["step"] < found["step"]), found]})


@contextmanager
def leaving_traceback(run_dir: Path, ranks: Ranks) -> Iterator[None]:
    """Whatever ends the run here, but being told to stop, also stands in run_dir/error.log, with its traceback.

    Of an error that all ranks meet the first one tells; of the loss of a rank, the heartbeat.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        path = run_dir / ERROR_LOG
        if ranks.rank:
            time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        with suppress(OSError):
            told = ranks.rank and path.exists() and time.time() - path.stat().st_mtime < SECONDS_OF_ONE_ERROR
            if not told and not is_of_a_peer(error):
                head = f"{datetime.now(timezone.utc).isoformat(timespec='seconds')} {ranks.world.place}"
                with path.open("a") as log:
                    log.write(f"{head}\n{''.join(traceback.format_exception(error))}\n")
        raise


def is_of_a_peer(error: BaseException) -> bool:
    """Whether a collective call failed, as it does on all ranks when one of them is gone."""
    if isinstance(error, (distributed.DistNetworkError, distributed.DistStoreError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "Gloo", "NCCL", "ProcessGroup"))


def _told(value: float) -> Any:
    """JSON has no NaN: a number that is not finite is told by its name."""
    return value if math.isfinite(value) else str(value)
