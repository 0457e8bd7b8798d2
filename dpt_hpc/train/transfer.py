"""What of a pre-trained network is kept, frozen or trained more slowly: by the names of its modules."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn

from dpt_hpc.errors import ConfigError
from dpt_hpc.train.config import TransferOptions

HEAD = "head"
HEAD_MODULES = ("readout", "output")
"""The read-out, in every network: the layers that turn scalars into a number. CGCNN and the transformer have them after
the pooling, for each structure; SchNet and PaiNN before it, for each atom."""

NETWORK = "network."
"""What the names of the network's own weights begin with, beside those of its scaling."""


def modules_of(model: nn.Module) -> list[str]:
    """Names that `freeze` and `reset` take: `head`, the network's modules, and the members of its lists (layers.0)."""
    found = [HEAD]
    for name in _weights(model):
        module, inner = _place(name)
        found += [module] if inner is None else [module, f"{module}.{inner}"]
    return list(dict.fromkeys(found))


def weights_in(model: nn.Module, modules: Sequence[str], option: str) -> set[str]:
    """The names of the weights in `modules`. Raises ConfigError that names `option` for a module that is not there."""
    found: set[str] = set()
    for module in modules:
        inside = HEAD_MODULES if module == HEAD else (module,)
        own = {name for name in _weights(model) if any(name.startswith(f"{m}.") for m in inside)}
        if module not in modules_of(model) or not own:
            known = modules_of(model)
            near = difflib.get_close_matches(module, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}."
            raise ConfigError(f"{option}: the network has no module {module!r}; {hint}")
        found |= {NETWORK + name for name in own}
    return found


def freeze(model: nn.Module, options: TransferOptions) -> None:
    """Take the weights of `options.freeze` out of the training. Raises ConfigError if none would be left to train."""
    frozen = weights_in(model, options.freeze, "transfer.freeze")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("transfer.freeze: every module is frozen, nothing is left to train.\nLeave out one, as head.")


def learning_rate_scales(model: nn.Module, options: TransferOptions, learning_rate: float) -> dict[str, float]:
    """Each trained weight's share of the learning rate, by its name.

    The head has 1, or `head_learning_rate` / learning_rate; the last layer has `layer_decay`, each one before it
    `layer_decay` of the next one's, and what lies before the first layer once more so. Modules after the last layer
    are of it.
    """
    layers = [number for module, number in map(_place, _weights(model)) if module not in HEAD_MODULES]
    depth = 1 + max((number for number in layers if number is not None), default=-1)
    head = 1.0 if options.head_learning_rate is None else options.head_learning_rate / learning_rate
    found: dict[str, float] = {}
    stage = 0
    for name, parameter in model.named_parameters():
        module, number = _place(name.removeprefix(NETWORK))
        in_head = module in HEAD_MODULES
        if not in_head and number is not None:
            stage = 1 + number
        if parameter.requires_grad:
            found[name] = head if in_head else options.layer_decay ** (depth + 1 - stage)
    return found


def _weights(model: nn.Module) -> list[str]:
    """Names of the network's weights, without what they all begin with."""
    return [name.removeprefix(NETWORK) for name, _ in model.named_parameters() if name.startswith(NETWORK)]


def _place(weight: str) -> tuple[str, int | None]:
    """The module that a weight is in, and its number where that is a list."""
    module, _, inner = weight.partition(".")
    number = inner.partition(".")[0]
    return module, int(number) if number.isdigit() else None
