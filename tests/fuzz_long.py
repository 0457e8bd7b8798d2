"""`make fuzz`: ten thousand spoilt files and more over all readers, from fresh seeds; the table goes into
benchmarks/results/fuzz.md.

python tests/fuzz_long.py [--inputs N] [--seed N] [--only NAME] [--out FILE]
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import hypothesis
import torch
from fuzz_readers import READERS
from fuzz_structures import Reader
from fuzzing import spoilt
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dpt_hpc import __version__

DEADLINE = 120
"""Seconds after which an input counts as hung, on however busy a machine."""
MEMORY = 12 << 30
"""Bytes of address space; torch alone takes 4 GB of it."""


def fuzz(reader: Reader, count: int, seed: int) -> tuple[Counter[str], dict[str, bytes]]:
    """Outcomes of `count` inputs; the first input of each kind of failure."""
    outcomes: Counter[str] = Counter()
    failures: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = reader.make(Path(folder))
        good = file.read_bytes()
        assert reader.outcome(file, good) == "accepted"

        @hypothesis.seed(seed)
        @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(draws=st.data())
        def one(draws: st.DataObject) -> None:
            content = draws.draw(spoilt(reader.kind, good))
            faulthandler.dump_traceback_later(DEADLINE, exit=True)
            try:
                outcomes[reader.outcome(file, content)] += 1
            except Exception as error:
                outcomes["found"] += 1
                last = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__} {Path(last.filename).name}:{last.lineno} {error}"
                failures.setdefault(what[:200], content)
            finally:
                faulthandler.cancel_dump_traceback_later()

        one()
    return outcomes, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=12_000, help="over all readers together")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--only", default="", help="readers whose name has this in it")
    parser.add_argument("--out", type=Path, help="write the table there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.enable()
    chosen = [reader for reader in READERS if asked.only in reader.name]
    weight = {reader.name: 0.25 if reader.costly else 1.0 for reader in chosen}
    began, total, lines = time.monotonic(), Counter[str](), []
    print(f"seed {asked.seed}", flush=True)
    for reader in chosen:
        count = max(round(asked.inputs * weight[reader.name] / sum(weight.values())), 1)
        outcomes, failures = fuzz(reader, count, asked.seed)
        total += outcomes
        lines.append(row(reader.name, outcomes))
        print(lines[-1], flush=True)
        for failure, content in failures.items():
            print(f"    {failure}\n      {content[:300]!r}", flush=True)
    lines.append(row("**all**", total))
    print(lines[-1])
    if asked.out:
        asked.out.write_text(table(lines, asked.seed, time.monotonic() - began))
    return 1 if total["found"] else 0


def row(name: str, outcomes: Counter[str]) -> str:
    counts = [sum(outcomes.values()), *(outcomes[kind] for kind in ("refused", "accepted", "found"))]
    return f"| {name} | {' | '.join(f'{count:,}' for count in counts)} |"


def table(lines: list[str], seed: int, seconds: float) -> str:
    head = [
        "# Spoilt files",
        "",
        f"`make fuzz`, dpt_hpc {__version__}, seed {seed}, {seconds / 60:.0f} minutes in one process, "
        f"which kept within {MEMORY >> 30} GB of address space and {DEADLINE} s an input.",
        "",
        "Good files of every reader, cut, flipped, with lines and keys gone, doubled or exchanged, and with values of "
        "wrong types, sizes and depths. Refused: by an error that names the file. Accepted: what was read is sound, "
        "and holds what nobody touched. Found: anything else, such as another exception.",
        "",
        "| reader | inputs | refused | accepted | found |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *lines]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
