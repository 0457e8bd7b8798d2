"""A worker: it takes the next cell that nobody holds, until all are done. Any number of them share a directory."""

from __future__ import annotations

import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dpt_hpc.errors import DptError, EnvironmentFault
from dpt_hpc.suite.plan import FinetuneCell, Plan, PretrainCell
from dpt_hpc.suite.records import pretraining_record
from dpt_hpc.suite.weights import fault_of, finetuning_record, kept_weights, weights_of
from dpt_hpc.train import signals
from dpt_hpc.train.config import FinetuneConfig
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.run import finished_to
from dpt_hpc.train.run_dir import FREE_TO_CHANGE, changed_options, claim_run_dir, read_settings, save_config
from dpt_hpc.train.run_lock import RunLock, holder
from dpt_hpc.train.signals import Interrupted
from dpt_hpc.train.world import World, find_world

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds after which a worker looks again, where all that is left is held by others or waits for them; twice as long
each time."""


@dataclass(frozen=True)
class Unit:
    """What one worker does at a time: a pre-training, or one seed of a fine-tuning."""

    cell: PretrainCell | FinetuneCell
    seed: int | None = None

    @property
    def path(self) -> Path:
        """The directory of its run."""
        return self.cell.path if self.seed is None else self.cell.path / f"seed_{self.seed}"

    @property
    def finished(self) -> bool:
        """Whether its results are there or recorded, and those of what it needs, from whose weights it began."""
        first = self.needs
        return (self.ended and (first is None or first.finished) and self.fault is None) or self.recorded

    @property
    def fault(self) -> str | None:
        """Why its results are not those of its cell, and what to do; None where they are, or are not there."""
        cell = self.cell
        return fault_of(cell, self.path) if isinstance(cell, FinetuneCell) and self.ended else None

    @property
    def recorded(self) -> bool:
        """Whether its results are among the suite's records, and not here."""
        if self.ended:
            return False
        if isinstance(self.cell, PretrainCell):
            return pretraining_record(self.cell)[0] is not None
        record, _ = finetuning_record(self.cell)
        return record is not None and str(self.seed) in record["test_mae"]

    @property
    def waits_for(self) -> Unit | None:
        """The pre-training whose weights are neither here nor among the records."""
        first, cell = self.needs, self.cell
        if first is None or first.ended or not isinstance(cell, FinetuneCell):
            return None
        return first if kept_weights(cell.start) is None else None

    @property
    def ended(self) -> bool:
        """Whether it was run to its end here."""
        return finished_to(self.path, self.cell.config.training.epochs)

    @property
    def needs(self) -> Unit | None:
        """What must be finished before it."""
        first = self.cell.start.cell if isinstance(self.cell, FinetuneCell) else None
        return None if first is None else Unit(first)


def units_of(cell: PretrainCell | FinetuneCell) -> list[Unit]:
    """What a cell consists of."""
    if isinstance(cell, PretrainCell):
        return [Unit(cell)]
    return [Unit(cell, seed) for seed in cell.config.seeds]


def left_of(units: Sequence[Unit]) -> list[Unit]:
    """What is to be run: all that is not finished, and pre-trainings that are recorded without the weights that a
    fine-tuning is to begin from."""
    unfinished = {unit for unit in units if not unit.finished}
    lacking = {unit.waits_for for unit in unfinished}
    return [unit for unit in units if unit in unfinished or unit in lacking]


class CellsFailed(DptError):
    """Some cells of a suite could not be run; the others were."""


def alone() -> Ranks:
    """A world of one for this worker, also where srun has started many: on its own GPU, if the node has several."""
    return Ranks(replace(World(), local_rank=find_world().local_rank, source="dpt-hpc suite: one worker"))


