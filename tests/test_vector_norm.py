"""The LayerNorm of vectors: what it normalises, how it turns, and its gradients where eigenvectors have none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import ET
from test_derivatives import SYSTEMS, TRICLINIC, batch_of
from torch import Tensor

from dpt_hpc.errors import ConfigError
from dpt_hpc.models import TorchMDETOptions, build_model, predict, predict_noise
from dpt_hpc.models.vector_norm import VectorLayerNorm, inverse_root
from dpt_hpc.quickstart import configs
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.config_file import load_config

WHITENED = replace(ET, vector_norm="whitened")


def vectors_of(count: int = 6, channels: int = 24, spread: Tensor | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, 3, channels, dtype=torch.float64, generator=generator)
    return vectors if spread is None else spread[:, None] * vectors


def whitened(vectors: Tensor) -> Tensor:
    return VectorLayerNorm(vectors.shape[2]).to(vectors.dtype)(vectors).detach()


def test_an_inverse_root_is_one() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = torch.randn(20, 3, 3, dtype=torch.float64, generator=generator)
    matrices = factors @ factors.transpose(1, 2) + 0.01 * torch.eye(3, dtype=torch.float64)
    root = inverse_root(matrices)
    expected = torch.eye(3, dtype=torch.float64).expand(20, 3, 3)
    torch.testing.assert_close(root @ matrices @ root, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [1e-1, 1.0, 1e4])
def test_vectors_have_mean_zero_and_covariance_one_whatever_their_size(size: float) -> None:
    """The sizes of one structure in a thousand are what makes a head's loss jump."""
    found = whitened(size * vectors_of())
    covariance = found @ found.transpose(1, 2) / found.shape[2]
    torch.testing.assert_close(found.mean(2), torch.zeros(6, 3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(covariance, torch.eye(3, dtype=torch.float64).expand(6, 3, 3), rtol=0, atol=3e-3)


def test_it_turns_with_the_vectors_also_where_one_direction_is_all_but_missing() -> None:
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    flat = torch.tensor([1.0, 1.0, 1e-7], dtype=torch.float64)
    for vectors in (vectors_of(), vectors_of(spread=flat)):
        for turn in (rotation, -rotation):
            turned = whitened(torch.einsum("nic,ij->njc", vectors, turn))
            expected = torch.einsum("nic,ij->njc", whitened(vectors), turn)
            torch.testing.assert_close(turned, expected, rtol=0, atol=1e-9)


def test_gradients_are_exact_where_eigenvalues_are_equal_and_finite_where_vectors_vanish() -> None:
    norm = VectorLayerNorm(3).double()
    cube = torch.eye(3, dtype=torch.float64)[None].requires_grad_()  # a covariance without directions
    assert torch.autograd.gradcheck(norm, (cube,))
    assert torch.autograd.gradgradcheck(norm, (cube,))
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    VectorLayerNorm(4)(zero).square().sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


def test_the_transformers_head_reads_whitened_vectors_and_its_energy_does_not() -> None:
    torch.manual_seed(0)
    model = build_model(WHITENED, noise_head=True).double().eval()
    plain = build_model(ET).double().eval()
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    batch = batch_of(SYSTEMS["mixed"])
    torch.testing.assert_close(predict(model, batch).energy, predict(plain, batch).energy, rtol=0, atol=0)

    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    alone = batch_of([TRICLINIC])
    turned = replace(alone, positions=alone.positions @ turn, cell=alone.cell @ turn)
    expected = predict_noise(model, alone) @ turn
    torch.testing.assert_close(predict_noise(model, turned), expected, rtol=0, atol=1e-10)


def test_it_is_off_in_the_papers_transformer_and_another_norm_is_refused() -> None:
    path = configs() / "pretrain" / "torchmd_et_1_1_1.yaml"
    assert TorchMDETOptions().vector_norm is None
    head = load_config(configs() / "pretrain" / "torchmd_et_denoise_head.yaml", PretrainConfig)
    assert head.model == TorchMDETOptions(vector_norm="whitened")
    assert load_config(path, PretrainConfig, ["model.vector_norm=whitened"]).model == TorchMDETOptions(
        vector_norm="whitened"
    )
    with pytest.raises(ConfigError, match=r"model\.vector_norm: .*'whitened'.*got 'layer'"):
        load_config(path, PretrainConfig, ["model.vector_norm=layer"])
