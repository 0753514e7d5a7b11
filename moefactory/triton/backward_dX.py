"""dx[r, k] = sum over n of dy[row(r), n] * weight[e(r)][n, k], the input gradient of a grouped GEMM.

    argument          shape                order
    dy                [T*K, N], or [T, N]  expert order; token order when read through gather_indices // DY_DIVISOR
    weight            [E, N, K]            Hugging Face's layout
    dx                [T*K, K]             expert order; token order with SCATTER
    with DSWIGLU (the down GEMM) the product dA = dy * weight stays in registers, and the epilogue stores instead
    h                 [T*K, 2I]            expert order, the saved pre-activation (K = I)
    routing_weights   [T*K]                token order; dy is the unscaled dO, the scaling happens here
    dh                [T*K, 2I]            expert order
    scaled_a          [T*K, I]             expert order, s * A: what dW of the down GEMM needs
    ds                [tiles, T*K]         token order, per column tile: <dA, A> is the routing weight's gradient, since
                                           <dO, Y> = <dO, A W^T> = <dO W, A>; summed over tiles in order afterwards

Rows of dropped slots (group E) are stored as zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import KernelConfigBackward_dX
from .activation import dswiglu, swiglu
from .combine import sum_parts
from .forward import GROUP_M, Rows, kernel_arguments, store_tile
from .launch import accumulator, cdiv, descriptor, launch, num_programs
from .schedule import rows_of_tile, tile_of


@triton.jit
def _halves(tile):
    """The left and the right half of a tile's columns."""
    ROWS: tl.constexpr = tile.shape[0]
    HALF: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, HALF)), (0, 2, 1)))


@triton.jit
def _dswiglu_slice(da, ds_row, rows, col0, I, pointers, ACC: tl.constexpr):
    """Store dH and s*A of the columns of `da` from `col0` on; return ds_row plus their <dA, A>."""
    weight, offs_m, row_mask = rows
    h_ptr, dh_ptr, scaled_a_ptr = pointers
    OUT: tl.constexpr = dh_ptr.dtype.element_ty
    offs_i = col0 + tl.arange(0, da.shape[1])
    mask = row_mask[:, None] & (offs_i < I)[None, :]
    row = offs_m.to(tl.int64)[:, None]
    h_ptrs = h_ptr + row * (2 * I) + offs_i[None, :]
    gate = tl.load(h_ptrs, mask=mask, other=0.0).to(ACC)  # [BLOCK_M, columns of da]
    up = tl.load(h_ptrs + I, mask=mask, other=0.0).to(ACC)
    da = da.to(OUT).to(ACC)  # rounded, as it is when the activation is a kernel of its own
    a = swiglu(gate, up)
    ds_row += tl.sum(tl.where(mask, da * a, 0.0), axis=1)
    dgate, dup = dswiglu(da * weight[:, None], gate, up)
    dh_ptrs = dh_ptr + row * (2 * I) + offs_i[None, :]
    tl.store(dh_ptrs, dgate.to(OUT), mask=mask)
    tl.store(dh_ptrs + I, dup.to(OUT), mask=mask)
    tl.store(scaled_a_ptr + row * I + offs_i[None, :], (a * weight[:, None]).to(OUT), mask=mask)
    return ds_row


