"""Defining torch operators through the dispatcher itself.

`torch.library.custom_op` does the same and checks every call for aliasing, which costs some 50 us of host time a call;
the operators here return fresh tensors only, so that they need no such check. `torch.library.opcheck` holds for both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD

from .launch import laid_out
from .replay import replayed

_LIBRARY = torch.library.Library("moefactory", "FRAGMENT")
_IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {}
_FUNCTIONS: dict[Any, type[torch.autograd.Function]] = {}
PLAIN = {torch.Tensor, torch.nn.Parameter}


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated function the operator ``moefactory::<schema>``, on every device, with this fake.

    The fake gets the same arguments and returns empty tensors of the right shapes and dtypes.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"moefactory::{name}", fake, lib=_LIBRARY)
        operator = getattr(torch.ops.moefactory, name).default
        _IMPLEMENTATIONS[operator] = replayed(function)
        return operator

    return decorate


def call(operator: Any, *args: Any) -> Any:
    """`operator(*args)`, without the dispatcher where nothing listens to operators: 15 us less, 150 with autograd.

    What listens: torch.compile and other tracers (modes, functorch), tensor subclasses. Autograd does too; it gets a
    Function, made of the operator's implementation and of its registered backward.
    """
    if torch.compiler.is_compiling() or _observed():
        return operator(*args)
    differentiable = False
    for arg in args:
        if isinstance(arg, torch.Tensor):
            if type(arg) not in PLAIN:
                return operator(*args)
            differentiable = differentiable or arg.requires_grad
    if differentiable and torch.is_grad_enabled() and (function := _FUNCTIONS.get(operator)) is not None:
        return function.apply(*args)
    return _IMPLEMENTATIONS.get(operator, operator)(*args)


def traced(tensor: torch.Tensor) -> bool:
    """Whether this tensor may stand for another: it need not have an address then."""
    return torch.compiler.is_compiling() or _observed() or type(tensor) not in PLAIN


def within(number: int, most: int) -> bool:
    """Whether a number is 1 to `most`. Where a graph is for any number, it is not."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

        return bool(statically_known_true(number > 0) and statically_known_true(number <= most))
    return 0 < number <= most


def _observed() -> bool:
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
    )


def differentiate(
    operator: Any,
    backward: Callable[..., Any],
    save: Callable[..., None] | None = None,
    direct: Callable[..., Any] | None = None,
) -> None:
    """Register the operator's backward, ``backward(ctx, *grads)``, and what ``save(ctx, inputs, output)`` keeps.

    `direct` replaces the implementation where it is called directly: it need not make the empty tensors that stand for
    None in an operator's result.
    """
    torch.library.register_autograd(operator, backward, setup_context=save, lib=_LIBRARY)
    if direct is not None:
        _IMPLEMENTATIONS[operator] = replayed(direct)
    implementation = _IMPLEMENTATIONS[operator]

    def forward(ctx: Any, *inputs: Any) -> Any:  # `setup_context` costs 20 us: torch then binds the arguments by name
        output = implementation(*inputs)
        if save is not None:
            save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    _FUNCTIONS[operator] = type(operator._opname, (torch.autograd.Function,), methods)


def no_second_derivative(ctx: Any, *grads: Any) -> None:
    """The backward of a backward operator: refused in our own words."""
    raise RuntimeError("moefactory: the triton backend has no second derivative; choose moe/backend=torch for it")


def refuse_forward_mode(*tensors: torch.Tensor | None) -> None:
    """RuntimeError if one of them carries a tangent."""
    if fwAD._current_level >= 0 and any(t is not None and fwAD.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("moefactory: the triton backend has no forward-mode derivative; choose moe/backend=torch")


def given_back(
    name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """What autograd saved, contiguous and aligned: a saved-tensors hook may have handed out other memory.

    Args:
        name: what it is.
        tensor: what was handed out.
        shape: of what was saved.
        like: a tensor on its device, and of its dtype where no `dtype` is given.

    Raises:
        ValueError: another shape, dtype or device than what was saved: the kernels could only read it wrongly.
    """
    wanted = torch.Size(shape), dtype or like.dtype, like.device
    if (tensor.shape, tensor.dtype, tensor.device) != wanted:
        came = f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} for the backward"
        needed = f"{tuple(wanted[0])} {wanted[1]} on {wanted[2]}"
        raise ValueError(f"{name}: {came}; needed: {needed}, as it was saved")
    return laid_out(tensor)
