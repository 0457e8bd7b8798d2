"""Every reader of files that others may have written: what a good file is, and how the program reads it.

A reader either refuses a file with a DptError that names it, or gives what is right: `read` asserts that, and then
returns.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import crystals
import numpy as np
import torch
import yaml
from fuzz_structures import INGEST, INGESTS, Reader, valid
from written_runs import DERIVATIVES, write_run, write_tuning

from dpt_hpc.data.catalog import Catalog
from dpt_hpc.data.folds import FOLDS, matbench_fold
from dpt_hpc.data.ingest import ingest
from dpt_hpc.data.leaks import part_tested_by, read_exclusion
from dpt_hpc.data.shards import Dataset
from dpt_hpc.models import CGCNNOptions, build_model
from dpt_hpc.quickstart import PACKAGE
from dpt_hpc.report.page import render
from dpt_hpc.report.runs import load_runs
from dpt_hpc.scaling.bench import conclude
from dpt_hpc.scaling.predict import Network
from dpt_hpc.suite.config import load_suite
from dpt_hpc.train.card import ModelCard
from dpt_hpc.train.checkpoint import Snapshot, load_model, single_file, write_checkpoint
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.config_file import load_any_config, read_config
from dpt_hpc.train.deepspeed_options import read_deepspeed_options
from dpt_hpc.train.pretrained import find_pretrained
from dpt_hpc.train.run_dir import claim_run_dir
from dpt_hpc.train.world import find_world
from dpt_hpc.train.writer import restore

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart"
SAMPLE = PACKAGE / "sample" / "mlearn"
RESULTS = ROOT / "benchmarks" / "results"


def make_dataset(folder: Path, name: str) -> Path:
    shutil.copytree(SAMPLE, folder / "mlearn", dirs_exist_ok=True)
    return folder / "mlearn" / name


def make_small(folder: Path) -> Path:
    ingest([crystals.write_matdeeplearn(folder, crystals.crystals(5))], folder / "small", INGEST)
    return folder / "small" / "shard_00000.h5"


def read_dataset(file: Path, *, verify: bool) -> None:
    """Values in a shard that is not verified may be any; its manifest and its shapes may not."""
    dataset = Dataset.open(file.parent, verify=verify)
    for index in range(0, len(dataset), max(len(dataset) // 5, 1)):
        structure = dataset.get(index)
        if verify:
            valid(structure)
    dataset.read(np.arange(min(len(dataset), 5)))
    dataset.files.close()


def text_of(source: Path) -> Callable[[Path], Path]:
    return lambda folder: shutil.copy(source, folder / source.name)


def read_set(file: Path) -> None:
    words = file.read_bytes().decode("utf-8", errors="replace").split("\n")
    read_config(QUICKSTART / "pretrain.yaml", PretrainConfig, words)


def make_set(folder: Path) -> Path:
    (folder / "words").write_text("training.epochs=3\nmodel.name=schnet\ndata.split.by=group\nseed=1")
    return folder / "words"


CARD = ModelCard(CGCNNOptions(cutoff=4.0, hidden=8, layers=1, gaussians=8, readout_hidden=8), (29, 79))


def weights_of(card: ModelCard) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: weight.contiguous() for name, weight in build_model(card.options).state_dict().items()}


def make_checkpoint(folder: Path, name: str) -> Path:
    weights = weights_of(CARD)
    state = {"epoch": 2, "step": 4, "step_in_epoch": 0, "best": "step_00000004", "best_loss": 1.0}
    moments = {f"{k}.exp_avg": torch.zeros_like(v) for k, v in weights.items() if v.is_floating_point()}
    checkpoint = folder / "run" / "checkpoints" / "step_00000004"
    checkpoint.parent.mkdir(parents=True)
    write_checkpoint(checkpoint, Snapshot.of(CARD, weights, moments, state))
    for link in ("last", "best"):
        (checkpoint.parent / link).symlink_to(checkpoint.name)
    return checkpoint / name


def read_checkpoint(file: Path) -> None:
    """Resume from it, and load its network."""
    before = weights_of(CARD)
    resumed = restore(file.parent.parent)
    model = load_model(file.parent).state_dict()
    assert resumed is not None
    for found in (resumed.weights, model):
        assert all(torch.equal(found[name], weight) for name, weight in before.items())


def make_export(folder: Path) -> Path:
    (folder / "model.safetensors").write_bytes(single_file(CARD, weights_of(CARD)))
    return folder / "model.safetensors"


def read_export(file: Path) -> None:
    model = load_model(file).state_dict()
    assert all(torch.equal(model[name], weight) for name, weight in weights_of(CARD).items())


def make_run(folder: Path, name: str) -> Path:
    write_run(folder / "run", DERIVATIVES)
    return folder / "run" / name


def make_pretraining(folder: Path) -> Path:
    make_run(folder, "metrics.jsonl")
    make_checkpoint(folder, "manifest.json")
    return folder / "run" / "metrics.jsonl"


def make_tuning(folder: Path) -> Path:
    return write_tuning(folder / "tuning") / "results.json"


def read_report(file: Path) -> None:
    page = render(load_runs([file.parent]))
    assert "<script>alert" not in page


def make_split(folder: Path) -> Path:
    make_dataset(folder, "dataset.json")
    ids = Dataset.open(folder / "mlearn").structure_ids
    np.savez_compressed(folder / "split.npz", train=ids[:20], validation=ids[20:30], test=ids[30:40])
    return folder / "split.npz"


def read_split(file: Path) -> None:
    dataset = Dataset.open(file.parent / "mlearn", verify=False)
    assert set(part_tested_by(file.parent, dataset).tolist()) <= set(range(len(dataset)))


def make_exclusion(folder: Path) -> Path:
    make_dataset(folder, "dataset.json")
    ids = Dataset.open(folder / "mlearn").structure_ids
    return crystals.dump(folder / "leaks.json", {"exclude": ids[:9].tolist(), "by": "structure"})


def read_left_out(file: Path) -> None:
    dataset = Dataset.open(file.parent / "mlearn", verify=False)
    assert set(read_exclusion([str(file)], dataset).tolist()) <= set(range(len(dataset)))


def make_folds(folder: Path) -> Path:
    names = [f"mb-small-{row + 1:03}" for row in range(20)]
    folds = {f"fold_{k}": {"train": [n for n in names if n not in names[k::5]], "test": names[k::5]} for k in range(5)}
    return crystals.dump(folder / "folds.json", {"splits": {"matbench_small": folds}})


def read_folds(file: Path) -> None:
    for fold in range(FOLDS):
        learnt, tested = matbench_fold(str(file), None, 20, fold)
        assert sorted([*learnt.tolist(), *tested.tolist()]) == list(range(20))


def make_hosts(folder: Path) -> Path:
    (folder / "hosts").write_text("node1\nnode1\nnode2\nnode2\n")
    return folder / "hosts"


def read_hosts(file: Path) -> None:
    world = find_world({"PBS_NODEFILE": str(file), "RANK": "1", "LOCAL_RANK": "1"})
    assert 0 <= world.rank < world.world_size


LAUNCHERS: tuple[Mapping[str, str], ...] = (
    {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1",
     "MASTER_PORT": "9"},
    {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0",
     "SLURM_STEP_NODELIST": "n[1-4,7],m2", "SLURM_STEP_NUM_NODES": "2"},
)  # fmt: skip


def make_variables(folder: Path) -> Path:
    return crystals.dump(folder / "variables.json", LAUNCHERS)


def read_variables(file: Path) -> None:
    try:
        launchers = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return
    for given in launchers if isinstance(launchers, list) else ():
        if isinstance(given, dict) and all(isinstance(v, str) and "\0" not in v for v in given.values()):
            world = find_world(given)
            assert 0 <= world.rank < world.world_size
            assert 0 <= world.local_rank < world.world_size
            assert 0 < world.master_port < 65536


def make_scaling(folder: Path) -> Path:
    for record in json.loads((RESULTS / "scaling_weak.json").read_text())["measurements"]:
        crystals.dump(folder / f"weak_{record['ranks']}.json", record)
    return folder / "weak_1.json"


def read_scaling(file: Path) -> None:
    conclude("weak", file.parent, predict=False, network=Network(1e-6, 1e9), conditions={})


def resume(file: Path) -> None:
    config = read_config(QUICKSTART / "pretrain.yaml", PretrainConfig, [])
    claim_run_dir(file.parent, config, resume=True)


def make_resumed(folder: Path) -> Path:
    (folder / "config.yaml").write_text((QUICKSTART / "pretrain.yaml").read_text())
    return folder / "config.yaml"


def read_suite(file: Path) -> None:
    for name, network in load_suite(file).networks.items():
        for part in (name, *network.pretrainings, *network.datasets):
            assert Path(part).name == part


def make_deepspeed(folder: Path) -> Path:
    zero = {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": True}
    return crystals.dump(folder / "zero.json", {"zero_optimization": zero, "wall_clock_breakdown": False})


def read_catalog(file: Path) -> None:
    for entry in Catalog.read(file):
        entry.lines()
        assert all(Path(raw.name).name == raw.name and raw.name != ".." for raw in entry.files)


def make_catalog(folder: Path) -> Path:
    entries = yaml.safe_load((PACKAGE / "data" / "catalog" / "datasets.yaml").read_text())
    (folder / "datasets.yaml").write_text(yaml.safe_dump(entries[:3], allow_unicode=True, sort_keys=False))
    return folder / "datasets.yaml"


READERS = (
    *INGESTS,
    Reader("dataset.json", "json", lambda f: make_dataset(f, "dataset.json"), partial(read_dataset, verify=True)),
    Reader("shard, verified", "bytes", make_small, partial(read_dataset, verify=True)),
    Reader("shard, not verified", "bytes", make_small, partial(read_dataset, verify=False), names_file=False),
    Reader("catalog", "yaml", make_catalog, read_catalog),
    Reader("config: pretrain", "yaml", text_of(QUICKSTART / "pretrain.yaml"),
           lambda file: read_config(file, PretrainConfig)),
    Reader("config: finetune", "yaml", text_of(QUICKSTART / "finetune.yaml"),
           lambda file: read_config(file, FinetuneConfig)),
    Reader("config: its task", "yaml", text_of(QUICKSTART / "finetune.yaml"), load_any_config),
    Reader("--set", "text", make_set, read_set, names_file=False),
    Reader("suite", "yaml", text_of(ROOT / "configs" / "suite" / "scale.yaml"), read_suite),
    Reader("DeepSpeed JSON", "json", make_deepspeed, lambda file: read_deepspeed_options(str(file), 0)),
    *(Reader(f"checkpoint: {name}", kind, partial(make_checkpoint, name=name), read_checkpoint)
      for name, kind in (("manifest.json", "json"), ("model.safetensors", "bytes"), ("model.yaml", "yaml"),
                         ("optimizer.safetensors", "bytes"), ("state.pt", "bytes"))),
    Reader("exported model", "bytes", make_export, read_export),
    *(Reader(f"report: {name}", kind, partial(make_run, name=name), read_report, costly=True)
      for name, kind in (("metrics.jsonl", "text"), ("run.json", "json"), ("config.yaml", "yaml"),
                         ("results.json", "json"), ("predictions_test.npz", "bytes"))),
    Reader("report: results.json of seeds", "json", make_tuning, read_report, costly=True),
    Reader("split.npz", "bytes", make_split, read_split),
    Reader("data.exclude", "json", make_exclusion, read_left_out),
    Reader("Matbench's folds", "json", make_folds, read_folds),
    Reader("host file", "text", make_hosts, read_hosts, names_file=False),
    Reader("launcher's variables", "json", make_variables, read_variables, names_file=False),
    Reader("scaling results", "json", make_scaling, read_scaling),
    Reader("resumed config.yaml", "yaml", make_resumed, resume),
    Reader("pre-training to begin from", "text", make_pretraining, lambda file: find_pretrained(str(file.parent), 1)),
)  # fmt: skip
