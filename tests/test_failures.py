"""Signals, lost ranks, another number of ranks, steps that are not finite: a run ends in time, by name, and goes on.

Ranks are started here by hand: a launcher would end the others before they could say what they know.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import Options, of_steps, records, run, same_weights, small_options

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import RankLost
from dpt_hpc.train.checkpoint import load_optimizer, load_state, load_weights
from dpt_hpc.train.failures import DivergedError
from dpt_hpc.train.signals import EXIT_INTERRUPTED, EXIT_REQUEUE
from dpt_hpc.train.writer import restore

SEVERAL_RUNS = Path(__file__).with_name("several_runs.py")


def start(ranks: int, *command: object) -> list[subprocess.Popen[str]]:
    """`ranks` processes of python `command`, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def start_run(ranks: int, config: Path, *arguments: str) -> list[subprocess.Popen[str]]:
    return start(ranks, "-m", "dpt_hpc.launch", config, "--quiet", *arguments)


def ended(processes: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str]]:
    """Exit code and output of each process."""
    try:
        told = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def succeed(processes: list[subprocess.Popen[str]]) -> None:
    for code, told in ended(processes):
        assert code == 0, told


def written(path: Path, options: Options, run_dir: Path) -> Path:
    path.write_text(yaml.safe_dump(options | {"task": "pretrain", "run_dir": str(run_dir)}))
    return path


def wait_for_step(run_dir: Path, processes: list[subprocess.Popen[str]], step: int) -> None:
    while not any(int(p.name[5:13]) >= step for p in (run_dir / "checkpoints").glob("step_*")):
        assert all(p.poll() is None for p in processes), ended(processes, 10)
        time.sleep(0.01)


