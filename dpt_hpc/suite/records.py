"""What was run already, here or elsewhere: one committed JSON file a cell, which `--tables` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dpt_hpc.errors import DataError
from dpt_hpc.suite.plan import FinetuneCell, PretrainCell
from dpt_hpc.train.run_dir import changed_options

FREE = (
    "run_dir",
    "compat",
    "pretrained",
    "seeds",
    "data.path",
    "data.store",
    "data.memory",
    "data.stage",
    "training.evaluation_batch_size",
    "training.edge_budget",
    "training.grad_accumulation",
    "checkpoint.",
    "engine.",
)
"""Options in which a run may differ from its cell without a word: they change no number, or are told in another way
(data by digest, weights by digest, seeds one by one; compat stands for options that are compared)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Source(_Strict):
    name: str
    structures: int
    digest: str


class _Record(_Strict):
    pretraining: str
    network: str
    command: str | None
    recorded_command: str
    git: str | None
    device: str | None
    split: dict[str, int]
    parameters: int
    versions: dict[str, str | None]
    dataset: list[_Source]
    epochs: int
    wall_seconds: list[float | None]
    other_options: list[str]
    config: dict[str, Any]


class PretrainRecord(_Record):
    """Of a pre-training. weights_sha256: of its best weights (`weights_digest`)."""

    objective: dict[str, Any]
    best_epoch: int
    validation: dict[str, float | None]
    test: dict[str, float | None] | None
    weights_sha256: str | None = None


class FinetuneRecord(_Record):
    """Of a fine-tuning. pretrained_sha256: of the weights that it began from. test_mae, best_epoch: by seed."""

    pooling: str
    pretrained_sha256: str | None
    faults: list[str]
    notes: list[str]
    property: str
    unit: str
    test_mae: dict[int, float]
    best_epoch: dict[int, int]


def read_record(cell: PretrainCell | FinetuneCell) -> dict[str, Any] | None:
    """What the records say of a cell; None where they say nothing. Raises DataError for a broken record, or one that
    is of another cell, with file and field."""
    file = cell.record
    if file is None or not file.is_file():
        return None
    kind: type[_Record] = PretrainRecord if isinstance(cell, PretrainCell) else FinetuneRecord
    try:
        text = file.read_text(encoding="utf-8")
        kind.model_validate_json(text)
    except UnicodeDecodeError as error:
        raise _broken(file, str(error)) from None
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise _broken(file, f"{place}: {fault['msg']}" if place else fault["msg"]) from None
    content: dict[str, Any] = json.loads(text)
    names = {"network": cell.network, "pretraining": cell.name if isinstance(cell, PretrainCell) else cell.start.name}
    if isinstance(cell, FinetuneCell):
        names["pooling"] = cell.pooling
    for key, name in names.items():
        if content[key] != name:
            raise _broken(file, f"{key}: is {content[key]!r}, but the file is in the place of {name!r}")
    return content


def pretraining_record(cell: PretrainCell) -> tuple[dict[str, Any] | None, str | None]:
    """The record of a pre-training, and None; where it is of other options than configured: None, and why."""
    record = read_record(cell)
    if record is None:
        return None, None
    changed = other_options(cell, record)
    return (None, f"its record is not used: {changed[0]}") if changed else (record, None)


def other_options(cell: PretrainCell | FinetuneCell, record: Mapping[str, Any]) -> list[str]:
    """In what the settings of a record are others than those of its cell now: "training.epochs: was 3, now 1"."""
    now = type(cell.config).model_validate(without_roots(cell.config.model_dump(mode="json")))
    return changed_options(now, {**record["config"], "run_dir": cell.config.run_dir}, free=FREE)


def without_roots(value: Any) -> Any:
    """Settings without the directories of the machine: of an absolute path the last name stays."""
    if isinstance(value, Mapping):
        return {key: without_roots(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_roots(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _broken(file: Path, fault: str) -> DataError:
    return DataError(
        f"{file}: broken record of a suite: {fault}\n"
        "Restore the file as `dpt-hpc suite FILE --tables` wrote it, or delete it to have its cell run again."
    )
