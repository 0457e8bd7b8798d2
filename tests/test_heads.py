"""Heads on the features of the atoms: their symmetries, their derivatives, and what becomes of them in checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import CGCNN, ET, NETWORKS
from small_runs import Options, run
from test_derivatives import SYSTEMS, TRICLINIC, batch_of
from torch import Tensor

from dpt_hpc.models import Scaling, build_model, predict_noise
from dpt_hpc.models.heads import GatedEquivariant, ScalarHead, VectorHead
from dpt_hpc.quickstart import configs
from dpt_hpc.train.checkpoint import find_checkpoint, load_model, load_weights
from dpt_hpc.train.config import HeadDenoisingOptions
from dpt_hpc.train.finetune import load_pretrained

VECTORS = ["torchmd_et, exact", "painn, exact"]
HEADS = ["cgcnn, exact", *VECTORS]


def model_of(name: str) -> Scaling:
    torch.manual_seed(0)
    return build_model(NETWORKS[name], noise_head=True).double().eval()


def noise_of(model: Scaling, *structures: object, **changes: Tensor) -> Tensor:
    batch = replace(batch_of(list(structures)), **changes)  # type: ignore[arg-type]
    return predict_noise(model, batch).detach()


@pytest.mark.parametrize("name", VECTORS)
def test_predicted_noise_turns_with_the_structure_where_there_are_vectors(name: str) -> None:
    """Under a rotation and under a reflection: noise is a polar vector."""
    model = model_of(name)
    assert isinstance(model.noise_head, VectorHead)
    expected = noise_of(model, TRICLINIC)
    assert float(expected.abs().max()) > 1e-4
    generator = torch.Generator().manual_seed(3)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator))[0]
    for turn in (rotation, -rotation):
        turned = noise_of(model, TRICLINIC, positions=TRICLINIC.positions @ turn, cell=(TRICLINIC.cell @ turn)[None])
        torch.testing.assert_close(turned, expected @ turn, rtol=0, atol=1e-10)


def test_the_head_of_a_network_without_vectors_knows_no_direction() -> None:
    """What its documentation says; a head that could turn would need no such warning."""
    model = model_of("cgcnn, exact")
    assert isinstance(model.noise_head, ScalarHead)
    turn = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    turned = noise_of(model, TRICLINIC, positions=TRICLINIC.positions @ turn, cell=(TRICLINIC.cell @ turn)[None])
    torch.testing.assert_close(turned, noise_of(model, TRICLINIC), rtol=0, atol=1e-10)
    written = (configs() / "pretrain" / "cgcnn_denoise_head.yaml").read_text()
    for text in (HeadDenoisingOptions.__doc__, ScalarHead.__doc__, written):
        assert "but to answer zero" in " ".join((text or "").split()) or "can answer is zero" in str(text)


@pytest.mark.parametrize("name", HEADS)
def test_translation_order_and_company_change_no_noise(name: str) -> None:
    model = model_of(name)
    expected = noise_of(model, TRICLINIC)
    torch.testing.assert_close(noise_of(model, TRICLINIC, positions=TRICLINIC.positions + 0.7), expected)
    order = torch.tensor([2, 0, 1])
    permuted = replace(TRICLINIC, positions=TRICLINIC.positions[order], atomic_numbers=TRICLINIC.atomic_numbers[order])
    torch.testing.assert_close(noise_of(model, permuted), expected[order])
    structures = SYSTEMS["mixed"]
    alone = torch.cat([noise_of(model, s) for s in structures])
    torch.testing.assert_close(noise_of(model, *structures), alone, rtol=1e-12, atol=1e-12)


def test_the_gated_block_has_exact_derivatives_of_both_orders() -> None:
    torch.manual_seed(0)
    block = GatedEquivariant(4, 3, 2, 2).double()
    generator = torch.Generator().manual_seed(1)
    scalars = torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    vectors = torch.randn(5, 3, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(block, (scalars, vectors))
    assert torch.autograd.gradgradcheck(block, (scalars, vectors))


def test_vectors_of_zero_have_a_finite_gradient() -> None:
    """A norm has none there; an atom alone, or at a centre of inversion, has such vectors."""
    head = VectorHead(4, 4)
    vectors = torch.zeros(2, 3, 4, requires_grad=True)
    block, _ = head.first(torch.ones(2, 4), vectors)
    block.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_the_training_gradient_is_the_finite_difference_of_the_loss(name: str) -> None:
    """Through the whole network, in every weight that the head can see."""
    model = model_of(name).train()
    batch = batch_of(SYSTEMS["mixed"])
    weights = torch.randn(batch.positions.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def loss() -> Tensor:
        return (predict_noise(model, batch) - weights).square().sum()

    parameters = [p for p in model.parameters() if p.numel() > 1]
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    assert sum(bool(g.any()) for g in gradients) > len(gradients) / 2
    generator = torch.Generator().manual_seed(2)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * 1e-5 * direction
                values.append(float(loss()))
                parameter -= sign * 1e-5 * direction
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float((gradient * direction).sum()), rel=1e-5, abs=1e-8)


def test_the_network_is_drawn_as_without_a_head() -> None:
    torch.manual_seed(4)
    without = build_model(ET).state_dict()
    torch.manual_seed(4)
    with_head = build_model(ET, noise_head=True).state_dict()
    assert all(torch.equal(value, with_head[name]) for name, value in without.items())
    assert {name.partition(".")[0] for name in with_head.keys() - without.keys()} == {"noise_head"}


def test_a_model_without_a_head_predicts_no_noise() -> None:
    with pytest.raises(ValueError, match="the model has no noise head, expected one built with noise_head=True"):
        predict_noise(build_model(CGCNN).double(), batch_of([TRICLINIC]))


def test_a_checkpoint_keeps_the_head_and_fine_tuning_leaves_it(
    finished: tuple[Options, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**finished[0], "training": {"epochs": 1, "batch_size": 8}, "objective": {"kind": "head_denoising"}}
    path = run(options, tmp_path / "run")
    assert "model.name=cgcnn has no vectors: its head knows no direction, and learns next to" in capsys.readouterr().err
    weights = load_weights(path)
    model = load_model(path)
    assert isinstance(model, Scaling)
    assert isinstance(model.noise_head, ScalarHead)
    assert torch.equal(model.noise_head.output.weight, weights["noise_head.output.weight"])

    # The loss reaches all but the read-out of the energy, which neither moves nor decays.
    torch.manual_seed(options["seed"])
    drawn = build_model(model.network.options, noise_head=True).state_dict()  # type: ignore[arg-type, union-attr]
    unmoved = {name for name, value in drawn.items() if torch.equal(value, weights[name])}
    read_out = {name for name in drawn if name.startswith(("network.readout.", "network.output."))}
    assert len(read_out) > 2
    assert unmoved == read_out | {"scale", "shift", "element_references"}

    network = model.network.options  # type: ignore[union-attr]
    fresh = build_model(network)  # type: ignore[arg-type]
    found = load_pretrained(fresh, network, find_checkpoint(path))  # type: ignore[arg-type]
    heads = {name for name in weights if name.startswith("noise_head.")}
    assert len(heads) == 4
    assert set(found.skipped) == heads
    assert torch.equal(fresh.state_dict()["network.output.weight"], weights["network.output.weight"])
