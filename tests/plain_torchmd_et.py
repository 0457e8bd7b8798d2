"""The equivariant transformer once more, from the equations of Thölke & De Fabritiis (2022), one edge at a time.

An oracle that shares nothing with the package, and imports nothing of it: neighbours by trying images, radial
functions, cutoff, embedding, layer norm, activations, attention, pooling, strain and derivatives are written down here,
slowly. Weights come by the names of `TorchMDET.state_dict`, float64; joined matrices are cut into the published ones.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """Atom i and its neighbour j, which is `distance` Å away along r = r_i - r_j (the paper's sign)."""

    i: int
    j: int
    distance: Tensor
    unit: Tensor


def energy_forces_stress(
    weights: Weights,
    numbers: list[int],
    positions: Tensor,
    cell: Tensor,
    *,
    cutoff: float,
    heads: int,
    own_images: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy (), forces (N,3), stress (3,3) of a crystal, periodic in all directions; positions (N,3), cell (3,3).

    own_images: whether pairs of an atom and its images count in the neighbour embedding; in the paper's code they do
    not.
    """
    positions = positions.clone().requires_grad_()
    strain = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    deformation = torch.eye(3, dtype=torch.float64) + (strain + strain.T) / 2
    moved, deformed = positions @ deformation, cell @ deformation
    total = energy(weights, numbers, moved, deformed, cutoff=cutoff, heads=heads, own_images=own_images)
    by_position, by_strain = torch.autograd.grad(total, (positions, strain))
    return total.detach(), -by_position, by_strain / torch.linalg.det(cell).abs()


def energy(
    weights: Weights,
    numbers: list[int],
    positions: Tensor,
    cell: Tensor,
    *,
    cutoff: float,
    heads: int,
    own_images: bool,
) -> Tensor:
    """Embedding, neighbour embedding, layers, and the network on the sum of the atoms: ()."""
    pairs = neighbors(positions, cell, cutoff)
    radial = [radial_functions(pair.distance, weights, cutoff) for pair in pairs]
    decay = [cosine(pair.distance, cutoff) for pair in pairs]
    counted = [own_images or pair.i != pair.j for pair in pairs]
    x = embedding(weights, numbers, *(list(itertools.compress(found, counted)) for found in (pairs, radial, decay)))
    v = [torch.zeros(3, len(x[0]), dtype=torch.float64) for _ in x]
    for layer in itertools.takewhile(lambda k: f"layers.{k}.norm.weight" in weights, itertools.count()):
        prefix = f"layers.{layer}."
        own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        dx, dv = attention(own, x, v, pairs, radial, decay, heads)
        x = [a + b for a, b in zip(x, dx, strict=True)]
        v = [a + b for a, b in zip(v, dv, strict=True)]
    pooled = sum((layer_norm(weights["norm.weight"], weights["norm.bias"], a) for a in x), torch.zeros_like(x[0]))
    for k in itertools.takewhile(lambda k: f"readout.{k}.weight" in weights, itertools.count()):
        pooled = silu(weights[f"readout.{k}.weight"] @ pooled + weights[f"readout.{k}.bias"])
    return (weights["output.weight"] @ pooled + weights["output.bias"])[0]


def neighbors(positions: Tensor, cell: Tensor, cutoff: float) -> list[Pair]:
    """All pairs within the cutoff, each image of j by itself, the atom itself left out."""
    heights = [1 / float(torch.linalg.inv(cell.detach())[:, k].norm()) for k in range(3)]
    spread = float((positions.detach()[:, None] - positions.detach()).norm(dim=2).max())
    reach = [math.ceil((cutoff + spread) / height) for height in heights]
    pairs = []
    for image in itertools.product(*(range(-r, r + 1) for r in reach)):
        shift = torch.tensor(image, dtype=torch.float64) @ cell
        for i, j in itertools.product(range(len(positions)), repeat=2):
            if i == j and image == (0, 0, 0):
                continue
            r = positions[i] - positions[j] - shift
            distance = (r * r).sum().sqrt()
            if float(distance.detach()) <= cutoff:
                pairs.append(Pair(i, j, distance, r / distance))
    return pairs


def cosine(distance: Tensor, cutoff: float) -> Tensor:
    """phi(d)."""
    return 0.5 * (torch.cos(math.pi * distance / cutoff) + 1)


def radial_functions(distance: Tensor, weights: Weights, cutoff: float) -> Tensor:
    """e_k(d) = phi(d) exp(-beta_k (exp(-alpha d) - mu_k)^2), alpha = 5 / cutoff as in the authors' code: (K,)."""
    away = torch.exp(-5 / cutoff * distance) - weights["radial.means"]
    return cosine(distance, cutoff) * torch.exp(-weights["radial.betas"] * away**2)


def embedding(
    weights: Weights, numbers: list[int], pairs: list[Pair], radial: list[Tensor], decay: list[Tensor]
) -> list[Tensor]:
    """n_i = sum_j phi(d) embed'(z_j) * (W_F e + b_F), x_i = W_C [embed(z_i), n_i] + b_C."""
    own, other = weights["embedding.weight"], weights["neighbors.embedding.weight"]
    around = [torch.zeros(own.shape[1], dtype=torch.float64) for _ in numbers]
    for pair, e, phi in zip(pairs, radial, decay, strict=True):
        filter_ = weights["neighbors.filters.weight"] @ e + weights["neighbors.filters.bias"]
        around[pair.i] = around[pair.i] + phi * other[numbers[pair.j] - 1] * filter_
    return [
        weights["neighbors.combine.weight"] @ torch.cat([own[z - 1], n]) + weights["neighbors.combine.bias"]
        for z, n in zip(numbers, around, strict=True)
    ]


def attention(
    w: Weights,
    x: list[Tensor],
    v: list[Tensor],
    pairs: list[Pair],
    radial: list[Tensor],
    decay: list[Tensor],
    heads: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """What a layer adds: to x_i (F,) and to v_i (3,F)."""
    size = len(x[0])
    x = [layer_norm(w["norm.weight"], w["norm.bias"], a) for a in x]
    (w_q, w_k, w_v), (b_q, b_k, b_v) = cut(w, "projection", [size, size, 3 * size])
    (w_dk, w_dv), (b_dk, b_dv) = cut(w, "filters", [size, 3 * size])
    query, key, value = [w_q @ a + b_q for a in x], [w_k @ a + b_k for a in x], [w_v @ a + b_v for a in x]

    message = [torch.zeros(size, dtype=torch.float64) for _ in x]
    vector_message = [torch.zeros(3, size, dtype=torch.float64) for _ in x]
    for pair, e, phi in zip(pairs, radial, decay, strict=True):
        i, j = pair.i, pair.j
        d_k, d_v = silu(w_dk @ e + b_dk), silu(w_dv @ e + b_dv)
        s_x, s_1, s_2 = (value[j] * d_v).split(size)
        product = query[i] * key[j] * d_k
        each = size // heads
        weighted = []
        for head in range(heads):
            part = slice(head * each, (head + 1) * each)
            weighted.append(phi * silu(product[part].sum()) * s_x[part])
        message[i] = message[i] + torch.cat(weighted)
        vector_message[i] = vector_message[i] + s_1 * v[j] + s_2 * pair.unit[:, None]

    u_1, u_2, u_3 = w["vector_projection.weight"].split(size)
    dx, dv = [], []
    for y, vectors, total in zip(message, v, vector_message, strict=True):
        q_1, q_2, q_3 = (w["output_projection.weight"] @ y + w["output_projection.bias"]).split(size)
        product = ((vectors @ u_1.T) * (vectors @ u_2.T)).sum(0)
        dx.append(q_3 + q_2 * product)
        dv.append(total + q_1 * (vectors @ u_3.T))
    return dx, dv


def cut(w: Weights, name: str, rows: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """A joined matrix and its bias, cut into the published ones."""
    return list(w[f"{name}.weight"].split(rows)), list(w[f"{name}.bias"].split(rows))


def layer_norm(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Of one atom: (F,)."""
    centred = x - x.mean()
    return weight * centred / (centred.square().mean() + 1e-5).sqrt() + bias


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))
