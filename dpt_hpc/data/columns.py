"""The flat arrays of a shard: columns of structures, and columns of atoms with row pointers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.statistics import estimate_edges
from dpt_hpc.structure import Structure

Array = NDArray[Any]
LABELS = ("energy", "forces", "stress")


def flat_columns(block: Sequence[Structure], dtype: str) -> dict[str, Array]:
    """The arrays of a shard by name, as `data.shard_file` lists them; dtype: of positions, forces and stress."""
    count = [s.num_atoms for s in block]
    columns: dict[str, Array] = {
        "atom_ptr": np.concatenate([[0], np.cumsum(count)]).astype(np.int64),
        "atomic_numbers": np.concatenate([s.atomic_numbers.numpy() for s in block]).astype(np.uint8),
        "positions": np.concatenate([s.positions.numpy() for s in block]).astype(dtype),
        "cell": np.stack([s.cell.numpy() for s in block]).astype(np.float64),
        "pbc": np.stack([s.pbc.numpy() for s in block]),
        "structure_id": np.array([s.structure_id for s in block], dtype=np.str_),
        "group": np.array([s.group for s in block], dtype=np.str_),
        "edge_estimate": np.array([estimate_edges(s.num_atoms, s.volume) for s in block], dtype=np.int64),
    }
    empty: dict[str, Callable[[Structure], Any]] = {
        "energy": lambda s: 0.0,
        "forces": lambda s: np.zeros((s.num_atoms, 3)),
        "stress": lambda s: np.zeros((3, 3)),
    }
    for label in LABELS:
        values = [getattr(s, label) for s in block]
        present = np.array([v is not None for v in values])
        columns[f"has_{label}"] = present
        if present.any():
            rows = [empty[label](s) if v is None else np.asarray(v) for s, v in zip(block, values, strict=True)]
            joined = np.concatenate(rows) if label == "forces" else np.stack(rows)
            columns[label] = joined.astype(np.float64 if label == "energy" else dtype)
    for name in sorted({name for s in block for name in s.properties}):
        columns[f"properties/{name}"] = np.array([s.properties.get(name, 0.0) for s in block], dtype=np.float64)
        columns[f"properties/has_{name}"] = np.array([name in s.properties for s in block])
    return columns


def content_digest(columns: Mapping[str, Array]) -> str:
    """SHA-256 of what a shard says: names, shapes and values of its columns, whatever file, version of HDF5 or release
    of dpt_hpc holds them. The estimate of edges does not count: it is ours, and may be made anew."""
    digest = hashlib.sha256()
    for name, values in sorted(columns.items()):
        if name == "edge_estimate":
            continue
        content = "\0".join(values).encode() if values.dtype.kind == "U" else np.ascontiguousarray(values).tobytes()
        kind = "text" if values.dtype.kind == "U" else values.dtype.newbyteorder("<").str
        digest.update(f"{name} {kind} {values.shape} {len(content)}\n".encode() + content)
    return digest.hexdigest()
