"""y[r] = x[row(r)] @ weight[e(r)], warp-specialised, for forward and dX alike: the equations of these two files.

    MODE      product                                   stored
    PLAIN     forward: x @ W^T; dX: dy @ W (TRANS_W)    y [T*K, width], in expert order or scattered (SCATTER)
    SWIGLU    H = x @ W^T, [gate | up] of a tile        A = silu(gate) * up [T*K, I]; with STORE_H also H [T*K, 2I]

Two consumers multiply the upper and the lower 64 rows of a tile. A finished tile is rounded, kept in registers, and
stored in parts of 64 columns (of y; of H, then of A) under the first products of the next one, or under every other
(EVERY), which leaves the stores more time. One part at a time is staged in `out`, apart from the ring. A program's loop
has a turn more than it has tiles, for the last tile's parts, and in its first turn the parts lie outside of the result
and are clipped; every tile has at least LEAST products, of zeros where it has too few of its own (dropped rows, a short
reduction).

A tile whose lower 64 rows are padding takes as long as any other where tiles go round in turn. Where they are claimed
(CLAIM) it takes half the products: the lower consumer lets the tile's stages pass.

Of rows in expert order the ring has a stage more than of W, which is twice as large: they are asked for a product
earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .launch import cdiv, launch, num_programs
from .schedule import PROGRAMS as MOST_PROGRAMS
from .specialized import (
    RAGGED,
    WARPS,
    claims,
    descriptor,
    halves,
    make_news,
    phase,
    quarters_of,
    ragged,
    sigmoid,
    slots_of,
    tell,
    told,
)
from .turns import CHUNKS, CLAIMS, NONE, answered, ask, chunk, leave, take_over

if TYPE_CHECKING:
    from ..config import KernelConfigBackward_dX, KernelConfigForward
    from .forward import Rows

PLAIN, SWIGLU = gl.constexpr(0), gl.constexpr(1)
GROUP_M = 12  # row tiles of an expert that share W
AHEAD = gl.constexpr(4)  # steps before a tile's end, and again before that


@gluon.jit
def place_of(tile, tables, num_m, num_n, num_experts, BLOCK_M: gl.constexpr, GROUP_M: gl.constexpr):
    """(expert, first row, the expert's end, column tile) of a tile; past the last one no expert, and any rows.

    An expert's row tiles sweep over the columns together, or in groups as large as one another of at most GROUP_M.
    """
    tile_expert_ptr, tile_row_ptr, offsets_ptr = tables[0], tables[1], tables[2]
    tile_m = gl.minimum(tile // num_n, num_m - 1)  # of the same group as the tile
    expert = gl.load(tile_expert_ptr + tile_m)
    row = gl.load(tile_row_ptr + tile_m)
    first = gl.load(offsets_ptr + expert)
    end = gl.load(offsets_ptr + expert + 1)
    rows = gl.cdiv(end - first, BLOCK_M)
    size = gl.cdiv(rows, gl.cdiv(rows, GROUP_M))
    number = (row - first) // BLOCK_M
    group = number // size * size
    at = tile - (tile_m - number + group) * num_n
    size = gl.minimum(size, rows - group)
    row0 = first + (group + at % size) * BLOCK_M
    return gl.where(tile < num_m * num_n, expert, num_experts), row0, end, at // size


@gluon.jit
def _copy_w(index, step, place, desc, ring, WIDE_W: gl.constexpr, TRANS_W: gl.constexpr):
    """Ask for W of a tile's product `index`, the tile's first at `step`, once its stage is free."""
    expert, tile_n = place
    x_stages, w_stages, full, empty = ring
    DTYPE: gl.constexpr = w_stages.dtype
    X_STAGES: gl.constexpr = x_stages.shape[0]
    STAGES: gl.constexpr = w_stages.shape[0]
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    BLOCK_N: gl.constexpr = w_stages.shape[2] if TRANS_W else w_stages.shape[1]
    OUT_N: gl.constexpr = BLOCK_N // 2 if WIDE_W else BLOCK_N
    s = (step + index) % STAGES
    ready = full.index((step + index) % X_STAGES)
    w_stage = w_stages.index(s)
    k = index * BLOCK_K
    mbarrier.wait(empty.index(s), phase(step + index, STAGES) ^ 1)
    mbarrier.expect(ready, BLOCK_N * BLOCK_K * 2)
    if TRANS_W:
        w_box = w_stage._reinterpret(DTYPE, [1, BLOCK_K, BLOCK_N], desc.layout)
        tma.async_copy_global_to_shared(desc, [expert, k, tile_n * OUT_N], ready, w_box)
    elif WIDE_W:
        w_box = w_stage._reinterpret(DTYPE, [2, OUT_N, BLOCK_K], desc.layout)
        tma.async_copy_global_to_shared(desc, [expert * 2, tile_n * OUT_N, k], ready, w_box)
    else:
        w_box = w_stage._reinterpret(DTYPE, [1, BLOCK_N, BLOCK_K], desc.layout)
        tma.async_copy_global_to_shared(desc, [expert, tile_n * OUT_N, k], ready, w_box)


@gluon.jit
def _copy_x(index, step, rows, desc, K, ring, DIVISOR: gl.constexpr, EVEN_K: gl.constexpr, layout: gl.constexpr):
    """Ask for the rows of product `index` of the tile that begins at `step`; their stage is free."""
    row, upper, lower, whole = rows
    x_stages, _, full, _ = ring
    X_STAGES: gl.constexpr = x_stages.shape[0]
    ROWS: gl.constexpr = x_stages.shape[1] // 2
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    s = (step + index) % X_STAGES
    ready = full.index(s)
    x_halves = halves_of(x_stages)
    k = index * BLOCK_K
    if DIVISOR == 0:
        mbarrier.expect(ready, 2 * ROWS * BLOCK_K * 2, pred=whole)
        mbarrier.expect(ready, ROWS * BLOCK_K * 2, pred=whole == 0)
        tma.async_copy_global_to_shared(desc, [row, k], ready, x_halves.index(2 * s))
        tma.async_copy_global_to_shared(desc, [row + ROWS, k], ready, x_halves.index(2 * s + 1), pred=whole)
    else:
        offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
        inside = (offs_k >= 0)[None, :] if EVEN_K else (offs_k < K - k)[None, :]
        async_copy.async_copy_global_to_shared(x_halves.index(2 * s), upper[0] + k, mask=inside & upper[1][:, None])
        if whole:
            lower_half = x_halves.index(2 * s + 1)
            async_copy.async_copy_global_to_shared(lower_half, lower[0] + k, mask=inside & lower[1][:, None])
        async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def halves_of(x_stages):
    """The stages of x as upper and lower halves in turn."""
    ROWS: gl.constexpr = x_stages.shape[1] // 2
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], x_stages.dtype)
    return x_stages._reinterpret(x_stages.dtype, [2 * x_stages.shape[0], ROWS, BLOCK_K], layout)


@gluon.jit
def _rows_of(
    expert, row0, row_end, slots, x_ptr, num_experts, K, lane, offs_k, DIVISOR: gl.constexpr, CLAIM: gl.constexpr
):
    """(row for TMA; of each half of a tile pointers to the first columns, and which rows to read; whether there are
    rows in the lower half); of dropped rows zeros are read."""
    kept = expert < num_experts
    ROWS: gl.constexpr = lane.shape[0]
    whole = row_end - row0 > ROWS if CLAIM else row_end >= row0  # in turn: always
    if DIVISOR == 0:
        return gl.where(kept, row0, RAGGED), x_ptr, x_ptr, whole
    else:
        upper = x_ptr + (slots[0] // DIVISOR).to(gl.int64)[:, None] * K + offs_k[None, :]
        lower = x_ptr + (slots[1] // DIVISOR).to(gl.int64)[:, None] * K + offs_k[None, :]
        last = gl.where(kept, row_end, 0)
        return row0, (upper, row0 + lane < last), (lower, row0 + ROWS + lane < last), whole


@gluon.jit
def _copy_steps(
    first,
    end,
    step,
    place,
    rows,
    inputs,
    K,
    ring,
    DIVISOR: gl.constexpr,
    WIDE_W: gl.constexpr,
    TRANS_W: gl.constexpr,
    EVEN_K: gl.constexpr,
    layout: gl.constexpr,
):
    """W of a tile's products `first` to `end`, and the rows, one product ahead where there is a stage more of them."""
    x_desc, w_desc, _ = inputs
    EXTRA: gl.constexpr = ring[0].shape[0] - ring[1].shape[0]
    for index in range(first, end):
        _copy_w(index, step, place, w_desc, ring, WIDE_W, TRANS_W)
        _copy_x(index + EXTRA, step, rows, x_desc, K, ring, DIVISOR, EVEN_K, layout)


@gluon.jit
def _slots_of_halves(rows, end, gather_ptr, DIVISOR: gl.constexpr):
    """The slots of a tile's upper rows and of its lower ones."""
    return slots_of(rows, end, gather_ptr, DIVISOR), slots_of(rows + rows.shape[0], end, gather_ptr, DIVISOR)


@gluon.jit
def producer(
    inputs,
    tables,
    sizes,
    ring,
    news,
    DIVISOR: gl.constexpr,
    WIDE_W: gl.constexpr,
    TRANS_W: gl.constexpr,
    EVEN_K: gl.constexpr,
    LEAST: gl.constexpr,
    GROUP_M: gl.constexpr,
    CLAIM: gl.constexpr,
    CHUNK: gl.constexpr,
    PRODUCERS: gl.constexpr,
):
    """Take tiles, tell of them, and fill the ring: rows of x, by TMA or through the index, and W, with WIDE_W gate and
    up rows side by side.

    Tiles are the program's own, CHUNK of them taken at a time, or claimed (CLAIM), late, so that they are begun in
    their order; then what others have not begun. A tile's number, its place and its slots wait for one another; each is
    asked for a few steps before it is needed.
    """
    gather_ptr, counters_ptr = tables[3], tables[4]
    num_m, num_n, num_experts, K, _, M = sizes
    x_desc, w_desc, x_ptr = inputs
    EXTRA: gl.constexpr = ring[0].shape[0] - ring[1].shape[0]
    ROWS: gl.constexpr = ring[0].shape[1] // 2
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [PRODUCERS, 1], [1, 0])
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, layout))
    tiles = num_m * num_n
    steps = gl.maximum(gl.cdiv(K, BLOCK_K), LEAST)
    programs = gl.num_programs(0)
    own_ptr = counters_ptr + CHUNKS + gl.program_id(0)
    answer = ask(own_ptr, PRODUCERS)
    expert, row0, row_end, tile_n = place_of(gl.program_id(0), tables, num_m, num_n, num_experts, 2 * ROWS, GROUP_M)
    slots = _slots_of_halves(row0 + lane, M, gather_ptr, DIVISOR)
    begun = answered(answer, PRODUCERS)
    tile = gl.where(begun == 0, gl.program_id(0), NONE)  # or others were there before
    number = 0  # of the tile in its chunk
    step = 0
    turn = 0
    if EXTRA > 0:
        if tile < tiles:
            rows = _rows_of(expert, row0, row_end, slots, x_ptr, num_experts, K, lane, offs_k, DIVISOR, CLAIM)
            _copy_x(0, step, rows, x_desc, K, ring, DIVISOR, EVEN_K, layout)
    while tile < tiles:
        # dropped rows take LEAST products, of zeros, so that nobody is told of more tiles than `news` hold
        count = gl.where(expert < num_experts, steps, LEAST)
        tell(news, turn, count, row0, row_end, tile_n)
        place = (expert, tile_n)
        rows = _rows_of(expert, row0, row_end, slots, x_ptr, num_experts, K, lane, offs_k, DIVISOR, CLAIM)
        second = gl.maximum(count - 2 * AHEAD, 0)
        third = gl.maximum(count - AHEAD, 0)
        if CLAIM:
            first = gl.maximum(count - 3 * AHEAD, 0)
            _copy_steps(0, first, step, place, rows, inputs, K, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, layout)
            answer = ask(counters_ptr + CLAIMS, PRODUCERS)
            _copy_steps(first, second, step, place, rows, inputs, K, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, layout)
            tile = programs + answered(answer, PRODUCERS)
        else:
            if number == 0:
                answer = ask(own_ptr, PRODUCERS)
            _copy_steps(0, second, step, place, rows, inputs, K, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, layout)
            tile += programs
            number += 1
            if (number == CHUNK) | (tile >= tiles):
                tile = gl.program_id(0) + answered(answer, PRODUCERS) * (CHUNK * programs)
                number = 0
        next_expert, next_row0, next_end, next_n = place_of(tile, tables, num_m, num_n, num_experts, 2 * ROWS, GROUP_M)
        _copy_steps(second, third, step, place, rows, inputs, K, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, layout)
        next_slots = _slots_of_halves(next_row0 + lane, M, gather_ptr, DIVISOR)
        last = count - EXTRA
        _copy_steps(third, last, step, place, rows, inputs, K, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, layout)
        if EXTRA > 0:
            _copy_w(last, step, place, w_desc, ring, WIDE_W, TRANS_W)
            if tile < tiles:
                next_rows = _rows_of(
                    next_expert, next_row0, next_end, next_slots, x_ptr, num_experts, K, lane, offs_k, DIVISOR, CLAIM
                )
                _copy_x(0, step + count, next_rows, x_desc, K, ring, DIVISOR, EVEN_K, layout)
        expert, row0, row_end, tile_n, slots = next_expert, next_row0, next_end, next_n, next_slots
        step += count
        turn += 1
    own = gl.minimum(tiles, programs) if CLAIM else tiles
    tile = begun * (CHUNK * programs) + gl.program_id(0)
    if (begun == 0) | (tile >= own):
        tile = take_over(own, counters_ptr, CHUNK, PRODUCERS)
    number = 0
    while tile < own:  # others' tiles: rarely, so without looking ahead
        expert, row0, row_end, tile_n = place_of(tile, tables, num_m, num_n, num_experts, 2 * ROWS, GROUP_M)
        count = gl.where(expert < num_experts, steps, LEAST)
        tell(news, turn, count, row0, row_end, tile_n)
        place = (expert, tile_n)
        slots = _slots_of_halves(row0 + lane, M, gather_ptr, DIVISOR)
        rows = _rows_of(expert, row0, row_end, slots, x_ptr, num_experts, K, lane, offs_k, DIVISOR, CLAIM)
        if EXTRA > 0:
            _copy_x(0, step, rows, x_desc, K, ring, DIVISOR, EVEN_K, layout)
        last = count - EXTRA
        _copy_steps(0, last, step, place, rows, inputs, K, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, layout)
        if EXTRA > 0:
            _copy_w(last, step, place, w_desc, ring, WIDE_W, TRANS_W)
        step += count
        turn += 1
        tile += programs
        number += 1
        if (number == CHUNK) | (tile >= own):
            tile = take_over(own, counters_ptr, CHUNK, PRODUCERS)
            number = 0
    tell(news, turn, 0, 0, 0, 0)  # the last tile is stored under a turn without products
    tell(news, turn + 1, -1, 0, 0, 0)
    leave(counters_ptr, PRODUCERS)


