"""A LayerNorm of vectors: channels made uncorrelated over space."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Whitening(nn.Module):
    """v (N,3,C) -> gain_c * S^(-1/2) (v_c - mean over c), S = their covariance (3,3) over the channels, plus epsilon.

    The vector LayerNorm that kept others' denoising with this network free of NaN (Zaidi et al. 2022). The inverse root
    comes from a fixed number of Newton-Schulz steps: products of S alone, so it turns with the vectors exactly, and can
    be differentiated any number of times, also where eigenvalues coincide, where an eigendecomposition cannot.
    """

    def __init__(self, channels: int, epsilon: float = 1e-5, steps: int = 16) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.epsilon, self.steps = epsilon, steps

    def forward(self, vectors: Tensor) -> Tensor:
        """(N,3,C) -> (N,3,C)."""
        centred = vectors - vectors.mean(2, keepdim=True)
        identity = torch.eye(3, dtype=vectors.dtype, device=vectors.device)
        covariance = centred @ centred.transpose(1, 2) / vectors.shape[2] + self.epsilon * identity
        size = covariance.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        root, inverse = covariance / size, identity
        for _ in range(self.steps):
            step = 1.5 * identity - 0.5 * inverse @ root
            root, inverse = root @ step, step @ inverse
        return self.gain * (inverse @ centred) / size.sqrt()
