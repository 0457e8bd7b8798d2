"""Run by `make cudatorch` in an environment with a CUDA build of torch: the extension with CUDA in it loads and works.

No GPU is needed: importing finds clashing symbols and libraries, and one operation runs on the CPU.
"""

from __future__ import annotations

import torch

from dpt_hpc import _C
from dpt_hpc.ops import NATIVE_DEVICES, radius_graph

assert torch.version.cuda, f"torch {torch.__version__} is no CUDA build"
assert _C.has_cuda, "the extension was built without CUDA"
assert "cuda" in NATIVE_DEVICES
graph = radius_graph(
    torch.zeros(1, 3, dtype=torch.float64),
    3.0 * torch.eye(3, dtype=torch.float64)[None],
    torch.ones(1, 3, dtype=torch.bool),
    torch.tensor([0, 1]),
    cutoff=3.5,
)
assert graph.num_edges == 6  # the neighbours of a simple cubic crystal
print(f"torch {torch.__version__} and the extension with CUDA in one process; GPU: {torch.cuda.is_available()}")
