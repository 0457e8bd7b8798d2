"""`python -m dpt_hpc.launch CONFIG`: the one entry for srun, mpirun, deepspeed, torchrun, or nothing."""

from __future__ import annotations

import sys

from dpt_hpc.__main__ import run_command_line


def main() -> None:
    """Run the verb that the config names (pretrain or finetune) on every rank: `dpt-hpc run CONFIG [--set K=V]`."""
    run_command_line(["run", *sys.argv[1:]])


if __name__ == "__main__":
    main()
