"""dgate = dlogits.T @ x: the gradient of the router's weight.

For few tokens by a kernel here: it takes the GPU about as long as cuBLAS's does, and the host, whose calls a step of
few tokens waits for, much less: some 14 us with its result's memory in place of 88, in the middle of a step (on two
hosts).

    argument   shape
    dlogits    [T, E]
    x          [T, H]
    dgate      [E, H]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, cdiv, launch, on_device, power_of_2

MAX_TOKENS = 512  # beyond, cuBLAS is faster
BLOCK = 64


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
