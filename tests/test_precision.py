"""Mixed precision: what runs in bf16, what must not, and how far the derivatives stray."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS
from small_runs import Options, records, run, small_options
from test_derivatives import SYSTEMS
from torch import Tensor
from torch.nn import functional

from dpt_hpc.errors import ConfigError, EnvironmentFault
from dpt_hpc.models import EnergyModel, ModelOptions, build_model, predict, set_precision
from dpt_hpc.models.precision import NodeProducts
from dpt_hpc.ops import linear
from dpt_hpc.ops.linear import _multiply, _tensor_cores
from dpt_hpc.structure import Batch
from dpt_hpc.train.checkpoint import load_weights

ROUNDING = 2.0**-8
"""Relative spacing of bfloat16: a product of two rounded numbers errs by this much at most."""


def operands() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3, 20), (7, 20), (7,)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.requires_grad_(), (weight / 20**0.5).requires_grad_(), bias.requires_grad_()


def test_bf16_rounds_the_product_and_nothing_else() -> None:
    x, weight, bias = operands()
    y = linear(x, weight, bias, "bf16")
    exact = functional.linear(x, weight, bias)
    assert y.dtype == torch.float32
    size = functional.linear(x.abs(), weight.abs())
    assert 0 < float(((y - exact).abs() / size).detach().max()) < 2 * ROUNDING
    far = linear(x, weight, bias + 1e4, "bf16")  # the bias is added in float32: 1e4 would swallow a bfloat16 product
    torch.testing.assert_close(far - 1e4, y, rtol=0, atol=1e-2)


@pytest.mark.parametrize("with_bias", [True, False])
def test_first_and_second_derivatives_of_bf16_are_those_of_float32_within_its_rounding(with_bias: bool) -> None:
    x, weight, bias = operands()

    def derivatives(precision: str) -> list[Tensor]:
        y = linear(x, weight, bias if with_bias else None, precision)  # type: ignore[arg-type]
        (force,) = torch.autograd.grad(torch.tanh(y).sum(), x, create_graph=True)
        assert force.dtype == torch.float32
        return [force.detach(), *torch.autograd.grad(force.square().sum(), [weight, x])]

    for narrow, wide in zip(derivatives("bf16"), derivatives("float32"), strict=True):
        assert narrow.dtype == torch.float32
        assert 0 < float((narrow - wide).norm() / wide.norm()) < 3 * ROUNDING


def test_where_products_are_exact_bf16_is_float32_to_the_second_derivative() -> None:
    """Small integers are exact in bfloat16: what differs then is no rounding, but a mistake."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((5, 6), (4, 6)))
    x.requires_grad_()
    weight.requires_grad_()

    def derivatives(precision: str) -> tuple[Tensor, ...]:
        y = linear(x, weight, None, precision)  # type: ignore[arg-type]
        first = torch.autograd.grad((y * y).sum() / 2, x, create_graph=True)[0]
        return y, first, *torch.autograd.grad((first * torch.arange(6.0)).sum(), [x, weight])

    y, first, *second = derivatives("float32")
    assert int(max(first.abs().max(), y.abs().max())) <= 256  # exact so far
    for narrow, wide in zip(derivatives("bf16"), (y, first, *second), strict=True):
        torch.testing.assert_close(narrow, wide, rtol=ROUNDING, atol=0)


def test_tf32_off_a_gpu_and_other_types_are_refused() -> None:
    x, weight, _ = operands()
    with pytest.raises(EnvironmentFault, match=r"linear: precision tf32: .*tensors are on cpu"):
        linear(x, weight, None, "tf32")
    with pytest.raises(TypeError, match=r"precision bf16: expected float32 operands, got torch\.float64"):
        linear(x.double(), weight.double(), None, "bf16")
    with pytest.raises(ValueError, match="precision: expected float32, bf16, tf32, got 'fp8'"):
        linear(x, weight, None, "fp8")  # type: ignore[arg-type]


def test_the_switch_of_tf32_is_on_for_one_product() -> None:
    switch = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(switch, "fp32_precision") else "allow_tf32"
    before = getattr(switch, name)
    with _tensor_cores():
        assert getattr(switch, name) in ("tf32", True)
    assert getattr(switch, name) == before


