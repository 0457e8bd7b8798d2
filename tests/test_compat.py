"""Presets of the paper's two codes: what they set, whom they refuse, and runs that were begun before them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import Options, config_of, run, small_options

from dpt_hpc.cli.config import check
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.errors import ConfigError
from dpt_hpc.models import CGCNNOptions, TorchMDETOptions
from dpt_hpc.quickstart import configs
from dpt_hpc.train.compat import NETWORKS, SIZES, amounts, differences, preset
from dpt_hpc.train.config import (
    DenoisingOptions,
    DerivativesOptions,
    FinetuneConfig,
    HeadDenoisingOptions,
    PretrainConfig,
)
from dpt_hpc.train.config_file import check_config, load_config
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.run_dir import changed_options, claim_run_dir, save_config

PRETRAININGS = sorted((configs() / "pretrain").glob("*.yaml"))
DENOISING = {"kind": "derivative_denoising"}
FAITHFUL = [p for p in PRETRAININGS if p.stem.startswith(tuple(NETWORKS)) and not p.stem.endswith("_mixed")]


def test_exact_is_the_default_and_sets_nothing(small_dataset: Path, tmp_path: Path) -> None:
    config = config_of(small_options(small_dataset), tmp_path, objective=DENOISING)
    assert (config.compat, config.model.max_images) == ("exact", None)
    assert config.objective == DenoisingOptions(noise_scale=0.1, sign="physical", loss="mae")


def test_a_preset_sets_what_the_papers_code_does_otherwise(small_dataset: Path, tmp_path: Path) -> None:
    options: Options = {"data": {"path": str(small_dataset)}, "model": {"name": "cgcnn"}}
    experiments = config_of(options, tmp_path, compat="paper-experiments", objective=DENOISING)
    assert isinstance(experiments.model, CGCNNOptions)
    assert (experiments.model.max_images, experiments.model.gaussian_width) == (1, 0.05)
    assert experiments.data.split.by == "structure"
    assert experiments.objective == DenoisingOptions(noise_scale=0.1, sign="paper", loss="mae")
    release = config_of(options, tmp_path, compat="paper-release", objective={"kind": "head_denoising"})
    assert isinstance(release.model, CGCNNOptions)
    assert (release.model.max_images, release.model.gaussian_width) == (2, 0.2)
    assert release.objective == HeadDenoisingOptions(noise_scale=0.04, loss="mse")
    assert options["model"] == {"name": "cgcnn"}, "the options that were given have changed"


@pytest.mark.parametrize("compat", ["exact", "paper-experiments", "paper-release"])
def test_without_a_network_and_an_objective_the_defaults_are_meant(compat: str, tmp_path: Path) -> None:
    """As without a preset; and a group without its kind is refused under each in the same words."""
    config = config_of({"data": {"path": "x"}}, tmp_path, compat=compat)
    assert config.objective == DerivativesOptions()
    assert (config.model.name, config.model.max_images) == ("cgcnn", {"exact": None, "paper-release": 2}.get(compat, 1))
    with pytest.raises(ConfigError, match=r"objective\.kind: is not given; expected derivatives or"):
        config_of({"data": {"path": "x"}}, tmp_path, compat=compat, objective={"energy_weight": 0})


def test_every_option_of_a_network_is_fixed_told_or_free() -> None:
    """A new one must be given its place; and the sizes are the defaults of the options, which are the paper's."""
    free = {"name", "pooling", "backend", "table_knots"}
    for kind in (CGCNNOptions, TorchMDETOptions):
        fixed, told = preset("paper-experiments", kind.name, "derivatives"), amounts(kind.name, "derivatives", "")
        known = {key.removeprefix("model.") for key in {**fixed, **told} if key.startswith("model.")}
        assert known | free == {field.name for field in fields(kind)}
        assert kind() == kind(**{key.removeprefix("model."): value for key, value in SIZES[kind.name].items()})


def amounts_of(config: PretrainConfig | FinetuneConfig) -> tuple[float, ...]:
    split = config.data.split
    return (
        config.optimizer.learning_rate,
        config.schedule.min_learning_rate,
        *(config.training.batch_size, config.training.epochs),
        *(split.train, split.validation, split.test),
    )


