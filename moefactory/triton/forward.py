"""y[r, n] = sum over k of x[row(r), k] * weight[e(r)][n, k], the forward grouped GEMM.

    argument         shape                       order
    x                [T*K, K], or [T, K]         expert order; token order with PERMUTE_X (gathered in the load)
    weight           [E, N, K]                   Hugging Face's layout; with SWIGLU N = 2I, gate rows then up rows
    y                [T*K, N], SWIGLU [T*K, I]   expert order; token order with PERMUTE_Y (scattered in the store)
    h                [T*K, 2I]                   expert order, SWIGLU and STORE_H only: what the backward needs

Rows of dropped slots (group E) are stored as zeros. Persistent: program p computes tiles p, p + programs, ...
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import KernelConfigForward
from .activation import swiglu
from .launch import accumulator, cdiv, descriptor, launch, num_programs
from .schedule import TileTable, rows_of_tile, tile_of

GROUP_M = 8


@triton.jit
def store_tile(desc, row0, col0, row_end, ptrs, tile, mask, width, USE_TMA_STORE: tl.constexpr):
    """Store a tile at (row0, col0): by TMA where asked for and whole, else through pointers.

    A tile that is cut off by its expert's end or by the width of its half would overwrite what lies behind.
    """
    if USE_TMA_STORE:
        if (row0 + tile.shape[0] <= row_end) & (col0 % width + tile.shape[1] <= width):
            desc.store([row0, col0], tile)
        else:
            tl.store(ptrs, tile, mask=mask)
    else:
        tl.store(ptrs, tile, mask=mask)


@triton.jit
def _grouped_forward(
    x,
    w,
    y_ptr,
    y_desc,
    h_ptr,
    h_desc,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    expert_offsets_ptr,
    gather_indices_ptr,
    num_experts,
    N,
    K,
    TOP_K: tl.constexpr,
    PERMUTE_X: tl.constexpr,
    PERMUTE_Y: tl.constexpr,
    SWIGLU: tl.constexpr,
    STORE_H: tl.constexpr,
    USE_TMA_LOAD_X: tl.constexpr,
    USE_TMA_LOAD_W: tl.constexpr,
    USE_TMA_STORE: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    OUT: tl.constexpr = y_ptr.dtype.element_ty
    OUT_N: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N  # columns of y per tile
    out_width = N // 2 if SWIGLU else N
    num_m = tl.load(num_tiles_ptr)
    num_n = tl.cdiv(out_width, OUT_N)
    offs_k = tl.arange(0, BLOCK_K)
    lane_n = tl.arange(0, BLOCK_N)
    tables = (tile_expert_ptr, tile_row_ptr, expert_offsets_ptr, gather_indices_ptr)
    following = rows_of_tile(tl.program_id(0), num_m, num_n, tables, BLOCK_M, GROUP_M)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        expert, row0, row_end, slot = following
        if tile + tl.num_programs(0) < num_m * num_n:  # of few tokens a program has one tile: nothing to wait for
            following = rows_of_tile(tile + tl.num_programs(0), num_m, num_n, tables, BLOCK_M, GROUP_M)
        _, tile_n = tile_of(tile, num_m, num_n, GROUP_M)
        offs_m = row0 + tl.arange(0, BLOCK_M)
        row_mask = offs_m < row_end
        # rows past the end read a row that exists and are never stored: no mask inside the loop
        col0 = tile_n * OUT_N
        x_row = tl.where(row_mask, offs_m, row0)
        if PERMUTE_X:
            x_row = slot // TOP_K
        if not USE_TMA_LOAD_X:
            x_ptrs = x + x_row.to(tl.int64)[:, None] * K + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
        if not USE_TMA_LOAD_W:
            col = col0 + lane_n % OUT_N
            w_row = (lane_n // OUT_N) * out_width + tl.where(col < out_width, col, 0)
            w_ptrs = w + expert.to(tl.int64) * N * K + w_row.to(tl.int64)[:, None] * K + offs_k[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        k_end = tl.where(expert < num_experts, K, 0)  # dropped rows: no product, zeros
        for k in tl.range(0, k_end, BLOCK_K):
            if USE_TMA_LOAD_X:
                x_tile = x.load([row0, k])
            elif EVEN_K:
                x_tile = tl.load(x_ptrs + k)
            else:
                x_tile = tl.load(x_ptrs + k, mask=(offs_k < K - k)[None, :], other=0.0)
            if USE_TMA_LOAD_W:
                if SWIGLU:
                    w_tile = w.load([expert * 2, col0, k]).reshape(BLOCK_N, BLOCK_K)
                else:
                    w_tile = w.load([expert, col0, k]).reshape(BLOCK_N, BLOCK_K)
            elif EVEN_K:
                w_tile = tl.load(w_ptrs + k)
            else:
                w_tile = tl.load(w_ptrs + k, mask=(offs_k < K - k)[None, :], other=0.0)
            acc = tl.dot(x_tile, tl.trans(w_tile), acc, input_precision="ieee", out_dtype=ACC)
        offs_n = col0 + tl.arange(0, OUT_N)
        mask = row_mask[:, None] & (offs_n < out_width)[None, :]
        y_row = offs_m.to(tl.int64)
        if PERMUTE_Y:
            y_row = slot.to(tl.int64)
        if SWIGLU:
            # H is rounded before the activation, as it is when the activation is a kernel of its own
            halves = tl.permute(tl.reshape(acc.to(OUT), (BLOCK_M, 2, OUT_N)), (0, 2, 1))
            gate, up = tl.split(halves)  # [BLOCK_M, OUT_N] each
            if STORE_H:
                h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
                store_tile(h_desc, row0, col0, row_end, h_ptrs, gate, mask, out_width, USE_TMA_STORE)
                store_tile(
                    h_desc, row0, out_width + col0, row_end, h_ptrs + out_width, up, mask, out_width, USE_TMA_STORE
                )
            out = swiglu(gate.to(ACC), up.to(ACC)).to(OUT)
        else:
            out = acc.to(OUT)
        y_ptrs = y_ptr + y_row[:, None] * out_width + offs_n[None, :]
        store_tile(y_desc, row0, col0, row_end, y_ptrs, out, mask, out_width, USE_TMA_STORE)


@dataclass(slots=True)
class Rows:
    """The rows of a launch: the plan's tensors on the device and the tile table of its block size."""

    expert_offsets: Tensor  # [E+2]
    gather_indices: Tensor  # [T*K]
    top_k: int
    table: TileTable
    sm_margin: int = 0  # multiprocessors that are left to others

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The tensors in the kernels' order."""
        table = self.table
        return table.tile_expert, table.tile_row, table.num_tiles, self.expert_offsets, self.gather_indices


