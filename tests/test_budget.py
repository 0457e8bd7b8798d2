"""The edge budget: set, learnt from memory, halved when a GPU is full; and what an epoch tells of its costs."""

from __future__ import annotations

import itertools
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import Options, config_of, of_steps, run, same_weights

from dpt_hpc.data.sampler import Sampler
from dpt_hpc.data.shared_memory import free_memory, status_bytes
from dpt_hpc.errors import ConfigError, EnvironmentFault
from dpt_hpc.train.budget import LEARNING_STEPS, LEAST_TAKEN, SHARE, EdgeBudget, HostMemory, Memory, rounded_down
from dpt_hpc.train.costs import EpochCosts
from dpt_hpc.train.loop import Trainer
from dpt_hpc.train.ranks import Ranks

CPU = torch.device("cpu")
EDGES = np.array([100, 40, 30, 20, 900])


class Linear(Memory):
    """A device on which training takes `fixed` bytes and `per_edge` for each edge of its fullest micro-batch."""

    def __init__(self, room: int, fixed: int, per_edge: int) -> None:
        self.room, self.fixed, self.per_edge, self.edges = room, fixed, per_edge, 0

    def taken(self) -> int:
        return self.fixed + self.per_edge * self.edges


def sampler() -> Sampler:
    return Sampler(np.arange(4), EDGES, 4, seed=0)


def test_learning_begins_with_the_largest_structure_and_grows_to_what_fits() -> None:
    drawn = sampler()
    budget = EdgeBudget("auto", drawn, Ranks(), CPU)
    memory = Linear(room=20_000_000_000, fixed=10_000_000, per_edge=1_000_000)
    budget.watch(memory)
    seen = [drawn.edge_budget]
    while budget.steps_to_learn:
        memory.edges = seen[-1] or 0  # every step fills its budget
        assert budget.learn(memory.edges)
        seen.append(drawn.edge_budget)
    assert seen[:2] == [100, 384]  # of the training part: structure 4 is not in it
    assert len(seen) == 1 + LEARNING_STEPS
    fits = SHARE * 20_000_000_000 / 1_000_000
    assert 0.8 * fits < seen[-1] <= fits
    assert not budget.learn(10**9)


def test_a_budget_stays_near_what_has_been_tried() -> None:
    """Small steps on a large memory: how much a far larger micro-batch takes is not known."""
    drawn = sampler()
    budget = EdgeBudget("auto", drawn, Ranks(), CPU)
    budget.watch(Linear(room=10**12, fixed=0, per_edge=1))
    while budget.steps_to_learn:
        budget.learn(300)
    assert drawn.edge_budget == rounded_down(4 * 300)


def test_no_step_of_learning_is_a_leap_the_last_one_neither() -> None:
    drawn = sampler()
    budget = EdgeBudget("auto", drawn, Ranks(), CPU)
    budget.watch(Linear(room=10**15, fixed=0, per_edge=1))
    seen = [100]
    while budget.steps_to_learn:
        budget.learn(seen[-1])
        seen.append(drawn.edge_budget or 0)
    assert all(after <= 4 * before for before, after in itertools.pairwise(seen))
    assert seen[-1] > 10_000


def test_edges_of_one_epoch_are_not_set_against_the_memory_of_the_next() -> None:
    drawn = sampler()
    budget = EdgeBudget("auto", drawn, Ranks(), CPU)
    memory = Linear(room=100_000_000, fixed=0, per_edge=1_000_000)
    for edges in (100, 10):  # epochs of one step each
        budget.watch(memory)
        memory.edges = edges
        budget.learn(edges)
    assert drawn.edge_budget == 80  # 384 if 100 edges took what 10 take


def test_what_is_too_little_to_be_measured_is_taken_for_some_megabytes() -> None:
    drawn = sampler()
    budget = EdgeBudget("auto", drawn, Ranks(), CPU)
    budget.watch(Linear(room=1_000_000_000, fixed=0, per_edge=0))
    seen = []
    while budget.steps_to_learn:
        budget.learn(3)
        seen.append(drawn.edge_budget)
    assert seen == [rounded_down(int(SHARE * 1_000_000_000 * 3 / LEAST_TAKEN))] * LEARNING_STEPS


def test_less_memory_than_the_largest_structure_takes_gives_a_smaller_budget() -> None:
    drawn = sampler()
    budget = EdgeBudget("auto", drawn, Ranks(), CPU)
    memory = Linear(room=50_000_000, fixed=0, per_edge=1_000_000)
    budget.watch(memory)
    memory.edges = 100
    budget.learn(100)
    assert drawn.edge_budget == 40
    assert budget.above(lambda indices: [f"id {i}" for i in indices]) == (
        "1 structure(s) have more edges than the edge budget, 40, and are computed alone: id 0"
    )


def test_a_learnt_budget_is_resumed_by_as_many_ranks_only() -> None:
    state = {"edges": 77, "steps_to_learn": 0, "world_size": 1}
    learnt, others, set_by_hand = sampler(), sampler(), sampler()
    budget = EdgeBudget("auto", learnt, Ranks(), CPU)
    budget.resume(state)
    assert (learnt.edge_budget, budget.state()) == (77, state)
    EdgeBudget("auto", others, Ranks(), CPU).resume(state | {"world_size": 8})
    assert others.edge_budget == 100
    given = EdgeBudget(55, set_by_hand, Ranks(), CPU)
    given.resume(state)
    assert (set_by_hand.edge_budget, given.state()) == (55, None)


