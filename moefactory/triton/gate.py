"""The router's product, logits = x @ gate.T, and the gradient of its weight, dgate = dlogits.T @ x.

For few tokens by kernels here. The first takes the GPU 1 us more than an empty launch at one token and 2 at 16, where
cuBLAS's takes 4 (H 2048, E 128). The second takes the GPU about as long as cuBLAS's does, and the host, whose calls a
step of few tokens waits for, much less: some 14 us with its result's memory in place of 88, in the middle of a step (on
two hosts).

`gate_logits` is a part of other operators; `router_logits` is one of its own, with a derivative, for who routes alone.

    argument   shape
    x          [T, H]
    gate       [E, H]
    logits     [T, E]
    arrived    [1] int32   set to 0 for `decode`, whose first kernel the product is
    dlogits    [T, E]
    dgate      [E, H]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, cdiv, laid_out, launch, on_device, power_of_2
from .library import PLAIN, call, define, differentiate, refuse_forward_mode, within

MAX_TOKENS_FORWARD, MAX_TOKENS = 32, 512  # of the product, of the gradient; beyond, cuBLAS is faster
MAX_WIDTH = 16384  # the loop over a row of the gate is unrolled: its loads go out together
BLOCK = 64  # the gradient's tokens, experts and columns a program
PIECE = 1024  # the product's columns at a time


@triton.jit
def gate_kernel(
    x_ptr,
    gate_ptr,
    logits_ptr,
    arrived_ptr,
    T,
    E,
    H: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DECODE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """logits[t, e] of an expert and BLOCK_T tokens. With DECODE it is the first of `decode`'s two kernels."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()  # the other kernel may be put in place; it waits for the end of this one
    expert = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    if DECODE:
        if (expert == 0) & (tl.program_id(1) == 0):
            tl.store(arrived_ptr, 0)
    products = tl.zeros((BLOCK_T, BLOCK_K), ACC)
    for first in tl.static_range(0, H, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        w = tl.load(gate_ptr + expert * H + offs_k, mask=offs_k < H, other=0.0).to(ACC)
        mask = (token < T)[:, None] & (offs_k < H)[None, :]
        products += w[None, :] * tl.load(x_ptr + token[:, None] * H + offs_k[None, :], mask=mask, other=0.0).to(ACC)
    logits = tl.sum(products, axis=1).to(logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + token * E + expert, logits, mask=token < T)


def gate_logits(x: Tensor, gate: Tensor) -> Tensor:
    """logits [T,E] in x's dtype of x [T,H], contiguous, and gate [E,H]: sums of float32 (float64 of float64)."""
    (tokens, width), experts = x.shape, gate.shape[0]
    if not 0 < tokens <= MAX_TOKENS_FORWARD or width > MAX_WIDTH:
        return F.linear(x, gate)
    logits = torch.empty(tokens, experts, dtype=x.dtype, device=x.device)
    grid, meta = gate_launch(tokens, experts, width, x.dtype)
    with on_device(x.device):
        args = (x, gate.contiguous(), logits, logits, tokens, experts)
        launch("gate", gate_kernel, grid, *args, **meta, DECODE=False, DEPENDENT=False)
    return logits


def gate_launch(tokens: int, experts: int, width: int, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and meta-parameters of `gate_kernel`; the same for the one to four tokens of `decode` and for others.

    More than four: two tokens share a row of the gate. With more of them a program waits longer for their sums.
    """
    block_t, piece, warps = (1, 2 * PIECE, 8) if tokens <= 4 else (2, PIECE, 4)
    sides = {"BLOCK_T": block_t, "BLOCK_K": min(piece, power_of_2(width)), "num_warps": warps}
    return (experts, cdiv(tokens, block_t)), {"H": width, "ACC": accumulator(dtype), **sides}


def _fake(x: Tensor, gate: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0])


@define("router_logits(Tensor x, Tensor gate) -> Tensor", _fake)
def _router_logits(x: Tensor, gate: Tensor) -> Tensor:
    return gate_logits(laid_out(x), gate)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    (x, gate), (need_x, need_gate) = inputs, ctx.needs_input_grad[:2]  # the dispatcher adds one
    ctx.save_for_backward(x if need_gate else None, gate if need_x else None)  # else it may be written to since


def _backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, gate = ctx.saved_tensors  # by torch, which can differentiate again
    need_x, need_gate = ctx.needs_input_grad
    return dlogits @ gate if need_x else None, dlogits.t() @ x if need_gate else None


differentiate(_router_logits, _backward, _save)


def router_logits(x: Tensor, gate: Tensor) -> Tensor:
    """x @ gate.T as torch has it, but of few tokens by the kernel that the whole block takes: its bits."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype not in {torch.get_autocast_dtype(kind), torch.float64}
    fit = x.ndim == 2 and x.shape[1] == gate.shape[1] <= MAX_WIDTH and (x.dtype, x.device) == (gate.dtype, gate.device)
    plain = torch.compiler.is_compiling() or {type(x), type(gate)} <= PLAIN  # a subclass has its own product
    if autocast or not fit or not plain or not within(x.shape[0], MAX_TOKENS_FORWARD):
        return F.linear(x, gate)
    refuse_forward_mode(x, gate)
    logits: Tensor = call(_router_logits, x, gate)
    return logits


@triton.jit
def _gate_gradient(
    dlogits_ptr,
    x_ptr,
    dgate_ptr,
    T,
    E,
    H,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    expert = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_E, BLOCK_H), ACC)
    for first in range(0, T, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (token < T)[:, None]
        d = tl.load(dlogits_ptr + token[:, None] * E + expert[None, :], mask=inside & (expert < E)[None, :], other=0.0)
        x = tl.load(x_ptr + token[:, None] * H + offs_h[None, :], mask=inside & (offs_h < H)[None, :], other=0.0)
        acc = tl.dot(tl.trans(d), x, acc, input_precision="ieee", out_dtype=ACC)
    out = dgate_ptr + expert[:, None] * H + offs_h[None, :]
    tl.store(out, acc.to(dgate_ptr.dtype.element_ty), mask=(expert < E)[:, None] & (offs_h < H)[None, :])


def gate_gradient(dlogits: Tensor, x: Tensor) -> Tensor:
    """dgate [E,H] in x's dtype of dlogits [T,E] and x [T,H]: sums of float32 (float64 of float64), rounded once."""
    (tokens, experts), width = dlogits.shape, x.shape[1]
    if not 0 < tokens <= MAX_TOKENS:
        return dlogits.t() @ x
    out = torch.empty(experts, width, dtype=x.dtype, device=x.device)
    block_t, block_e, block_h = (min(max(16, power_of_2(n)), BLOCK) for n in (tokens, experts, width))
    grid = (cdiv(width, block_h), cdiv(experts, block_e))
    sides = {"BLOCK_T": block_t, "BLOCK_E": block_e, "BLOCK_H": block_h}
    with on_device(x.device):
        args = (dlogits.contiguous(), x, out, tokens, experts, width)
        launch("gate_gradient", _gate_gradient, grid, *args, ACC=accumulator(x.dtype), **sides)
    return out