@gluon.jit
def _scatter(stage, y_ptr, slot, col0, width, layout: gl.constexpr):
    """Rows of a staged tile to the rows `slot` of y; a negative slot is none."""
    offs_n = col0 + gl.arange(0, stage.shape[1], layout=gl.SliceLayout(0, layout))
    ptrs = y_ptr + slot.to(gl.int64)[:, None] * width + offs_n[None, :]
    mask = (slot >= 0)[:, None] & (offs_n < width)[None, :]
    # first to leave the L2: what is read again before y is are operands (5 % of dX of up's time)
    gl.store(ptrs, stage.load(layout), mask=mask, eviction_policy="evict_first")


@gluon.jit
def _store_part(
    PART: gl.constexpr,
    quarters,
    place,
    slot,
    outputs,
    out,
    width,
    layout: gl.constexpr,
    MODE: gl.constexpr,
    SCATTER: gl.constexpr,
    STORE_H: gl.constexpr,
):
    """One part of a finished tile, given its quarters: y's in turn; with SWIGLU H's (STORE_H), then A's, two."""
    row_end, ragged_row, col0 = place
    y_desc, h_desc, y_ptr = outputs
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    ROWS: gl.constexpr = out.shape[0]
    COLS: gl.constexpr = out.shape[1]
    OF_A: gl.constexpr = PART - 4 if STORE_H else PART
    tma.store_wait(0)  # of the part before
    if MODE == SWIGLU and OF_A >= 0:
        # H is rounded before the activation, as it is when the activation is a kernel of its own
        gate = quarters[OF_A].to(gl.float32)
        out.store((gate * sigmoid(gate) * quarters[2 + OF_A].to(gl.float32)).to(DTYPE))
        fence_async_shared()
        box = out._reinterpret(DTYPE, [1, 1, ROWS, COLS], y_desc.layout)
        tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0 + OF_A * COLS], box)
    else:
        out.store(quarters[PART])
        if SCATTER:
            _scatter(out, y_ptr, slot, col0 + PART * COLS, width, layout)
        else:
            fence_async_shared()
            if MODE == SWIGLU:
                box = out._reinterpret(DTYPE, [1, 1, 1, ROWS, COLS], h_desc.layout)
                at = [RAGGED, row_end, PART // 2, ragged_row, col0 + PART % 2 * COLS]
                tma.async_copy_shared_to_global(h_desc, at, box)
            else:
                box = out._reinterpret(DTYPE, [1, 1, ROWS, COLS], y_desc.layout)
                tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0 + PART * COLS], box)


