"""The card of a checkpoint: what it says, that it is small, that earlier ones load, and that nothing is unpickled."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small_runs import Options, config_of, finetune_options, records, run

from dpt_hpc import __version__
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.errors import DataError
from dpt_hpc.models import build_model
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.card import describe_training
from dpt_hpc.train.checkpoint import find_checkpoint, load_card, load_model, load_weights, single_file
from dpt_hpc.train.finetune import describe_checkpoint, finetune, load_pretrained
from dpt_hpc.train.ranks import Ranks


def card_text(path: Path) -> dict[str, Any]:
    """The card as another program reads it."""
    return yaml.safe_load((find_checkpoint(path) / "model.yaml").read_text())


def test_a_checkpoint_says_where_it_comes_from(finished: tuple[Options, Path], small_dataset: Path) -> None:
    options, path = finished
    card = card_text(path)
    results = json.loads((path / "results.json").read_text())
    dataset = Dataset.open(small_dataset)
    (data,) = card["trained_on"]["dataset"]
    assert data == {
        "path": str(small_dataset),
        "name": "small",
        "structures": 48,
        "digest": dataset.manifests[0].digest,
    }
    assert card["trained_on"]["split"] == {"train": 24, "validation": 12, "test": 12, "by": "structure", "seed": 7}
    assert card["trained_on"]["objective"]["kind"] == "derivatives"
    assert card["training"]["epoch"] == results["best_epoch"]
    logged = {r["epoch"]: r["validation"] for r in records(path, "epoch")}
    assert card["training"]["validation"] == logged[results["best_epoch"]]
    assert card["training"]["step"] == 5 * results["best_epoch"]
    assert card["config"]["training"]["batch_size"] == options["training"]["batch_size"]
    assert card["config"]["seed"] == 7
    assert set(card["elements"]) <= {SYMBOLS[z] for z in dataset.elements}
    assert card["made"]["dpt_hpc"] == __version__
    assert card["made"]["date"][:2] == "20"
    assert card["units"] == {
        "energy": "eV, total of the cell",
        "forces": "eV/Å, -dE/dpositions",
        "stress": "eV/Å³, (1/V) dE/dstrain, tension positive",
    }
    assert (find_checkpoint(path) / "model.yaml").stat().st_size < 8_000


def test_errors_stand_in_a_card_only_for_its_own_weights(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, _ = finished
    path = run(
        options | {"training": {"epochs": 1, "batch_size": 5}, "checkpoint": {"keep": 9, "every_steps": 2}},
        tmp_path / "run",
    )
    steps = {p.name: card_text(p)["training"] for p in (path / "checkpoints").glob("step_*")}
    assert {name for name, training in steps.items() if "validation" in training} == {"step_00000005"}
    assert {training["epoch"] for training in steps.values()} == {1}


def test_a_property_has_its_unit_and_its_pre_training(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, before = finished
    finetune(finetune_options(options, tmp_path / "run", seeds=[0], pretrained=str(before)), Ranks(), quiet=True)
    card = load_card(tmp_path / "run" / "seed_0")
    assert card.units == {"volume_per_atom": "A^3"}
    earlier = card.trained_on["pretrained"]
    assert earlier["trained_on"]["objective"] == load_card(before).objective
    assert len(earlier["digest"]) == 64
    with pytest.raises(DataError, match=r"a fine-tuning of 1 seeds.*\n.*seed_0"):
        load_card(tmp_path / "run")


def test_what_was_not_learnt_is_said(finished: tuple[Options, Path]) -> None:
    card = load_card(finished[1])
    weights = {"energy_weight": 0.0, "forces_weight": 1.0, "stress_weight": 0.0}
    other = replace(card, trained_on={"objective": card.objective | weights})
    assert other.units["energy"] == "eV, total of the cell; not learnt"
    assert other.units["forces"] == card.units["forces"]


def test_a_licence_goes_along(finished: tuple[Options, Path], small_dataset: Path) -> None:
    dataset = Dataset.open(small_dataset)
    (manifest,) = dataset.manifests
    dataset.manifests = (replace(manifest, provenance={"licence": "CC BY 4.0", "citation": "A 2020"}),)
    part = torch.arange(3).numpy()
    (data,) = describe_training(dataset, Split(part, part, part), 0, config_of(finished[0], Path("r")), {})["dataset"]
    assert (data["licence"], data["citation"]) == ("CC BY 4.0", "A 2020")


def test_a_single_file_is_the_whole_model(finished: tuple[Options, Path], tmp_path: Path) -> None:
    _, path = finished
    file = tmp_path / "network.safetensors"
    file.write_bytes(single_file(load_card(path), load_weights(path)))
    again = load_model(file)
    assert all(torch.equal(v, load_weights(path)[k]) for k, v in again.state_dict().items())
    assert load_card(file).text() == load_card(path).text()
    before, now = (build_model(load_card(path).options) for _ in range(2))
    assert load_pretrained(before, before.network.options, find_checkpoint(path)) == load_pretrained(
        now, now.network.options, find_checkpoint(file)
    )
    assert all(torch.equal(v, now.state_dict()[k]) for k, v in before.network.state_dict(prefix="network.").items())
    assert describe_checkpoint(file)["checkpoint"] == str(file)


def test_a_shared_card_tells_no_places(finished: tuple[Options, Path]) -> None:
    _, path = finished
    card = load_card(path)
    shared = card.shareable()
    assert str(Path(card.config["run_dir"]).parent) in card.text()
    assert str(Path(card.config["run_dir"]).parent) not in shared.text()
    assert shared.config["data"]["path"] == ["small"]
    assert shared.trained_on["dataset"][0]["digest"] == card.trained_on["dataset"][0]["digest"]


def test_cards_of_the_first_format_still_load(finished: tuple[Options, Path], tmp_path: Path) -> None:
    _, path = finished
    card = load_card(path)
    content = {
        "model": asdict(card.options),
        "elements": [SYMBOLS[z] for z in card.elements],
        "trained_on": {"dataset": [], "objective": card.objective},
    }
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    save_file(load_weights(path), tmp_path / "model.safetensors")
    earlier = load_card(tmp_path)
    assert (earlier.options, earlier.elements, earlier.config, earlier.training) == (
        card.options,
        card.elements,
        {},
        {},
    )
    assert load_card(tmp_path / "model.safetensors") == earlier  # the card beside it


def test_files_that_are_no_models_are_named(finished: tuple[Options, Path], tmp_path: Path) -> None:
    _, path = finished
    with pytest.raises(DataError, match=r"nowhere: no such file or directory\.\nGive a run"):
        find_checkpoint(tmp_path / "nowhere")
    bare = tmp_path / "bare.safetensors"
    save_file(load_weights(path), bare)
    with pytest.raises(DataError, match=r"no exported model: it has no model card.*\n.*dpt-hpc export"):
        load_card(bare)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(single_file(load_card(path), load_weights(path))[:-9])
    with pytest.raises(DataError, match=r"cut\.safetensors: not a whole safetensors file"):
        load_weights(cut)
    other = tmp_path / "other.safetensors"
    other.write_bytes(single_file(load_card(path), {"scale": torch.ones(())}))
    with pytest.raises(DataError, match=r"not the weights of the network that its card describes: .*Missing key"):
        load_model(other)


class Bomb:
    """What an attacker pickles."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return (open, ("exploded", "w"))


@pytest.mark.parametrize(
    "text",
    ["- 1", "model: 3", "!!python/object/apply:os.system [touch exploded]", "model: {name: alien}", "[", "a: \0"],
)
def test_a_card_is_text_and_nothing_more(
    text: str, finished: tuple[Options, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.yaml").write_text(text)
    save_file(load_weights(finished[1]), tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.yaml: not a model card of this version"):
        load_card(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="not a whole safetensors file"):
        load_weights(tmp_path)
    assert not (tmp_path / "exploded").exists()
