"""What a suite runs: a YAML file that names configs of single runs and what is changed in them; no setting twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from dpt_hpc.train.config import Options
from dpt_hpc.train.config_file import read_config

BASELINE = "baseline"
RESERVED = (BASELINE, "pretrain", "tables")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class Recipe(Options):
    """A config file of one run, from the directory of the suite's file, and options changed in it."""

    config: str
    set: dict[str, Any] = Field({})
    """Overrides, as `--set` takes them: `training.epochs: 10`."""


class Pretraining(Options):
    """A pre-training: one to run (`config`), or another one (`of`), whole or its first `epochs` epochs."""

    config: str | None = None
    set: dict[str, Any] = Field({})
    of: str | None = None
    """The name of another pre-training that is run: NAME, or NETWORK/NAME of another entry of `networks`."""
    epochs: int | None = Field(None, ge=1)
    """Only its first so many epochs: their best checkpoint is what so short a run would have exported."""
    label: str | None = None
    """Its name in tables; null: its objective's."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Pretraining:
        if (self.config is None) == (self.of is None):
            raise ValueError("give either config (a file to run) or of (a pre-training to cut short)")
        if self.of is None and self.epochs is not None:
            raise ValueError(
                "epochs belongs to of: the first epochs of that pre-training; for one to run: set training.epochs"
            )
        if self.of is not None and self.set:
            raise ValueError("of runs nothing, so that set has no meaning beside it")
        return self


class Against(Options):
    """The fine-tunings from scratch that a recipe is compared with."""

    network: str
    pooling: Literal["add", "mean"] = "add"

    def is_in(self, block: Block) -> bool:
        return block.network == self.network and self.pooling in block.pooling and BASELINE in block.pretrainings


class Network(Options):
    """What is run with one network. Its name is a directory; the network itself is in the configs."""

    set: dict[str, Any] = Field({})
    """Overrides of all its runs."""
    set_pretraining: dict[str, Any] = Field({})
    """Overrides of all its pre-trainings, besides."""
    set_finetuning: dict[str, Any] = Field({})
    """Overrides of all its fine-tunings, besides; those of `transfer` say nothing to the baseline, and are left out."""
    against: Against | None = None
    """Whose baseline all improvements are over, of the same datasets and seeds; null: its own. For recipes: what they
    gain over the faithful one."""
    pretrainings: dict[str, Pretraining] = Field({})
    datasets: dict[str, Recipe] = Field(min_length=1)


class Block(Options):
    """Fine-tunings: every pooling x pre-training x dataset of one network, in this order."""

    network: str
    pooling: tuple[Literal["add", "mean"], ...] = ("add",)
    pretrainings: tuple[str, ...] = (BASELINE,)
    """`baseline` is training from scratch."""
    datasets: tuple[str, ...] = ()
    """Empty: all of the network's."""


class Figure(Options):
    """Fine-tuning errors against the length of the pre-training, or against the structures it learnt from."""

    x: Literal["epochs", "structures"]
    network: str
    pooling: Literal["add", "mean"] = "add"
    lines: dict[str, tuple[str, ...]] = Field(min_length=1)
    """Label of each line: the pre-trainings on it."""


class SuiteConfig(Options):
    run_dir: str = "runs"
    """Everything is below it: NETWORK/pretrain/NAME and NETWORK/POOLING/NAME/DATASET."""
    networks: dict[str, Network] = Field(min_length=1)
    cells: tuple[Block, ...] = Field(min_length=1)
    """In the order in which they are run; a pre-training runs before the first cell that needs it."""
    figures: dict[str, Figure] = Field({})
    records: str | None = None
    """A directory, from that of the suite's file, of what was run already, here or elsewhere: cells/ and weights/ of
    its pre-trainings. What is in it is not run again."""
    leaks: tuple[str, ...] = ()
    """What `dpt-hpc data leaks --out` wrote, a file for each pre-training set, from the directory of the suite's file:
    the tables then tell how many structures of each fine-tuning set are in the pre-training set, too."""

    @field_validator("leaks", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("networks")
    @classmethod
    def _names_are_directories(cls, value: dict[str, Network]) -> dict[str, Network]:
        for network, content in value.items():
            for name in (network, *content.pretrainings, *content.datasets):
                if not NAME.fullmatch(name) or name in RESERVED:
                    raise ValueError(
                        f"{name!r} names a directory: letters, digits, _ . - only, and none of {', '.join(RESERVED)}"
                    )
            for name, pretraining in content.pretrainings.items():
                if pretraining.of is not None:
                    other, whole = whole_of(network, pretraining.of)
                    known = value[other].pretrainings if other in value else {}
                    if whole not in known or known[whole].config is None:
                        raise ValueError(f"{network}.pretrainings.{name}.of is {pretraining.of!r}, which runs nothing")
        return value

    @model_validator(mode="after")
    def _names_are_known(self) -> SuiteConfig:
        for i, block in enumerate(self.cells):
            network = _known(self.networks, block.network, f"cells.{i}.network")
            for name in block.datasets:
                _known(network.datasets, name, f"cells.{i}.datasets")
            for name in block.pretrainings:
                _known({BASELINE: None, **network.pretrainings}, name, f"cells.{i}.pretrainings")
        for name, network in self.networks.items():
            if (other := network.against) is not None:
                _known(self.networks, other.network, f"networks.{name}.against.network")
                if not any(other.is_in(block) for block in self.cells):
                    raise ValueError(
                        f"networks.{name}.against: no cells of {other.network} with {other.pooling} pooling are a "
                        f"baseline; add {BASELINE} to them"
                    )
        for title, figure in self.figures.items():
            network = _known(self.networks, figure.network, f"figures.{title}.network")
            for name in (name for line in figure.lines.values() for name in line):
                _known({BASELINE: None, **network.pretrainings}, name, f"figures.{title}.lines")
        return self


def whole_of(network: str, of: str) -> tuple[str, str]:
    """Network and name of the pre-training that `of`, of an entry of `network`, means."""
    other, slash, name = of.rpartition("/")
    return (other, name) if slash else (network, of)


def load_suite(path: str | Path, run_dir: str | None = None) -> SuiteConfig:
    """Read a suite's YAML file. Raises ConfigError, which names the key, for whatever is wrong with it."""
    return read_config(path, SuiteConfig, [] if run_dir is None else [f"run_dir={run_dir}"])


def overrides(*groups: Mapping[str, Any]) -> dict[str, str]:
    """The values of `--set` that `groups` ask for, a later group before an earlier one: `training.epochs` -> `10`."""
    found: dict[str, str] = {}
    for key, value in (pair for group in groups for pair in group.items()):
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        found[key] = text.removesuffix("\n...").strip()
    return found


def _known(there: Mapping[str, Any], name: str, place: str) -> Any:
    if name not in there:
        raise ValueError(f"{place}: there is no {name!r}; expected one of {', '.join(there)}")
    return there[name]
