"""AdamW over groups of weights, and its state by the names of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.optim import AdamW

from dpt_hpc.train.config import OptimizerOptions
from dpt_hpc.train.schedule import SCALE

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two running means, per weight."""


def whole_state(optimizer: AdamW, weights: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """`Engine.optimizer_state` of an optimiser that holds all of it."""
    state: dict[str, Tensor] = {}
    for name, parameter in weights:
        own = optimizer.state.get(parameter)
        if not own:
            return {}
        state["step"] = own["step"]  # one for all: no engine leaves a parameter out of an update
        state |= {f"{moment}.{name}": own[moment] for moment in MOMENTS}
    return state


def set_whole_state(optimizer: AdamW, weights: Iterable[tuple[str, nn.Parameter]], state: Mapping[str, Tensor]) -> None:
    """Take up what `whole_state` gave; nothing where it was empty."""
    for name, parameter in weights if state else ():
        moments = {m: state[f"{m}.{name}"].to(parameter.device, copy=True) for m in MOMENTS}
        optimizer.state[parameter] = {"step": state["step"].to(parameter.device, copy=True), **moments}


def adamw(weights: Iterable[tuple[str, nn.Parameter]], options: OptimizerOptions, scales: Mapping[str, float]) -> AdamW:
    """One parameter group for each share of the learning rate that occurs among `weights`."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in weights:
        groups.setdefault(scales.get(name, 1.0), []).append(parameter)
    rate = options.learning_rate
    shared = [{"params": own, "lr": rate * scale, SCALE: scale} for scale, own in groups.items()]
    return AdamW(shared, lr=rate, weight_decay=options.weight_decay, fused=True)