@triton.jit
def _grouped_dX(
    dy,
    w,
    dx_ptr,
    dx_desc,
    h_ptr,
    scaled_a_ptr,
    ds_ptr,
    routing_weights_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    expert_offsets_ptr,
    gather_indices_ptr,
    num_experts,
    M,
    N,
    K,
    DY_DIVISOR: tl.constexpr,
    SCATTER: tl.constexpr,
    DSWIGLU: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    USE_TMA_LOAD_DY: tl.constexpr,
    USE_TMA_LOAD_W: tl.constexpr,
    USE_TMA_STORE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_m = tl.load(num_tiles_ptr)
    num_k = tl.cdiv(K, BLOCK_K)
    lane_n = tl.arange(0, BLOCK_N)
    tables = (tile_expert_ptr, tile_row_ptr, expert_offsets_ptr, gather_indices_ptr)
    following = rows_of_tile(tl.program_id(0), num_m, num_k, tables, BLOCK_M, GROUP_M)
    for tile in tl.range(tl.program_id(0), num_m * num_k, tl.num_programs(0), flatten=FLATTEN):
        expert, row0, row_end, slot = following
        # a program with one tile has nothing to wait for; in wide dSwiGLU the branch costs registers, and they are full
        if (DSWIGLU and BLOCK_K > 128) or tile + tl.num_programs(0) < num_m * num_k:
            following = rows_of_tile(tile + tl.num_programs(0), num_m, num_k, tables, BLOCK_M, GROUP_M)
        _, tile_k = tile_of(tile, num_m, num_k, GROUP_M)
        offs_m = row0 + tl.arange(0, BLOCK_M)
        row_mask = offs_m < row_end
        col0 = tile_k * BLOCK_K
        offs_k = col0 + tl.arange(0, BLOCK_K)
        col_mask = offs_k < K
        dy_row = tl.where(row_mask, offs_m, row0)
        if DY_DIVISOR > 0:
            dy_row = slot // DY_DIVISOR
        if not USE_TMA_LOAD_DY:
            dy_ptrs = dy + dy_row.to(tl.int64)[:, None] * N + lane_n[None, :]  # [BLOCK_M, BLOCK_N]
        if not USE_TMA_LOAD_W:
            w_base = w + expert.to(tl.int64) * N * K
            w_ptrs = w_base + lane_n.to(tl.int64)[:, None] * K + offs_k[None, :]  # [BLOCK_N, BLOCK_K]
        acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        n_end = tl.where(expert < num_experts, N, 0)  # dropped rows: no product, zeros
        for n in tl.range(0, n_end, BLOCK_N):
            if USE_TMA_LOAD_DY:
                dy_tile = dy.load([row0, n])
            elif EVEN_N:
                dy_tile = tl.load(dy_ptrs + n)
            else:
                dy_tile = tl.load(dy_ptrs + n, mask=(lane_n < N - n)[None, :], other=0.0)
            if USE_TMA_LOAD_W:
                w_tile = w.load([expert, n, col0]).reshape(BLOCK_N, BLOCK_K)
            elif EVEN_N and EVEN_K:
                w_tile = tl.load(w_ptrs + n * K)
            else:
                w_tile = tl.load(w_ptrs + n * K, mask=(lane_n < N - n)[:, None] & col_mask[None, :], other=0.0)
            acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee", out_dtype=ACC)
        if DSWIGLU:
            weight = tl.full((BLOCK_M,), 1.0, ACC)
            if HAS_WEIGHTS:
                weight = tl.load(routing_weights_ptr + slot).to(ACC)
            ds_row = tl.zeros((BLOCK_M,), ACC)
            # in slices of at most 64 columns: whole, the epilogue's values do not fit the registers
            # (128x256 tile, 8 warps, compiled for sm_90a: 2.2 KB of spills in halves, 20 bytes in quarters)
            pointers = (h_ptr, dx_ptr, scaled_a_ptr)
            rows = (weight, offs_m, row_mask)
            left, right = _halves(acc)
            if BLOCK_K >= 128:
                QUARTER: tl.constexpr = BLOCK_K // 4
                part0, part1 = _halves(left)
                part2, part3 = _halves(right)
                ds_row = _dswiglu_slice(part0, ds_row, rows, col0, K, pointers, ACC)
                ds_row = _dswiglu_slice(part1, ds_row, rows, col0 + QUARTER, K, pointers, ACC)
                ds_row = _dswiglu_slice(part2, ds_row, rows, col0 + 2 * QUARTER, K, pointers, ACC)
                ds_row = _dswiglu_slice(part3, ds_row, rows, col0 + 3 * QUARTER, K, pointers, ACC)
            else:
                ds_row = _dswiglu_slice(left, ds_row, rows, col0, K, pointers, ACC)
                ds_row = _dswiglu_slice(right, ds_row, rows, col0 + BLOCK_K // 2, K, pointers, ACC)
            tl.store(ds_ptr + tile_k.to(tl.int64) * M + slot, ds_row, mask=row_mask)
        else:
            out = acc.to(dx_ptr.dtype.element_ty)
            dx_row = offs_m.to(tl.int64)
            if SCATTER:
                dx_row = slot.to(tl.int64)
            dx_ptrs = dx_ptr + dx_row[:, None] * K + offs_k[None, :]
            mask = row_mask[:, None] & col_mask[None, :]
            store_tile(dx_desc, row0, col0, row_end, dx_ptrs, out, mask, K, USE_TMA_STORE)


def _launch_dX(
    name: str,
    dy: Tensor,
    weight: Tensor,
    rows: Rows,
    config: KernelConfigBackward_dX,
    outputs: tuple[Any, ...],
    *,
    dy_divisor: int,
    **flags: Any,
) -> None:
    """`outputs`: dx (or dh), its descriptor, h, scaled_a, ds, routing_weights; unused ones are any tensor."""
    experts, n, k = weight.shape
    m = rows.gather_indices.shape[0]
    dy_arg: Any = descriptor(dy, [config.block_m, config.block_n]) if config.use_tma_load_dy else dy
    w_arg: Any = descriptor(weight, [1, config.block_n, config.block_k]) if config.use_tma_load_w else weight
    programs = num_programs(dy.device, rows.sm_margin, 2 if config.num_warps <= 4 else 1)
    programs = min(programs, rows.table.max_tiles * cdiv(k, config.block_k))
    args = (dy_arg, w_arg, *outputs, *rows.arguments, experts, m, n, k)
    meta = {**kernel_arguments(config), **flags, "DY_DIVISOR": dy_divisor, "EVEN_N": n % config.block_n == 0}
    meta["EVEN_K"] = k % config.block_k == 0
    fixed = {"ACC": accumulator(dy.dtype), "GROUP_M": GROUP_M}
    launch(name, _grouped_dX, (programs,), *args, **meta, **fixed)


def dX_gemm(
    dy: Tensor,
    weight: Tensor,
    rows: Rows,
    config: KernelConfigBackward_dX,
    *,
    dy_divisor: int = 0,
    scatter: bool = False,
) -> Tensor:
    """dx [T*K,K] of dy [.,N]; `dy_divisor` d > 0 reads dy's row gather_indices // d; `scatter`: to token order."""
    m, k = rows.gather_indices.shape[0], weight.shape[2]
    dx = torch.empty(m, k, dtype=dy.dtype, device=dy.device)
    if m and config.warp_specialize:
        from .specialized_rows import specialized_dX

        specialized_dX(dy, weight, rows, config, dx, dy_divisor=dy_divisor, scatter=scatter)
    elif m:
        dx_desc = descriptor(dx, [config.block_m, config.block_k]) if config.use_tma_store else dx
        flags = {"SCATTER": scatter, "DSWIGLU": False, "HAS_WEIGHTS": False}
        _launch_dX("dX", dy, weight, rows, config, (dx, dx_desc, dx, dx, dx, dx), dy_divisor=dy_divisor, **flags)
    return dx


def dX_gemm_dswiglu(
    dy: Tensor,
    weight: Tensor,
    h: Tensor,
    routing_weights: Tensor | None,
    rows: Rows,
    config: KernelConfigBackward_dX,
    *,
    dy_divisor: int = 0,
    over_h: bool = False,
    in_parts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH [T*K,2I], s*A [T*K,I], ds [T*K] in float32 or float64, token order) of the down GEMM, in one kernel.

    `in_parts`: ds as it was made, [P,T*K], for who sums over P on the way. `over_h`: dH takes H's memory. A tile reads
    the part of H that it writes, before it writes it, and no other.
    """
    m, i = rows.gather_indices.shape[0], weight.shape[2]
    wide = torch.promote_types(dy.dtype, torch.float32)
    dh = h if over_h else torch.empty(m, 2 * i, dtype=dy.dtype, device=dy.device)
    scaled_a = torch.empty(m, i, dtype=dy.dtype, device=dy.device)
    halves = 2 if config.warp_specialize else 1  # what its epilogue sums at a time
    ds = torch.empty(halves * cdiv(i, config.block_k), m, dtype=wide, device=dy.device)
    if m and config.warp_specialize:
        from .specialized_dswiglu import specialized_dX_dswiglu

        specialized_dX_dswiglu(dy, weight, h, routing_weights, rows, config, dh, scaled_a, ds, dy_divisor=dy_divisor)
    elif m:
        weights = h if routing_weights is None else routing_weights
        flags = {"SCATTER": False, "DSWIGLU": True, "HAS_WEIGHTS": routing_weights is not None}
        outputs = (dh, dh, h, scaled_a, ds, weights)
        _launch_dX("dX_dswiglu", dy, weight, rows, config, outputs, dy_divisor=dy_divisor, **flags)
    return dh, scaled_a, ds if in_parts else sum_parts(ds)