@pytest.mark.parametrize(
    ("network", "target", "expected"),
    [
        ("cgcnn", None, (2e-3, 1e-5, 50, 100, 0.8, 0.05, 0.15)),
        ("torchmd_et", None, (2e-4, 1e-6, 32, 100, 0.8, 0.05, 0.15)),
        ("cgcnn", "exfoliation_energy", (2e-3, 1e-5, 32, 200, 0.6, 0.2, 0.2)),
        ("cgcnn", "formation_energy", (2e-3, 1e-5, 128, 200, 0.6, 0.2, 0.2)),
        ("cgcnn", "formation_energy_per_atom", (2e-3, 1e-5, 32, 200, 0.6, 0.2, 0.2)),
        ("cgcnn", "band_gap", (2e-3, 1e-5, 32, 200, 0.6, 0.2, 0.2)),
        ("torchmd_et", "exfoliation_energy", (2e-4, 1e-6, 32, 200, 0.6, 0.2, 0.2)),
    ],
)
def test_amounts_that_are_left_open_are_the_papers(network: str, target: str | None, expected: tuple[float]) -> None:
    raw: Options = {"run_dir": "r", "data": {"path": "x"}, "compat": "paper-experiments", "model": {"name": network}}
    kind = PretrainConfig if target is None else FinetuneConfig
    raw |= {} if target is None else {"objective": {"target": target}}
    config = check_config(raw, kind, "test")
    assert amounts_of(config) == expected
    assert differences(config.compat, config) is None
    given = {"optimizer": {"learning_rate": 1e-4}, "training": {"epochs": 3}, "data": {"path": "x"}}
    given["data"]["split"] = {"train": 0.5, "validation": 0.25, "test": 0.25}
    assert amounts_of(check_config(raw | given, kind, "test")) == (1e-4, *expected[1:3], 3, 0.5, 0.25, 0.25)


def test_a_run_says_what_differs_from_its_preset(small_dataset: Path, tmp_path: Path, capsys: Any) -> None:
    whole = Dataset.open(small_dataset)
    four = sorted(range(len(whole)), key=lambda i: int(whole.num_atoms[i]))[:4]
    structures = [whole.get(i) for i in four]
    write_dataset(structures, tmp_path / "four", provenance={}, property_units={"volume_per_atom": "A^3"})
    (tmp_path / "c.yaml").write_text(f"task: pretrain\nrun_dir: r\ndata: {{path: {tmp_path / 'four'}}}\n")
    settings = ["compat=paper-experiments", "model.filters=table", "training.epochs=1", "training.batch_size=24"]
    settings += ["data.split={train: 0.5, validation: 0.25, test: 0.25}"]
    config = load_config(tmp_path / "c.yaml", PretrainConfig, [*settings, f"run_dir={tmp_path / 'run'}"])
    said = differences(config.compat, config)
    assert said == (
        "compat is paper-experiments, except for training.batch_size=24 (the paper: 50), "
        "model.filters=table (the paper: exact), training.epochs=1 (the paper: 100), "
        "data.split.train=0.5 (the paper: 0.8), data.split.validation=0.25 (the paper: 0.05), "
        "data.split.test=0.25 (the paper: 0.15)"
    )
    check(tmp_path / "c.yaml", settings)
    assert said in capsys.readouterr().out
    pretrain(config, Ranks())
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("compat", ["paper-experiments", "paper-release"])
@pytest.mark.parametrize("path", FAITHFUL, ids=lambda p: p.stem)
def test_every_pretraining_of_the_paper_takes_either_preset(path: Path, compat: str) -> None:
    config = load_config(path, PretrainConfig, [f"compat={compat}"])
    assert config.model.max_images == (1 if compat == "paper-experiments" else 2)
    assert config.data.split.by == "structure"
    exact = load_config(path, PretrainConfig)
    assert isinstance(config.model, TorchMDETOptions) or config.model.gaussian_width in (0.05, 0.2)
    assert (exact.compat, exact.model.max_images, exact.data.split.by) == ("exact", None, "group")