@pytest.fixture(scope="module")
def options(small_dataset: Path) -> Options:
    return small_options(small_dataset)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_within_seconds_asks_for_requeue_and_the_run_ends_bit_equal(
    options: Options, tmp_path: Path, number: signal.Signals
) -> None:
    """One process; the signal comes anywhere: in a step, in a validation, in a save; SIGCONT follows, as of Slurm."""
    options = deepcopy(options)
    options["training"] |= {"epochs": 12}
    options["checkpoint"] = {"every_steps": 100}
    config = written(tmp_path / "config.yaml", options, tmp_path / "run")
    arguments: list[str] = []
    for step in (5, 20):
        processes = start_run(1, config, *arguments)
        wait_for_step(tmp_path / "run", processes, step)
        processes[0].send_signal(number)
        processes[0].send_signal(signal.SIGCONT)
        began = time.monotonic()
        [(code, told)] = ended(processes)
        assert time.monotonic() - began < 30
        assert code == EXIT_REQUEUE == 75, told
        assert f"stopped: told to stop ({number.name}): all is saved up to step" in told.replace(
            "during an evaluation ", ""
        )
        assert "Traceback" not in told
        stopped_at = int(told.partition("up to step ")[2].partition(".")[0])
        restored = restore(tmp_path / "run" / "checkpoints")
        assert restored is not None
        assert restored.state["step"] == stopped_at
        assert not (tmp_path / "run" / "error.log").exists()
        arguments = ["--resume"]
    succeed(start_run(1, config, "--resume"))
    whole = run(options, tmp_path / "whole")
    for name in ("step", "loss", "learning_rate", "grad_norm"):
        assert of_steps(whole, name) == of_steps(tmp_path / "run", name), name
    assert [r["validation"] for r in records(whole, "epoch")] == [
        r["validation"] for r in records(tmp_path / "run", "epoch")
    ]
    same_weights(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_two_ranks_go_on_bit_equal(options: Options, tmp_path: Path) -> None:
    options = deepcopy(options)
    options["training"] |= {"epochs": 6, "grad_accumulation": 2}
    options["engine"] = {"zero_stage": 2}
    whole = written(tmp_path / "whole.yaml", options, tmp_path / "whole")
    config = written(tmp_path / "config.yaml", options, tmp_path / "run")
    succeed(start_run(2, whole))
    processes = start_run(2, config)
    wait_for_step(tmp_path / "run", processes, 7)
    processes[1].send_signal(signal.SIGUSR1)
    for code, told in ended(processes):
        assert code == EXIT_REQUEUE, told
    step = load_state(tmp_path / "run" / "checkpoints" / "last")["step"]
    assert 7 <= step < 30
    succeed(start_run(2, config, "--resume"))
    assert of_steps(tmp_path / "run", "loss") == of_steps(tmp_path / "whole", "loss")
    same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_ctrl_c_that_reaches_one_rank_is_every_ranks_exit_code(options: Options, tmp_path: Path) -> None:
    """Launch files would queue the run again for another one."""
    long = options | {"training": options["training"] | {"epochs": 500}}
    processes = start_run(2, written(tmp_path / "config.yaml", long, tmp_path / "run"))
    wait_for_step(tmp_path / "run", processes, 3)
    processes[0].send_signal(signal.SIGINT)
    done = ended(processes)
    assert [code for code, _ in done] == [EXIT_INTERRUPTED] * 2, done


@pytest.mark.slow
def test_four_then_two_ranks_then_one_go_on_with_the_loss_that_was_left(options: Options, tmp_path: Path) -> None:
    """ZeRO 2, then ZeRO 1 with accumulation, then plain torch; and back to DeepSpeed without ZeRO."""
    options = deepcopy(options)
    options["training"] |= {"epochs": 5}
    options["model"] |= {"gaussian_width": 0.2}
    run_dir = tmp_path / "run"
    config = written(tmp_path / "config.yaml", options, run_dir)
    stages = (
        (4, ["training.epochs=1", "engine.zero_stage=2"]),
        (2, ["training.epochs=2", "engine.zero_stage=1", "training.grad_accumulation=2"]),
        (1, ["training.epochs=3"]),
        (1, ["training.epochs=4", "engine.kind=deepspeed"]),
        (2, ["training.epochs=5", "engine.zero_stage=2"]),
    )
    for i, (ranks, changes) in enumerate(stages):
        sets = [word for change in changes for word in ("--set", change)]
        succeed(start_run(ranks, config, *sets, *(["--resume"] if i else [])))
        assert json.loads((run_dir / "run.json").read_text())["world_size"] == ranks
    whole = run(options, tmp_path / "whole")
    assert of_steps(run_dir, "step") == of_steps(whole, "step") == list(range(1, 26))
    np.testing.assert_allclose(of_steps(run_dir, "loss"), of_steps(whole, "loss"), rtol=1e-6)
    same_weights(run_dir, whole, within=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(1, signal.SIGKILL), (0, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_a_killed_or_stopped_rank_ends_the_others_and_is_named(
    options: Options, tmp_path: Path, victim: int, number: signal.Signals
) -> None:
    timeout = 20
    options = deepcopy(options)
    options["training"] |= {"epochs": 1000}
    options["engine"] = {"rank_timeout": timeout}
    run_dir = tmp_path / "run"
    processes = start_run(3, written(tmp_path / "config.yaml", options, run_dir))
    wait_for_step(run_dir, processes, 4)
    processes[victim].send_signal(number)
    began = time.monotonic()
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        for process in others:
            process.wait(60)
        seconds = time.monotonic() - began
    finally:
        processes[victim].kill()
    told = "".join(text for _, text in ended(processes))
    assert seconds < timeout + 6, told
    assert [process.returncode for process in others] == [RankLost.exit_code] * 2, told
    assert told.count("error: ") == 1, told
    assert f"error: rank {victim} on {platform.node()}" in told, told
    assert "with --resume" in told
    assert f"rank {victim} on {platform.node()}" in (run_dir / "error.log").read_text()
    restored = restore(run_dir / "checkpoints")
    assert restored is not None
    assert not restored.damaged


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_do_not_train_on(options: Options, tmp_path: Path) -> None:
    """What happens to the ranks of a node when slurmstepd dies; here the launcher is torchrun's name and a process."""
    options = deepcopy(options)
    options["training"] |= {"epochs": 1000}
    options["engine"] = {"rank_timeout": 20}
    config = written(tmp_path / "config.yaml", options, tmp_path / "run")
    program = tmp_path / "launcher.py"
    program.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(SEVERAL_RUNS.parent)!r})\n"
        "from test_failures import start_run\n"
        "os.environ['TORCHELASTIC_RUN_ID'] = 'test'\n"
        f"ranks = start_run(2, {str(config)!r})\n"
        "print(*[rank.pid for rank in ranks], flush=True)\n"
        "print([rank.communicate() for rank in ranks])\n"
    )
    launcher = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    ranks = [int(word) for word in launcher.stdout.readline().split()]
    wait_for_step(tmp_path / "run", [launcher], 2)
    launcher.kill()
    launcher.communicate()
    began = time.monotonic()
    while any(is_running(rank) for rank in ranks) and time.monotonic() - began < 60:
        time.sleep(0.1)
    left = [rank for rank in ranks if is_running(rank)]
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    assert not left
    assert "its launcher is gone" in (tmp_path / "run" / "error.log").read_text()


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def endless_label(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The small dataset with one energy, of the training part, that float32 cannot hold; and that structure's id."""
    source = Dataset.open(small_dataset)
    bad = str(np.load(finished[1] / "split.npz")["train"][3])
    structures = [source.get(i) for i in range(len(source))]
    endless = [
        replace(s, energy=torch.tensor(1e300, dtype=torch.float64) if torch.is_tensor(s.energy) else 1e300)
        if name == bad
        else s
        for name, s in zip(source.ids(np.arange(len(source))), structures, strict=True)
    ]
    out = tmp_path_factory.mktemp("endless") / "data"
    write_dataset(endless, out, provenance={}, property_units={"volume_per_atom": "A^3"})
    return out, bad


def test_steps_that_are_not_finite_are_skipped_at_most_so_often(
    options: Options, endless_label: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, bad = endless_label
    options = deepcopy(options)
    options["data"]["path"] = str(dataset)
    options["training"] |= {"epochs": 4, "max_skipped_steps": 2}
    with pytest.raises(DivergedError, match=r"epoch 3, step 1\d: loss inf.*not finite \(2 such step") as caught:
        run(options, tmp_path / "run")
    assert bad in str(caught.value)
    assert "dpt-hpc inspect" in str(caught.value)
    assert capsys.readouterr().err.count("; skipped, ") == 2
    found = json.loads((tmp_path / "run" / "diverged.json").read_text())["steps"]
    assert [s["epoch"] for s in found] == [1, 2, 3]
    for step in found:
        [rank] = step["ranks"]
        assert rank["loss"] == step["loss"] == "inf"
        assert bad in rank["structures"]
        assert len(rank["structures"]) == 5
    log = (tmp_path / "run" / "error.log").read_text()
    assert "DivergedError" in log
    assert "Traceback (most recent call last)" in log
    losses = of_steps(tmp_path / "run", "loss")
    assert losses.count(None) == 2  # type: ignore[arg-type]
    # The count is the run's, not the process's.
    with pytest.raises(DivergedError, match="2 such step"):
        run(options, tmp_path / "run", resume=True)
    options["training"] |= {"max_skipped_steps": 4}
    run(options, tmp_path / "run", resume=True)
    assert all(np.isfinite(r["train"]["loss"]) for r in records(tmp_path / "run", "epoch")[1:])


@pytest.mark.slow
def test_a_skipped_step_changes_nothing_under_any_engine(
    options: Options, endless_label: tuple[Path, str], tmp_path: Path
) -> None:
    """The loss is infinite, its gradient finite: only what all ranks know of the loss can tell them to skip."""
    dataset, bad = endless_label
    options = deepcopy(options)
    options["data"]["path"] = str(dataset)
    options["model"] |= {"gaussian_width": 0.2}
    alone = run(options, tmp_path / "alone")
    variants = [(stage, accumulation) for stage in (0, 1, 2) for accumulation in (1, 2)]
    configs = []
    for stage, accumulation in variants:
        changed = deepcopy(options) | {"engine": {"zero_stage": stage}}
        changed["training"]["grad_accumulation"] = accumulation
        name = f"zero_{stage}_{accumulation}"
        configs.append(written(tmp_path / f"{name}.yaml", changed, tmp_path / name))
    succeed(start(2, SEVERAL_RUNS, *configs))
    for config in configs:
        same_weights(alone, config.with_suffix(""), within=1e-6)
        found = json.loads((config.with_suffix("") / "diverged.json").read_text())["steps"]
        assert len(found) == 3
        assert sum(bad in rank["structures"] for rank in found[0]["ranks"]) == 1
        assert [rank["loss"] == "inf" for rank in found[0]["ranks"]].count(True) == 1


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_skipped(options: Options, tmp_path: Path) -> None:
    """Two ranks; the gradient of one weight is NaN on one of them, in the third step of five."""
    configs = []
    for stage, accumulation in ((0, 2), (1, 1), (1, 2), (2, 1), (2, 2)):
        changed = deepcopy(options) | {"engine": {"zero_stage": stage}, "checkpoint": {"every_steps": 1, "keep": 9}}
        changed["training"] |= {"epochs": 1, "grad_accumulation": accumulation}
        name = f"zero_{stage}_{accumulation}"
        configs.append(written(tmp_path / f"{name}.yaml", changed, tmp_path / name))
    succeed(start(2, SEVERAL_RUNS, "--nan-gradient", *configs))
    for config in configs:
        run_dir = config.with_suffix("")
        [found] = json.loads((run_dir / "diverged.json").read_text())["steps"]
        assert found["step"] == 3
        assert found["grad_norm"] in ("inf", "nan")
        assert np.isfinite(found["loss"])
        steps = [run_dir / "checkpoints" / f"step_{step:08d}" for step in range(2, 6)]
        held = [load_weights(path) | load_optimizer(path) for path in steps]
        assert all(tensor.isfinite().all() for tensor in held[-1].values())
        assert all(torch.equal(tensor, held[1][name]) for name, tensor in held[0].items()), "a skipped step is none"
        assert any(not torch.equal(tensor, held[2][name]) for name, tensor in held[1].items())
