"""Configs: what is refused, and in which words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from dpt_hpc.data.catalog.entries import Catalog
from dpt_hpc.errors import ConfigError
from dpt_hpc.models import NETWORKS, CGCNNOptions, ModelOptions, TorchMDETOptions
from dpt_hpc.quickstart import configs
from dpt_hpc.suite.plan import plan_suite
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.config_file import load_any_config, load_config
from dpt_hpc.train.run_dir import save_config

PRESETS = sorted(p for p in configs().rglob("*.yaml") if p.parent.name != "suite")
CGCNN = configs() / "pretrain" / "cgcnn_1_500_500.yaml"
ET = configs() / "pretrain" / "torchmd_et_1_500_500.yaml"
JDFT = configs() / "finetune" / "cgcnn_jdft.yaml"


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_presets_are_valid_and_survive_saving(path: Path, tmp_path: Path) -> None:
    kind = PretrainConfig if "task: pretrain" in path.read_text() else FinetuneConfig
    config = load_config(path, kind)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml", kind) == config


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_the_data_of_every_preset_can_be_had(path: Path) -> None:
    """By name from the catalog, or as the sample of the quickstart; and no two of them share structures."""
    config = load_config(path, PretrainConfig if "task: pretrain" in path.read_text() else FinetuneConfig)
    names = [Path(p).name for p in config.data.path]
    assert set(names) <= {entry.name for entry in Catalog.read()} | {"mlearn", "elastic"}
    assert not {"pretrain", "relaxed"} <= set(names)


@pytest.mark.parametrize("path", sorted((configs() / "suite").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_data_of_every_suite_can_be_had(path: Path) -> None:
    names = {Path(p).name for cell in plan_suite(path).order for p in cell.config.data.path}
    assert names <= {entry.name for entry in Catalog.read()}


def test_a_fault_in_a_suite_names_the_suite(tmp_path: Path) -> None:
    text = (configs() / "suite" / "paper.yaml").read_text().replace("../pretrain", str(configs() / "pretrain"))
    file = tmp_path / "suite.yaml"
    file.write_text(
        text.replace("../finetune", str(configs() / "finetune")).replace("model.filters: ", "model.filter: ")
    )
    with pytest.raises(ConfigError, match=rf"{file}: set: model\.filter: unknown option; did you mean model\.filters"):
        plan_suite(file)


def test_the_faithful_preset_is_the_paper() -> None:
    config = load_config(CGCNN, PretrainConfig)
    assert config.training.precision == "float32"
    assert isinstance(config.model, CGCNNOptions)
    assert (config.model.cutoff, config.model.max_neighbors, config.model.hidden, config.model.layers) == (
        8.0,
        250,
        100,
        4,
    )
    assert (config.model.gaussians, config.model.gaussian_width, config.model.filters) == (50, 0.05, "exact")
    assert config.model.envelope is None
    assert (config.optimizer.learning_rate, config.optimizer.weight_decay) == (2e-3, 0.01)
    assert (config.training.batch_size, config.training.epochs, config.training.clip_norm) == (50, 100, 10.0)
    assert config.training.ema_decay is None
    assert not config.objective.element_references  # type: ignore[union-attr]


def test_the_faithful_preset_of_the_transformer_is_the_paper() -> None:
    config = load_config(ET, PretrainConfig)
    assert isinstance(config.model, TorchMDETOptions)
    assert config.model == TorchMDETOptions()
    sizes = (config.model.hidden, config.model.layers, config.model.heads, config.model.radial)
    assert sizes == (128, 8, 8, 50)
    assert (config.model.cutoff, config.model.max_neighbors, config.model.num_elements) == (8.0, 250, 100)
    assert (config.model.readout_hidden, config.model.readout_layers, config.model.pooling) == (128, 2, "add")
    assert (config.model.filters, config.training.precision) == ("exact", "float32")
    assert (config.optimizer.learning_rate, config.schedule.min_learning_rate) == (2e-4, 1e-6)
    assert config.training.batch_size == 32


def test_an_option_of_another_network_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.gaussians: unknown option"):
        load_config(ET, PretrainConfig, ["model.gaussians=50"])
    with pytest.raises(ConfigError, match=r"model\.heads: unknown option; valid here: backend, cutoff"):
        load_config(CGCNN, PretrainConfig, ["model.heads=8"])


def test_without_a_name_the_network_is_cgcnn(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("run_dir: r\ndata: {path: d}\nmodel: {hidden: 32}\n")
    assert load_config(tmp_path / "c.yaml", PretrainConfig).model == CGCNNOptions(hidden=32)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=torchmd_et", r"model: a group of options, got 'torchmd_et'; did you mean model\.name=torchmd_et\?"),
        ("model=et", r"got 'et'; did you mean model\.name=cgcnn or model\.name=torchmd_et or model\.name=schnet or"),
        ("objective=derivatives", r"objective: .*; did you mean objective\.kind=derivatives\?"),
        ("training.epoch=3", r"training\.epoch: unknown option; did you mean training\.epochs\?"),
        ("trainig.epochs=3", r"trainig: unknown option; did you mean training\?"),
        ("model.cutof=3", r"model\.cutof: unknown option; did you mean model\.cutoff\?"),
        (
            "objective.force_weight=3",
            r"objective\.force_weight: unknown option; did you mean objective\.forces_weight\?",
        ),
        ("objective.kind=forces", r"objective\.kind: is 'forces'; expected derivatives or derivative_denoising"),
        ("training.epochs=0", r"training\.epochs: .*greater than or equal to 1; got 0"),
        ("training.batch_size=many", r"training\.batch_size: .*integer.*got 'many'"),
        ("model.name=shnet", r"model\.name: is 'shnet'; expected cgcnn or torchmd_et or schnet or painn\."),
        ("model.cutoff=-1", r"model: cutoff is -1\.0, expected more than 0\."),
        ("model.max_neighbors=0", r"model: max_neighbors is 0, expected at least 1\."),
        ("seed=[1", r"--set seed=\[1: '\[1' is not valid YAML"),
        ("data.path=[]", r"data\.path: .*at least 1 item"),
        ("data.split.train=0.9", r"data\.split: train \+ validation \+ test is 1\.1, expected 1"),
        ("engine.zero_stage=3", r"engine\.zero_stage: "),
        ("seed", r"--set seed: expected KEY=VALUE"),
        ("seed.x=1", r"--set seed\.x=1: seed is a value, not a group of options"),
    ],
)
def test_a_wrong_override_is_refused_with_its_place(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CGCNN, PretrainConfig, [override])


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="2 option") as caught:
        load_config(CGCNN, PretrainConfig, ["training.epochs=-1", "optimizer.lr=1"])
    assert "training.epochs" in str(caught.value)
    assert "optimizer.lr" in str(caught.value)


def test_each_fault_names_its_line_or_its_override(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "task: pretrain\n"
        "# a comment\n"
        "data: &d {path: x, store: cloud}\n"
        "training:\n"
        "  epochs: -3\n"
        "  batch_size: many\n"
        "optimizer:\n"
        "  learning_rate: fast\n"
        "run_dir: runs/x\n"
    )
    overrides = [
        "trainig.epochs=3",
        "optimizer.learning_rate=slow",
        "training.epochs=0",
        "model={name: cgcnn, cutof: 3}",
    ]
    with pytest.raises(ConfigError) as told:
        load_config(file, PretrainConfig, overrides)
    faults = {line.partition(": ")[0].strip() for line in str(told.value).splitlines()[1:]}
    assert faults == {
        f"{file}:3",
        f"{file}:6",
        "--set optimizer.learning_rate",
        "--set training.epochs",
        "--set trainig",
        "--set model.cutof",
    }
    assert f"{file}:3: data.store: " in str(told.value)


def test_a_fault_of_a_group_names_the_line_of_its_option(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("task: pretrain\nrun_dir: r\ndata: {path: d}\nmodel:\n  hidden: 8\n  cutoff: -1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:6: model: cutoff is -1\.0, expected more than 0\."):
        load_config(file, PretrainConfig)
    with pytest.raises(ConfigError, match=r"\n  --set model: cutoff is -2\.0, expected more than 0\."):
        load_config(file, PretrainConfig, ["model.cutoff=-2"])


def test_a_fault_of_several_options_names_the_line_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    start = "task: pretrain\nrun_dir: r\ndata: {path: d}\n"
    file.write_text(
        f"{start}objective:\n  kind: derivatives\n  energy_weight: 0\n  forces_weight: 0\n  stress_weight: 0\n"
    )
    with pytest.raises(ConfigError, match=r"mine\.yaml:6: objective: energy_weight, forces_weight and"):
        load_config(file, PretrainConfig)
    file.write_text(f"{start}model:\n  name: torchmd_et\n  heads: 7\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:6: model: heads is 7, expected a divisor of hidden"):
        load_config(file, PretrainConfig)


@pytest.mark.parametrize("words", ["pretrain", "run", "config check"])
def test_a_config_comes_through_a_pipe_once(tmp_path: Path, words: str) -> None:
    """As from `dpt-hpc config show`: a second reading would find it empty."""
    command = [sys.executable, "-m", "dpt_hpc", *words.split(), "/dev/stdin"]
    text = f"task: pretrain\nrun_dir: {tmp_path / 'r'}\ndata: {{path: {tmp_path / 'nowhere'}}}\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert "is empty" not in done.stderr
    assert "nowhere" in done.stderr


def test_a_wrong_name_hides_no_fault_beside_it(tmp_path: Path) -> None:
    """Not those either that its group has under every right name; those under some (envelope) cannot be known."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "task: pretrain\n"
        "run_dir: r\n"
        "data: {path: d}\n"
        "model:\n"
        "  name: shnet\n"
        "  hiden: 3\n"
        "  layers: many\n"
        "  envelope: cosine\n"
        "training: {epochs: 0}\n"
        "objective:\n"
        "  kind: derivativ\n"
        "  colour: 2\n"
    )
    with pytest.raises(ConfigError) as told:
        load_config(file, PretrainConfig)
    faults = [fault.partition(f"{file}:")[2] for fault in str(told.value).splitlines()[1:]]
    assert [re.split("; (?:got|expected|valid)", fault)[0] for fault in faults] == [
        "5: model.name: is 'shnet'",
        "7: model.layers: Input should be a valid integer, unable to parse string as an integer",
        "6: model.hiden: unknown option; did you mean model.hidden?",
        "9: training.epochs: Input should be greater than or equal to 1",
        "11: objective.kind: is 'derivativ'",
        "12: objective.colour: unknown option",
    ]


