"""Linear maps whose matrix product may run in a narrower number format than its operands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.ops.autograd import apply, asked

Precision = Literal["float32", "bf16", "tf32"]
"""float32: as the operands are · bf16: both rounded to bfloat16, sums in float32 (rounded to bfloat16 once more on a
CPU, whose products return it) · tf32: rounded to 10 bits inside the tensor cores of a GPU."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, precision: Precision = "float32") -> Tensor:
    """x @ weight.t() + bias, the product in `precision`; operands, result, bias and all gradients keep their type.

    x (...,K) · weight (M,K) · bias (M,) or None -> (...,M). Differentiable any number of times: the products of the
    derivatives run in the same precision, and rounding counts as the identity. Errors: ValueError for an unknown
    precision, TypeError for operands other than float32 in bf16 or tf32, EnvironmentFault for tf32 where no GPU is.
    """
    if precision == "float32":
        return functional.linear(x, weight, bias)
    return _narrow(x, weight, bias, precision)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _narrow(x: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision) -> Tensor:
    if precision not in get_args(Precision):
        raise ValueError(f"linear: precision: expected {', '.join(get_args(Precision))}, got {precision!r}.")
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        raise TypeError(f"linear: precision {precision}: expected float32 operands, got {x.dtype} and {weight.dtype}.")
    if precision == "tf32" and not x.is_cuda:
        raise EnvironmentFault(
            f"linear: precision tf32: a format of NVIDIA's tensor cores, but the tensors are on {x.device}.\n"
            "Use bf16 or float32."
        )
    y: Tensor = apply(_Product, x.reshape(-1, x.shape[-1]), weight.t(), precision)
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class _Product(Function):
    """a (N,K), b (K,M), precision -> (N,M). Its derivatives are two such products, so that it is closed under them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        a, b, ctx.precision = inputs
        ctx.save_for_backward(a, b)
        return _multiply(a, b, ctx.precision)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (a, b), (gradient,) = ctx.saved_tensors, gradients
        return (
            apply(_Product, gradient, b.t(), ctx.precision) if asked(ctx, 0) else None,
            apply(_Product, a.t(), gradient, ctx.precision) if asked(ctx, 1) else None,
            None,
        )


def _multiply(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    if precision == "bf16":
        narrow = a.to(torch.bfloat16), b.to(torch.bfloat16)
        return torch.mm(*narrow, out_dtype=torch.float32) if a.is_cuda and _NEW else torch.mm(*narrow).float()
    with _tensor_cores():
        return torch.mm(a, b)


_NEW = hasattr(torch.backends.cuda.matmul, "fp32_precision")
"""PyTorch 2.9 or later: it warns of, or refuses, its older switch, and has products with a wider result."""


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """TF32 for one product: the switch is the whole process's, but tables of filters must not lose their digits."""
    switch: Any = torch.backends.cuda.matmul
    name, on = ("fp32_precision", "tf32") if _NEW else ("allow_tf32", True)
    before = getattr(switch, name)
    setattr(switch, name, on)
    try:
        yield
    finally:
        setattr(switch, name, before)
