"""RoutingPlan: a stable counting sort of the T*K slots by expert, without atomics; three launches, fewer for few slots.

    histogram   tile_counts[b, e] = how many slots of block b go to expert e
    prefix      tile_starts[b, e] = how many of the blocks before b do; token_counts_by_expert[e] = how many in all
    positions   row(slot) = offsets[e] + tile_starts[b, e] + how many slots before it in its block go to e too

Up to FEW_BLOCKS blocks each program of `positions` adds up the counts itself, at most 32 KB: no prefix.

In the whole block the router may count (`router.counted`), and positions also makes the tile table of the first GEMM,
unless that is long: two launches less.

Group E stands for the dropped slots (ids outside [0, E)), which come last.

    array            shape           index -> value
    selected         [T*K] int64     flat slot -> expert
    tile_counts      [blocks, E+1]   (block, group) -> slots
    offsets          [E+2] int32     group -> its first expert-order row; then T*K
    gather, scatter  [T*K] int32     expert-order row -> slot, slot -> expert-order row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import RoutingPlan, check_selected
from .launch import cdiv, launch, on_device, power_of_2
from .library import call, define
from .routed import Three, apart, parts_planned
from .schedule import TILES_PER_PROGRAM, WORDS, most_tiles, store_tiles

BLOCK = 128  # slots per program; their order within is found by comparing all pairs
BLOCK_ALONE = 64  # slots that one program sorts faster than several launches do
FEW_BLOCKS, MAX_FEW_GROUPS = 32, 256  # of slots and their groups, whose counts a program holds in its registers
PREFIX_GROUPS = 2
PREFIX_BLOCKS = 1024


@triton.jit
def _group_of(selected_ptr, slot, mask, E):
    """The group of each slot: its expert, E if that is outside of [0, E), E + 1 for lanes past the end."""
    expert = tl.load(selected_ptr + slot, mask=mask, other=0)
    group = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return tl.where(mask, group, E + 1)


@triton.jit
def _histogram(selected_ptr, tile_counts_ptr, M, E, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    group = _group_of(selected_ptr, slot, slot < M, E)
    # the mask keeps lanes past the end out: a value of GROUPS or more would be counted in the last bin
    counts = tl.histogram(group, GROUPS, mask=slot < M)
    offs_g = tl.arange(0, GROUPS)
    tl.store(tile_counts_ptr + block.to(tl.int64) * (E + 1) + offs_g, counts, mask=offs_g < E + 1)


@triton.jit
def _prefix(
    tile_counts_ptr, tile_starts_ptr, counts_ptr, blocks, E, PREFIX_BLOCKS: tl.constexpr, PREFIX_GROUPS: tl.constexpr
):
    offs_g = tl.program_id(0) * PREFIX_GROUPS + tl.arange(0, PREFIX_GROUPS)
    total = tl.zeros((PREFIX_GROUPS,), tl.int32)
    for first in range(0, blocks, PREFIX_BLOCKS):
        offs_b = first + tl.arange(0, PREFIX_BLOCKS)
        mask = (offs_b < blocks)[:, None] & (offs_g < E + 1)[None, :]
        ptrs = offs_b.to(tl.int64)[:, None] * (E + 1) + offs_g[None, :]
        counts = tl.load(tile_counts_ptr + ptrs, mask=mask, other=0)  # [PREFIX_BLOCKS, PREFIX_GROUPS]
        starts = total[None, :] + tl.cumsum(counts, axis=0) - counts
        tl.store(tile_starts_ptr + ptrs, starts, mask=mask)
        total += tl.sum(counts, axis=0)
    tl.store(counts_ptr + offs_g, total, mask=offs_g < E + 1)


@triton.jit
def _plan_alone(
    selected_ptr,
    counts_ptr,
    offsets_ptr,
    gather_ptr,
    scatter_ptr,
    M,
    E,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All three steps in one program, for at most BLOCK slots: of few tokens' time a launch is a large part."""
    offs_g = tl.arange(0, GROUPS)
    slot = tl.arange(0, BLOCK)
    mask = slot < M
    group = _group_of(selected_ptr, slot, mask, E)
    mine = offs_g[None, :] == group[:, None]  # [BLOCK, GROUPS]
    counts = tl.sum(mine.to(tl.int32), axis=0)
    counts = tl.where(offs_g < E + 1, counts, 0)  # lanes past the end have a group past the last
    starts = tl.cumsum(counts, axis=0) - counts
    tl.store(counts_ptr + offs_g, counts, mask=offs_g < E + 1)
    tl.store(offsets_ptr + offs_g, starts, mask=offs_g < E + 1)
    tl.store(offsets_ptr + E + 1, M)
    earlier = (group[None, :] == group[:, None]) & (slot[None, :] < slot[:, None])  # [BLOCK, BLOCK]
    row = tl.sum(tl.where(mine, starts[None, :], 0), axis=1) + tl.sum(earlier.to(tl.int32), axis=1)
    tl.store(scatter_ptr + slot, row, mask=mask)
    tl.store(gather_ptr + row, slot, mask=mask)


