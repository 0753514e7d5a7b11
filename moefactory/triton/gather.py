"""rows[r] = source[index[r] // DIVISOR]: a copy of token rows in expert order, at the speed of memory.

argument   shape                  order
source     [T, H] or [T*K, H]     token order
index      [T*K]                  the plan's gather_indices
rows       [T*K, H]               expert order
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, power_of_2

BLOCK_H = 1024
BLOCK_ROWS = 4


@triton.jit
def _gather_rows(
    source_ptr, index_ptr, rows_ptr, M, H, DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr
):
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    row_mask = offs_m < M
    mask = row_mask[:, None] & (offs_h < H)[None, :]
    source = tl.load(index_ptr + offs_m, mask=row_mask, other=0) // DIVISOR
    tile = tl.load(source_ptr + source.to(tl.int64)[:, None] * H + offs_h[None, :], mask=mask, other=0.0)
    tl.store(rows_ptr + offs_m.to(tl.int64)[:, None] * H + offs_h[None, :], tile, mask=mask)


def gather_rows(source: Tensor, index: Tensor, divisor: int) -> Tensor:
    """[T*K,H]: row r is row ``index[r] // divisor`` of `source`."""
    count, width = index.shape[0], source.shape[1]
    rows = torch.empty(count, width, dtype=source.dtype, device=source.device)
    if count:
        block = min(power_of_2(width), BLOCK_H)
        grid = (cdiv(count, BLOCK_ROWS), cdiv(width, block))
        meta = {"DIVISOR": divisor, "BLOCK_M": BLOCK_ROWS, "BLOCK_H": block}
        launch("gather_rows", _gather_rows, grid, source, index, rows, count, width, **meta)
    return rows
