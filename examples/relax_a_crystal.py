# %% [markdown]
# # Relax a crystal with a pre-trained network
#
#     python examples/relax_a_crystal.py [MODEL [STRUCTURE]]
#
# MODEL is a run, a checkpoint or an exported file that learnt energies, forces and stress. Without one, a tiny network
# is pre-trained here on the sample data, to show the way: its numbers are not to be used.

# %%
import subprocess
import sys
import warnings

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.optimize import LBFGS

from dpt_hpc.calculator import DPTCalculator
from dpt_hpc.quickstart import PACKAGE, configs

MODEL, STRUCTURE, *_ = [*sys.argv[1:], None, None]

# %% [markdown]
# ## A network
#
# Relaxations want an energy without jumps: `model.envelope`, and no limit on the number of neighbours.

# %%
if MODEL is None:
    MODEL = "runs/smooth"
    command = [sys.executable, "-m", "dpt_hpc", "pretrain", str(configs() / "quickstart" / "pretrain.yaml"), "--set"]
    changes = [
        f"data.path={PACKAGE / 'sample' / 'mlearn'}",
        f"run_dir={MODEL}",
        "data.split.train_fraction=0.3",
        "model.envelope=gate",
        "model.cutoff=4.0",
        "model.layers=2",
        "training.epochs=5",
        "training.batch_size=8",
    ]
    subprocess.run([*command, *" --set ".join(changes).split(" ")], check=True)

calculator = DPTCalculator(MODEL)
print("network:", calculator.model)
print("trained on:", calculator.model.card.trained_on["dataset"][0]["name"])

# %% [markdown]
# ## A crystal, out of shape

# %%
if STRUCTURE is None:
    atoms = bulk("Cu", cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=0)
    atoms.set_cell(atoms.cell[:] @ (np.eye(3) + 0.02 * np.diag([1, -1, 0.5])), scale_atoms=True)
else:
    found = read(STRUCTURE)
    assert isinstance(found, Atoms)
    atoms = found
atoms.calc = calculator


def describe(word: str) -> float:
    """Print energy, largest force and pressure; return the energy."""
    energy, forces = atoms.get_potential_energy(), np.linalg.norm(atoms.get_forces(), axis=1).max()
    pressure = -np.trace(atoms.get_stress(voigt=False)) / 3 * 160.2176634
    volume = atoms.get_volume() / len(atoms)
    print(f"{word}: {energy:.4f} eV, {forces:.4f} eV/Å at most, {pressure:.2f} GPa, {volume:.3f} Å³ per atom")
    return energy


# %% [markdown]
# ## Relax the positions, then the cell too

# %%
before = describe("before")
LBFGS(atoms, logfile=None).run(fmax=0.05, steps=200)
moved = describe("positions relaxed")

# %%
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ASE's filter takes the logarithm of the cell, and says when it is inexact
    LBFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.05, steps=200)
after = describe("cell relaxed")
assert after <= moved <= before
write("relaxed.cif", atoms)
print("wrote relaxed.cif")
