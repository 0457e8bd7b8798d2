"""Evaluations and predictions: the same in halves where the GPU is too small, and clear where they cannot be had."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from groups import on_ranks, refused

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.data.store import DiskStore
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.models import CGCNNOptions, Scaling, build_model
from dpt_hpc.train.config import DerivativesOptions, EngineOptions, OptimizerOptions
from dpt_hpc.train.data import Data
from dpt_hpc.train.engine import build_engine
from dpt_hpc.train.growing import GrowingArrays
from dpt_hpc.train.objective import build_objective
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.scoring import EdgeLimit, Scoring, evaluate, share_of, write_predictions, writing

ALL = np.arange(48)


@pytest.fixture
def scoring(small_dataset: Path) -> Scoring:
    dataset = Dataset.open(small_dataset)
    torch.manual_seed(0)
    model = Scaling(build_model(CGCNNOptions(cutoff=4.0, hidden=8, layers=1, gaussians=8, readout_hidden=8))).double()
    objective = build_objective(model, DerivativesOptions(), seed=0)
    kind = EngineOptions(kind="torch")
    engine = build_engine(objective, Ranks(), kind, OptimizerOptions(), clip=None, grad_accumulation=1)
    data = Data(DiskStore(dataset, dataset.layout(torch.float64, None)), Split(ALL, ALL, ALL), engine.device)
    return Scoring(objective, engine, data, batch_size=10)


def with_room_for(structures: int, scoring: Scoring) -> list[int]:
    """Let the network raise what a GPU does for larger batches; the sizes of those that it is given."""
    sizes: list[int] = []

    def limited(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        sizes.append(len(inputs[-1]) - 1)
        if sizes[-1] > structures:
            raise torch.OutOfMemoryError("CUDA out of memory")

    scoring.objective.model.register_forward_pre_hook(limited)
    return sizes


def test_what_the_gpu_has_no_memory_for_is_evaluated_in_halves(
    scoring: Scoring, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    indices = ALL[::-1]
    errors = evaluate(scoring, indices)
    write_predictions(tmp_path / "whole.npz", scoring, indices)
    sizes = with_room_for(3, scoring)
    assert evaluate(scoring, indices) == pytest.approx(errors, rel=1e-12)
    assert sizes[:5] == [10, 5, 3, 2, 5]
    write_predictions(tmp_path / "halves.npz", scoring, indices)
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "halves.npz") as halves:
        assert whole.files == halves.files
        assert halves["structure_ids"].tolist() == scoring.data.dataset.ids(indices)
        for name in whole.files:
            if whole[name].dtype.kind == "f":
                np.testing.assert_allclose(halves[name], whole[name], rtol=1e-9, atol=1e-12)
            else:
                np.testing.assert_array_equal(halves[name], whole[name])
    told = capsys.readouterr().err
    assert told.count("rank 0: out of memory on cpu in an evaluation; repeated in halves. Set training.eval") == 1


def test_a_structure_that_is_too_large_alone_is_named(scoring: Scoring) -> None:
    with_room_for(0, scoring)
    one = replace(scoring, limit=EdgeLimit(np.full(48, 5), 4))
    name = scoring.data.dataset.ids([7])[0]
    with pytest.raises(
        EnvironmentFault, match=rf"rank 0: out of memory on cpu in an .* of \d+ atoms: {name}\.\nUse a smaller network"
    ):
        evaluate(one, ALL[7:])


def test_predictions_that_cannot_be_written_say_where_and_what_to_do(scoring: Scoring, tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    path = tmp_path / "a_file" / "found.npz"
    message = r"a_file/found\.npz: cannot be written: Not a directory\.\nMake room there: training is complete, and the"
    with pytest.raises(EnvironmentFault, match=message):
        write_predictions(path, scoring, ALL)
    # Only rank 0 writes; nobody waits for it.
    refused(
        on_ranks(3, lambda rank: writing(cast(Ranks, rank), path, lambda: GrowingArrays(path))),
        EnvironmentFault,
        message,
    )


@pytest.mark.parametrize(
    ("ranks", "batch_size"), [(1, 64), (3, 64), (8, 64), (512, 64), (1000, 64), (16_000, 64), (2, 7)]
)
def test_rank_0_gathers_a_bounded_number_of_structures(ranks: int, batch_size: int) -> None:
    share = share_of(ranks, batch_size)
    assert share * ranks <= max(8192, ranks)
    assert share % batch_size == 0 or share == max(8192 // ranks, 1) < batch_size