def forward_gemm(
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    config: KernelConfigForward,
    *,
    permute_x: bool = False,
    permute_y: bool = False,
    swiglu: bool = False,
    store_h: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, h): y [T*K,N] or with `swiglu` [T*K,I]; h [T*K,2I] with `swiglu` and `store_h`, else None."""
    experts, n, k = weight.shape
    m = rows.gather_indices.shape[0]
    width = n // 2 if swiglu else n
    y = torch.empty(m, width, dtype=x.dtype, device=x.device)
    h = torch.empty(m, n, dtype=x.dtype, device=x.device) if swiglu and store_h else None
    if not m:
        return y, h
    if config.warp_specialize:
        from .specialized_rows import specialized_forward

        fused = {"permute_x": permute_x, "permute_y": permute_y, "swiglu": swiglu}
        specialized_forward(x, weight, rows, config, y, h, **fused)
        return y, h
    out_n = config.block_n // 2 if swiglu else config.block_n
    x_arg: Any = descriptor(x, [config.block_m, config.block_k]) if config.use_tma_load_x else x
    w_arg: Any = weight
    if config.use_tma_load_w and swiglu:
        w_arg = descriptor(weight.view(2 * experts, n // 2, k), [2, out_n, config.block_k])
    elif config.use_tma_load_w:
        w_arg = descriptor(weight, [1, config.block_n, config.block_k])
    y_desc: Any = descriptor(y, [config.block_m, out_n]) if config.use_tma_store else y
    h_desc = descriptor(h, [config.block_m, out_n]) if config.use_tma_store and h is not None else y_desc
    programs = num_programs(x.device, rows.sm_margin, 2 if config.num_warps <= 4 else 1)
    programs = min(programs, rows.table.max_tiles * cdiv(width, out_n))
    launch(
        "forward_up" if swiglu else "forward",
        _grouped_forward,
        (programs,),
        *(x_arg, w_arg, y, y_desc, y if h is None else h, h_desc, *rows.arguments, experts, n, k),
        **_constants(config, k, x.dtype, rows.top_k, permute_x, permute_y, swiglu, h is not None),
    )
    return y, h


@lru_cache(maxsize=1024)
def _constants(
    config: KernelConfigForward,
    k: int,
    dtype: torch.dtype,
    top_k: int,
    permute_x: bool,
    permute_y: bool,
    swiglu: bool,
    store_h: bool,
) -> dict[str, Any]:
    """The constexprs of a launch; made once, as they take longer than the launch."""
    flags = {"PERMUTE_X": permute_x, "PERMUTE_Y": permute_y, "SWIGLU": swiglu, "STORE_H": store_h}
    rest = {"TOP_K": top_k, "EVEN_K": k % config.block_k == 0, "ACC": accumulator(dtype), "GROUP_M": GROUP_M}
    return {**flags, **rest, **kernel_arguments(config)}


@lru_cache(maxsize=1024)
def kernel_arguments(config: Any) -> dict[str, Any]:
    """A kernel config as launch arguments: constexprs in capitals, num_warps and num_stages as Triton names them.

    ``gather_first`` is not the kernel's: it decides what the kernel is given; ``warp_specialize``, which kernel it is.
    """
    fields = [name for name in config.__dataclass_fields__ if name not in {"gather_first", "warp_specialize"}]
    names = {name: name if name.startswith("num_") else name.upper() for name in fields}
    return {argument: getattr(config, name) for name, argument in names.items()}
