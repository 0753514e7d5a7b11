"""dweight[e][n, k] = sum over the rows r of expert e of dy[row(r), n] * x[row(r), k], the weight gradient.

    argument   shape                  order
    dy         [T*K, N], or [T, N]    expert order; token order when read through gather_indices // DY_DIVISOR
    x          [T*K, K], or [T, K]    the same with X_DIVISOR
    dweight    [E, N, K]              every element is written: an expert without rows gets zeros, so no memset before

The sum runs in expert order, so it is the same at every call. An expert's last, ragged step is apart from the loop:
there both operands are masked to zero, since 0 * NaN of a neighbour's row would be NaN, and the loop has no masks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import KernelConfigBackward_dW
from .forward import Rows, kernel_arguments
from .launch import accumulator, cdiv, descriptor, launch, num_programs
from .schedule import tile_of

GROUP_N = 8


@triton.jit
def _row_of(row, gather_indices_ptr, mask, DIVISOR: tl.constexpr):
    """The operand's row for expert-order rows `row`."""
    if DIVISOR > 0:
        return tl.load(gather_indices_ptr + row, mask=mask, other=0) // DIVISOR
    else:
        return row


@triton.jit
def _rows_of_expert(tile, tiles, per_expert, tables, lane_m, DY_DIVISOR: tl.constexpr, X_DIVISOR: tl.constexpr):
    """(first row, end, dy's rows, x's rows of the first step) of a tile's expert; past the last tile, of the last."""
    expert_offsets_ptr, gather_indices_ptr = tables
    expert = tl.minimum(tile, tiles - 1) // per_expert
    start = tl.load(expert_offsets_ptr + expert)
    end = tl.load(expert_offsets_ptr + expert + 1)
    row = start + lane_m
    dy_row = _row_of(row, gather_indices_ptr, row < end, DY_DIVISOR)
    return start, end, dy_row, _row_of(row, gather_indices_ptr, row < end, X_DIVISOR)


@triton.jit
def _grouped_dW(
    dy,
    x,
    dy_ptr,
    x_ptr,
    dw_ptr,
    dw_desc,
    expert_offsets_ptr,
    gather_indices_ptr,
    num_experts,
    N,
    K,
    DY_DIVISOR: tl.constexpr,
    X_DIVISOR: tl.constexpr,
    USE_TMA_LOAD_DY: tl.constexpr,
    USE_TMA_LOAD_X: tl.constexpr,
    USE_TMA_STORE: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_n = tl.cdiv(N, BLOCK_N)
    num_k = tl.cdiv(K, BLOCK_K)
    lane_m = tl.arange(0, BLOCK_M)
    tables = (expert_offsets_ptr, gather_indices_ptr)
    tiles = num_experts * num_n * num_k
    following = _rows_of_expert(tl.program_id(0), tiles, num_n * num_k, tables, lane_m, DY_DIVISOR, X_DIVISOR)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        # what the next tile starts from is loaded under this one's products, as each step's rows are under the last
        start, end, dy_row, x_row = following
        next_tile = tile + tl.num_programs(0)
        following = _rows_of_expert(next_tile, tiles, num_n * num_k, tables, lane_m, DY_DIVISOR, X_DIVISOR)
        expert = tile // (num_n * num_k)
        tile_n, tile_k = tile_of(tile % (num_n * num_k), num_n, num_k, GROUP_N)
        whole = start + (end - start) // BLOCK_M * BLOCK_M
        n0 = tile_n * BLOCK_N
        k0 = tile_k * BLOCK_K
        offs_n = n0 + tl.arange(0, BLOCK_N)
        offs_k = k0 + tl.arange(0, BLOCK_K)
        # columns past the end are masked, not clamped: a clamped index is no longer known to be contiguous, and the
        # loads then are neither wide nor pipelined (3 % of cuBLAS's speed, measured)
        dy_mask = (offs_n < N)[None, :]
        x_mask = (offs_k < K)[None, :]
        dy_ptrs = dy_ptr + offs_n[None, :]
        x_ptrs = x_ptr + offs_k[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_K), ACC)
        for m in tl.range(start, whole, BLOCK_M):
            if USE_TMA_LOAD_DY:
                dy_tile = dy.load([m, n0])
            elif EVEN_N:
                dy_tile = tl.load(dy_ptrs + dy_row.to(tl.int64)[:, None] * N)  # [BLOCK_M, BLOCK_N]
            else:
                dy_tile = tl.load(dy_ptrs + dy_row.to(tl.int64)[:, None] * N, mask=dy_mask, other=0.0)
            if USE_TMA_LOAD_X:
                x_tile = x.load([m, k0])
            elif EVEN_K:
                x_tile = tl.load(x_ptrs + x_row.to(tl.int64)[:, None] * K)  # [BLOCK_M, BLOCK_K]
            else:
                x_tile = tl.load(x_ptrs + x_row.to(tl.int64)[:, None] * K, mask=x_mask, other=0.0)
            # one step ahead, else the index load takes a stage of the pipeline
            next_row = m + BLOCK_M + lane_m
            dy_row = _row_of(next_row, gather_indices_ptr, next_row < end, DY_DIVISOR)
            x_row = _row_of(next_row, gather_indices_ptr, next_row < end, X_DIVISOR)
            acc = tl.dot(tl.trans(dy_tile), x_tile, acc, input_precision="ieee", out_dtype=ACC)
        if whole < end:
            row_mask = (whole + lane_m < end)[:, None]
            dy_tile = tl.load(dy_ptrs + dy_row.to(tl.int64)[:, None] * N, mask=row_mask & dy_mask, other=0.0)
            x_tile = tl.load(x_ptrs + x_row.to(tl.int64)[:, None] * K, mask=row_mask & x_mask, other=0.0)
            acc = tl.dot(tl.trans(dy_tile), x_tile, acc, input_precision="ieee", out_dtype=ACC)
        out = acc.to(dw_ptr.dtype.element_ty)
        if USE_TMA_STORE:
            dw_desc.store([expert, n0, k0], out.reshape(1, BLOCK_N, BLOCK_K))
        else:
            dw_ptrs = dw_ptr + expert.to(tl.int64) * N * K + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
            tl.store(dw_ptrs, out, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :])