def work(plan: Plan, ranks: Ranks, say: Callable[[str], None], *, quiet: bool = False) -> None:
    """Run what is left of `plan`, beside other workers, until every cell is finished or has failed.

    A cell whose worker is lost is taken up again, from its last checkpoint. One that fails is told, and left to the
    next call. Raises CellsFailed at the end if some did, Interrupted when told to stop.
    """
    units = [unit for cell in plan.order for unit in units_of(cell)]
    failed: dict[Unit, str] = {}
    seconds = FIRST_WAIT
    while True:
        _heed_signals()
        left = left_of(units)
        waiting = False
        for unit in left:
            if unit in failed:
                continue
            if (first := unit.waits_for) is not None:
                if first in failed:
                    failed[unit] = f"its pre-training {first.path} has failed"
                waiting = True
                continue
            if fault := unit.fault:
                failed[unit] = fault
                say(f"== {unit.path}: failed\n{fault}")
                continue
            with _held(unit) as mine:
                if not mine:
                    waiting = True
                    continue
                if unit.ended:
                    continue
                say(f"== {unit.path}: {'goes on' if (unit.path / 'config.yaml').exists() else 'begins'}")
                seconds = FIRST_WAIT
                if fault := _run(unit, ranks, quiet=quiet):
                    failed[unit] = fault
                    say(f"== {unit.path}: failed\n{fault}")
            break  # look again from the first one: a lost worker's cell comes before new ones
        else:
            if not waiting or all(unit in failed for unit in left):
                break
            _wait(seconds)
            seconds = min(2 * seconds, LONGEST_WAIT)
    if failed:
        listed = "\n".join(f"  {unit.path}: {fault.splitlines()[0]}" for unit, fault in failed.items())
        raise CellsFailed(
            f"{len(failed)} of the suite's runs failed; all others are done.\n{listed}\n"
            "Mend the causes and start the suite again: what is finished is not run again."
        )


@contextmanager
def _held(unit: Unit) -> Iterator[bool]:
    """Hold a unit's run directory; False where another process does."""
    if holder(unit.path) is not None:
        yield False
        return
    unit.path.mkdir(parents=True, exist_ok=True)
    lock = RunLock(unit.path)
    try:
        lock.take(0)
    except EnvironmentFault:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _run(unit: Unit, ranks: Ranks, *, quiet: bool) -> str | None:
    """Run a unit that this process holds; returns what went wrong."""
    try:
        cell = unit.cell
        if isinstance(cell, PretrainCell):
            pretrain(cell.config, ranks, resume=True, quiet=quiet, command=cell.command)
        elif unit.seed is not None:
            config, command = _beginning(cell)
            _open_cell(cell, config, unit.path)
            finetune(config, ranks, resume=True, quiet=quiet, seeds=[unit.seed], command=command)
    except Interrupted:
        raise
    except DptError as error:
        return str(error)
    except Exception as error:  # of the program: the other cells must not wait for its mend
        traceback.print_exc(file=sys.stderr)
        return f"{type(error).__name__}: {error}"
    return None


def _beginning(cell: FinetuneCell) -> tuple[FinetuneConfig, str]:
    """Config and command of a fine-tuning: those planned, or with the recorded weights of its pre-training."""
    begins = weights_of(cell.start)
    if begins is None or begins != cell.start.weights:
        return cell.config, cell.command
    command = f"{cell.command} --set pretrained={shlex.quote(str(begins))}"
    if cell.start.epochs is not None:
        command += " --set pretrained_epochs=null"
    return cell.config.model_copy(update={"pretrained": str(begins), "pretrained_epochs": None}), command


def _open_cell(cell: FinetuneCell, config: FinetuneConfig, seed: Path) -> None:
    """Write down what all seeds of a fine-tuning have in common, by whoever comes first.

    Where it had begun from the same pre-training in another place, that place is written down anew, for the seed as
    well: a run goes on from weights of the recorded digest alone.
    """
    lock = RunLock(cell.path)
    lock.take(cell.config.engine.rank_timeout)
    try:
        if not (cell.path / "config.yaml").exists():
            save_config(config, cell.path / "config.yaml")
        for file in (cell.path / "config.yaml", seed / "config.yaml"):
            moved = file.exists() and not changed_options(config, read_settings(file), (*FREE_TO_CHANGE, "pretrained"))
            if moved and changed_options(config, read_settings(file)):
                save_config(config, file)
        claim_run_dir(cell.path, config, resume=True)
    finally:
        lock.release()


def _wait(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _heed_signals()
        time.sleep(0.2)


def _heed_signals() -> None:
    if name := signals.received():
        raise Interrupted(f"told to stop ({name}), between two cells.\nStart the suite again to go on.")
