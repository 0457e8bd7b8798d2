"""Which GPU and cores a rank gets, what DeepSpeed may be told, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import Options, of_steps, run

from dpt_hpc.errors import ConfigError
from dpt_hpc.train.deepspeed_options import read_deepspeed_options, stale_build_locks
from dpt_hpc.train.placement import bound, crowded_cores, divide_cores, shared_gpus

ZERO = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"


def test_unbound_ranks_divide_the_cores() -> None:
    cores = [0, 4, 1, 5, 2, 6, 3, 7]  # two logical ones of a physical one side by side
    assert divide_cores([cores] * 3) == [[0, 4], [1, 5, 2], [6, 3, 7]]
    assert divide_cores([cores] * 4)[3] == [3, 7]


def test_ranks_that_the_launcher_has_bound_stay_where_they_are() -> None:
    assert divide_cores([[0, 1], [2, 3]]) == [[0, 1], [2, 3]]
    assert divide_cores([[0, 1, 2, 3]]) == [[0, 1, 2, 3]]


def test_ranks_that_share_a_socket_or_have_a_set_within_a_set_divide_it() -> None:
    sockets = [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]
    assert divide_cores(sockets) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert divide_cores([[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]) == [[2], [0, 1], [3]]


def test_ranks_without_a_core_each_are_told() -> None:
    assert crowded_cores(divide_cores([[0], [1]]), [[0], [1]], "n1") is None
    allowed = [[2]] * 4
    message = crowded_cores(divide_cores(allowed), allowed, "n1")
    assert message is not None
    assert message.startswith("4 of the 4 ranks of node n1 may run on 1 core(s) only (2)")
    assert "--cpus-per-task" in message
    allowed = [[0], [0], [1, 2, 3]]  # more cores than ranks in all
    message = crowded_cores(divide_cores(allowed), allowed, "n1")
    assert message is not None
    assert message.startswith("2 of the 3 ranks of node n1 may run on 1 core(s) only (0)")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: nothing to bind to")
def test_threads_that_are_there_already_are_bound_too() -> None:
    program = (
        "import os, torch; from pathlib import Path; from dpt_hpc.train.placement import bind\n"
        "torch.set_num_threads(2); torch.ones(600, 600) @ torch.ones(600, 600)\n"
        "core = max(os.sched_getaffinity(0)); bind([core])\n"
        "threads = [int(thread.name) for thread in Path('/proc/self/task').iterdir()]\n"
        "assert len(threads) > 1 and all(os.sched_getaffinity(thread) == {core} for thread in threads)\n"
    )
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)


def test_a_rank_that_cannot_be_bound_trains_on(capsys: pytest.CaptureFixture[str]) -> None:
    before = os.sched_getaffinity(0)
    assert not bound("rank 3 on n1", [100_000, 100_001])
    assert os.sched_getaffinity(0) == before
    told = capsys.readouterr().err
    assert told.startswith("warning: rank 3 on n1 cannot be bound to its core(s) 100000, 100001: ")
    assert "engine.pin=false" in told


def test_two_ranks_on_one_gpu_are_refused() -> None:
    assert shared_gpus([("a", "gpu-1"), ("a", "gpu-2"), ("b", "gpu-1"), ("b", None), ("b", None)]) is None
    message = shared_gpus([("a", "gpu-1"), ("a", "gpu-2"), ("a", "gpu-1"), ("a", "gpu-2")])
    assert message is not None
    assert message.startswith("ranks 0, 2 share a GPU of a (gpu-1); 1 more GPU(s) are shared.")
    assert "Start as many ranks per node as it has GPUs" in message


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_files_that_ship_are_read(stage: int) -> None:
    options = read_deepspeed_options(str(ZERO / f"zero{stage}.json"), 0)
    assert options["zero_optimization"]["stage"] == stage
    assert read_deepspeed_options(None, stage) == {"zero_optimization": {"stage": stage}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage 3 of ZeRO cannot train on forces: its hooks free"),
        ({"zero_optimization": {"stage": "2"}}, "ZeRO stage is '2', expected 0, 1 or 2"),
        ({"zero_optimization": {"stage": 2}}, "says ZeRO stage 2, but engine.zero_stage is 1"),
        ({"zero_optimization": {"offload_optimizer": {}}}, "zero_optimization.offload_optimizer: nothing is offloaded"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm is false, but the gradient's norm"),
        ({"communication_data_type": "fp16"}, "communication_data_type is fp16, but gradients are summed in fp32"),
        ({"bf16": {"enabled": True}}, "bf16 is decided by training.precision"),
        ({"train_batch_size": 8}, "train_batch_size is decided by training.batch_size"),
        ({"zero_optimisation": {}}, "zero_optimisation: unknown here; did you mean zero_optimization?"),
        ([], "expected an object"),
    ],
)
def test_a_deepspeed_file_that_does_not_fit_is_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        read_deepspeed_options(str(path), 1)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_deepspeed_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: No such file"):
        read_deepspeed_options(str(tmp_path / "none.json"), 0)
    (tmp_path / "broken.json").write_text('{"zero_optimization":\n')
    with pytest.raises(ConfigError, match=r"broken\.json:2: not valid JSON"):
        read_deepspeed_options(str(tmp_path / "broken.json"), 0)


def test_zero_3_is_refused_by_name(finished: tuple[Options, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.zero_stage: stage 3 of ZeRO cannot train on forces"):
        run(finished[0], tmp_path / "run", engine={"zero_stage": 3})


def test_a_wrong_number_of_ranks_is_refused(finished: tuple[Options, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.world_size is 4, but this run has 1 rank\(s\) \(no launcher"):
        run(finished[0], tmp_path / "run", engine={"world_size": 4})


@pytest.mark.slow
def test_a_stale_build_lock_hangs_nothing_and_is_told(
    finished: tuple[Options, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """DeepSpeed would wait for the lock of the extension that it compiles on CPUs."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    assert stale_build_locks() == []  # somebody may be building
    os.utime(lock, (time.time() - 7200,) * 2)
    run_dir = run(
        finished[0],
        tmp_path / "run",
        engine={"kind": "deepspeed", "deepspeed": str(ZERO / "zero1.json")},
        training={"epochs": 1, "batch_size": 12},
    )
    assert len(of_steps(run_dir, "step")) == 2
    told = capsys.readouterr().err
    assert f"warning: {lock}: left 2.0 h ago by a build of deepspeed_shm_comm that was killed." in told
    assert f"Remove it: rm {lock}" in told