def dW_gemm(
    dy: Tensor,
    x: Tensor,
    rows: Rows,
    num_experts: int,
    config: KernelConfigBackward_dW,
    *,
    dy_divisor: int = 0,
    x_divisor: int = 0,
) -> Tensor:
    """dweight [E,N,K] of dy [.,N] and x [.,K]; a divisor d > 0 reads that operand's row gather_indices // d."""
    n, k = dy.shape[1], x.shape[1]
    dw = torch.empty(num_experts, n, k, dtype=x.dtype, device=x.device)
    if not rows.gather_indices.shape[0]:
        return dw.zero_()  # no rows, no addresses to give to a kernel
    if config.warp_specialize:
        from .specialized_dW import specialized_dW

        specialized_dW(dy, x, rows, config, dw, dy_divisor=dy_divisor, x_divisor=x_divisor)
        return dw
    dy_arg: Any = descriptor(dy, [config.block_m, config.block_n]) if config.use_tma_load_dy else dy
    x_arg: Any = descriptor(x, [config.block_m, config.block_k]) if config.use_tma_load_x else x
    dw_desc: Any = descriptor(dw, [1, config.block_n, config.block_k]) if config.use_tma_store else dw
    tiles = num_experts * cdiv(n, config.block_n) * cdiv(k, config.block_k)
    programs = min(num_programs(x.device, rows.sm_margin, 2 if config.num_warps <= 4 else 1), tiles)
    launch(
        "dW",
        _grouped_dW,
        (programs,),
        *(dy_arg, x_arg, dy, x, dw, dw_desc, rows.expert_offsets, rows.gather_indices, num_experts, n, k),
        DY_DIVISOR=dy_divisor,
        X_DIVISOR=x_divisor,
        EVEN_N=n % config.block_n == 0,
        EVEN_K=k % config.block_k == 0,
        ACC=accumulator(x.dtype),
        GROUP_N=GROUP_N,
        **kernel_arguments(config),
    )
    return dw
