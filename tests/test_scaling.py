"""`dpt-hpc bench scaling`: real steps of one and of two ranks, joined, told and drawn; the prediction's ingredients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from imbalance import count
from small_runs import Options

from dpt_hpc.data.shards import Dataset
from dpt_hpc.errors import ConfigError
from dpt_hpc.report.scaling import scaling_lines
from dpt_hpc.scaling.bench import conclude, measure_here, rank_counts
from dpt_hpc.scaling.imbalance import SimulatedImbalance
from dpt_hpc.scaling.predict import Network
from dpt_hpc.scaling.result import fit_line, join_records, work_of
from dpt_hpc.scaling.start import command_for
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.config_file import check_config
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.world import World

NETWORK = Network(5e-6, 12.5e9)
CONDITIONS = {"file_system": None, "checkpoint_minutes": 30.0, "jitter": 0.0}


def config_for(options: Options, directory: Path) -> Path:
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(options | {"run_dir": str(directory / "run")}))
    return path


@pytest.mark.slow
def test_one_and_two_ranks_are_started_measured_joined_and_predicted(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dpt_hpc", "bench", "scaling", config_for(finished[0], tmp_path)]
    command += ["--ranks", "1,2", "--structures", 4, "--steps", 2, "--warm-up", 1, "--out", out, "--predict", "--json"]
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((out / "scaling_weak.json").read_text())
    one, two = result["measurements"]
    assert [(r["ranks"], r["structures"], len(r["per_rank"])) for r in (one, two)] == [(1, 4, 1), (2, 8, 2)]
    assert one["engine"] == two["engine"] == "DeepSpeedEngine"  # else the engines' difference looks like lost scaling
    assert one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(two["structures_per_second"] / one["structures_per_second"] / 2)
    for record in (one, two):
        for share in record["per_rank"]:
            assert sum(share["parts"].values()) == pytest.approx(record["watched_seconds_per_step"], rel=0.2)
    assert two["parts"]["all-reduce"] > one["parts"]["all-reduce"]
    assert two["counts"]["gradient_bytes"] == 4 * two["parameters"]
    assert two["network"]["bandwidth"] > 1e6
    points = result["prediction"]["points"]
    assert (points[0]["ranks"], points[-1]["ranks"]) == (1, 16000)
    assert points[0]["terms"]["division"] == 0 < points[1]["terms"]["division"] < points[-1]["terms"]["division"]
    assert [c["ranks"] for c in result["prediction"]["checked"]] == [2]
    assert (out / "scaling_weak.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "scratch").exists()
    text = (out / "scaling_weak.md").read_text()
    assert all(assumption in text for assumption in result["prediction"]["assumptions"])
    assert str(tmp_path) not in text


def test_one_rank_in_this_process(finished: tuple[Options, Path], tmp_path: Path) -> None:
    config = check_config(finished[0] | {"run_dir": str(tmp_path / "run")}, PretrainConfig, "test")
    before = threading.enumerate()
    measure_here(config, "strong", 8, Ranks(), tmp_path / "out", warm_up=0, steps=4)
    result = conclude("strong", tmp_path / "out", predict=True, network=NETWORK, conditions=dict(CONDITIONS))
    (record,) = result["measurements"]
    assert record["structures"] == 8
    assert not [t for t in threading.enumerate() if t not in before], "threads of loaders are left"
    assert record["checkpoint"]["bytes"] > 4 * record["parameters"]
    # Full steps and those of an eighth of the structures: the line through both tells fixed cost from work.
    assert {w["edges"] < record["edges_per_step"] / 3 for w in record["work"]} == {True, False}
    # Shares are simulated with edges that are counted, also where one rank needs no counts.
    dataset = Dataset.open(finished[0]["data"]["path"])
    edges = np.load(tmp_path / "out" / "edges.npy").tolist()
    assert set(edges) <= set(count(dataset, 4.0, config.model.max_neighbors).tolist())
    assert not set(edges) <= set(dataset.edge_estimate.tolist())
    assert record["dataset"]["edges"] == sum(edges)
    # Of 8 structures 16,000 ranks cannot all have one: what is left is latency and idle ranks.
    assert result["prediction"]["points"][-1]["efficiency"] < 0.01
    out = tmp_path / "out"
    by_cpu = conclude("strong", out, predict=True, network=NETWORK, conditions=dict(CONDITIONS), clock="cpu")
    work, steps = by_cpu["prediction"]["work"], record["work"]
    assert (work["data_wait"], work["checkpoint"]) == (0, 0)
    assert 0 < work["per_edge"] < 3 * sum(s["cpu_seconds"] for s in steps) / sum(s["edges"] for s in steps)
    assert "the processor's time" in "\n".join(scaling_lines(by_cpu))
    assert any("strong" in line.lower() for line in scaling_lines(result))
    with pytest.raises(ConfigError, match=r"holds no measurement of weak scaling"):
        conclude("weak", tmp_path / "out", predict=False, network=NETWORK, conditions={})
    with pytest.raises(ConfigError, match=r"a step of 1 rank\(s\) needs 400 structures, but the training part has 24"):
        measure_here(config, "weak", 400, Ranks(), tmp_path / "out", warm_up=0, steps=2)
    other = record | {"ranks": 2, "structures": 9, "threads": record["threads"] + 1}
    other["options"] = json.loads(json.dumps(record["options"]))
    other["options"]["model"]["cutoff"] = 5.0
    threads, more = record["threads"], record["threads"] + 1
    told = rf"of 1 and 2 ranks differ in structures \(8 and 9\), threads \({threads} and {more}\), "
    with pytest.raises(ConfigError, match=told + r"options.model.cutoff \(4.0 and 5.0\)"):
        join_records([record, other])
    stale = tmp_path / "out" / "strong_000002.json"
    stale.write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=told):
        conclude("strong", tmp_path / "out", predict=False, network=NETWORK, conditions={})
    alone = conclude("strong", tmp_path / "out", [1], predict=False, network=NETWORK, conditions={})
    assert [r["ranks"] for r in alone["measurements"]] == [1]
    stale.unlink()
    # Bytes of all structures over all structures, not over those that are trained on; and only where they are read.
    on_disk = record | {"store": "disk"}
    assert work_of([record]).structure_bytes == 0
    assert work_of([on_disk]).structure_bytes == record["dataset"]["bytes"] / record["dataset"]["all_structures"]
    assert record["dataset"]["all_structures"] == 2 * record["dataset"]["structures"]
    on_disk["options"] = record["options"] | {"data": record["options"]["data"] | {"stage": "tmp"}}
    assert work_of([on_disk]).structure_bytes == 0
    (tmp_path / "out" / "strong_000001.json").write_text(json.dumps(record | {"ranks": 4}))
    with pytest.raises(ConfigError, match="starts from the steps of a single rank"):
        conclude("strong", tmp_path / "out", predict=True, network=NETWORK, conditions=dict(CONDITIONS))


def test_fixed_cost_and_cost_per_edge_from_steps() -> None:
    assert fit_line([100, 200, 400], [1.1, 1.2, 1.4]) == (pytest.approx(1.0), pytest.approx(0.001))
    assert fit_line([100, 100], [1.0, 3.0]) == (0.0, pytest.approx(0.02))
    assert fit_line([100, 200], [1.0, 4.0]) == (0.0, pytest.approx(5 / 300))
    assert fit_line([100, 200], [4.0, 1.0]) == (pytest.approx(2.5), 0.0)


def test_simulated_imbalance() -> None:
    same = SimulatedImbalance(np.full(10, 100), 4, weak=True)
    assert same(1) == same(64) == 1.0
    # 2 structures for 8 ranks: those that have one have 4 times the mean.
    assert SimulatedImbalance(np.full(10, 100), 2, weak=False)(8) == pytest.approx(4.0)
    # One structure for each rank cannot be balanced; sixteen can.
    sizes = np.arange(1, 100)
    assert SimulatedImbalance(sizes, 1, weak=True)(256) > 1.8
    assert SimulatedImbalance(sizes, 1, weak=True, similar_sizes=True)(256) < 1.6
    many = SimulatedImbalance(sizes, 16, weak=True)
    assert many(256) < 1.1
    assert many.seconds(1) == 0 < many.seconds(16) < many.seconds(1024)


def test_which_ranks_to_start() -> None:
    alone = Ranks()
    assert rank_counts(None, alone) == []
    assert rank_counts("1,2,4", alone) == [1, 2, 4]
    for wrong in ("0", "2,2", "1;2", ""):
        with pytest.raises(ConfigError, match=r"expected distinct numbers of ranks, for example 1,2,4"):
            rank_counts(wrong, alone)
    two = Ranks(World(rank=1, world_size=2, source="srun"), members=(0, 1))
    assert rank_counts("2", two) == []
    with pytest.raises(ConfigError, match=r"srun has started 2 ranks, and they cannot start others"):
        rank_counts("1,2", two)


def test_how_ranks_are_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, said in (("srun", ""), ("mpiexec", "HYDRA build details")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert command_for(4, ["x"], {"SLURM_JOB_ID": "7"})[:3] == [str(tmp_path / "srun"), "-n", "4"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert command_for(4, ["x"], {}) == [
        *(str(tmp_path / "mpiexec"), "-n", "4"),
        *(str(tmp_path / "python"), "-m", "dpt_hpc", "x"),
    ]
    (tmp_path / "mpiexec").unlink()
    monkeypatch.setenv("PATH", "")
    torchrun = command_for(2, ["x"], {})
    assert torchrun[1:3] == ["-m", "torch.distributed.run"]
    assert torchrun[-3:] == ["-m", "dpt_hpc", "x"]