def test_fine_tuning_has_presets_too() -> None:
    path = configs() / "finetune" / "cgcnn_jdft.yaml"
    config = load_config(path, FinetuneConfig, ["compat=paper-release"])
    assert isinstance(config.model, CGCNNOptions)
    assert (config.model.max_images, config.model.gaussian_width) == (2, 0.2)
    with pytest.raises(ConfigError, match=r"objective\.normalise=false, but objective\.normalise=true is given"):
        load_config(path, FinetuneConfig, ["compat=paper-release", "objective.normalise=true"])
    frozen = ["compat=paper-release", "pretrained=runs/x", "transfer.freeze=[embedding]"]
    with pytest.raises(ConfigError, match=r"transfer\.freeze=\[\], but transfer\.freeze=\[embedding\] is given"):
        load_config(path, FinetuneConfig, frozen)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.max_images=null"], r"it sets model\.max_images=1, but model\.max_images=null is given"),
        (
            ["model.gaussian_width=0.1", "training.ema_decay=0.9"],
            r"training\.ema_decay=null, but .*=0\.9 is given; .*gaussian_width=0\.05, but .*=0\.1 is given",
        ),
        (["model.envelope=cosine"], r"it sets model\.envelope=null, but model\.envelope=cosine is given"),
        (["objective.noise_scale=0.2"], r"objective\.noise_scale=0\.1, but objective\.noise_scale=0\.2 is given"),
        (
            ["objective={kind: mixed}"],
            r"compat is paper-experiments, but the paper has no objective mixed; it has",
        ),
        (["model.pooling=mean"], r"it sets model\.pooling=add, but model\.pooling=mean is given"),
        (
            ["model={name: cgcn, hiden: 3}", "training.epochs=0"],
            r"--set model\.name: is 'cgcn'.*Did you mean cgcnn\?(.*\n)*.*model\.hiden: unk(.*\n)*.*training\.epochs",
        ),
        (["objective.kind=derivativs"], r"--set objective\.kind: is 'derivativs'.*Did you mean"),
        (["model.hidden=7"], r"it sets model\.hidden=100, but model\.hidden=7 is given"),
        (
            ["model={name: torchmd_et, cutoff: 3, max_neighbors: 4, heads: 4}"],
            r"cutoff=8, but model\.cutoff=3 is given; .*neighbors=250, .*neighbors=4 is given; .*heads=8, .*heads=4 is",
        ),
        (["model={name: schnet}"], r"has no network schnet; it has cgcnn, torchmd_et\. Expected exact"),
        (["model=3"], r"model: a group of options, got 3"),
        (["compat=papers"], r"compat: Input should be 'exact', 'paper-experiments' or 'paper-release'"),
    ],
)
def test_an_option_against_the_preset_is_refused_with_both_values(settings: list[str], message: str) -> None:
    path = configs() / "pretrain" / "cgcnn_denoising.yaml"
    with pytest.raises(ConfigError, match=message):
        load_config(path, PretrainConfig, ["compat=paper-experiments", *settings])


def test_a_run_begun_before_an_option_existed_goes_on(finished: tuple[Options, Path], tmp_path: Path) -> None:
    """What its config does not say is what it did; and a preset may be named later, if it sets what the run had."""
    options = finished[0] | {"objective": {**DENOISING, "sign": "paper"}, "training": {"epochs": 1, "batch_size": 12}}
    path = run(options, tmp_path / "run")
    saved: dict[str, Any] = yaml.safe_load((path / "config.yaml").read_text())
    del saved["compat"], saved["objective"]["loss"]
    (path / "config.yaml").write_text(yaml.safe_dump(saved))
    claim_run_dir(path, load_config(path / "config.yaml", PretrainConfig), resume=True)
    claim_run_dir(path, config_of(options, path), resume=True)
    with pytest.raises(ConfigError, match=r"objective\.loss: was 'mae', now 'mse'"):
        claim_run_dir(path, config_of(options, path, objective=options["objective"] | {"loss": "mse"}), resume=True)
    options = {key: value for key, value in options.items() if key != "model"}
    save_config(config_of(options, path), path / "config.yaml")
    with pytest.raises(ConfigError, match=r"model\.max_images: was None, now 1"):
        claim_run_dir(path, config_of(options, path, compat="paper-experiments"), resume=True)
    save_config(config_of(options, path, model={"max_images": 1}), path / "config.yaml")
    claim_run_dir(path, config_of(options, path, compat="paper-experiments"), resume=True)


def test_what_a_preset_did_not_fix_yet_counts_as_it_was(tmp_path: Path) -> None:
    raw = {"run_dir": "r", "data": {"path": "x"}, "compat": "paper-experiments", "model": {"name": "torchmd_et"}}
    config = check_config(raw, PretrainConfig, "test")
    saved = config.model_dump(mode="json")
    assert changed_options(config, saved) == []
    del saved["model"]["own_images"]
    assert changed_options(config, saved) == ["model.own_images: was True, now False"]


def test_a_saved_config_that_is_valid_no_more_is_compared_as_it_is(
    finished: tuple[Options, Path], tmp_path: Path
) -> None:
    saved: dict[str, Any] = yaml.safe_load((finished[1] / "config.yaml").read_text())
    saved["training"]["warmup"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ConfigError, match=r"training\.warmup: was 3, now None"):
        claim_run_dir(tmp_path, config_of(finished[0], tmp_path), resume=True)