def test_a_wrong_task_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run_dir: r\ntask: pretrian\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:2: task is 'pretrian', .* Did you mean pretrain\?"):
        load_any_config(tmp_path / "mine.yaml")


def test_every_network_has_its_options_in_configs() -> None:
    assert [options for options, _ in NETWORKS] == list(get_args(ModelOptions))


def test_all_weights_zero_is_refused() -> None:
    zero = [f"objective.{label}_weight=0" for label in ("energy", "forces", "stress")]
    with pytest.raises(ConfigError, match="nothing to learn"):
        load_config(CGCNN, PretrainConfig, zero)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml", PretrainConfig)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml: not valid YAML"):
        load_config(broken, PretrainConfig)
    broken.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping of options, got list"):
        load_config(broken, PretrainConfig)


def test_a_required_option_is_named(tmp_path: Path) -> None:
    short = tmp_path / "short.yaml"
    short.write_text("run_dir: runs/x\ndata: {path: d}\n")
    with pytest.raises(ConfigError, match=r"\n  objective: required, but not given"):
        load_config(short, FinetuneConfig)
    short.write_text("run_dir: runs/x\ndata: {path: d}\nobjective:\n  kind: property\n")
    with pytest.raises(ConfigError, match=r"short\.yaml:3: objective\.target: required, but not given"):
        load_config(short, FinetuneConfig)


def test_the_config_of_another_verb_is_told_with_its_verb(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("task: pretrain\nrun_dir: r\n")
    with pytest.raises(ConfigError, match=r"c.yaml: its task is pretrain.\nRun it with `dpt-hpc pretrain "):
        load_config(file, FinetuneConfig)


def test_repeated_seeds_are_refused() -> None:
    with pytest.raises(ConfigError, match="seeds"):
        load_config(JDFT, FinetuneConfig, ["seeds=[1, 1]"])