@pytest.mark.parametrize("name", NETWORKS)
def test_filters_and_energies_are_no_narrow_products(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor inside another module: narrow products have a row per atom, vector or structure, none per knot or edge."""
    network, _ = narrow_and_wide(NETWORKS[name])
    narrow = {n for n, module in network.named_modules() if isinstance(module, NodeProducts)}
    assert narrow
    assert not [n for n in narrow if n.endswith(("filters", "output"))]
    batch = Batch.from_structures(SYSTEMS["mixed"], dtype=torch.float32)
    products: list[tuple[int, ...]] = []

    def recorded(a: Tensor, b: Tensor, precision: Any) -> Tensor:
        products.append((*a.shape, *b.shape))
        return multiply(a, b, precision)

    multiply = _multiply
    monkeypatch.setattr(sys.modules["dpt_hpc.ops.linear"], "_multiply", recorded)
    predict(network.eval(), batch, forces=False, stress=False)
    assert products
    for rows, _, _, columns in products:
        assert rows in (batch.num_atoms, 3 * batch.num_atoms, batch.num_structures)
        assert columns > 1


def narrow_and_wide(options: ModelOptions) -> tuple[EnergyModel, EnergyModel]:
    torch.manual_seed(0)
    wide, narrow = build_model(options), build_model(options)
    narrow.load_state_dict(wide.state_dict())
    set_precision(narrow, "bf16")
    return narrow, wide


def gradient(model: EnergyModel, batch: Batch) -> Tensor:
    p = predict(model.train(), batch)
    assert p.forces is not None
    assert p.stress is not None
    loss = p.energy.square().sum() + 5 * p.forces.square().sum() + 50 * p.stress.square().sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("name", ["cgcnn, exact", "torchmd_et, table", "schnet, exact", "painn, table"])
def test_a_network_in_bf16_stays_near_itself_and_keeps_its_weights(name: str) -> None:
    narrow, wide = narrow_and_wide(NETWORKS[name])
    assert {p.dtype for p in narrow.parameters()} == {torch.float32}
    batch = Batch.from_structures(SYSTEMS["mixed"], dtype=torch.float32)
    found, expected = predict(narrow.eval(), batch), predict(wide.eval(), batch)
    for field in ("energy", "forces", "stress"):
        a, b = getattr(found, field), getattr(expected, field)
        assert a.dtype == torch.float32
        assert 0 < float((a - b).norm() / b.norm()) < 0.03, field
    a, b = gradient(narrow, batch), gradient(wide, batch)
    assert a.isfinite().all()
    assert float((a - b).norm() / b.norm()) < 0.05


def options_of(dataset: Path, model: str) -> Options:
    options = small_options(dataset)
    if model == "torchmd_et":
        sizes = {"cutoff": 4.0, "hidden": 16, "layers": 2, "heads": 2, "radial": 12, "readout_hidden": 16}
        options["model"] = {"name": model, "backend": NETWORKS["torchmd_et, exact"].backend, **sizes}
    options["objective"] = {"kind": "derivatives", "element_references": True}
    return options


@pytest.mark.parametrize("model", ["cgcnn", "torchmd_et"])
def test_a_run_in_bf16_learns_with_weights_in_float32(model: str, small_dataset: Path, tmp_path: Path) -> None:
    options = options_of(small_dataset, model)
    options["training"]["precision"] = "bf16"
    path = run(options, tmp_path / "bf16")
    losses = [r["validation"]["loss"] for r in records(path, "epoch")]
    assert losses[-1] < losses[0]
    assert {w.dtype for w in load_weights(path).values()} == {torch.float32}


def test_tf32_on_the_cpu_is_refused_before_the_first_step(small_dataset: Path, tmp_path: Path) -> None:
    options = small_options(small_dataset)
    options["training"]["precision"] = "tf32"
    options["engine"] = {"device": "cpu"}
    with pytest.raises(ConfigError, match=r"training\.precision is tf32, .* but this run is on the CPU"):
        run(options, tmp_path / "tf32")
    assert not (tmp_path / "tf32").exists()