@triton.jit
def _counts_and_starts(tile_counts_ptr, tile_starts_ptr, counts_ptr, block, blocks, offs_g, E, BLOCKS: tl.constexpr):
    """(slots of each group, those of the blocks before this one); with BLOCKS from the counts of all of them."""
    inside = offs_g < E + 1
    if BLOCKS > 0:
        offs_b = tl.arange(0, BLOCKS)
        offs = offs_b.to(tl.int64)[:, None] * (E + 1) + offs_g[None, :]  # [BLOCKS, GROUPS]
        tile_counts = tl.load(tile_counts_ptr + offs, mask=(offs_b < blocks)[:, None] & inside[None, :], other=0)
        counts = tl.sum(tile_counts, axis=0)
        if block == 0:
            tl.store(counts_ptr + offs_g, counts, mask=inside)
        return counts, tl.sum(tl.where((offs_b < block)[:, None], tile_counts, 0), axis=0)
    else:
        counts = tl.load(counts_ptr + offs_g, mask=inside, other=0)
        return counts, tl.load(tile_starts_ptr + block.to(tl.int64) * (E + 1) + offs_g, mask=inside, other=0)


@triton.jit
def _positions(
    selected_ptr,
    tile_counts_ptr,
    tile_starts_ptr,
    counts_ptr,
    offsets_ptr,
    gather_ptr,
    scatter_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    M,
    E,
    max_tiles,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0)
    offs_g = tl.arange(0, GROUPS)
    of_all = (tile_counts_ptr, tile_starts_ptr, counts_ptr)
    counts, starts = _counts_and_starts(*of_all, block, tl.num_programs(0), offs_g, E, BLOCKS)
    ends = tl.cumsum(counts, axis=0)
    if block == 0:
        tl.store(offsets_ptr + offs_g, ends - counts, mask=offs_g < E + 1)
        tl.store(offsets_ptr + E + 1, M)
    if TILES > 0:
        table = (tile_expert_ptr, tile_row_ptr, num_tiles_ptr)
        store_tiles(table, ends - counts, counts, offs_g, max_tiles, BLOCK_M, TILES)
    lane = tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    mask = slot < M
    group = _group_of(selected_ptr, slot, mask, E)
    base = tl.gather(ends - counts + starts, tl.minimum(group, GROUPS - 1), axis=0)  # of lanes past the end: anything
    # summed over its rows: a thread holds whole columns, and adds without asking others
    earlier = (group[:, None] == group[None, :]) & (lane[:, None] < lane[None, :])  # [BLOCK, BLOCK]
    row = base + tl.sum(earlier.to(tl.int32), axis=0)
    tl.store(scatter_ptr + slot, row, mask=mask)
    tl.store(gather_ptr + row, slot, mask=mask)


