"""A = silu(gate) * up, and its derivative; H = [gate, up] along columns.

forward    A[r]  = s[r] * silu(gate[r]) * up[r]                                     (s = 1 in the forward)
backward   dgate = s * dA * up * sig(gate) * (1 + gate * (1 - sig(gate)))
           dup   = s * dA * silu(gate)
           ds    = sum over columns of dA * silu(gate) * up                         dA before scaling by s

argument          shape        order
h, dh             [M, 2I]      expert order
a, da, scaled_a   [M, I]       expert order
routing_weights   [T*K]        token order, reached through gather_indices
ds                [T*K]        token order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulator, cdiv, interpreting, launch, power_of_2

INTERPRETED = tl.constexpr(interpreting())  # which knows no assembly
BLOCK_ROWS = 4
BLOCK_COLS = 512


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), of float32 by the special unit's exponential and reciprocal.

    They are what Triton's own are made of, without the eight instructions that keep numbers below 2**-126. Those become
    0 here: of gates below -87, whose silu is less than 2**-119.
    """
    if INTERPRETED or x.dtype != tl.float32:
        return tl.sigmoid(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up."""
    return gate * sigmoid(gate) * up


@triton.jit
def dswiglu(da, gate, up):
    """(dgate, dup) for a gradient `da` of silu(gate) * up."""
    sig = sigmoid(gate)
    silu = gate * sig
    return da * up * tl.fma(silu, 1 - sig, sig), da * silu


@triton.jit
def _swiglu_forward(
    h_ptr,
    a_ptr,
    gather_indices_ptr,
    routing_weights_ptr,
    M,
    I,
    HAS_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = (offs_m < M)[:, None] & (offs_i < I)[None, :]
    h_ptrs = h_ptr + offs_m[:, None] * (2 * I) + offs_i[None, :]
    gate = tl.load(h_ptrs, mask=mask, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_I]
    up = tl.load(h_ptrs + I, mask=mask, other=0.0).to(ACC)
    a = swiglu(gate, up)
    if HAS_WEIGHTS:
        slot = tl.load(gather_indices_ptr + offs_m, mask=offs_m < M, other=0)
        a = a * tl.load(routing_weights_ptr + slot).to(ACC)[:, None]
    tl.store(a_ptr + offs_m[:, None] * I + offs_i[None, :], a.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(
    da_ptr,
    h_ptr,
    dh_ptr,
    scaled_a_ptr,
    ds_ptr,
    gather_indices_ptr,
    routing_weights_ptr,
    M,
    I,
    HAS_WEIGHTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = offs_m < M
    weight = tl.full((BLOCK_M,), 1.0, ACC)
    slot = tl.load(gather_indices_ptr + offs_m, mask=row_mask, other=0)
    if HAS_WEIGHTS:
        weight = tl.load(routing_weights_ptr + slot).to(ACC)
    ds = tl.zeros((BLOCK_M,), ACC)
    for start in range(0, I, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I)
        mask = row_mask[:, None] & (offs_i < I)[None, :]
        rows_i = offs_m[:, None] * I + offs_i[None, :]
        rows_h = offs_m[:, None] * (2 * I) + offs_i[None, :]
        da = tl.load(da_ptr + rows_i, mask=mask, other=0.0).to(ACC)
        gate = tl.load(h_ptr + rows_h, mask=mask, other=0.0).to(ACC)
        up = tl.load(h_ptr + rows_h + I, mask=mask, other=0.0).to(ACC)
        a = swiglu(gate, up)
        ds += tl.sum(da * a, axis=1)
        dgate, dup = dswiglu(da * weight[:, None], gate, up)
        tl.store(dh_ptr + rows_h, dgate.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(dh_ptr + rows_h + I, dup.to(dh_ptr.dtype.element_ty), mask=mask)
        scaled = (a * weight[:, None]).to(scaled_a_ptr.dtype.element_ty)
        tl.store(scaled_a_ptr + rows_i, scaled, mask=mask)
    tl.store(ds_ptr + slot, ds, mask=row_mask)


def swiglu_forward(h: Tensor, gather_indices: Tensor, routing_weights: Tensor | None) -> Tensor:
    """A [M,I] of h [M,2I], times each row's routing weight if `routing_weights` [T,K] is given."""
    rows, width = h.shape[0], h.shape[1] // 2
    a = torch.empty(rows, width, dtype=h.dtype, device=h.device)
    if not rows:
        return a
    block = min(power_of_2(width), BLOCK_COLS)
    grid = (cdiv(rows, BLOCK_ROWS), cdiv(width, block))
    weights = h if routing_weights is None else routing_weights
    meta = {"HAS_WEIGHTS": routing_weights is not None, "ACC": accumulator(h.dtype), "BLOCK_M": BLOCK_ROWS}
    launch("swiglu_forward", _swiglu_forward, grid, h, a, gather_indices, weights, rows, width, BLOCK_I=block, **meta)
    return a


def swiglu_backward(
    da: Tensor, h: Tensor, gather_indices: Tensor, routing_weights: Tensor | None, *, over_h: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH [M,2I], s*A [M,I], ds [T*K] in float32 or float64, token order) of da [M,I], the gradient before scaling.

    `over_h`: dH takes H's memory.
    """
    rows, width = da.shape
    dh, scaled_a = h if over_h else torch.empty_like(h), torch.empty_like(da)
    wide = torch.promote_types(h.dtype, torch.float32)
    ds = torch.empty(rows, dtype=wide, device=h.device)
    if not rows:
        return dh, scaled_a, ds
    block = min(power_of_2(width), BLOCK_COLS)
    weights = h if routing_weights is None else routing_weights
    args = (da, h, dh, scaled_a, ds, gather_indices, weights, rows, width)
    meta = {"HAS_WEIGHTS": routing_weights is not None, "ACC": accumulator(h.dtype), "BLOCK_M": BLOCK_ROWS}
    launch("swiglu_backward", _swiglu_backward, (cdiv(rows, BLOCK_ROWS),), *args, BLOCK_I=block, **meta)
    return dh, scaled_a, ds