@gluon.jit
def pass_by(step, ring):
    """Give back the stage of `step` when it comes: the consumer has no rows of that tile."""
    x_stages, w_stages, full, empty = ring
    X_STAGES: gl.constexpr = x_stages.shape[0]
    STAGES: gl.constexpr = w_stages.shape[0]
    mbarrier.wait(full.index(step % X_STAGES), phase(step, X_STAGES))
    mbarrier.arrive(empty.index(step % STAGES), count=1)


@gluon.jit
def _consumer(
    WHICH: gl.constexpr,
    operands,
    GATHERED: gl.constexpr,
    MODE: gl.constexpr,
    TRANS_W: gl.constexpr,
    SCATTER: gl.constexpr,
    STORE_H: gl.constexpr,
    LEAST: gl.constexpr,
    EVERY: gl.constexpr,
    CLAIM: gl.constexpr,
):
    """The upper (WHICH 0) or the lower half of each tile's rows."""
    outputs, gather_ptr, width, ring, news, outs = operands
    x_stages, w_stages, full, empty = ring
    DTYPE: gl.constexpr = x_stages.dtype
    X_STAGES: gl.constexpr = x_stages.shape[0]
    STAGES: gl.constexpr = w_stages.shape[0]
    ROWS: gl.constexpr = x_stages.shape[1] // 2
    BLOCK_N: gl.constexpr = w_stages.shape[2] if TRANS_W else w_stages.shape[1]
    QUARTER: gl.constexpr = BLOCK_N // 4
    OUT_N: gl.constexpr = BLOCK_N // 2 if MODE == SWIGLU else BLOCK_N
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // QUARTER, QUARTER // 8], [4, 1], [1, 0])
    x_halves = halves_of(x_stages)
    out = outs.index(WHICH)
    lane = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    quarters = quarters_of(gl.zeros([ROWS, BLOCK_N], DTYPE, mma))
    place = (0, RAGGED, 0)  # past the end of the result: of the first turn nothing is stored
    slot = gl.full([ROWS], -1, gl.int32, gl.SliceLayout(1, layout))
    step = 0
    turn = 0
    steps, row0, row_end, tile_n = told(news, turn)
    while steps >= 0:
        if (steps > 0) & ((row_end - row0 > ROWS) if CLAIM and WHICH == 1 else True):
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, mma)
            for index in gl.static_range(LEAST):
                s = (step + index) % STAGES
                x_s = (step + index) % X_STAGES
                mbarrier.wait(full.index(x_s), phase(step + index, X_STAGES))
                if GATHERED:
                    fence_async_shared()  # cp.async wrote through the generic proxy, the product reads another way
                w_stage = w_stages.index(s) if TRANS_W else w_stages.index(s).permute((1, 0))
                acc = warpgroup_mma(x_halves.index(2 * x_s + WHICH), w_stage, acc, use_acc=index > 0, is_async=True)
                if index % EVERY == 0:
                    _store_part(
                        index // EVERY, quarters, place, slot, outputs, out, width, layout, MODE, SCATTER, STORE_H
                    )
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if index > 0:
                    mbarrier.arrive(empty.index((step + index + STAGES - 1) % STAGES), count=1)
            if SCATTER:
                slot = gl.load(gather_ptr + row0 + lane, mask=row0 + lane < row_end, other=-1)
            for index in range(LEAST, steps):
                s = (step + index) % STAGES
                x_s = (step + index) % X_STAGES
                mbarrier.wait(full.index(x_s), phase(step + index, X_STAGES))
                if GATHERED:
                    fence_async_shared()
                w_stage = w_stages.index(s) if TRANS_W else w_stages.index(s).permute((1, 0))
                acc = warpgroup_mma(x_halves.index(2 * x_s + WHICH), w_stage, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((step + index + STAGES - 1) % STAGES), count=1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step + steps + STAGES - 1) % STAGES), count=1)
            quarters = quarters_of(acc.to(DTYPE))
        else:
            for index in gl.static_range(LEAST):
                if CLAIM and WHICH == 1:
                    if steps > 0:
                        pass_by(step + index, ring)
                if index % EVERY == 0:
                    _store_part(
                        index // EVERY, quarters, place, slot, outputs, out, width, layout, MODE, SCATTER, STORE_H
                    )
            if CLAIM and WHICH == 1:
                for index in range(LEAST, steps):
                    pass_by(step + index, ring)
            slot = gl.full([ROWS], -1, gl.int32, gl.SliceLayout(1, layout))  # it has no rows
        # a product, so that the compiler knows what divides the column, and moves 16 bytes at a time
        place = (row_end, RAGGED - row_end + row0 + WHICH * ROWS, tile_n * OUT_N)
        step += steps
        turn += 1
        steps, row0, row_end, tile_n = told(news, turn)
    tma.store_wait(0)


