"""Presets of what the paper's code does otherwise than we do (method.md): one word for its experiments, one for its
release.

`exact`, the default, sets nothing. The paper's two codes cut the periodic images and broaden the radial functions
differently; both split by structure, learn plain labels in float32 without averaged weights, train all weights alike
to the last epoch, test those of the best one, and denoise with the sign of the noise. Numbers that are not ours against
theirs (sizes, rates, epochs) are the defaults of the options, or stand in configs/.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Compat = Literal["exact", "paper-experiments", "paper-release"]

ANY_RUN = {
    "data.split.by": "structure",
    "training.batching": "random",
    "training.early_stopping": None,
    "training.tested": "best",
    "training.ema_decay": None,
    "training.precision": "float32",
}

NETWORKS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cgcnn": {
        "paper-experiments": {"model.max_images": 1, "model.gaussian_width": 0.05, "model.envelope": None},
        "paper-release": {"model.max_images": 2, "model.gaussian_width": 0.2, "model.envelope": None},
    },
    "torchmd_et": {
        "paper-experiments": {"model.max_images": 1, "model.envelope": None},
        "paper-release": {"model.max_images": 2, "model.envelope": None},
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


def preset(compat: str, network: str, objective: str) -> dict[str, Any]:
    """The options that `compat` sets for a network and a kind of objective, by dotted names.

    Raises ValueError for a network or an objective that the paper does not have.
    """
    if compat == "exact":
        return {}
    for what, name, known in (("network", network, NETWORKS), ("objective", objective, OBJECTIVES)):
        if name not in known:
            raise ValueError(
                f"compat is {compat}, but the paper has no {what} {name}; it has {', '.join(known)}. Expected exact"
            )
    return {**ANY_RUN, **NETWORKS[network][compat], **OBJECTIVES[objective]}


def filled(raw: Mapping[str, Any], network: str, objective: str) -> dict[str, Any]:
    """Options as they were written down, and those of the preset that they name where they leave them open.

    network, objective: those that are meant where `raw` names none. Raises ValueError as `preset` does.
    """
    options = dict(raw)
    compat = options.get("compat", "exact")
    if compat not in ("paper-experiments", "paper-release"):
        return options
    network = _tag(options.get("model"), "name", network)
    objective = _tag(options.get("objective"), "kind", objective)
    for key, value in preset(compat, network, objective).items():
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
    """Raises ValueError if an option of a checked config is not the one that its preset sets."""
    wrong = []
    for key, value in preset(compat, options.model.name, options.objective.kind).items():
        given = options
        for part in key.split("."):
            given = getattr(given, part)
        if given != value:
            wrong.append(f"it sets {key}={_plain(value)}, but {key}={_plain(given)} is given")
    if wrong:
        raise ValueError(f"compat is {compat}: {'; '.join(wrong)}. Leave these options out, or use compat=exact")


def _tag(options: Any, key: str, default: str) -> str:
    return str(options.get(key, default)) if isinstance(options, Mapping) else default


def _plain(value: Any) -> str:
    """As YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
