"""What the autograd Functions of the message kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import Function


class Scope:
    """An `inner_derivative` block: closed once it has been left."""

    closed = False


_scope: ContextVar[Scope | None] = ContextVar("inner_derivative", default=None)


@contextmanager
def inner_derivative() -> Iterator[None]:
    """A scope in which the geometry is variable, and after which it is constant.

    For forces in a loss: inside, messages are computed and the energy is differentiated with respect to the geometry,
    with create_graph=True; outside, the loss is differentiated with respect to the weights. `loss.backward()` cannot
    know that nobody wants the loss's gradient in the positions, and would pay for it. After the scope, messages that
    were computed in it give no gradient for the inputs that depend on the geometry alone (cgconv: edge_lengths;
    radial_messages: directions, envelope, and taps that are not trainable); all other gradients are what they were.
    """
    scope = Scope()
    token = _scope.set(scope)
    try:
        yield
    finally:
        scope.closed = True
        _scope.reset(token)


def current_scope() -> Scope | None:
    """The innermost `inner_derivative` that the caller is in."""
    return _scope.get()


def apply(function: type[Function], *arguments: Any) -> Any:
    """function.apply, which torch's types do not know."""
    return function.apply(*arguments)


def asked(ctx: Any, index: int, absent: int = 0) -> bool:
    """Whether the running backward will use the gradient of input `index`; `absent` of the inputs before it are None.

    needs_input_grad says what can be differentiated, not what autograd.grad was asked for: the gradient of the energy
    with respect to the positions alone would pay for that of the filter weights. The engine knows better; where it
    does not answer (a leaf, another version of torch), the gradient is computed.
    """
    if not ctx.needs_input_grad[index]:
        return False
    node = ctx.next_functions[index - absent][0]
    try:
        return node is not None and bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):
        return True


def third_derivative(operation: str) -> NotImplementedError:
    """The refusal to differentiate the second backward of `operation`."""
    return NotImplementedError(
        f"{operation}: a third derivative was asked for; the native kernels have two.\n"
        "Forces and stress in a loss need two. For more, use backend='reference'."
    )
