"""Both networks in plain PyTorch, from the published equations, with every (edges, ...) tensor stored.

What the fused kernels are compared with, in accuracy (tests/test_torchmd_et.py) and in speed (training_step.py). The
transformer shares no code with dpt_hpc.models.torchmd_et: parameters are separate, dense and named as in Thölke & De
Fabritiis (2022), messages are gathered, multiplied and scattered as tensors of one row per edge.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.models import EnergyModel, NodeFeatures
from dpt_hpc.models.cgcnn import CGConv, Edges
from dpt_hpc.ops import RadiusGraph


class PlainCGConv(CGConv):
    """CGCNN's convolution with two linear maps of the concatenation [x_i, x_j, e_ij], as the paper's code has it."""

    def forward(self, x: Tensor, edges: Edges, backend: Any) -> Tensor:
        source, target = edges.graph.edge_index
        functions = edges.basis(edges.lengths)
        radial = functions[:, : self.weight.shape[1] - 2 * self.hidden]
        z = torch.cat([x.index_select(0, target), x.index_select(0, source), radial], dim=1)
        (gate, filter_), (gate_bias, filter_bias) = self.weight.chunk(2), self.bias.chunk(2)
        opened = torch.sigmoid(functional.linear(z, gate, gate_bias))
        if self.closing is not None:
            odds = torch.exp(functions[:, radial.shape[1] :] @ self.closing[:, :1])
            opened = odds * opened / (1 - opened + odds * opened)
        messages = opened * functional.softplus(functional.linear(z, filter_, filter_bias))
        if edges.envelope is not None:
            messages = edges.envelope[:, None] * messages
        counts = edges.graph.target_ptr.diff().clamp(min=1)[:, None] if edges.counts is None else edges.counts
        return x + _scatter(messages, target, len(x)) / counts


class PlainET(EnergyModel):
    """Embedding -> neighbour embedding -> attention layers -> LayerNorm -> sum -> MLP -> one number per structure.

    weights: the state of a dpt_hpc.models.TorchMDET; its joined matrices are cut into the published ones.
    """

    def __init__(self, weights: dict[str, Tensor], *, heads: int, cutoff: float, max_neighbors: int | None) -> None:
        super().__init__()
        self.cutoff, self.max_neighbors, self.max_images = cutoff, max_neighbors, None
        self.heads, self.alpha = heads, 5.0 / cutoff
        w = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in weights.items()}
        self.means, self.betas = w["radial.means"], w["radial.betas"]
        self.embedding, self.neighbor_embedding = w["embedding.weight"], w["neighbors.embedding.weight"]
        self.distance_proj, self.combine = _linear(w, "neighbors.filters"), _linear(w, "neighbors.combine")
        self.attention = nn.ModuleList()
        while f"layers.{len(self.attention)}.norm.weight" in w:
            self.attention.append(PlainAttention(w, f"layers.{len(self.attention)}.", heads))
        self.out_norm = _norm(w, "norm")
        self.post = nn.ModuleList()
        while f"readout.{len(self.post)}.weight" in w:
            self.post.append(_linear(w, f"readout.{len(self.post)}"))
        self.output = _linear(w, "output")
        self.num_scalars = self.num_vectors = self.embedding.shape[1]

    def node_features(self, atomic_numbers: Tensor, edge_vectors: Tensor, graph: RadiusGraph) -> NodeFeatures:
        source, target = graph.edge_index
        d = (edge_vectors**2).sum(1).sqrt()
        cutoffs = torch.where(d < self.cutoff, 0.5 * (torch.cos(d * math.pi / self.cutoff) + 1), torch.zeros_like(d))
        smeared = cutoffs[:, None] * torch.exp(-self.betas * (torch.exp(-self.alpha * d)[:, None] - self.means) ** 2)
        unit = edge_vectors / d[:, None]

        x = self.embedding[atomic_numbers - 1]
        w = self.distance_proj(smeared) * cutoffs[:, None]
        gathered = _scatter(self.neighbor_embedding[atomic_numbers - 1].index_select(0, source) * w, target, len(x))
        x = self.combine(torch.cat([x, gathered], dim=1))

        vec = x.new_zeros(len(x), 3, x.shape[1])
        for layer in self.attention:
            dx, dvec = layer(x, vec, source, target, cutoffs, smeared, unit)
            x, vec = x + dx, vec + dvec
        return NodeFeatures(self.out_norm(x), vec)

    def read_out(self, features: NodeFeatures, atom_ptr: Tensor) -> Tensor:
        x = features.scalars
        structure = torch.repeat_interleave(torch.arange(len(atom_ptr) - 1, device=x.device), atom_ptr.diff())
        pooled = _scatter(x, structure, len(atom_ptr) - 1)
        for layer in self.post:
            pooled = nn.functional.silu(layer(pooled))
        return self.output(pooled)[:, 0]


class PlainAttention(nn.Module):
    """One equivariant multi-head attention layer, with distances in keys and values ("both")."""

    def __init__(self, w: dict[str, nn.Parameter], prefix: str, heads: int) -> None:
        super().__init__()
        self.heads = heads
        hidden = w[f"{prefix}norm.weight"].shape[0]
        self.layernorm = _norm(w, f"{prefix}norm")
        self.q_proj, self.k_proj, self.v_proj = _cut(w, f"{prefix}projection", [hidden, hidden, 3 * hidden])
        self.dk_proj, self.dv_proj = _cut(w, f"{prefix}filters", [hidden, 3 * hidden])
        self.vec_proj = w[f"{prefix}vector_projection.weight"]
        self.o_proj = _linear(w, f"{prefix}output_projection")

    def forward(
        self, x: Tensor, vec: Tensor, source: Tensor, target: Tensor, cutoffs: Tensor, smeared: Tensor, unit: Tensor
    ) -> tuple[Tensor, Tensor]:
        n, hidden = x.shape
        silu = nn.functional.silu
        x = self.layernorm(x)
        q, k = self.q_proj(x), self.k_proj(x)
        v = self.v_proj(x).reshape(n, 3, hidden)
        vec1, vec2, vec3 = (vec @ self.vec_proj.t()).split(hidden, dim=2)
        vec_dot = (vec1 * vec2).sum(1)
        dk = silu(self.dk_proj(smeared))
        dv = silu(self.dv_proj(smeared)).reshape(-1, 3, hidden)

        products = q.index_select(0, target) * k.index_select(0, source) * dk
        scores = products.reshape(-1, self.heads, hidden // self.heads).sum(2)
        weights = silu(scores) * cutoffs[:, None]
        vx, v1, v2 = (v.index_select(0, source) * dv).unbind(1)
        message = (vx.reshape(-1, self.heads, hidden // self.heads) * weights[:, :, None]).reshape(-1, hidden)
        vector_message = vec.index_select(0, source) * v1[:, None, :] + v2[:, None, :] * unit[:, :, None]

        o1, o2, o3 = self.o_proj(_scatter(message, target, n)).split(hidden, dim=1)
        dx = vec_dot * o2 + o3
        dvec = vec3 * o1[:, None, :] + _scatter(vector_message, target, n)
        return dx, dvec


def _scatter(rows: Tensor, index: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_add(0, index, rows)


def _linear(w: dict[str, nn.Parameter], name: str) -> nn.Linear:
    return _with(w[f"{name}.weight"].detach(), w[f"{name}.bias"].detach())


def _cut(w: dict[str, nn.Parameter], name: str, rows: list[int]) -> list[nn.Linear]:
    parts = zip(w[f"{name}.weight"].detach().split(rows), w[f"{name}.bias"].detach().split(rows), strict=True)
    return [_with(weight, bias) for weight, bias in parts]


def _with(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    linear.weight, linear.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
    return linear


def _norm(w: dict[str, nn.Parameter], name: str) -> nn.LayerNorm:
    norm = nn.LayerNorm(w[f"{name}.weight"].shape[0], dtype=w[f"{name}.weight"].dtype)
    norm.weight, norm.bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return norm
