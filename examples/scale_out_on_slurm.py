# %% [markdown]
# # Scale out on Slurm
#
#     python examples/scale_out_on_slurm.py
#
# What can be tried before the cluster is there runs here, on two ranks of this machine; what Slurm has to start is
# printed.

# %%
import json
import subprocess
import sys
from pathlib import Path

from dpt_hpc.quickstart import PACKAGE, configs, shipped

CONFIG = configs() / "quickstart" / "pretrain.yaml"
SETTINGS = [
    f"data.path={PACKAGE / 'sample' / 'mlearn'}",
    "run_dir=runs/two_ranks",
    "data.split.train_fraction=0.2",
    "model.cutoff=4.0",
    "model.layers=2",
    "training.epochs=1",
]
CHANGES = [word for setting in SETTINGS for word in ("--set", setting)]
MPIEXEC = Path(sys.executable).parent / "mpiexec"
"""That of `pip install dpt-hpc[mpi]`; on a cluster it is the site's."""
ON_TWO_RANKS = [str(MPIEXEC), "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, "-m", "dpt_hpc.launch"]


def shell(*words: str | Path) -> None:
    """One command, shown and run."""
    print("$", *(Path(word).name if str(word).startswith("/") else word for word in words), flush=True)
    if code := subprocess.run([str(word) for word in words]).returncode:
        sys.exit(code)  # it has said what is wrong


# %% [markdown]
# ## 1. Is the config valid, and what will a step cost?

# %%
dpt_hpc = [sys.executable, "-m", "dpt_hpc"]
shell(*dpt_hpc, "config", "check", CONFIG, *CHANGES)
shell(*dpt_hpc, "pretrain", CONFIG, *CHANGES, "--check")

# %% [markdown]
# ## 2. Are the machine and the ranks well?
#
# On the cluster: `srun -N 2 --ntasks-per-node=4 python -m dpt_hpc.launch doctor CONFIG`.

# %%
shell(*ON_TWO_RANKS, "doctor", CONFIG, *CHANGES)

# %% [markdown]
# ## 3. Train on two ranks
#
# They take the steps that one rank would take.

# %%
shell(*ON_TWO_RANKS, CONFIG, *CHANGES, "--quiet")
run = json.loads(Path("runs/two_ranks/run.json").read_text())
print(f"{run['world_size']} ranks, {run['engine']}, {run['launched_by']}")
assert run["world_size"] == 2

# %% [markdown]
# ## 4. The same on Slurm
#
# The job files ship with dpt_hpc and are submitted as they are. A job that runs out of time saves, ends with exit code
# 75 and queues itself again.

# %%
jobs = shipped("launch")
changes = " ".join(f"--set {setting}" for setting in ("data.path=data/mine", "run_dir=runs/mine"))
for job in ("slurm.sbatch", "scaling.sbatch"):
    assert (jobs / job).is_file()
print(
    f"""
sbatch -N 8 --ntasks-per-node=4 {jobs.name}/scaling.sbatch CONFIG {changes}   # how far does it scale?
sbatch -N 2 --ntasks-per-node=4 --gpus-per-node=4 {jobs.name}/slurm.sbatch CONFIG {changes}
squeue --me
dpt-hpc watch runs/mine"""
)
