"""The doctor on one and on two real ranks: green where all is well, and each red line provoked by what it warns of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from required import needs_mpi, required
from small_runs import Options, config_of, finetune_options
from test_parallel import mpiexec

from dpt_hpc.cli import run_command_line
from dpt_hpc.data import manifest
from dpt_hpc.doctor.examine import examine
from dpt_hpc.doctor.finding import Finding, worst
from dpt_hpc.doctor.machine import memory
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.world import World

NAMES = [
    *("versions", "build", "start-up", "memory", "build locks", "dataset", "staging", "engine", "placement"),
    *("all-reduce", "one-sided get", "run directory", "parity", "checkpoint"),
]


@pytest.fixture
def options(finished: tuple[Options, Path]) -> Options:
    return finished[0]


def written(options: Options, directory: Path) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(options | {"task": "pretrain", "run_dir": str(directory / "runs" / "new")}))
    return path


def by_name(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_one_rank_is_well_and_nothing_is_left_behind(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(options, tmp_path)
    run_command_line(["doctor", str(config), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert [f["name"] for f in told["findings"]] == NAMES
    assert {f["status"] for f in told["findings"]} <= {"ok", "warn"}
    figures = {f["name"]: f["figures"] for f in told["findings"]}
    assert figures["dataset"]["bytes_per_second"] > 0
    assert figures["checkpoint"]["bytes"] > 4 * figures["engine"]["weights"]
    assert list(tmp_path.iterdir()) == [config]


def test_a_fine_tuning_is_examined_too(options: Options, tmp_path: Path) -> None:
    found = by_name(examine(finetune_options(options, tmp_path / "run"), Ranks()))
    assert list(found) == NAMES
    assert found["parity"].status == found["checkpoint"].status == "ok"


def test_a_red_line_ends_with_exit_code_4_and_says_what_to_do(
    options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(SystemExit) as caught:
        run_command_line(["doctor", str(written(options, tmp_path))])
    assert caught.value.code == 4
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("bad  run directory"))
    assert "new: cannot be written: Not a directory" in lines[at]
    assert "-> Make room or get write access there" in lines[at + 1]
    assert not any("checkpoint" in line for line in lines[at + 2 :])


def test_a_run_that_is_there_already(finished: tuple[Options, Path]) -> None:
    before = sorted(finished[1].rglob("*"))
    found = by_name(examine(config_of(*finished), Ranks()))
    assert (found["run directory"].status, found["checkpoint"].status) == ("warn", "ok")
    assert "it holds a run already" in found["run directory"].said
    assert "--resume" in found["run directory"].todo
    assert sorted(finished[1].rglob("*")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 200 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], check=False)
    if mounted.returncode:
        assert not required("mount")
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_too_little_space_and_no_write_access(options: Options, small_disk: Path) -> None:
    found = by_name(examine(config_of(options, small_disk / "run"), Ranks()))
    assert found["run directory"].status == "bad"
    assert "0.20 MB free, 0.34 MB needed for checkpoints: too little space" in found["run directory"].said
    assert "checkpoint" not in found
    assert found["run directory"].as_json()["figures"]["bytes_per_second"] is None
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    found = by_name(examine(config_of(options, small_disk / "run"), Ranks()))
    assert found["run directory"].status == "bad"
    assert "cannot be written: Read-only file system" in found["run directory"].said


def test_the_place_where_shards_are_staged_is_looked_at_and_left_as_it_is(
    options: Options, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(manifest, "sha256_of", hashed.append)

    def staging(place: str) -> Finding:
        data = options["data"] | {"stage": place}
        findings = examine(config_of(options, tmp_path / "run", data=data), Ranks())
        found = next(finding for finding in findings if finding.name == "staging")
        if found.status == "ok":
            engine = next(findings)
            assert engine.figures["store"] == "disk"  # auto: a few structures are tried, the dataset is not loaded
        return found

    assert staging(f"{tmp_path}/stage/deep").status == "ok"
    assert not (tmp_path / "stage").exists()
    assert hashed == []
    (small_disk / "filled").write_bytes(bytes(190_000))
    full = staging(str(small_disk))
    assert full.status == "warn"
    assert "free, " in full.said
    assert full.said.endswith("needed for the dataset: too little space")
    monkeypatch.delenv("NOWHERE", raising=False)
    unset = staging("$NOWHERE")
    assert unset.status == "bad"
    assert "the variable NOWHERE is not set" in unset.said
    nowhere = staging(f"{small_disk}/filled/x")
    assert nowhere.status == "bad"
    assert "filled is not a directory that can be written to" in nowhere.said


def test_a_missing_shard_is_named_and_what_needs_it_is_not_tried(options: Options, tmp_path: Path) -> None:
    broken = broken_dataset(options, tmp_path)
    data = options["data"] | {"path": str(broken)}
    found = by_name(examine(config_of(options, tmp_path / "run", data=data), Ranks()))
    assert found["dataset"].status == found["engine"].status == "bad"
    assert f"{broken}/shard_00000.h5: is missing" in found["dataset"].said
    assert "parity" not in found


def broken_dataset(options: Options, directory: Path) -> Path:
    broken = directory / "broken"
    shutil.copytree(options["data"]["path"], broken)
    (broken / "shard_00000.h5").unlink()
    return broken


def test_a_stale_build_lock(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1e9, 1e9))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    found = by_name(examine(config_of(options, tmp_path / "run"), Ranks()))
    assert found["build locks"].status == "bad"
    assert f"{lock}: left" in found["build locks"].said
    assert f"rm {lock}" in found["build locks"].todo


def test_the_worst_rank_speaks() -> None:
    well, silent, ill = (Finding("x", s, said) for s, said in (("ok", "2 GB"), ("ok", ""), ("bad", "1 GB")))
    places = ["rank 0 on a", "rank 1 on b", "rank 2 on b"]
    assert worst([well, well, well], places) == well
    assert worst([silent, silent, well], places) == well
    assert worst([well, ill, ill], places).said == "rank 1 on b, and 1 more: 1 GB"
    assert worst([ill, ill, ill], places) == worst([silent, ill, silent], places) == ill


@needs_mpi
@pytest.mark.slow
def test_two_ranks(options: Options, tmp_path: Path) -> None:
    """All ZeRO stages well; then a gradient that is 1% wrong on one rank; then no shard, and one core for both."""
    program = Path(__file__).with_name("doctor_ranks.py")
    done = mpiexec(2, program, written(options, tmp_path), broken_dataset(options, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    told: list[dict[str, dict[str, Any]]] = [
        {f["name"]: f for f in json.loads(line.partition("findings: ")[2])}
        for line in done.stdout.splitlines()
        if "findings: " in line
    ]
    assert len(told) == 5
    for stage, found in enumerate(told[:3]):
        assert {f["status"] for f in found.values()} <= {"ok", "warn"}, found
        assert found["parity"]["figures"]["zero_stage"] == stage
        assert 0 < found["parity"]["figures"]["relative_error"] < 1e-5
        assert found["all-reduce"]["figures"]["bandwidth"] > 1e6
        assert found["one-sided get"]["figures"]["bytes_per_second"] > 1e6
        assert "DeepSpeedEngine" in found["engine"]["said"]
    wrong, crowded = told[3:]
    assert [name for name, f in wrong.items() if f["status"] == "bad"] == ["parity"]
    assert "the gradient of 2 rank(s) differs from that of one by" in wrong["parity"]["said"]
    assert 1e-3 < wrong["parity"]["figures"]["relative_error"] < 1e-2
    assert crowded["placement"]["status"] == "warn"
    assert "have 1 core(s) between them" in crowded["placement"]["said"]
    assert "is missing" in crowded["dataset"]["said"]
    assert crowded["engine"]["status"] == "bad"


@needs_mpi
@pytest.mark.slow
def test_a_rank_that_fails_where_another_waits_does_not_hang_the_doctor(options: Options, tmp_path: Path) -> None:
    program = Path(__file__).with_name("doctor_ranks.py")
    began = time.monotonic()
    done = mpiexec(2, program, written(options, tmp_path), "fail", timeout=200)
    assert time.monotonic() - began < 100
    assert done.returncode == 4
    assert "bad   parity: structure 7: is not there (rank 1 on " in done.stderr


def test_little_memory_is_a_warning_for_each_rank_of_a_node() -> None:
    alone, crowded = memory(Ranks()), memory(Ranks(World(local_world_size=1_000_000)))
    assert (alone.status, crowded.status) == ("ok", "warn")
    assert crowded.figures["free"] == pytest.approx(alone.figures["free"] / 1e6, rel=0.2)
    assert "0.0 GB free for each rank of a node" in crowded.said


def test_versions_of_ranks_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    from dpt_hpc.doctor.machine import versions

    class Two(Ranks):
        def all_gather(self, value: Any) -> list[Any]:
            return [value, value | {"torch": "1.0"}]

    found = versions(Two())
    assert found.status == "bad"
    assert found.said.endswith("here, 1.0 on rank 1")
    assert found.said.startswith("torch ")
    assert sys.version.split()[0] == found.figures["python"]
