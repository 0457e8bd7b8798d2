"""What of pre-trained weights is loaded, frozen, and trained how fast; when a fine-tuning stops, and what it tests."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from networks import SMALL
from required import needs_mpi
from small_runs import FALLING, Options, config_of, finetune_options, records, run, same_weights
from test_derivatives import TRICLINIC, batch_of
from torch.optim import SGD

from dpt_hpc.data.split import thin
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import CGCNNOptions, ModelOptions, TorchMDETOptions, build_model
from dpt_hpc.models.derivatives import build_graph, edge_vectors
from dpt_hpc.models.energy_model import NodeFeatures
from dpt_hpc.train.checkpoint import load_state, load_weights
from dpt_hpc.train.config import ScheduleOptions, TransferOptions
from dpt_hpc.train.evaluate import evaluate_checkpoint
from dpt_hpc.train.finetune import finetune
from dpt_hpc.train.pretrained import find_pretrained
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.schedule import SCALE, PlateauSchedule
from dpt_hpc.train.transfer import learning_rate_scales, weights_in

TRANSFER: Options = {
    "freeze": ["embedding", "convolutions.0"],
    "reset": ["output"],
    "layer_decay": 0.5,
    "head_learning_rate": 4e-3,
}


def tuned(options: Options, run_dir: Path, pretrained: Path, *, resume: bool = False, **changes: Any) -> Path:
    """Fine-tune one seed; returns its run directory. changes: of training, and other groups whole."""
    options = deepcopy(options)
    training = {**options["training"], "epochs": 1, **changes.pop("training", {})}
    config = finetune_options(options, run_dir, pretrained=str(pretrained), seeds=[0], training=training, **changes)
    finetune(config, Ranks(), resume=resume, quiet=True)
    return run_dir / "seed_0"


def test_modules_are_frozen_reset_and_trained_at_their_rates(
    finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, pretrained = finished
    config = finetune_options(options, tmp_path / "fine", pretrained=str(pretrained), seeds=[0], transfer=TRANSFER)
    finetune(config, Ranks())
    told = capsys.readouterr().out
    assert ", network.output.weight, network.output.bias\n" in told.split("  reset: ")[1]
    assert "  frozen: network.embedding.weight, network.embedding.bias, network.convolutions.0.weight" in told
    before, after = load_weights(pretrained), load_weights(tmp_path / "fine" / "seed_0" / "checkpoints" / "last")
    same = {name for name in after if name.startswith("network.") and torch.equal(before[name], after[name])}
    assert same == weights_in(build_model(config.model), ["embedding", "convolutions.0"], "x")
    torch.manual_seed(0)
    fresh = build_model(config.model).state_dict()["network.output.weight"]
    far = (after["network.output.weight"] - before["network.output.weight"]).abs().max()
    assert (after["network.output.weight"] - fresh).abs().max() < 0.1 * far  # it began from the seed's
    rates = torch.load(tmp_path / "fine" / "seed_0" / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert rates["learning_rate"] == 0.002


def test_a_layers_rate_is_a_part_of_the_next_ones() -> None:
    options = TransferOptions(layer_decay=0.5, head_learning_rate=6e-3)
    model = build_model(CGCNNOptions(layers=2))
    assert learning_rate_scales(model, options, 2e-3) == {
        "network.embedding.weight": 0.125,
        "network.embedding.bias": 0.125,
        "network.convolutions.0.weight": 0.25,
        "network.convolutions.0.bias": 0.25,
        "network.convolutions.1.weight": 0.5,
        "network.convolutions.1.bias": 0.5,
        **{f"network.readout.{i}.{kind}": 3.0 for i in range(3) for kind in ("weight", "bias")},
        "network.output.weight": 3.0,
        "network.output.bias": 3.0,
    }
    scales = learning_rate_scales(build_model(TorchMDETOptions(layers=2)), TransferOptions(layer_decay=0.5), 2e-4)
    assert scales["network.neighbors.combine.weight"] == scales["network.radial.means"] == 0.125
    assert scales["network.layers.0.norm.bias"] == 0.25
    assert scales["network.layers.1.filters.weight"] == scales["network.norm.weight"] == 0.5
    assert scales["network.readout.1.weight"] == scales["network.output.bias"] == 1
    assert set(learning_rate_scales(model, TransferOptions(), 2e-3).values()) == {1.0}


@pytest.mark.parametrize("options", SMALL, ids=lambda o: o.name)
def test_the_head_is_what_no_feature_of_an_atom_depends_on(options: ModelOptions) -> None:
    """In every network, before its pooling or after; and all else reaches the energy by these features."""
    torch.manual_seed(0)
    model = build_model(options).double()
    batch = batch_of([TRICLINIC])
    graph = build_graph(model, batch)
    features = model.node_features(
        batch.atomic_numbers, edge_vectors(batch.positions, batch.cell, graph, batch.batch), graph
    )
    weights = dict(model.named_parameters())
    reached = torch.autograd.grad(features.scalars.sum(), list(weights.values()), retain_graph=True, allow_unused=True)
    unread = {name for name, gradient in zip(weights, reached, strict=True) if gradient is None}
    energy = model.read_out(features, batch.atom_ptr).sum()
    of_energy = torch.autograd.grad(energy, list(weights.values()), allow_unused=True)
    needless = {name for name, gradient in zip(weights, of_energy, strict=True) if gradient is None}
    assert weights_in(model, ["head"], "x") == unread - needless
    pooled_after = options.name in ("schnet", "painn")  # as TransferOptions says of them
    twice = torch.tensor([0, batch.num_atoms, 2 * batch.num_atoms])
    both = NodeFeatures(features.scalars.repeat(2, 1), None)
    one = model.read_out(NodeFeatures(both.scalars, None), torch.tensor([0, 2 * batch.num_atoms]))
    apart = model.read_out(both, twice).sum()
    assert torch.allclose(one, apart, rtol=1e-9) == pooled_after
    assert (options.name in str(TransferOptions.__doc__).lower()) == pooled_after


def test_groups_keep_their_ratios_down_to_the_smallest_rate() -> None:
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(1)], "lr": 1e-3 * s, SCALE: s} for s in (1.0, 1e-5)]
    optimizer = SGD(groups, lr=1e-3)
    schedule = PlateauSchedule(optimizer, ScheduleOptions(factor=0.5, patience=0, min_learning_rate=1e-4), 1e-3)
    rates = []
    for _ in range(6):
        schedule.step(1.0)
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert [rate[0] for rate in rates] == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4, 1e-4, 1e-4])
    assert all(slow == pytest.approx(1e-5 * fast, rel=1e-12) for fast, slow in rates)
    again = SGD([dict(group) for group in groups], lr=1e-3)
    resumed = PlateauSchedule(again, ScheduleOptions(factor=0.5, patience=0, min_learning_rate=1e-4), 1e-3)
    resumed.load_state_dict(schedule.state_dict(), schedule.learning_rate)
    assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        (
            {"freeze": ["convolution"]},
            r"transfer\.freeze: the network has no module 'convolution'; did you mean convolu",
        ),
        (
            {"reset": ["x"]},
            r"transfer\.reset: the network has no module 'x'; expected some of head, embedding",
        ),
        (
            {"freeze": ["embedding", "convolutions", "head"]},
            r"transfer\.freeze: every module is frozen, nothing",
        ),
    ],
)
def test_modules_that_are_not_there_are_refused(
    transfer: Options, message: str, finished: tuple[Options, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        tuned(finished[0], tmp_path / "fine", finished[1], transfer=transfer)


def test_nothing_is_frozen_where_nothing_is_pretrained(finished: tuple[Options, Path], tmp_path: Path) -> None:
    for change in ({"transfer": {"freeze": ["embedding"]}}, {"pretrained_epochs": 3}):
        with pytest.raises(ConfigError, match=r"pretrained is null: there is nothing to freeze, to reset, or to take"):
            finetune_options(finished[0], tmp_path, **change)


def test_an_interrupted_fine_tuning_goes_on_bit_for_bit(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, pretrained = finished
    changes: Options = {"transfer": TRANSFER, "schedule": FALLING}
    training = {"ema_decay": 0.9, "early_stopping": 8, "epochs": 4}
    whole = tuned(options, tmp_path / "whole", pretrained, training=training, **changes)
    tuned(options, tmp_path / "broken", pretrained, training=training | {"epochs": 2}, **changes)
    broken = tuned(options, tmp_path / "broken", pretrained, training=training, resume=True, **changes)
    same_weights(whole, broken)
    rates = [[r["learning_rate"] for r in records(path, "epoch")] for path in (whole, broken)]
    assert rates[0] == rates[1]
    assert rates[0][-1] < 0.001


def test_early_stopping_waits_for_a_better_validation_loss_also_when_resumed(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    options, pretrained = finished
    changes: Options = {"optimizer": {"learning_rate": 0.05}}
    training = {"early_stopping": 3, "epochs": 40}
    whole = tuned(options, tmp_path / "whole", pretrained, training=training, **changes)
    results = json.loads((whole / "results.json").read_text())
    losses = [r["validation"]["loss"] for r in records(whole, "epoch")][1:]
    best = losses.index(min(losses)) + 1
    assert results["best_epoch"] == best
    assert results["last_epoch"] == len(losses) == best + 3 < 40
    tuned(options, tmp_path / "broken", pretrained, training=training | {"epochs": best + 1}, **changes)
    broken = tuned(options, tmp_path / "broken", pretrained, training=training, resume=True, **changes)
    same_weights(whole, broken)
    assert json.loads((broken / "results.json").read_text())["last_epoch"] == results["last_epoch"]
    before = (broken / "run.json").read_bytes()
    tuned(options, tmp_path / "broken", pretrained, training=training, resume=True, **changes)
    assert (broken / "run.json").read_bytes() == before  # it is finished, though short of its 40 epochs


def test_the_last_weights_can_be_tested_instead_of_the_best(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, pretrained = finished
    changes: Options = {"optimizer": {"learning_rate": 0.05}}
    errors = {}
    for tested in ("best", "last"):
        path = tuned(options, tmp_path / tested, pretrained, training={"tested": tested, "epochs": 4}, **changes)
        results = json.loads((path / "results.json").read_text())
        assert (results["tested"], results["last_epoch"]) == (tested, 4)
        errors[tested] = results["test"]["target_mae"]
    assert results["best_epoch"] < 4, "the last epoch is the best one: the two cannot be told apart"
    assert errors["best"] != errors["last"]
    evaluate_checkpoint(str(path / "checkpoints" / "last"), (options["data"]["path"],), out=tmp_path / "all")
    tested_on, everything = (
        np.load(p) for p in (path / "predictions_test.npz", next((tmp_path / "all").glob("*.npz")))
    )
    of_last = dict(zip(everything["structure_ids"].tolist(), everything["target_pred"].tolist(), strict=True))
    expected = [of_last[name] for name in tested_on["structure_ids"].tolist()]
    np.testing.assert_allclose(tested_on["target_pred"], expected, rtol=1e-5)


def test_the_first_epochs_of_a_run_are_what_so_short_a_run_exports(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    options = deepcopy(finished[0])
    options |= {"checkpoint": {"keep_every_epochs": 1}, "optimizer": {"learning_rate": 0.03}}
    options["training"] |= {"epochs": 6}
    long = run(options, tmp_path / "long")
    for epochs in (1, 4):
        short = run({**options, "training": options["training"] | {"epochs": epochs}}, tmp_path / f"short_{epochs}")
        found = find_pretrained(str(long), epochs)
        expected = load_weights(short)
        assert all(torch.equal(weight, expected[name]) for name, weight in load_weights(found).items())
        assert load_state(found)["epoch"] - 1 == json.loads((short / "results.json").read_text())["best_epoch"]
    path = tuned(options, tmp_path / "fine", long, pretrained_epochs=4)
    noted = json.loads((path / "run.json").read_text())["pretrained"]
    assert Path(noted["checkpoint"]) == found
    with pytest.raises(ConfigError, match=r"pretrained_epochs is 7, but the run .*long has 6 epoch"):
        find_pretrained(str(long), 7)
    with pytest.raises(ConfigError, match=r"is not the directory of a run: no metrics\.jsonl"):
        find_pretrained(str(found), 2)
    pruned = run({**options, "checkpoint": {"keep": 1}}, tmp_path / "pruned")
    with pytest.raises(ConfigError, match=r"of .*pruned is epoch 1, whose checkpoint was not kept\.\n.*keep_every_"):
        find_pretrained(str(pruned), 1)


def test_a_part_of_the_training_structures_lies_within_a_larger_one(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    groups = np.random.default_rng(0).integers(0, 60, size=500)
    indices = np.flatnonzero(np.random.default_rng(1).random(500) < 0.8)
    parts = [set(thin(groups, indices, fraction, seed=3).tolist()) for fraction in (0.125, 0.25, 0.5, 1)]
    assert parts[0] < parts[1] < parts[2] < parts[3] == set(indices.tolist())
    for part, fraction in zip(parts, (0.125, 0.25, 0.5, 1), strict=True):
        assert len(part) == pytest.approx(fraction * len(indices), abs=10)
        left = set(groups[indices]) - {groups[i] for i in part}
        assert left | {groups[i] for i in part} == set(groups[indices])
        assert {groups[i] for i in set(indices.tolist()) - part} == left  # no group is parted
    assert parts[1] != set(thin(groups, indices, 0.25, seed=4).tolist())
    with pytest.raises(DataError, match=r"split: 0\.001 of the 4 structures to train, in 1 groups, are none\.\nSet"):
        thin(np.zeros(4), np.arange(4), 0.001, seed=0)
    options = deepcopy(finished[0])
    options["data"]["split"]["train_fraction"] = 0.5
    options["training"] |= {"epochs": 1}
    split = json.loads((run(options, tmp_path / "half") / "run.json").read_text())["split"]
    assert split == {"train": 12, "validation": 12, "test": 12}
    assert config_of(options, tmp_path).data.split.train_fraction == 0.5


@needs_mpi
@pytest.mark.slow
def test_two_ranks_fine_tune_groups_of_weights_as_one(finished: tuple[Options, Path], tmp_path: Path) -> None:
    """Frozen weights and shares of the learning rate under every ZeRO stage, interrupted and resumed."""
    from test_parallel import SEVERAL_RUNS, mpiexec

    options, pretrained = finished
    changes: Options = {"transfer": TRANSFER, "schedule": FALLING}
    one = tuned(options, tmp_path / "one", pretrained, training={"epochs": 4}, **changes)
    configs = []
    for stage in (0, 1, 2):
        for epochs in (2, 4):
            config = finetune_options(
                options, tmp_path / f"zero_{stage}", pretrained=str(pretrained), seeds=[0],
                training={**options["training"], "epochs": epochs}, engine={"zero_stage": stage}, **changes,
            )  # fmt: skip
            configs.append(tmp_path / f"zero_{stage}_{epochs}.yaml")
            configs[-1].write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = mpiexec(2, SEVERAL_RUNS, "--resume", *configs)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in (0, 1, 2):
        seed = tmp_path / f"zero_{stage}" / "seed_0"
        assert len(json.loads((seed / "run.json").read_text())["resumed"]) == 1
        same_weights(one, seed, within=1e-6)