def test_the_memory_of_the_host_is_what_was_taken_and_what_is_free() -> None:
    kept = [np.ones(10_000) for _ in range(2_000)]  # 160 MB that the allocator does not give back by itself
    kept = kept[-1:]
    memory = HostMemory(2)
    assert HostMemory(1).room == pytest.approx(2 * memory.room, rel=0.3)
    held = np.ones(30_000_000)  # 240 MB
    del held
    assert 230e6 < memory.taken() < 400e6


def test_what_the_heap_had_kept_counts_as_taken_when_it_is_used_again() -> None:
    """Arrays of 64 kB come from the heap, which keeps them while one above them lives."""
    held = [np.ones(8192) for _ in range(3000)]
    del held[:-1]
    memory = HostMemory(1)
    again = [np.ones(8192) for _ in range(2000)]
    assert memory.taken() > 100e6
    del again


def test_the_ulimit_of_a_rank_is_not_divided_by_the_ranks_of_its_node() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + 100_000_000, hard))
    try:
        rooms = [free_memory(processes) for processes in (1, 2)]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    assert all(80e6 < room <= 100_000_000 for room in rooms)
    assert free_memory() > 200e6


@pytest.mark.parametrize(("edges", "rounded"), [(1, 1), (7, 7), (9, 8), (1000, 896), (1023, 896), (1024, 1024)])
def test_a_budget_is_rounded_down_to_three_binary_digits(edges: int, rounded: int) -> None:
    assert rounded_down(edges) == rounded


@pytest.mark.parametrize(
    ("option", "repeatable", "message"),
    [
        (None, True, r"rank 0: out of memory on cpu\.\nSet training\.edge_budget to auto, or to a number"),
        (20, True, r"out of memory on cpu with one structure at a time\.\nUse a smaller network"),
        (90, False, r"with micro-batches of up to 90 edges\.\nResume with training\.edge_budget=45\."),
    ],
)
def test_where_halving_does_not_help_the_user_is_told_what_does(
    option: int | None, repeatable: bool, message: str
) -> None:
    with pytest.raises(EnvironmentFault, match=message):
        EdgeBudget(option, sampler(), Ranks(), CPU).halve(repeatable=repeatable)


@pytest.mark.parametrize("value", [0, -3, 2.5, True, "full"])
def test_a_wrong_budget_is_refused(value: Any, finished: tuple[Options, Path], tmp_path: Path) -> None:
    options = finished[0]
    with pytest.raises(ConfigError, match=r"training\.edge_budget: is .*, expected a number of edges, auto or null"):
        config_of(options, tmp_path, training={**options["training"], "edge_budget": value})


def test_a_budget_of_one_edge_is_not_halved_to_none_where_a_structure_has_no_edges() -> None:
    drawn = Sampler(np.arange(2), np.array([0, 5]), 2, seed=0)
    with pytest.raises(EnvironmentFault, match=r"with one structure at a time"):
        EdgeBudget(1, drawn, Ranks(), CPU).halve(repeatable=True)


def with_budget(options: Options, budget: int | str) -> Options:
    return {"training": {**options["training"], "edge_budget": budget}}


@pytest.mark.parametrize("budget", ["auto", 300, 1])
def test_a_budget_changes_how_a_step_is_computed_and_not_what(
    budget: int | str, finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, path = finished
    done = run(options, tmp_path / "run", **with_budget(options, budget))
    np.testing.assert_allclose(of_steps(done, "loss"), of_steps(path, "loss"), rtol=1e-5)
    same_weights(done, path, within=1e-6)
    warnings = capsys.readouterr().err
    assert ("have more edges than the edge budget" in warnings) == (budget != "auto")
    assert warnings.count("than the edge budget") <= 1


def test_a_step_for_which_the_gpu_is_too_small_is_repeated_in_smaller_parts(
    finished: tuple[Options, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error is raised where a GPU would: after a part of the gradient has been made."""
    options, path = finished
    loss_of = Trainer.train_step

    def train_step(trainer: Trainer, step: Any, batches: Any) -> Any:
        if (trainer.sampler.edge_budget or 0) > 400 and trainer.step == 3:
            engine = trainer.engine
            engine.backward(engine.loss(batches[0], 1, trainer.objective.counts(batches[0]))[0], last=False)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_of(trainer, step, batches)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    done = run(options, tmp_path / "run", **with_budget(options, 1000))
    assert of_steps(done, "step") == of_steps(path, "step")
    same_weights(done, path, within=1e-6)
    warnings = capsys.readouterr().err
    assert "structure(s) have more edges than the edge budget, 250, and are computed alone: " in warnings
    told = [line for line in warnings.splitlines() if "out of GPU memory" in line]
    assert [line.rpartition(" ")[2] for line in told] == ["500", "250"]


def test_costs_are_means_and_maxima_over_the_steps() -> None:
    costs = EpochCosts()
    for imbalance in (1.0, 1.5, 1.1):
        costs.add(imbalance)
    costs.waited = 2.0
    found = costs.record(8.0, Ranks(), torch.device("cpu"))
    assert found == {"imbalance": {"mean": pytest.approx(1.2), "max": 1.5}, "data_wait": 0.25}
    json.dumps(found)
