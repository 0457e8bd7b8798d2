"""The main job from end to end on the data that ships with dpt_hpc, each step printed as the command it is."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import dpt_hpc
from dpt_hpc.errors import ConfigError

PACKAGE = Path(dpt_hpc.__file__).parent


def shipped(name: str) -> Path:
    """A folder that ships with dpt_hpc: inside an installed package, or beside it in a checkout."""
    beside = PACKAGE.parent / name
    inside = PACKAGE / ("job_files/launch" if name == "launch" else name)  # launch itself is a module there
    return inside if inside.is_dir() else beside


def configs() -> Path:
    """The presets."""
    return shipped("configs")


def run_quickstart(out: Path, say: Callable[[str], None], run: Callable[[Sequence[str]], None]) -> None:
    """Run the four verbs. say prints a line, run executes one command line.

    A finished quickstart in `out` is shown, not repeated. Raises ConfigError if `out` holds anything else.
    """
    if (out / "report.html").exists():
        say(f"Already done: look at {out / 'report.html'} in a browser. To run it again, remove {out}.")
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: not empty.\nRemove it, or choose another directory with --out DIR.")
    sample, presets = PACKAGE / "sample", configs() / "quickstart"
    properties, pretrained = str(out / "data" / "elastic"), str(out / "pretrain")
    fine = ["finetune", str(presets / "finetune.yaml"), "--set", f"data.path={properties}"]
    steps = [
        (
            "Read 1,181 crystals with their bulk moduli (DFT) into a shard.",
            ["ingest", str(sample / "elastic.json.gz"), "--out", properties],
        ),
        (
            "Pre-train on energies, forces and stresses of six elements: a DEMONSTRATION, far too small to be useful.",
            [
                "pretrain",
                str(presets / "pretrain.yaml"),
                "--set",
                f"data.path={sample / 'mlearn'}",
                "--set",
                f"run_dir={pretrained}",
            ],
        ),
        ("Learn the bulk modulus from scratch.", [*fine, "--set", f"run_dir={out / 'baseline'}"]),
        (
            "Learn it again, starting from the pre-trained network.",
            [*fine, "--set", f"run_dir={out / 'finetuned'}", "--set", f"pretrained={pretrained}"],
        ),
        (
            "Put everything on one page.",
            ["report", pretrained, str(out / "baseline"), str(out / "finetuned"), "--out", str(out / "report.html")],
        ),
    ]
    for i, (purpose, command) in enumerate(steps, 1):
        say(f"\n[bold]{i}/{len(steps)}  {purpose}[/bold]\n$ dpt-hpc {shlex.join(command)}")
        run(command)
    say(
        f"\nDone. Look at {out / 'report.html'} in a browser.\n"
        "Next, with your own data: dpt-hpc ingest FILES... --out data/mine, then dpt-hpc inspect data/mine, then\n"
        f"dpt-hpc pretrain {configs() / 'pretrain' / 'cgcnn_1_500_500.yaml'} --set data.path=data/mine"
    )
