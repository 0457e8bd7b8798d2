# %% [markdown]
# # Fine-tune on your own crystals: a CSV and CIF files
#
#     python examples/finetune_on_your_own.py [TABLE.csv COLUMN=UNIT [PRETRAINED]]
#
# TABLE has a column `file`, which names a CIF file seen from the table's folder, and a column of the property. Without
# a table, a small one is written here from the sample data. PRETRAINED is a pre-training run; without one the network
# begins from scratch.

# %%
import csv
import json
import subprocess
import sys
from pathlib import Path

from ase import Atoms
from ase.io import write

from dpt_hpc.data.ingest import ingest
from dpt_hpc.data.shards import Dataset
from dpt_hpc.quickstart import PACKAGE

TABLE, TARGET, PRETRAINED, *_ = [*sys.argv[1:], None, None, None]
SMALL = 80
"""Crystals of the table that is written here."""


def dpt_hpc(*words: str | Path) -> None:
    """One command, as in a shell."""
    print("$ dpt-hpc", *words, flush=True)
    subprocess.run([sys.executable, "-m", "dpt_hpc", *map(str, words)], check=True)


# %% [markdown]
# ## The table

# %%
if TABLE is None:
    ingest([PACKAGE / "sample" / "elastic.json.gz"], "sample_moduli")
    sample = Dataset.open("sample_moduli")
    smallest = sample.num_atoms.argsort(kind="stable")[:SMALL].tolist()
    folder = Path("mine")
    (folder / "cifs").mkdir(parents=True)
    with (folder / "table.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["file", "bulk_modulus"])
        for crystal in map(sample.get, smallest):
            atoms = Atoms(crystal.atomic_numbers, crystal.positions, cell=crystal.cell, pbc=True)
            file = f"cifs/{crystal.structure_id}.cif"
            write(folder / file, atoms)
            rows.writerow([file, crystal.properties["log10_k_vrh"]])
    TABLE, TARGET = str(folder / "table.csv"), "bulk_modulus=log10(GPa)"
assert TARGET is not None, "name the column and its unit, for example band_gap=eV"
print(Path(TABLE).read_text()[:200], "...")

# %% [markdown]
# ## Ingest, and look at it

# %%
dpt_hpc("ingest", TABLE, "--target", TARGET, "--out", "data/mine")
dpt_hpc("inspect", "data/mine")

# %% [markdown]
# ## Fine-tune
#
# Three seeds: each has its own split, and their spread is the error bar. `pooling: mean` is for a property that does
# not grow with the cell; sums, such as a total energy, want `add`.

# %%
name = TARGET.partition("=")[0]
Path("finetune.yaml").write_text(
    f"""task: finetune
run_dir: runs/mine
pretrained: {PRETRAINED or "null"}
data: {{path: data/mine}}
objective: {{kind: property, target: {name}}}
model: {{name: cgcnn, cutoff: 5.0, pooling: mean, filters: table}}
training: {{epochs: 20, batch_size: 16}}
seeds: [0, 1, 2]
"""
)
dpt_hpc("config", "check", "finetune.yaml")
dpt_hpc("finetune", "finetune.yaml", "--quiet")
results = json.loads(Path("runs/mine/results.json").read_text())
print(f"{name}: test MAE {results['mean']:.3f} ± {results['std']:.3f} {results['unit']}")

# %% [markdown]
# ## Predict
#
# For any structures: here the same table. `--allow-unknown-elements`, because a split of so few crystals leaves
# elements out of the training part; for work of your own leave it out.

# %%
dpt_hpc("predict", "runs/mine/seed_0", TABLE, "-o", "predicted.csv", "--allow-unknown-elements", "--quiet")
print("\n".join(Path("predicted.csv").read_text().splitlines()[:4]))
