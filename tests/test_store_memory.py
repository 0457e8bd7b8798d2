"""The store `disk` takes memory for windows, not for the dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from loading import multiply
from small_runs import records
from test_shards import structures, written

from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.quickstart import PACKAGE

EPOCH = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from dpt_hpc.data.group import ALONE
from dpt_hpc.data.loader import Loader, Step
from dpt_hpc.data.sampler import Sampler
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.store_choice import open_store

def status(name):
    return next(int(l.split()[1]) * 1024 for l in Path("/proc/self/status").read_text().splitlines() if name in l)

def epoch(path, kind):
    dataset = Dataset.open(path, verify=False)
    layout = dataset.layout(torch.float32, None)
    sampler = Sampler(np.arange(len(dataset)), dataset.edge_estimate, 20, 0, window=200)
    windows = ([Step(k, sampler.parts(1, k, 1, 1)) for k in window] for window in sampler.windows())
    with open_store(dataset, layout, kind, 0.5, everyone=ALONE, node=ALONE, node_rank=0) as store:
        with Loader(store, windows) as loader:
            return sum(batch.num_structures for _, (batch,) in loader)

path, kind = sys.argv[1:]
epoch(path + "_warm", "disk")  # what the libraries take at their first use is not the dataset's
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
seen = epoch(path, kind)
print(json.dumps([seen, status("VmHWM") - before]))
"""


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, int]]:
    """Datasets of one and of eight times the size (of large structures: it is their atoms that take the memory)."""
    directory = tmp_path_factory.mktemp("sizes")
    items = structures(200, seed=1)
    large = [
        replace(
            s,
            positions=s.positions.repeat(60, 1),
            atomic_numbers=s.atomic_numbers.repeat(60),
            forces=None if s.forces is None else s.forces.repeat(60, 1),
        )
        for s in items
    ]
    written(directory / "one", large)
    found = {}
    for copies in (4, 32):
        path = directory / f"times_{copies}"
        found[copies] = path, multiply(directory / "one", path, copies)
        multiply(directory / "one", directory / f"{path.name}_warm", 1)
    return found


def peak(path: Path, kind: str, copies: int) -> int:
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(path), kind], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen, grown = json.loads(done.stdout)
    assert seen == 200 * copies
    return int(grown)


@pytest.mark.slow
def test_the_memory_of_disk_does_not_grow_with_the_dataset(sizes: dict[int, tuple[Path, int]]) -> None:
    (small, small_bytes), (large, large_bytes) = sizes[4], sizes[32]
    assert large_bytes == 8 * small_bytes
    one, eight = peak(small, "disk", 4), peak(large, "disk", 32)
    more = large_bytes - small_bytes
    assert more > 80e6
    assert eight - one < 0.1 * more
    assert peak(large, "node", 32) - peak(small, "node", 4) > 0.3 * more  # float32: the measure sees what is kept


TRAINED = """
import json, resource, sys
from pathlib import Path
import torch
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.config_file import check_config
from dpt_hpc.train.data import open_dataset, store_for
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import Ranks

small, path, run_dir, room = *sys.argv[1:4], int(sys.argv[4])
torch.set_num_threads(1)
options = {
    "run_dir": run_dir + "_small",
    "data": {"path": small, "store": "disk", "shuffle_window": 256,
             "split": {"train": 0.03, "validation": 0.005, "test": 0.965, "by": "structure"}},
    "model": {"name": "cgcnn", "cutoff": 2.4, "hidden": 8, "layers": 1, "gaussians": 8, "readout_hidden": 8},
    "training": {"epochs": 1, "batch_size": 16},
}
pretrain(check_config(options, PretrainConfig, "test"), Ranks(), quiet=True)  # what is of a run, and not of its data
options["run_dir"], options["data"]["path"] = run_dir, path
config = check_config(options, PretrainConfig, "test")
lines = Path("/proc/self/status").read_text().splitlines()
used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
dataset = open_dataset(config.data, Ranks())
try:
    store_for(dataset, config.data.model_copy(update={"store": "node"}), torch.float64, None, Ranks())
except EnvironmentFault as error:
    print(error)
pretrain(config, Ranks(), quiet=True)
"""


@pytest.mark.slow
def test_a_dataset_of_twice_the_memory_limit_trains(tmp_path: Path) -> None:
    """To the predictions of its test part, nearly all of it: what the process may allocate beyond what a run on a few
    structures has taken is half of the dataset. `node` is refused."""
    sample = Dataset.open(PACKAGE / "sample" / "mlearn")
    write_dataset([sample.get(i) for i in range(len(sample))], tmp_path / "one", provenance={})
    num_bytes = multiply(tmp_path / "one", tmp_path / "large", 56)
    words = [sys.executable, "-c", TRAINED, tmp_path / "one", tmp_path / "large", tmp_path / "run", num_bytes // 2]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "more than this process may have.\nSet data.store=disk" in done.stdout
    before, after = (record["validation"]["loss"] for record in records(tmp_path / "run", "epoch"))
    assert after < before
    with np.load(tmp_path / "run" / "predictions_test.npz") as file:
        assert len(file["structure_ids"]) > 0.96 * 56 * len(sample)
