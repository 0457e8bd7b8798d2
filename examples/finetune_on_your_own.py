# %% [markdown]
# # Fine-tune on your own crystals: a CSV and CIF files
#
#     python examples/finetune_on_your_own.py [TABLE.csv COLUMN=UNIT [PRETRAINED]]
#
# TABLE has a column `file`, which names a CIF file seen from the table's folder, and a column of the property. Without
# a table, a small one is written here from the sample data. PRETRAINED is a pre-training run of the same network;
# without one it begins from scratch.

# %%
import csv
import json
import subprocess
import sys
from pathlib import Path

from ase import Atoms
from ase.io import write

from dpt_hpc.data.shards import Dataset
from dpt_hpc.quickstart import PACKAGE

TABLE, TARGET, PRETRAINED, *_ = [*sys.argv[1:], None, None, None]
SMALL = 80
"""Crystals of the table that is written here."""


def dpt_hpc(*words: str | Path) -> None:
    """One command, as in a shell."""
    print("$ dpt-hpc", *words, flush=True)
    if code := subprocess.run([sys.executable, "-m", "dpt_hpc", *map(str, words)]).returncode:
        sys.exit(code)  # it has said what is wrong


# %% [markdown]
# ## The table

# %%
if TABLE is None:
    dpt_hpc("ingest", PACKAGE / "sample" / "elastic.json.gz", "--out", "sample_moduli", "--quiet")
    sample = Dataset.open("sample_moduli")
    smallest = sample.num_atoms.argsort(kind="stable")[:SMALL].tolist()
    folder = Path("sample_crystals")
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
NAME = TARGET.partition("=")[0]
DATA, RUN = f"data/{NAME}", f"runs/{NAME}"
print(Path(TABLE).read_text()[:200], "...")

# %% [markdown]
# ## Ingest, and look at it

# %%
dpt_hpc("ingest", TABLE, "--target", TARGET, "--out", DATA)
dpt_hpc("inspect", DATA)

# %% [markdown]
# ## Fine-tune
#
# Three seeds: each has its own split, and their spread is the error bar. `pooling: mean` is for a property that does
# not grow with the cell; sums, such as a total energy, want `add`.

# %%
Path("finetune.yaml").write_text(
    f"""task: finetune
run_dir: {RUN}
pretrained: {PRETRAINED or "null"}
data: {{path: {DATA}}}
objective: {{kind: property, target: {NAME}}}
model: {{name: cgcnn, cutoff: 5.0, pooling: mean, filters: table}}
training: {{epochs: 20, batch_size: 16}}
seeds: [0, 1, 2]
"""
)
dpt_hpc("config", "check", "finetune.yaml")
dpt_hpc("finetune", "finetune.yaml", "--quiet")
results = json.loads(Path(RUN, "results.json").read_text())
print(f"{NAME}: test MAE {results['mean']:.3f} ± {results['std']:.3f} {results['unit']}")

# %% [markdown]
# ## Predict
#
# For any structures: here the same table. `--allow-unknown-elements`, because a split of so few crystals leaves
# elements out of the training part; for work of your own leave it out.

# %%
dpt_hpc("predict", f"{RUN}/seed_0", TABLE, "-o", "predicted.csv", "--allow-unknown-elements", "--quiet")
print("\n".join(Path("predicted.csv").read_text().splitlines()[:4]))
