"""What is computed once and kept with its owner: orders of the edges, which all layers and passes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


def captures(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured from the current stream, which `tensor` is used on."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def kept(owner: object, name: str, tensor: Tensor, make: Callable[[], Value]) -> Value:
    """make(), which depends on `tensor` alone; the second time what the first one gave.

    On a GPU it is kept for the current stream only, which another would have to wait for, and not at all while a CUDA
    graph is captured: a replay, whose edges may be others, must compute it again.
    """
    if captures(tensor):
        return make()
    store: dict[object, Value] = owner.__dict__.setdefault("_kept", {})
    key = name, torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None
    if key not in store:
        store[key] = make()
    return store[key]
