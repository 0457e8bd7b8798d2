"""Derivative-based pre-training of graph neural networks on crystals, on one core or many nodes.

`dpt_hpc.load(path)` gives a trained network back: a `dpt_hpc.Model`. Nothing heavy is imported before that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpt_hpc.use import Model, load

__version__ = "0.1.0"

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from dpt_hpc import use

        return getattr(use, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
