"""Presets of the paper (method.md): one word for the code of its experiments, one for that of its release.

`exact`, the default, sets nothing. The paper's two codes cut the periodic images and broaden the radial functions
differently; both split by structure, learn plain labels in float32 without averaged weights, train all weights alike
to the last epoch, test those of the best one, and denoise with the sign of the noise. All this, and the sizes of a
network, cannot be given otherwise under a preset. Amounts can (rates, batches, epochs, fractions of the split): what is
left open is the paper's for that network and task, and a run says what differs from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Compat = Literal["exact", "paper-experiments", "paper-release"]

ANY_RUN: Mapping[str, Any] = {
    "data.split.by": "structure",
    "training.batching": "random",
    "training.early_stopping": None,
    "training.tested": "best",
    "training.ema_decay": None,
    "training.precision": "float32",
}

SIZES: Mapping[str, Mapping[str, Any]] = {
    "cgcnn": {
        "model.cutoff": 8.0,
        "model.max_neighbors": 250,
        "model.num_elements": 100,
        "model.hidden": 100,
        "model.layers": 4,
        "model.gaussians": 50,
        "model.readout_hidden": 150,
        "model.readout_layers": 3,
        "model.envelope": None,
    },
    "torchmd_et": {
        "model.cutoff": 8.0,
        "model.max_neighbors": 250,
        "model.num_elements": 100,
        "model.hidden": 128,
        "model.layers": 8,
        "model.heads": 8,
        "model.radial": 50,
        "model.readout_hidden": 128,
        "model.readout_layers": 2,
        "model.envelope": None,
    },
}

NETWORKS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cgcnn": {
        "paper-experiments": {"model.max_images": 1, "model.gaussian_width": 0.05},
        "paper-release": {"model.max_images": 2, "model.gaussian_width": 0.2},
    },
    "torchmd_et": {
        "paper-experiments": {"model.max_images": 1, "model.own_images": False},
        "paper-release": {"model.max_images": 2, "model.own_images": False},
    },
}

OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "derivatives": {"objective.element_references": False, "objective.normalise": False},
    "derivative_denoising": {"objective.noise_scale": 0.1, "objective.sign": "paper", "objective.loss": "mae"},
    "head_denoising": {"objective.noise_scale": 0.04, "objective.loss": "mse"},
    "property": {
        "objective.normalise": False,
        "transfer.freeze": (),
        "transfer.reset": (),
        "transfer.layer_decay": 1.0,
        "transfer.head_learning_rate": None,
    },
}

AMOUNTS: Mapping[str, Mapping[str, Any]] = {
    "cgcnn": {
        "optimizer.learning_rate": 2e-3,
        "schedule.min_learning_rate": 1e-5,
        "training.batch_size": 50,
        "model.filters": "exact",
    },
    "torchmd_et": {
        "optimizer.learning_rate": 2e-4,
        "schedule.min_learning_rate": 1e-6,
        "training.batch_size": 32,
        "model.filters": "exact",
        "model.vector_norm": None,
    },
}
"""Filters from a table differ by their interpolation alone; a norm of the vectors keeps denoising by a head stable."""

OF_ANY_TASK: Mapping[str, Any] = {
    "optimizer.weight_decay": 0.01,
    "schedule.factor": 0.8,
    "schedule.patience": 10,
    "schedule.threshold": 2e-4,
    "training.clip_norm": 10.0,
}

FRACTIONS = ("data.split.train", "data.split.validation", "data.split.test")

TUNING_BATCHES: Mapping[str, int] = {
    "exfoliation_energy": 32,
    "last_phdos_peak": 32,
    "formation_energy_per_atom": 32,
    "band_gap": 32,
}
"""Of CGCNN, by target: JDFT, Phonons, MP form and MP gap. (MOF is of a band gap, too: its batch is not known.)"""

OTHER_TUNING_BATCH = 128


def preset(compat: str, network: str, objective: str) -> dict[str, Any]:
    """The options that `compat` fixes for a network and a kind of objective, by dotted names.

    Raises ValueError for a network or an objective that the paper does not have.
    """
    if compat == "exact":
        return {}
    for what, name, known in (("network", network, NETWORKS), ("objective", objective, OBJECTIVES)):
        if name not in known:
            raise ValueError(
                f"compat is {compat}, but the paper has no {what} {name}; it has {', '.join(known)}. Expected exact"
            )
    pooling = {} if objective == "property" else {"model.pooling": "add"}
    return {**ANY_RUN, **SIZES[network], **NETWORKS[network][compat], **OBJECTIVES[objective], **pooling}


def amounts(network: str, objective: str, target: str) -> dict[str, Any]:
    """The options that a preset sets where they are left open, by dotted names. target: of kind property."""
    found = {**OF_ANY_TASK, **AMOUNTS[network], "training.epochs": 100}
    fractions = (0.8, 0.05, 0.15)
    if objective == "property":
        fractions = (0.6, 0.2, 0.2)
        found["training.epochs"] = 200
        if network == "cgcnn":
            found["training.batch_size"] = TUNING_BATCHES.get(target, OTHER_TUNING_BATCH)
    return found | dict(zip(FRACTIONS, fractions, strict=True))


def filled(raw: Mapping[str, Any], network: str, objective: str) -> dict[str, Any]:
    """Options as they were written down, and those of the preset that they name where they leave them open.

    network, objective: those that are meant where `raw` has no such group. With those that the paper does not have
    nothing is filled: they are wrong, and told by whoever checks the options.
    """
    options = dict(raw)
    compat = options.get("compat", "exact")
    if compat not in ("paper-experiments", "paper-release"):
        return options
    options.setdefault("model", {"name": network})
    options.setdefault("objective", {"kind": objective})
    network = _tag(options["model"], "name", network)
    objective = _tag(options["objective"], "kind", objective)
    if network not in NETWORKS or objective not in OBJECTIVES:
        return options
    settings = preset(compat, network, objective)
    settings |= amounts(network, objective, _tag(options["objective"], "target", ""))
    if any(_given(options, key) for key in FRACTIONS):  # they add up to one: all are the paper's, or none
        settings = {key: value for key, value in settings.items() if key not in FRACTIONS}
    for key, value in settings.items():
        *parents, last = key.split(".")
        node: Any = options
        for parent in parents:
            inner = node.get(parent, {})
            if not isinstance(inner, Mapping):
                break  # not a group of options: whoever checks them says so
            node[parent] = dict(inner)
            node = node[parent]
        else:
            node.setdefault(last, value)
    return options


def check_preset(compat: str, options: Any) -> None:
    """Raises ValueError if an option of a checked config is not the one that its preset fixes."""
    fixed = preset(compat, options.model.name, options.objective.kind)
    wrong = [
        f"it sets {key}={_plain(value)}, but {key}={_plain(given)} is given"
        for key, value, given in _otherwise(fixed, options)
    ]
    if wrong:
        raise ValueError(f"compat is {compat}: {'; '.join(wrong)}. Leave these options out, or use compat=exact")


def differences(compat: str, options: Any) -> str | None:
    """What of a checked config is not as in the paper that `compat` follows, though it may be: one line, or None."""
    if compat == "exact":
        return None
    known = amounts(options.model.name, options.objective.kind, getattr(options.objective, "target", ""))
    found = [f"{key}={_plain(given)} (the paper: {_plain(value)})" for key, value, given in _otherwise(known, options)]
    return f"compat is {compat}, except for {', '.join(found)}" if found else None


def departures(options: Any) -> list[str]:
    """All in which a checked config, of compat exact too, is not the paper's: "training.batch_size=8 (the paper: 50)".
    Empty for a network or an objective that the paper does not have."""
    network, objective = options.model.name, options.objective.kind
    if network not in NETWORKS or objective not in OBJECTIVES:
        return []
    of = options.compat if options.compat != "exact" else "paper-experiments"
    expected = preset(of, network, objective) | amounts(network, objective, getattr(options.objective, "target", ""))
    return [
        f"{key}={_plain(given)} (the paper: {_plain(value)})" for key, value, given in _otherwise(expected, options)
    ]


def recipe_of_our_own(settings: Mapping[str, Any]) -> list[str]:
    """What the saved settings of a fine-tuning, of any version, say otherwise than both codes of the paper, but for the
    split, the graph and the amounts: "training.early_stopping"."""
    network = settings.get("model", {}).get("name", "cgcnn")
    fixed = {**ANY_RUN, **OBJECTIVES["property"], **SIZES.get(network, {})}
    found = []
    for key, value in fixed.items():
        node: Any = settings
        for part in key.split("."):
            node = node.get(part, value) if isinstance(node, Mapping) else value
        if key != "data.split.by" and (tuple(node) if isinstance(node, list) else node) != value:
            found.append(key)
    return found


def _otherwise(expected: Mapping[str, Any], options: Any) -> list[tuple[str, Any, Any]]:
    """Key, expected value and given one, of those that differ."""
    found = []
    for key, value in expected.items():
        given = options
        for part in key.split("."):
            given = getattr(given, part)
        if given != value:
            found.append((key, value, given))
    return found


def _given(options: Any, key: str) -> bool:
    node = options
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _tag(options: Any, key: str, default: str) -> str:
    return str(options.get(key, default)) if isinstance(options, Mapping) else default


def _plain(value: Any) -> str:
    """As YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
