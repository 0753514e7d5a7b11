"""O[t] = sum over k of w[t,k] * Y[row(t,k)]: a token's K rows, unpermuted and summed in slot order in one pass.

    argument          shape      order
    rows (Y)          [T*K, H]   expert order, reached through scatter_indices; or token order
    routing_weights   [T, K]     token order; without it the plain sum (the sum of dX over a token's K rows)
    out (O)           [T, H]     token order

Its backward needs no kernel: the dX kernel reads dO through the index and scales by w in its epilogue.

dX[t] = sum over k of dY[row(t,k)] + sum over e of dlogits[t,e] * gate[e]: the experts' part and the router's, in one
pass. The second sum is a small product, done when the rows have come.

    dlogits     [T, E]      token order
    gate        [E, H]
    rows (dY)   [T*K, H]    as above
    dx (dX)     [T, H]      token order

ds[slot] = sum over p of parts[p, slot]: of the routing weights' gradient, which each column tile makes a part of.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, cdiv, launch, power_of_2

BLOCK_H = 1024
PARTS_BLOCK = 1024
SUM_T, SUM_H = 64, 64  # of a program of the sum that has the router's part: sides of a small product


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


@triton.jit
def _sum_dX(
    rows_ptr,
    scatter_indices_ptr,
    dlogits_ptr,
    gate_ptr,
    dx_ptr,
    T,
    E,
    H,
    TOP_K: tl.constexpr,
    UNPERMUTE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # programs beside each other share rows: memory is read in longer runs
    programs_h = tl.cdiv(H, BLOCK_H)
    token = (tl.program_id(0) // programs_h).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_h = (tl.program_id(0) % programs_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = token < T
    mask = inside[:, None] & (offs_h < H)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_H), ACC)
    for k in tl.static_range(TOP_K):
        row = token * TOP_K + k
        if UNPERMUTE:
            row = tl.load(scatter_indices_ptr + row, mask=inside, other=0).to(tl.int64)
        row_ptrs = rows_ptr + row[:, None] * H + offs_h[None, :]
        # read once, and with this hint the compiler leaves the loads together: all K of them are under way at a time
        total += tl.load(row_ptrs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    # after the rows: as the sum's start, the product would have each row turned to its layout through shared memory
    product = tl.zeros((BLOCK_T, BLOCK_H), ACC)
    for first in tl.range(0, E, BLOCK_E, num_stages=1):  # one turn, as a rule: nothing to load ahead for
        offs_e = first + tl.arange(0, BLOCK_E)
        dlogits_ptrs = dlogits_ptr + token[:, None] * E + offs_e[None, :]
        dlogits = tl.load(dlogits_ptrs, mask=inside[:, None] & (offs_e < E)[None, :], other=0.0)
        gate_ptrs = gate_ptr + offs_e.to(tl.int64)[:, None] * H + offs_h[None, :]
        gate_tile = tl.load(gate_ptrs, mask=(offs_e < E)[:, None] & (offs_h < H)[None, :], other=0.0)
        product = tl.dot(dlogits, gate_tile, product, input_precision="ieee", out_dtype=ACC)
    total += product
    tl.store(dx_ptr + token[:, None] * H + offs_h[None, :], total.to(dx_ptr.dtype.element_ty), mask=mask)


def sum_dX(
    rows: Tensor, scatter_indices: Tensor, dlogits: Tensor, gate: Tensor, top_k: int, *, token_order: bool
) -> Tensor:
    """dX [T,H]: the sum of each token's K rows of `rows` [T*K,H], plus dlogits [T,E] @ gate [E,H]."""
    (tokens, experts), width = dlogits.shape, gate.shape[1]
    dx = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if not tokens:
        return dx
    sides = {"BLOCK_T": SUM_T, "BLOCK_H": min(max(16, power_of_2(width)), SUM_H)}
    grid = (cdiv(width, sides["BLOCK_H"]) * cdiv(tokens, SUM_T),)
    args = (rows, scatter_indices, dlogits.contiguous(), gate.contiguous(), dx, tokens, experts, width)
    meta = {"TOP_K": top_k, "UNPERMUTE": not token_order, "ACC": accumulator(rows.dtype), **sides}
    launch("sum_dX", _sum_dX, grid, *args, **meta, BLOCK_E=min(max(16, power_of_2(experts)), 128), num_warps=4)
    return dx


@triton.jit
def part_sum(parts_ptr, offsets, mask, parts, M):
    """The sum of `parts` values, each M after the one before, in their order."""
    total = tl.load(parts_ptr + offsets, mask=mask, other=0.0)
    for part in range(1, parts):
        total += tl.load(parts_ptr + offsets + part * tl.cast(M, tl.int64), mask=mask, other=0.0)
    return total


@triton.jit
def _sum_parts(parts_ptr, out_ptr, parts, M, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, part_sum(parts_ptr, offsets, offsets < M, parts, M), mask=offsets < M)


def sum_parts(parts: Tensor) -> Tensor:
    """[M]: the sum of `parts` [P,M] over P, in the parts' dtype."""
    number, size = parts.shape
    if number == 1 or not size:
        return parts[0]
    out = torch.empty(size, dtype=parts.dtype, device=parts.device)
    launch("sum_ds", _sum_parts, (cdiv(size, PARTS_BLOCK),), parts, out, number, size, BLOCK=PARTS_BLOCK)
    return out