@gluon.jit
def _specialized_rows(
    x_desc,
    w_desc,
    y_desc,
    h_desc,
    x_ptr,
    y_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    expert_offsets_ptr,
    gather_indices_ptr,
    num_experts,
    M,
    K,
    width,
    DIVISOR: gl.constexpr,
    MODE: gl.constexpr,
    TRANS_W: gl.constexpr,
    SCATTER: gl.constexpr,
    STORE_H: gl.constexpr,
    LEAST: gl.constexpr,
    EVERY: gl.constexpr,
    EVEN_K: gl.constexpr,
    CLAIM: gl.constexpr,
    CHUNK: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    PRODUCERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    GATHERED: gl.constexpr = DIVISOR > 0
    WIDE_W: gl.constexpr = MODE == SWIGLU
    # a stage more of rows leaves TMA more time; copies of gathered rows it would only put before those of W
    X_STAGES: gl.constexpr = STAGES if GATHERED else STAGES + 1
    ring = make_ring(DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, X_STAGES, TRANS_W, 32 * PRODUCERS if GATHERED else 1)
    news = make_news()
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M // 2, BLOCK_N // 4], DTYPE)
    outs = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M // 2, BLOCK_N // 4], out_layout)
    tables = (tile_expert_ptr, tile_row_ptr, expert_offsets_ptr, gather_indices_ptr, num_tiles_ptr)
    # TMA needs rows of whole 16 bytes; said like this, the compiler knows it, and copies 16 bytes at a time
    num_n = gl.cdiv(width, BLOCK_N // 2 if WIDE_W else BLOCK_N)
    sizes = (gl.load(num_tiles_ptr), num_n, num_experts, K // 8 * 8, width // 8 * 8, M)
    outputs = (y_desc, h_desc, y_ptr)
    inputs = (x_desc, w_desc, x_ptr)
    operands = (outputs, gather_indices_ptr, sizes[4], ring, news, outs)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consumer, (upper, operands, GATHERED, MODE, TRANS_W, SCATTER, STORE_H, LEAST, EVERY, CLAIM)),
            (_consumer, (lower, operands, GATHERED, MODE, TRANS_W, SCATTER, STORE_H, LEAST, EVERY, CLAIM)),
            (
                producer,
                (
                    inputs,
                    tables,
                    sizes,
                    ring,
                    news,
                    DIVISOR,
                    WIDE_W,
                    TRANS_W,
                    EVEN_K,
                    LEAST,
                    GROUP_M,
                    CLAIM,
                    CHUNK,
                    PRODUCERS,
                ),
            ),
        ],
        [4, PRODUCERS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@gluon.jit
def make_ring(
    DTYPE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    X_STAGES: gl.constexpr,
    TRANS_W: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    """(stages of x, stages of W, their `full` and `empty` barriers), ready for use; `ARRIVALS` for a stage of x."""
    W_SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if TRANS_W else [BLOCK_N, BLOCK_K]
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], DTYPE)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(W_SHAPE, DTYPE)
    x_stages = gl.allocate_shared_memory(DTYPE, [X_STAGES, BLOCK_M, BLOCK_K], x_layout)
    w_stages = gl.allocate_shared_memory(DTYPE, [STAGES, W_SHAPE[0], W_SHAPE[1]], w_layout)
    full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(X_STAGES):
        mbarrier.init(full.index(s), count=1 + ARRIVALS)  # for W one arrival says which bytes TMA brings
    for s in gl.static_range(STAGES):
        mbarrier.init(empty.index(s), count=2)  # both consumers
    fence_async_shared()
    return x_stages, w_stages, full, empty


def _launch(
    name: str,
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    config: Any,
    sides: tuple[int, int, int],
    outputs: tuple[Any, Any, Tensor],
    **flags: Any,
) -> None:
    """`sides`: rows, output and reduction columns of a tile; `outputs`: descriptors of y and h, and y."""
    experts, n, k = weight.shape
    num_rows = rows.gather_indices.shape[0]
    block_m, block_n, block_k = sides
    reduced, width = (n, k) if flags["TRANS_W"] else (k, n)
    out_n, parts, every = block_n, 4, 2
    if flags["TRANS_W"]:
        w_desc = descriptor(weight, [1, block_k, block_n])
    elif flags["MODE"] == SWIGLU.value:
        width, out_n = n // 2, block_n // 2
        parts, every = 6 if flags["STORE_H"] else 2, 1  # spreading these was no gain
        w_desc = descriptor(weight.view(2 * experts, width, k), [2, out_n, block_k])
    else:
        w_desc = descriptor(weight, [1, block_n, block_k])
    if reduced < ((parts - 1) * every + 1) * block_k:  # products of zeros cost more than they leave time
        every = 1
    least = (parts - 1) * every + 1
    claim = claims(name, weight, num_rows)
    x_desc = w_desc if flags["DIVISOR"] else descriptor(x, [block_m // 2, block_k])  # gathered rows take none
    launch(
        name,
        _specialized_rows,
        (min(num_programs(x.device, rows.sm_margin), MOST_PROGRAMS, rows.table.max_tiles * cdiv(width, out_n)),),
        *(x_desc, w_desc, *outputs[:2], x, outputs[2], *rows.arguments),
        *(experts, num_rows, reduced, width),
        **{"SCATTER": False, "STORE_H": False, **flags},
        LEAST=least,
        EVERY=every,
        EVEN_K=bool(flags["DIVISOR"]) and reduced % block_k == 0 and reduced >= least * block_k,
        CLAIM=claim,
        CHUNK=1 if claim else chunk(max(cdiv(reduced, block_k), least)),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=config.num_stages,
        GROUP_M=GROUP_M,
        PRODUCER_REGISTERS=72 if flags["DIVISOR"] else 48,
        CONSUMER_REGISTERS=216 if flags["DIVISOR"] else 232,
        **WARPS,
    )


def specialized_forward(
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    config: KernelConfigForward,
    y: Tensor,
    h: Tensor | None,
    *,
    permute_x: bool,
    permute_y: bool,
    swiglu: bool,
) -> None:
    """Fill y [T*K,N] or, with `swiglu`, y [T*K,I] and, where it is wanted, h [T*K,2I]; see `forward.forward_gemm`."""
    sides = config.block_m, config.block_n, config.block_k
    box = [config.block_m // 2, config.block_n // 4]
    flags = {"DIVISOR": rows.top_k if permute_x else 0, "TRANS_W": False}
    if swiglu:
        y_desc = ragged(y, box)
        h_desc = y_desc if h is None else ragged(h, [1, *box], *halves(h))
        flags |= {"MODE": SWIGLU.value, "STORE_H": h is not None}
        _launch("forward_up", x, weight, rows, config, sides, (y_desc, h_desc, y), **flags)
        return
    y_desc = ragged(y, box)
    flags |= {"MODE": PLAIN.value, "SCATTER": permute_y}
    _launch("forward", x, weight, rows, config, sides, (y_desc, y_desc, y), **flags)


def specialized_dX(
    dy: Tensor,
    weight: Tensor,
    rows: Rows,
    config: KernelConfigBackward_dX,
    dx: Tensor,
    *,
    dy_divisor: int,
    scatter: bool,
) -> None:
    """Fill dx [T*K,K]; see `backward_dX.dX_gemm`."""
    sides = config.block_m, config.block_k, config.block_n  # the sum is over n
    dx_desc = ragged(dx, [config.block_m // 2, config.block_k // 4])
    flags = {"DIVISOR": dy_divisor, "MODE": PLAIN.value, "TRANS_W": True, "SCATTER": scatter}
    _launch("dX", dy, weight, rows, config, sides, (dx_desc, dx_desc, dx), **flags)
