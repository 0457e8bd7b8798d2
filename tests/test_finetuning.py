"""Fine-tuning: honest about what it loads, and what it refuses."""

from __future__ import annotations

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from networks import SMALL
from safetensors.torch import save_file
from small_runs import Options, finetune_options

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.models import build_model
from dpt_hpc.train.checkpoint import MANIFEST, find_checkpoint, load_card, load_weights
from dpt_hpc.train.evaluate import evaluate_checkpoint
from dpt_hpc.train.finetune import finetune, load_pretrained
from dpt_hpc.train.pretrained import find_pretrained
from dpt_hpc.train.ranks import Ranks


def test_finetuning_loads_every_weight_and_says_so(
    finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, path = finished
    config = finetune_options(options, tmp_path / "fine", pretrained=str(path))
    model = build_model(config.model)
    loaded = load_pretrained(model, config.model, path)
    assert set(loaded.loaded) == {k for k in model.state_dict() if k.startswith("network.")}
    assert set(loaded.reset) == {"scale", "shift", "element_references"}
    assert all(torch.equal(model.state_dict()[k], load_weights(path)[k]) for k in loaded.loaded)
    summary = finetune(config, Ranks())
    assert f"tensors {len(loaded.loaded)} loaded, 3 reset, 0 skipped" in capsys.readouterr().out
    assert len(summary["test_mae"]) == 2
    assert summary["mean"] == pytest.approx(np.mean(summary["test_mae"]))
    assert summary["std"] == pytest.approx(np.std(summary["test_mae"], ddof=1))
    assert summary["unit"] == "A^3"
    first = tmp_path / "fine" / "seed_0"
    predictions = np.load(first / "predictions_test.npz")
    error = np.abs(predictions["target_pred"] - predictions["target_true"]).mean()
    assert summary["test_mae"][0] == pytest.approx(error, rel=1e-6)
    assert evaluate_checkpoint(str(first), config.data.path)["target_mae"] > 0


def test_finetuning_refuses_another_network(finished: tuple[Options, Path], tmp_path: Path) -> None:
    options, path = finished
    config = finetune_options(options, tmp_path / "fine", pretrained=str(path), model={"name": "cgcnn", "hidden": 20})
    with pytest.raises(ConfigError, match=r"model\.hidden: pre-trained with 16, configured 20"):
        finetune(config, Ranks(), quiet=True)
    missing = finetune_options(options, tmp_path / "fine2", pretrained=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere: no such file or directory"):
        finetune(missing, Ranks(), quiet=True)


def test_what_changes_no_weight_may_differ_from_the_pretraining(finished: tuple[Options, Path]) -> None:
    """And does change none: in each network that has the option, all tensors are those of the same seed."""
    free = {"envelope": "cosine", "max_neighbors": 12, "max_images": 1, "pooling": "mean", "filters": "table"}
    card = load_card(finished[1]).options
    for name, value in free.items():
        options = replace(card, **{name: value})
        assert load_pretrained(build_model(options), options, finished[1]).loaded
        for small in SMALL:
            if name in {field.name for field in fields(small)}:
                torch.manual_seed(0)
                before = build_model(small).state_dict()
                torch.manual_seed(0)
                after = build_model(replace(small, **{name: value})).state_dict()
                assert all(torch.equal(after.pop(key), tensor) for key, tensor in before.items())
                assert not after


def test_a_pretraining_that_has_not_ended_is_refused_unless_its_checkpoint_is_named(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    options, path = finished
    going = Path(shutil.copytree(path, tmp_path / "going", symlinks=True))
    config = finetune_options(options, tmp_path / "fine", pretrained=str(going))
    (going / "results.json").rename(going / "kept.json")
    best = going / "checkpoints" / "best"
    with pytest.raises(ConfigError, match=rf"going: this run has not ended(.|\n)*pretrained={best.resolve()}\.$"):
        finetune(config, Ranks(), quiet=True)
    assert not (tmp_path / "fine").exists()
    assert find_pretrained(str(best), None) == best.resolve()
    (going / "kept.json").rename(going / "results.json")
    assert find_pretrained(str(going), None) == best.resolve()
    saved = yaml.safe_load((going / "config.yaml").read_text())
    saved["training"]["epochs"] += 1  # prolonged, and not there yet
    (going / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match="going: this run has not ended"):
        find_pretrained(str(going), None)


def test_finetuning_warns_of_elements_that_the_checkpoint_does_not_know(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, path = finished
    sample = Dataset.open(small_dataset)
    with_uranium = []
    for i in range(12):
        structure = sample.get(i)
        with_uranium.append(replace(structure, atomic_numbers=torch.full_like(structure.atomic_numbers, 92)))
    write_dataset(with_uranium, tmp_path / "u", provenance={}, property_units={"volume_per_atom": "A^3"})
    data = options["data"] | {"path": str(tmp_path / "u")}
    config = finetune_options(options, tmp_path / "fine", pretrained=str(path), data=data, seeds=[0])
    summary = finetune(config, Ranks(), quiet=True)
    assert capsys.readouterr().err.count("was not trained on: U\n") == 1
    assert summary["elements_new_to_pretrained"] == ["U"]


def test_a_target_that_is_not_there_is_refused(finished: tuple[Options, Path], tmp_path: Path) -> None:
    wrong = finetune_options(finished[0], tmp_path / "a", objective={"kind": "property", "target": "band_gap"})
    with pytest.raises(DataError, match=r"objective\.target is 'band_gap', but the dataset has volume_per_atom"):
        finetune(wrong, Ranks(), quiet=True)
    assert not (tmp_path / "a").exists()


def test_fine_tuning_resumes_its_unfinished_seeds_from_the_same_weights(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    options, path = finished
    pretrained = Path(shutil.copytree(path, tmp_path / "pretrained", symlinks=True))
    config = finetune_options(options, tmp_path / "fine", pretrained=str(pretrained))
    whole = finetune(config, Ranks(), quiet=True)
    first, second = (tmp_path / "fine" / f"seed_{seed}" for seed in (0, 1))
    shutil.rmtree(second)  # as if the job had been killed before it
    untouched = (first / "run.json").read_bytes()
    assert finetune(config, Ranks(), resume=True, quiet=True) == whole
    assert (first / "run.json").read_bytes() == untouched
    weights = load_weights(pretrained)
    checkpoint = find_checkpoint(pretrained)
    save_file({k: v * 2 for k, v in weights.items()}, checkpoint / "model.safetensors")
    (checkpoint / MANIFEST).unlink()  # which would tell of the change first
    longer = finetune_options(
        options, tmp_path / "fine", pretrained=str(pretrained), training=options["training"] | {"epochs": 2}
    )
    with pytest.raises(ConfigError, match="its pretrained has changed since it began"):
        finetune(longer, Ranks(), resume=True, quiet=True)


def test_evaluation_compares_what_the_network_has_learnt(
    finished: tuple[Options, Path], small_dataset: Path, tmp_path: Path
) -> None:
    options, path = finished
    data = (str(small_dataset),)
    with pytest.raises(DataError, match=r"--target volume_per_atom: .* predicts no property; it learnt derivatives"):
        evaluate_checkpoint(str(path), data, target="volume_per_atom")
    assert evaluate_checkpoint(str(path), data, out=tmp_path / "errors").keys() == {
        "energy_mae", "energy_per_atom_mae", "forces_mae", "stress_mae",
    }  # fmt: skip
    with pytest.raises(DataError, match=r"--out .*errors: is not empty"):
        evaluate_checkpoint(str(path), data, out=tmp_path / "errors")
    finetune(finetune_options(options, tmp_path / "fine", seeds=[0]), Ranks(), quiet=True)
    tuned = str(tmp_path / "fine" / "seed_0")
    assert evaluate_checkpoint(tuned, data).keys() == {"target_mae"}
    with pytest.raises(DataError, match=r"objective\.target is 'gap', but the dataset has volume_per_atom"):
        evaluate_checkpoint(tuned, data, target="gap")
