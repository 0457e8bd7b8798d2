"""Checkpoints are whole or absent: whatever kills the process, fills the disk, or damages a file."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import IO

import pytest
import torch
import yaml
from required import required
from small_runs import Options, of_steps, run, same_weights

from dpt_hpc.errors import ConfigError, EnvironmentFault
from dpt_hpc.models import CGCNNOptions, build_model
from dpt_hpc.train.card import ModelCard
from dpt_hpc.train.checkpoint import Snapshot, damage, load_model
from dpt_hpc.train.config import CheckpointOptions
from dpt_hpc.train.writer import CheckpointWriter, go_back, restore


def snapshot(step: int, size: int = 1) -> Snapshot:
    """A checkpoint of a network whose moments are all `step`: `size` times 4 kB."""
    options = CGCNNOptions(hidden=4, layers=1, gaussians=4, readout_hidden=4)
    moments = {"step": torch.tensor(float(step)), "exp_avg.weight": torch.full((1024 * size,), float(step))}
    state = {"step": step, "epoch": step + 1, "step_in_epoch": 0, "best": None, "best_loss": 1.0 / step}
    return Snapshot.of(ModelCard(options, (14,)), build_model(options).state_dict(), moments, state)


def write(writer: CheckpointWriter, step: int, *, best: bool = False) -> str:
    name = writer.name(step)
    shot = snapshot(step)
    shot.state["best"] = name if best else None
    writer.submit(name, shot, best=best)
    assert writer.finish() is None
    return name


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").glob("[!.]*") if not p.is_symlink())


def test_kills_at_random_moments_inside_the_writer_never_lose_a_published_checkpoint(tmp_path: Path) -> None:
    """Thirty processes that do nothing but publish, prune and re-point checkpoints are killed after a random time."""
    draw = random.Random(5)
    directory = tmp_path / "checkpoints"
    before = 0
    caught = set()
    for _ in range(30):
        child = os.fork()
        if child == 0:
            try:
                writer = CheckpointWriter(tmp_path, CheckpointOptions(keep=2))
                for step in range(before + 1, before + 10_000):
                    shot = snapshot(step, size=64)
                    name = writer.name(step)
                    shot.state["best"] = name
                    writer.submit(name, shot, best=step % 2 == 0)
            finally:
                os._exit(1)
        time.sleep(draw.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        caught |= {p.name.split("_")[0] for p in directory.glob(".*_*")}
        restored = restore(directory)
        if restored is None:
            assert before == 0
            continue
        assert not restored.damaged
        step = restored.state["step"]
        assert step >= before
        assert torch.equal(restored.optimizer["exp_avg.weight"], torch.full((1024 * 64,), float(step)))
        if (directory / "best").is_symlink():
            assert damage((directory / "best").resolve()) is None
        assert all(damage(path) is None for path in directory.glob("step_*"))
        go_back(restored)
        before = step
    assert before >= 10
    assert ".partial" in caught, "no kill came while a checkpoint was being written"


def test_pruning_keeps_the_newest_the_best_and_those_of_some_epochs(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointOptions(keep=2, keep_every_epochs=3))
    for step in range(1, 9):
        write(writer, step, best=step == 4)
    assert names(tmp_path) == [f"step_{s:08d}" for s in (3, 4, 6, 7, 8)]
    again = write(writer, 8)
    assert again == "step_00000008.1", "a published checkpoint is never written over"
    assert (tmp_path / "checkpoints" / "last").resolve().name == again
    restored = restore(tmp_path / "checkpoints")
    assert restored is not None
    assert restored.checkpoint.name == again


def test_whatever_stops_the_writer_is_told(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointOptions())
    name = write(writer, 1)
    unspeakable = snapshot(2)
    unspeakable.state["epoch"] = threading.Lock()  # nothing can write it down
    writer.submit(writer.name(2), unspeakable, best=False)
    fault = writer.finish()
    assert fault is not None
    assert re.match(
        rf"checkpoint {tmp_path}/checkpoints: cannot be written: TypeError: .*; the last whole one is {name}\.\n"
        r"Find out what is wrong with .*--resume",
        str(fault),
    )
    assert not list((tmp_path / "checkpoints").glob(".*_*")), "half a checkpoint keeps a disk full"
    writer.submit(writer.name(3), snapshot(3), best=False)
    assert writer.finish() is None, "an error that is over is not told again"


def test_what_cannot_be_removed_is_no_error_of_the_checkpoint(tmp_path: Path, small_disk: Path) -> None:
    """An old checkpoint is in use (something is mounted in it), another one has lost its manifest."""
    writer = CheckpointWriter(tmp_path, CheckpointOptions(keep=1))
    used = tmp_path / "checkpoints" / write(writer, 1) / "used"
    used.mkdir()
    subprocess.run(["mount", "--bind", small_disk, used], check=True)
    (small_disk / "file").touch()
    try:
        last = write(writer, 2)
        [left] = (tmp_path / "checkpoints").glob(".removed_*")
        last = write(writer, 3)
    finally:
        subprocess.run(["umount", "-l", left / "used"], check=True)
    assert names(tmp_path) == [last]
    assert left.exists()
    (tmp_path / "checkpoints" / last / "manifest.json").write_text("{")
    writer.options = CheckpointOptions(keep=1, keep_every_epochs=5)
    last = write(writer, 4)
    assert names(tmp_path) == [last]
    assert not left.exists(), "it is tried again"


def test_a_checkpoint_damaged_twice_is_set_aside_twice(tmp_path: Path) -> None:
    write(CheckpointWriter(tmp_path, CheckpointOptions(keep=3)), 1, best=True)
    for _ in range(2):
        second = write(CheckpointWriter(tmp_path, CheckpointOptions(keep=3)), 2)
        (tmp_path / "checkpoints" / second / "state.pt").write_bytes(b"")
        restored = restore(tmp_path / "checkpoints")
        assert restored is not None
        go_back(restored)
    assert names(tmp_path) == [f"damaged_{second}", f"damaged_{second}.1", "step_00000001"]


@pytest.mark.parametrize("fault", ["truncated", "changed", "missing file", "missing manifest", "missing directory"])
def test_a_damaged_last_checkpoint_is_set_aside_for_the_one_before(tmp_path: Path, fault: str) -> None:
    writer = CheckpointWriter(tmp_path, CheckpointOptions(keep=3))
    first, second = write(writer, 1, best=True), write(writer, 2)
    directory = tmp_path / "checkpoints"
    path = directory / second / "optimizer.safetensors"
    content = path.read_bytes()
    expected = {
        "truncated": rf"optimizer\.safetensors has 100 bytes, expected {len(content)}",
        "changed": r"optimizer\.safetensors has changed since it was written",
        "missing file": r"optimizer\.safetensors cannot be read: No such file",
        "missing manifest": r"manifest\.json is missing",
        "missing directory": r"is missing",
    }[fault]
    if fault == "truncated":
        path.write_bytes(content[:100])
    elif fault == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "missing file":
        path.unlink()
    elif fault == "missing manifest":
        (directory / second / "manifest.json").unlink()
    else:
        shutil.rmtree(directory / second)
    restored = restore(directory)
    assert restored is not None
    assert restored.checkpoint.name == first
    assert list(restored.damaged) == [second]
    assert re.match(expected, restored.damaged[second])
    go_back(restored)
    assert names(tmp_path) == ([f"damaged_{second}", first] if fault != "missing directory" else [first])
    assert (directory / "last").resolve().name == (directory / "best").resolve().name == first
    (directory / first / "state.pt").write_bytes(b"")
    with pytest.raises(
        EnvironmentFault, match=r"no checkpoint is whole.*\n.*state\.pt has 0 bytes.*\n.*set run_dir=DIR"
    ):
        restore(directory)


def test_a_checkpoint_of_an_earlier_format_is_refused_by_name(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, path = finished
    old = Path(shutil.copytree(path, tmp_path / "old", symlinks=True))
    last = (old / "checkpoints" / "last").resolve()
    (last / "manifest.json").unlink()
    (last / "optimizer.safetensors").rename(last / "optimizer.pt")
    changed = deepcopy(options)
    changed["training"]["epochs"] = 4
    with pytest.raises(ConfigError, match=r"of format 1, this version continues runs of format 2.*\n.*\n.*run_dir=DIR"):
        run(changed, old, resume=True)
    assert load_model(last) is not None
    later = write(CheckpointWriter(tmp_path, CheckpointOptions()), 1)
    manifest = tmp_path / "checkpoints" / later / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 3}))
    with pytest.raises(ConfigError, match=r"of format 3, this version reads format 2.*\n.*that wrote it"):
        restore(tmp_path / "checkpoints")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        assert not required("mount"), mounted.stderr
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def start(options: Options, run_dir: Path, config: Path, *arguments: str) -> subprocess.Popen[str]:
    config.write_text(yaml.safe_dump(options | {"task": "pretrain", "run_dir": str(run_dir)}))
    command = [sys.executable, "-m", "dpt_hpc", "pretrain", str(config), "--quiet", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for_step(run_dir: Path, process: subprocess.Popen[str], step: int) -> None:
    """Until a checkpoint of `step` or later is published."""
    while not any(load_step(path) >= step for path in (run_dir / "checkpoints").glob("step_*")):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)


def load_step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:13])


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 1024)
        except OSError:
            pass
    return filler


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_stops_or_goes_on_as_asked(
    finished: tuple[Options, Path], small_disk: Path, tmp_path: Path, on_error: str
) -> None:
    options = deepcopy(finished[0])
    options["training"]["epochs"] = 30
    options["checkpoint"] |= {"on_error": on_error}
    run_dir = small_disk / "run"
    process = start(options, run_dir, tmp_path / "config.yaml")
    wait_for_step(run_dir, process, 10)
    filler = fill(small_disk)
    assert process.stderr is not None
    if on_error == "stop":
        told = process.stderr.read()
        assert process.wait(60) == EnvironmentFault.exit_code
        assert "cannot be written: No space left on device; the last whole one is step_" in told
        assert "go on with --resume" in told
        assert told.count("error: ") == 1
        assert "Traceback" not in told
    else:
        told = read_until(process.stderr, "tried again at the next checkpoint")
        assert "No space left on device" in told
    restored = restore(run_dir / "checkpoints")
    assert restored is not None
    assert not restored.damaged
    filler.unlink()
    if on_error == "stop":
        process = start(options, run_dir, tmp_path / "config.yaml", "--resume")
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 0, rest
    assert of_steps(run_dir, "step") == list(range(1, 151)), "no line of the log is lost"
    same_weights(run_dir, run(options, tmp_path / "whole"))


def read_until(stream: IO[str], text: str) -> str:
    told = ""
    for line in stream:
        told += line
        if text in line:
            return told
    raise AssertionError(f"never said {text!r}: {told}")


@pytest.mark.slow
def test_a_disk_that_stays_full_stops_the_run_at_its_end(
    finished: tuple[Options, Path], small_disk: Path, tmp_path: Path
) -> None:
    options = deepcopy(finished[0])
    options["training"]["epochs"] = 6
    options["checkpoint"] |= {"on_error": "continue"}
    process = start(options, small_disk / "run", tmp_path / "config.yaml")
    wait_for_step(small_disk / "run", process, 4)
    fill(small_disk)
    _, told = process.communicate(timeout=120)
    assert process.returncode == EnvironmentFault.exit_code
    assert "error: checkpoint" in told
    assert "No space left on device" in told


@pytest.mark.slow
def test_a_read_only_directory_is_told(finished: tuple[Options, Path], small_disk: Path, tmp_path: Path) -> None:
    """From the beginning, and in the middle of a run."""
    options = deepcopy(finished[0])
    options["training"]["epochs"] = 200
    process = start(options, small_disk / "run", tmp_path / "config.yaml")
    wait_for_step(small_disk / "run", process, 4)
    # Files that are open for writing keep a file system writable: make the directory itself refuse.
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", small_disk / "run" / "checkpoints"], check=True)
    try:
        _, told = process.communicate(timeout=120)
        assert process.returncode == EnvironmentFault.exit_code, told
        assert "cannot be written: Read-only file system" in told
    finally:
        subprocess.run(["umount", "-l", small_disk / "run" / "checkpoints"], check=True)
    restored = restore(small_disk / "run" / "checkpoints")
    assert restored is not None
    assert not restored.damaged
    error_log = (small_disk / "run" / "error.log").read_text()
    assert "rank 0 on" in error_log
    assert "Traceback (most recent call last)" in error_log
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    process = start(options, small_disk / "other", tmp_path / "config.yaml")
    _, told = process.communicate(timeout=120)
    assert process.returncode == EnvironmentFault.exit_code
    assert "Read-only file system" in told
    assert "other" in told
