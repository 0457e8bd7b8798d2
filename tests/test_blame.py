"""One rank fails: all ranks end with its exit code, whichever it is, and it alone speaks; as under srun, which ends the
others when the first one leaves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from small_runs import Options, small_options
from test_failures import ended, start, written

from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault
from dpt_hpc.train.writer import restore

pytestmark = pytest.mark.slow

IN_A_STEP = """\
import sys, time
from dpt_hpc import launch
from dpt_hpc.errors import DataError
from dpt_hpc.train import writer
from dpt_hpc.train.loop import Trainer
victim, seconds = (int(word) for word in (sys.argv.pop(), sys.argv.pop()))
train_step, write_checkpoint = Trainer.train_step, writer.write_checkpoint
def fail(trainer, step, batches):
    if trainer.engine.rank == victim and trainer.step == 3:
        raise DataError("shard 3: gone")
    return train_step(trainer, step, batches)
def write(*arguments):
    time.sleep(seconds)
    write_checkpoint(*arguments)
Trainer.train_step, writer.write_checkpoint = fail, write
launch.main()
"""
WHILE_STARTING = """\
from dpt_hpc import launch
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.run import Run
prepare = Run._prepare
def fail(run, *arguments):
    raise EnvironmentFault("no more room")
Run._prepare = fail
launch.main()
"""
PATIENT = """\
import sys
from dpt_hpc import launch
sys.modules["dpt_hpc.cli.app"].SECONDS_FOR_THE_FIRST_RANK = 15.0
launch.main()
"""


@pytest.fixture(scope="module")
def options(small_dataset: Path) -> Options:
    return small_options(small_dataset)


def test_all_ranks_end_with_the_code_of_the_one_that_fails_in_a_step(options: Options, tmp_path: Path) -> None:
    """Two runs at once. In one rank 0 fails, which keeps the heartbeats; in the other rank 1, while rank 0 is writing a
    checkpoint."""
    program = tmp_path / "fails.py"
    program.write_text(IN_A_STEP)
    runs = []
    for victim, timeout, writing in ((0, 12, 0), (1, 36, 12)):
        changed = options | {"engine": {"rank_timeout": timeout}}
        config = written(tmp_path / f"{victim}.yaml", changed, tmp_path / f"run_{victim}")
        runs.append(start(2, program, config, "--quiet", writing, victim))
    for victim, processes in enumerate(runs):
        done = ended(processes)
        told = "".join(text for _, text in done)
        assert [code for code, _ in done] == [DataError.exit_code] * 2, told
        assert told.count("error") == told.count("shard 3: gone") == 1, told
        assert len(told.splitlines()) == 1, told
        restored = restore(tmp_path / f"run_{victim}" / "checkpoints")
        assert restored is not None
        assert restored.state["step"] == 2
        assert not restored.damaged


def test_a_rank_that_is_ended_beside_one_that_fails_while_starting_ends_with_its_code(
    options: Options, tmp_path: Path
) -> None:
    """Two runs at once: rank 0 fails alone, or both by a mistake of the config. SIGTERM comes when rank 0 has left."""
    program, patient = tmp_path / "fails.py", tmp_path / "patient.py"
    program.write_text(WHILE_STARTING)
    patient.write_text(PATIENT)  # on a busy machine one rank is seconds behind the other
    config = written(tmp_path / "config.yaml", options | {"engine": {"rank_timeout": 12}}, tmp_path / "run")
    mistake = written(tmp_path / "mistake.yaml", options | {"engine": {"kind": "torch"}}, tmp_path / "none")
    runs = {"no more room": start(2, program, config), "engine.kind is torch": start(2, patient, mistake)}
    left = dict(runs)
    while left:
        for word, processes in list(left.items()):
            if processes[0].poll() is not None:
                processes[1].send_signal(signal.SIGTERM)
                del left[word]
        time.sleep(0.01)
    for (word, processes), code in zip(runs.items(), (EnvironmentFault.exit_code, ConfigError.exit_code), strict=True):
        done = ended(processes, 30)
        told = "".join(text for _, text in done)
        assert [code for code, _ in done] == [code] * 2, told
        assert "Traceback" not in told
        assert told.count("error") == told.count(word) == 1, told
        assert "stopped" not in told