def _fake(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = apart(parts_planned(num_experts, selected.shape[0] * selected.shape[1]), selected.device)
    return selected.new_empty(num_experts + 1, dtype=torch.int32), *indices


@define("plan(Tensor selected, int num_experts) -> (Tensor, Tensor, Tensor, Tensor)", _fake)
def plan_tensors(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(counts [E+1], offsets [E+2], gather [T*K], scatter [T*K]), int32, of selected experts [T,K]."""
    indices = apart(parts_planned(num_experts, selected.numel()), selected.device)
    counts, _ = plan_and_table(selected, num_experts, None, 0, indices)
    return counts, *indices


def plan_and_table(
    selected: Tensor, num_experts: int, tile_counts: Tensor | None, block_m: int, indices: Three
) -> tuple[Tensor, Three | None]:
    """Fill `indices` (offsets, gather, scatter) as `plan_tensors`.

    Args:
        selected: [T,K].
        num_experts: E.
        tile_counts: the histogram, where the router has made it (`router.select_and_count`, of BLOCK slots).
        block_m: the height of the row tiles for which a table is wanted, or 0.
        indices: what is filled.

    Returns:
        counts [E+1], and the table, where it is made along the way.
    """
    rows, device = selected.numel(), selected.device
    offsets, gather, scatter = indices
    counts = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    if not rows:
        offsets.zero_()
        return counts.zero_(), None
    selected = selected.contiguous()
    groups = power_of_2(num_experts + 1)
    if rows <= BLOCK_ALONE:
        tensors = (selected, counts, offsets, gather, scatter)
        with on_device(device):
            launch(
                "plan_alone",
                _plan_alone,
                (1,),
                *tensors,
                rows,
                num_experts,
                GROUPS=groups,
                BLOCK=max(16, power_of_2(rows)),
            )
        return counts, None
    blocks = cdiv(rows, BLOCK)
    max_tiles = most_tiles(num_experts + 1, rows, block_m) if block_m else 0
    tiles = power_of_2(cdiv(max_tiles, blocks)) if 0 < max_tiles <= TILES_PER_PROGRAM * blocks else 0
    made = tuple(torch.empty(n, dtype=torch.int32, device=device) for n in (max_tiles, max_tiles, WORDS) if tiles)
    block = {"GROUPS": groups, "BLOCK": BLOCK}
    with on_device(device):
        if tile_counts is None:
            tile_counts = torch.empty(blocks, num_experts + 1, dtype=torch.int32, device=device)
            launch("plan_histogram", _histogram, (blocks,), selected, tile_counts, rows, num_experts, **block)
        few = blocks <= FEW_BLOCKS and groups <= MAX_FEW_GROUPS
        tile_starts = tile_counts if few else _starts(tile_counts, counts)
        args = (selected, tile_counts, tile_starts, counts, offsets, gather, scatter, *(made or (counts,) * 3))
        table = {"BLOCK_M": max(block_m, 1), "TILES": tiles, "BLOCKS": max(2, power_of_2(blocks)) if few else 0}
        launch("plan_positions", _positions, (blocks,), *args, rows, num_experts, max_tiles, **block, **table)
    return counts, (made[0], made[1], made[2]) if made else None


def _starts(tile_counts: Tensor, counts: Tensor) -> Tensor:
    """tile_starts [blocks, E+1]; fills counts [E+1]."""
    blocks, groups = tile_counts.shape
    tile_starts = torch.empty_like(tile_counts)
    prefix = {"PREFIX_BLOCKS": min(PREFIX_BLOCKS, power_of_2(blocks)), "PREFIX_GROUPS": PREFIX_GROUPS}
    grid = (cdiv(groups, PREFIX_GROUPS),)
    launch("plan_prefix", _prefix, grid, tile_counts, tile_starts, counts, blocks, groups - 1, **prefix)
    return tile_starts


def make_plan(selected_experts: Tensor, num_experts: int) -> RoutingPlan:
    """The same plan as `moefactory.routing.make_plan`, by kernels."""
    check_selected(selected_experts)
    counts, offsets, gather, scatter = call(plan_tensors, selected_experts, num_experts)
    return RoutingPlan(counts[:num_experts], gather, scatter, selected_experts.shape[1], offsets)
