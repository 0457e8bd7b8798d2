"""`python -m dpt_hpc.launch CONFIG`: the one entry for srun, mpirun, deepspeed, torchrun, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dpt_hpc.cli import run_command_line


def main() -> None:
    """Run the verb that the config names (pretrain or finetune) on every rank: `dpt-hpc run CONFIG [--set K=V]`.

    Also `python -m dpt_hpc.launch doctor ...` and `bench ...`, which are for many ranks too, and `suite ...`, of which
    every rank is a worker of its own.
    """
    words = without_local_rank(sys.argv[1:])
    run_command_line(words if words[:1] in (["doctor"], ["bench"], ["suite"]) else ["run", *words])


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments without the --local_rank that deepspeed and older torch launchers append for each process; they
    say the same by LOCAL_RANK."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept


if __name__ == "__main__":
    main()
