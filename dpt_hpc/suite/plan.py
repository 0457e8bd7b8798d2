"""The cells of a suite in the order in which they are run: which config, in which directory, after which other one."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from dpt_hpc.suite.config import (
    BASELINE,
    Against,
    Figure,
    Network,
    Recipe,
    SuiteConfig,
    load_suite,
    overrides,
    whole_of,
)
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig
from dpt_hpc.train.config_file import load_config


@dataclass(frozen=True, eq=False)
class PretrainCell:
    """A pre-training. name: its own; path: its run directory. command: what makes it without the suite."""

    network: str
    name: str
    path: Path
    config: PretrainConfig
    command: str
    record: Path | None = None
    """The file of its results among the suite's records, there or not."""


@dataclass(frozen=True, eq=False)
class Start:
    """What a row of a table begins with: a pre-training, whole or its first `epochs` epochs; the baseline has none."""

    name: str
    cell: PretrainCell | None = None
    epochs: int | None = None
    label: str | None = None
    weights: Path | None = None
    """The file of its weights among the suite's records, there or not."""


@dataclass(frozen=True, eq=False)
class FinetuneCell:
    """A fine-tuning, all seeds of it."""

    network: str
    pooling: str
    start: Start
    dataset: str
    path: Path
    config: FinetuneConfig
    command: str
    record: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A suite, spelled out.

    cells: fine-tunings in their order. starts: of every network, by their names. against: whose baseline a network's
    improvements are over, where it is not its own. leaks: files of what fine-tuning and pre-training sets share.
    records: the directory of what was run already.
    """

    run_dir: Path
    cells: tuple[FinetuneCell, ...]
    starts: dict[str, dict[str, Start]]
    figures: dict[str, Figure]
    against: dict[str, Against]
    leaks: tuple[Path, ...]
    records: Path | None = None

    @property
    def order(self) -> tuple[PretrainCell | FinetuneCell, ...]:
        """All that is run: every pre-training before the first cell that needs it."""
        found: list[PretrainCell | FinetuneCell] = []
        for cell in self.cells:
            if cell.start.cell is not None and cell.start.cell not in found:
                found.append(cell.start.cell)
            found.append(cell)
        return tuple(found)


def plan_suite(path: str | Path, run_dir: str | None = None) -> Plan:
    """Read a suite and every config that it names. run_dir: instead of the file's.

    Raises ConfigError for whatever is wrong in any of them, before anything is run.
    """
    suite = load_suite(path, run_dir)
    folder = Path(path).parent
    said_by = f"{path}: set:"
    runs = {name: _runs(suite, name, network, folder, said_by) for name, network in suite.networks.items()}
    starts = {name: _starts(suite, name, network, runs, folder) for name, network in suite.networks.items()}
    cells: dict[Path, FinetuneCell] = {}
    for block in suite.cells:
        network = suite.networks[block.network]
        for pooling in block.pooling:
            for name in block.pretrainings:
                for dataset in block.datasets or network.datasets:
                    start = starts[block.network][name]
                    cell = _finetune_cell(suite, block.network, pooling, start, dataset, folder, said_by)
                    cells.setdefault(cell.path, cell)  # named by two blocks, it is run at its first place
    against = {name: network.against for name, network in suite.networks.items() if network.against is not None}
    leaks = tuple(folder / file for file in suite.leaks)
    records = None if suite.records is None else Path(_near(folder / suite.records))
    return Plan(Path(suite.run_dir), tuple(cells.values()), starts, suite.figures, against, leaks, records)


def _runs(suite: SuiteConfig, name: str, network: Network, folder: Path, said_by: str) -> dict[str, PretrainCell]:
    """The pre-trainings of a network that are run. said_by: see load_config."""
    found: dict[str, PretrainCell] = {}
    for key, pretraining in network.pretrainings.items():
        if pretraining.config is not None:
            directory = f"{suite.run_dir}/{name}/pretrain/{key}"
            changes = overrides(network.set, network.set_pretraining, pretraining.set, {"run_dir": directory})
            file = _near(folder / pretraining.config)
            config = load_config(file, PretrainConfig, _words(changes), said_by)
            command = _command("pretrain", file, changes)
            record = _record(suite, folder, f"cells/{name}/pretrain/{key}.json")
            found[key] = PretrainCell(name, key, Path(directory), config, command, record)
    return found


def _starts(
    suite: SuiteConfig, name: str, network: Network, runs: dict[str, dict[str, PretrainCell]], folder: Path
) -> dict[str, Start]:
    found = {BASELINE: Start(BASELINE)}
    for key, pretraining in network.pretrainings.items():
        other, whole = whole_of(name, pretraining.of or key)
        part = "" if pretraining.epochs is None else f"_first_{pretraining.epochs}"
        weights = _record(suite, folder, f"weights/{other}/{whole}{part}.safetensors")
        found[key] = Start(key, runs[other][whole], pretraining.epochs, pretraining.label, weights)
    return found


def _finetune_cell(
    suite: SuiteConfig, name: str, pooling: str, start: Start, dataset: str, folder: Path, said_by: str
) -> FinetuneCell:
    network = suite.networks[name]
    recipe: Recipe = network.datasets[dataset]
    place = f"{name}/{pooling}/{start.name}/{dataset}"
    directory = f"{suite.run_dir}/{place}"
    origin: dict[str, object] = {"model.pooling": pooling}
    if start.cell is not None:
        origin["pretrained"] = str(start.cell.path)
    if start.epochs is not None:
        origin["pretrained_epochs"] = start.epochs
    changes = overrides(network.set, network.set_finetuning, recipe.set, origin, {"run_dir": directory})
    if start.cell is None:
        changes = {key: value for key, value in changes.items() if not key.startswith("transfer.")}
    file = _near(folder / recipe.config)
    config = load_config(file, FinetuneConfig, _words(changes), said_by)
    command = _command("finetune", file, changes)
    record = _record(suite, folder, f"cells/{place}.json")
    return FinetuneCell(name, pooling, start, dataset, Path(directory), config, command, record)


def _record(suite: SuiteConfig, folder: Path, place: str) -> Path | None:
    return None if suite.records is None else Path(_near(folder / suite.records / place))


def _near(file: Path) -> str:
    """`file` without the detours of a path relative to the suite's file."""
    return os.path.relpath(file) if not file.is_absolute() else os.path.normpath(file)


def _words(changes: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in changes.items()]


def _command(verb: str, file: str, changes: dict[str, str]) -> str:
    words = [word for change in _words(changes) for word in ("--set", change)]
    return shlex.join(["dpt-hpc", verb, file, *words])
