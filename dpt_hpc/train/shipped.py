"""Pre-trained models that ship with the package: each one exported file in dpt_hpc/weights, known by its name."""

from __future__ import annotations

from pathlib import Path

import dpt_hpc

FOLDER = Path(dpt_hpc.__file__).with_name("weights")


def shipped_models() -> dict[str, Path]:
    """Name and file of each, in alphabetical order. A name is taken wherever weights are read."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.safetensors"))}
