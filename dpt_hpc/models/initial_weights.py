"""How networks start."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

AnyLinear = TypeVar("AnyLinear", bound=nn.Linear)


def xavier(linear: AnyLinear, *rows: int) -> AnyLinear:
    """Xavier-uniform weights, for each block of `rows` as the matrix of its own that it stands for; zero bias."""
    for block in linear.weight.detach().split(list(rows) or linear.out_features):
        nn.init.xavier_uniform_(block)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
