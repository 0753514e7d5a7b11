"""O[t] = sum over k of w[t,k] * Y[row(t,k)]: a token's K rows, unpermuted and summed in slot order in one pass.

    argument          shape      order
    rows (Y)          [T*K, H]   expert order, reached through scatter_indices; or token order
    routing_weights   [T, K]     token order; without it the plain sum (the sum of dX over a token's K rows)
    out (O)           [T, H]     token order

Its backward needs no kernel: the dX kernel reads dO through the index and scales by w in its epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, cdiv, launch, power_of_2

BLOCK_H = 1024


@triton.jit
def _combine(
    rows_ptr,
    routing_weights_ptr,
    scatter_indices_ptr,
    out_ptr,
    H,
    TOP_K: tl.constexpr,
    UNPERMUTE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = offs_h < H
    total = tl.zeros((BLOCK_H,), ACC)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        row = slot
        if UNPERMUTE:
            row = tl.load(scatter_indices_ptr + slot).to(tl.int64)
        value = tl.load(rows_ptr + row * H + offs_h, mask=mask, other=0.0).to(ACC)  # [BLOCK_H]
        if HAS_WEIGHTS:
            value = value * tl.load(routing_weights_ptr + slot).to(ACC)
        total += value
    tl.store(out_ptr + token * H + offs_h, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine_rows(
    rows: Tensor, scatter_indices: Tensor, routing_weights: Tensor | None, top_k: int, *, token_order: bool
) -> Tensor:
    """[T,H]: the (weighted, if `routing_weights` [T,K] is given) sum of each token's K rows of `rows` [T*K,H]."""
    tokens, width = rows.shape[0] // top_k, rows.shape[1]
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if not tokens:
        return out
    block = min(power_of_2(width), BLOCK_H)
    grid = (tokens, cdiv(width, block))
    weights = rows if routing_weights is None else routing_weights
    meta = {"TOP_K": top_k, "UNPERMUTE": not token_order, "HAS_WEIGHTS": routing_weights is not None}
    args = (rows, weights, scatter_indices, out, width)
    launch("combine", _combine, grid, *args, ACC=accumulator(rows.dtype), BLOCK_H=block, **meta)
    return out
