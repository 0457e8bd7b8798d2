"""LayerNorm for vectors: what keeps the inputs of a vector head of one size, whatever the atom's surroundings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EPSILON = 1e-5
"""Added to the variances, as LayerNorm does for scalars."""

ITERATIONS = 16
"""Newton-Schulz steps: a variance of 1e-4 of their sum becomes 1, one of 1e-5 0.93, one of 1e-6 0.25."""


class VectorLayerNorm(nn.Module):
    """Whitens the vectors of an atom: mean zero and covariance one over its channels, then a weight per channel.

    With the covariance S (3,3) of the channels, v -> S^(-1/2) (v - mean): S turns with the structure and its inverse
    root with it, so the result is equivariant. The "whitened" LayerNorm of those who cured TorchMD-Net's denoising of
    NaN with it (Zaidi et al. 2022). The root is taken by Newton-Schulz iterations (Higham, Functions of Matrices,
    section 6.7) and not by eigenvectors, whose gradient is infinite where the surroundings are symmetric.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, vectors: Tensor) -> Tensor:
        """(N,3,C) -> (N,3,C)."""
        centred = vectors - vectors.mean(2, keepdim=True)
        one = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
        covariance = centred @ centred.transpose(1, 2) / vectors.shape[2] + EPSILON * one
        return inverse_root(covariance) @ centred * self.weight


def inverse_root(matrices: Tensor) -> Tensor:
    """S^(-1/2) of symmetric positive definite matrices (N,D,D), by matrix products alone.

    Coupled iteration on S / trace: Y -> the root, Z -> its inverse, each step with T = (3 - Z Y) / 2. Differentiable
    any number of times, also where eigenvalues are equal; too few steps for a very small eigenvalue leave its part of
    the result too small, never too large.
    """
    one = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    size = matrices.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    root, inverse = matrices / size, one.expand_as(matrices)
    for _ in range(ITERATIONS):
        step = 1.5 * one - 0.5 * (inverse @ root)
        root, inverse = root @ step, step @ inverse
    return inverse / size.sqrt()
