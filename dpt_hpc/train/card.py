"""The card of a set of weights: what the network is, what it learnt from, how well, and what its numbers mean.

It stands beside the weights of every checkpoint as model.yaml, or in the header of a single exported file. It is text:
no file of a model is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from dpt_hpc import __version__
from dpt_hpc.data.manifest import UNITS
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import Split
from dpt_hpc.errors import DataError
from dpt_hpc.models import ModelOptions, model_options
from dpt_hpc.plain_text import from_yaml
from dpt_hpc.structure import SYMBOLS
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig, PropertyOptions

CARD_FORMAT = 2
"""1 held model, elements and trained_on only; it is read, too."""


@dataclass(frozen=True)
class ModelCard:
    """What a set of weights is.

    elements: atomic numbers in its training data. trained_on: data (path, name, structures, digest, licence where it is
    known), split, objective, unit of a property, pre-trained weights. training: epoch and step of the weights, errors
    on the validation part then. config: all settings of the run. made: version of dpt_hpc and date of the weights;
    empty for one that is yet to be written, and so are the others where a card is of an earlier format.
    """

    options: ModelOptions
    elements: tuple[int, ...]
    trained_on: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def objective(self) -> dict[str, Any]:
        """What was learnt: `kind` and the options of that kind; empty if the card does not say."""
        return dict(self.trained_on.get("objective") or {})

    @property
    def units(self) -> dict[str, str]:
        """Name, unit and sign of every number that the network gives."""
        objective = self.objective
        kind = objective.get("kind")
        if kind == "property":
            target = str(objective["target"])
            return {target: str(self.trained_on.get("unit") or "unit unknown")}
        if kind is not None and kind.endswith("denoising"):
            return {"noise": "Å, how far each atom is from its place at equilibrium"}
        units = {
            "energy": UNITS["energy"],
            "forces": f"{UNITS['forces']}, -dE/dpositions",
            "stress": UNITS["stress"],
        }
        return {k: f"{unit}; not learnt" if k in self.unlearnt else unit for k, unit in units.items()}

    @property
    def unlearnt(self) -> tuple[str, ...]:
        """Labels that the network gives, but to which its training gave no weight."""
        return tuple(label for label in ("energy", "forces", "stress") if self.objective.get(f"{label}_weight") == 0)

    def text(self) -> str:
        """The card as YAML, as it is written to disk."""
        return yaml.dump(self.content(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

    def content(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "card": CARD_FORMAT,
            "model": asdict(self.options),
            "elements": [SYMBOLS[z] for z in self.elements],
            "units": self.units,
            "training": self.training,
            "trained_on": self.trained_on,
            "config": self.config,
            "made": self.made or {"dpt_hpc": __version__, "date": _now()},
        }

    @classmethod
    def parse(cls, text: str, place: Path) -> ModelCard:
        """The card that `text` is. Raises DataError, naming `place`, if it is none of this version."""
        try:
            content = from_yaml(text)
            options = model_options(content["model"])
            elements = tuple(SYMBOLS.index(symbol) for symbol in content["elements"])
            parts = {name: content.get(name) or {} for name in ("trained_on", "training", "config", "made")}
        except (TypeError, LookupError, ValueError, AttributeError) as error:
            raise DataError(f"{place}: not a model card of this version of dpt_hpc: {error}") from None
        if wrong := [name for name, part in parts.items() if not isinstance(part, dict)]:
            raise DataError(f"{place}: not a model card of this version of dpt_hpc: {wrong[0]} is not a mapping")
        parts["made"] = parts["made"] or {"dpt_hpc": "unknown", "date": "unknown"}
        return cls(options, elements, **parts)

    def shareable(self) -> ModelCard:
        """The same card without the places of files on the machine where the weights were made: their names stay."""
        return replace(self, trained_on=_named(self.trained_on), config=_named(self.config))


def describe_training(
    dataset: Dataset, split: Split, seed: int, config: PretrainConfig | FinetuneConfig, sources: Mapping[str, Any]
) -> dict[str, Any]:
    """`ModelCard.trained_on`: data, split, objective. seed: of the run. sources: further facts, for run.json too."""
    data = []
    for path, manifest in zip(config.data.path, dataset.manifests, strict=True):
        known = {key: manifest.provenance.get(key) for key in ("licence", "citation", "doi")}
        facts = {"path": path, "name": Path(path).name, "structures": manifest.num_structures}
        data.append({**facts, "digest": manifest.digest, **{k: v for k, v in known.items() if v}})
    options = config.data.split
    facts = {
        "dataset": data,
        "split": {
            **{part: len(getattr(split, part)) for part in ("train", "validation", "test")},
            "by": options.by if options.matbench is None else "matbench",
            "seed": seed if options.seed is None else options.seed,
        },
        "objective": config.objective.model_dump(mode="json"),
    }
    if isinstance(config.objective, PropertyOptions):
        facts["unit"] = dataset.property_units[config.objective.target]
    return {**sources, **facts}


def _named(value: Any, key: str = "") -> Any:
    """`value` with every path that stands under a key of paths cut down to its last part."""
    if isinstance(value, Mapping):
        return {k: _named(v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(v, key) for v in value]
    return Path(value).name if key in PATHS and isinstance(value, str) else value


PATHS = {"path", "checkpoint", "run_dir", "pretrained", "stage", "deepspeed", "exclude", "matbench"}
"""Keys of a card, or of a config, whose text is a place on the machine."""


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line: a card is read by people."""


def _list(dumper: yaml.SafeDumper, values: Any) -> yaml.Node:
    plain = all(value is None or isinstance(value, (str, int, float)) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(tuple, _list)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
