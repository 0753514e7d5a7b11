"""tiles[t] = (expert, first row): which rows of which expert the t-th row tile of a grouped GEMM computes.

    array            shape            index -> value
    expert_offsets   [E+2] int32      expert -> its first expert-order row; group E is the dropped slots, then T*K
    tile_expert      [max] int32      row tile -> expert (E: dropped rows, which the kernels store as zeros)
    tile_row         [max] int32      row tile -> its first row
    num_tiles        [WORDS] int32    how many tiles there are (the rest of the arrays is not written); then zeros, in
                                      which the programs of a launch count, and which they set back (`turns`)

Kernels that count in a table therefore run one after the other, as on one stream; two would take each other's tiles.

`max` = T*K // BLOCK_M + min(E + 1, T*K) holds for any routing, so that nothing is read back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch, power_of_2

TILES_PER_PROGRAM = 32
CHUNKS = 4  # words of `num_tiles` before those of each program: 16 bytes
PROGRAMS = 256  # how many programs may count in it; there is no GPU with so many multiprocessors
WORDS = CHUNKS + PROGRAMS
_COUNTERS = tl.constexpr(WORDS - 1)
_ROOM = tl.constexpr(2 * PROGRAMS)


@triton.jit
def _tile_table(
    expert_offsets_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    max_tiles,
    num_groups,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
    TILES: tl.constexpr,
):
    offs_g = tl.arange(0, GROUPS)
    group_mask = offs_g < num_groups
    first = tl.load(expert_offsets_ptr + offs_g, mask=group_mask, other=0)  # [GROUPS]
    last = tl.load(expert_offsets_ptr + offs_g + 1, mask=group_mask, other=0)
    table = (tile_expert_ptr, tile_row_ptr, num_tiles_ptr)
    store_tiles(table, first, last - first, offs_g, max_tiles, BLOCK_M, TILES)


@triton.jit
def store_tiles(table, first, counts, offs_g, max_tiles, BLOCK_M: tl.constexpr, TILES: tl.constexpr):
    """This program's TILES entries of the table of groups with `counts` rows from `first` on."""
    tile_expert_ptr, tile_row_ptr, num_tiles_ptr = table
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, axis=0)
    total = tl.sum(tiles, axis=0)
    offs_t = tl.program_id(0) * TILES + tl.arange(0, TILES)
    group = tl.sum((ends[None, :] <= offs_t[:, None]).to(tl.int32), axis=1)  # [TILES]
    mine = offs_g[None, :] == group[:, None]
    before = tl.sum(tl.where(mine, (ends - tiles)[None, :], 0), axis=1)
    start = tl.sum(tl.where(mine, first[None, :], 0), axis=1)
    tile_mask = (offs_t < total) & (offs_t < max_tiles)
    tl.store(tile_expert_ptr + offs_t, group, mask=tile_mask)
    tl.store(tile_row_ptr + offs_t, start + (offs_t - before) * BLOCK_M, mask=tile_mask)
    if tl.program_id(0) == 0:
        tl.store(num_tiles_ptr, total)
        store_counters(num_tiles_ptr)


@triton.jit
def store_counters(num_tiles_ptr):
    """Zeros behind the number of tiles."""
    word = tl.arange(0, _ROOM)
    tl.store(num_tiles_ptr + 1 + word, tl.zeros((_ROOM,), tl.int32), mask=word < _COUNTERS)


@triton.jit
def tile_of(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """(row tile, column tile): GROUP_M row tiles share a sweep over the columns, so that weights stay in L2."""
    width = GROUP_M * num_n
    first_m = (tile // width) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + (tile % width) % rows, (tile % width) // rows


@triton.jit
def rows_of_tile(tile, num_m, num_n, rows, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(expert, first row, the expert's end, slots [BLOCK_M]) of a tile; past the last tile, those of the last.

    Four loads that wait for one another: a persistent program asks for its next tile's while it computes this one.
    """
    tile_expert_ptr, tile_row_ptr, expert_offsets_ptr, gather_indices_ptr = rows
    tile_m, _ = tile_of(tl.minimum(tile, num_m * num_n - 1), num_m, num_n, GROUP_M)
    expert = tl.load(tile_expert_ptr + tile_m)
    row0 = tl.load(tile_row_ptr + tile_m)
    row_end = tl.load(expert_offsets_ptr + expert + 1)
    offs_m = row0 + tl.arange(0, BLOCK_M)
    slot = tl.load(gather_indices_ptr + offs_m, mask=offs_m < row_end, other=0)
    return expert, row0, row_end, slot


@dataclass(slots=True)
class TileTable:
    """The row tiles of one block size."""

    tile_expert: Tensor
    tile_row: Tensor
    num_tiles: Tensor
    max_tiles: int


def most_tiles(groups: int, num_rows: int, block_m: int) -> int:
    """How many row tiles there are at most, whatever the routing; also where a shape has no number yet."""
    return num_rows // block_m + torch.sym_min(groups, num_rows)


def tile_table(expert_offsets: Tensor, num_rows: int, block_m: int) -> TileTable:
    """Cut every expert's rows into tiles of `block_m`: one launch, no host synchronisation."""
    groups = expert_offsets.shape[0] - 1
    max_tiles = most_tiles(groups, num_rows, block_m)
    tile_expert = torch.empty(max_tiles, dtype=torch.int32, device=expert_offsets.device)
    tile_row = torch.empty_like(tile_expert)
    num_tiles = torch.empty(WORDS, dtype=torch.int32, device=expert_offsets.device)
    grid = (cdiv(max_tiles, TILES_PER_PROGRAM),)
    meta = {"BLOCK_M": block_m, "GROUPS": power_of_2(groups), "TILES": TILES_PER_PROGRAM}
    launch("tile_table", _tile_table, grid, expert_offsets, tile_expert, tile_row, num_tiles, max_tiles, groups, **meta)
    return TileTable(tile_expert, tile_row, num_tiles, max_tiles)
