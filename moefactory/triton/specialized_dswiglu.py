"""dH, s * A and <dA, A> of dA = dO @ W in one kernel, warp-specialised: the equations of `activation`, fused.

The activation's derivative reads and writes 2.5 times a tile of dA, which takes a quarter of the tile's products: too
long to wait for, too large for the registers beside a sum of 64 x 256. So a fourth partition of 4 warps does it. Each
consumer rounds its 64 rows of dA, as they are when the activation is a kernel of its own, and hands them over in shared
memory, half the columns before it multiplies the next tile, the others amid that: so 32 KB are enough, and the ring
keeps its four stages. The epilogue's warps load H and store the results past it, straight from and to memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .launch import cdiv, laid_out, launch, num_programs
from .schedule import PROGRAMS as MOST_PROGRAMS
from .specialized import NEWS, claims, descriptor, make_news, phase, quarters_of, sigmoid, told
from .specialized_rows import GROUP_M, halves_of, make_ring, pass_by, producer
from .turns import chunk

if TYPE_CHECKING:
    from ..config import KernelConfigBackward_dX
    from .forward import Rows

# 16 warps share 65,536 registers: 128 for each thread at the start, then these; 512 for one of each partition
WARPS = {
    "PRODUCERS": 4,
    "CONSUMER_REGISTERS": 176,
    "PRODUCER_REGISTERS": 56,
    "EPILOGUE_REGISTERS": 104,
    "num_warps": 4,
    "maxnreg": 128,
}
CHUNK_ROWS, CHUNK_COLS = gl.constexpr(16), gl.constexpr(64)  # of dA that the epilogue holds in registers


@gluon.jit
def _hand_over(left, right, WHICH: gl.constexpr, da, handed, handovers):
    """A consumer's rows of two blocks of 64 columns to the epilogue, once it has read the two before."""
    ROWS: gl.constexpr = da.shape[1] // 2
    COLS: gl.constexpr = da.shape[2]
    halves = da._reinterpret(da.dtype, [4, ROWS, COLS], da.layout)
    mbarrier.wait(handed.index(1), (handovers & 1) ^ 1)
    halves.index(WHICH).store(left)
    halves.index(2 + WHICH).store(right)
    mbarrier.arrive(handed.index(0), count=1)


@gluon.jit
def _multiply(acc, x_halves, WHICH: gl.constexpr, first, count, before, ring, GATHERED: gl.constexpr):
    """`count` products from step `first` on, of which the last is still under way; `before`: of the tile, already made.

    Each gives back the stage of the tile's product before it.
    """
    x_stages, w_stages, full, empty = ring
    STAGES: gl.constexpr = x_stages.shape[0]
    for index in range(count):
        step = first + index
        s = step % STAGES
        mbarrier.wait(full.index(s), phase(step, STAGES))
        if GATHERED:
            fence_async_shared()  # cp.async wrote through the generic proxy, the product reads through the other
        acc = warpgroup_mma(x_halves.index(2 * s + WHICH), w_stages.index(s), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=index + before > 0)
    return acc


@gluon.jit
def _consumer(WHICH: gl.constexpr, ring, news, da, handed, GATHERED: gl.constexpr, CLAIM: gl.constexpr):
    """The upper (WHICH 0) or the lower half of each tile's rows of dA, its columns in halves, into the blocks `da`."""
    x_stages, w_stages, _full, empty = ring
    DTYPE: gl.constexpr = x_stages.dtype
    STAGES: gl.constexpr = x_stages.shape[0]
    ROWS: gl.constexpr = x_stages.shape[1] // 2
    BLOCK_N: gl.constexpr = w_stages.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2, 16])
    x_halves = halves_of(x_stages)
    _, _, kept_left, kept_right = quarters_of(gl.zeros([ROWS, BLOCK_N], DTYPE, mma))
    step = 0
    turn = 0
    steps, row0, row_end, _n = told(news, turn)
    while steps >= 0:
        half = steps // 2
        if (steps > 0) & ((row_end - row0 > ROWS) if CLAIM and WHICH == 1 else True):
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, mma)
            acc = _multiply(acc, x_halves, WHICH, step, half, 0, ring, GATHERED)
            if turn > 0:
                _hand_over(kept_left, kept_right, WHICH, da, handed, 2 * turn - 1)
            acc = _multiply(acc, x_halves, WHICH, step + half, steps - half, half, ring, GATHERED)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step + steps + STAGES - 1) % STAGES), count=1)
            left, right, kept_left, kept_right = quarters_of(acc.to(DTYPE))
            _hand_over(left, right, WHICH, da, handed, 2 * turn)
        else:
            if CLAIM and WHICH == 1:
                for index in range(half):
                    pass_by(step + index, ring)
            if turn > 0:
                _hand_over(kept_left, kept_right, WHICH, da, handed, 2 * turn - 1)
            if CLAIM and WHICH == 1:
                for index in range(half, steps):
                    pass_by(step + index, ring)
                if steps > 0:  # of rows that there are not: nobody reads what is handed over
                    _hand_over(kept_left, kept_right, WHICH, da, handed, 2 * turn)
        step += steps
        turn += 1
        steps, row0, row_end, _n = told(news, turn)


@gluon.jit
def _load_h(h_ptr, row, row_end, col, width, layout: gl.constexpr):
    """(gate, up) of H, two columns a word: CHUNK_ROWS rows from `row` on, CHUNK_COLS columns from `col` on.

    Words, since a loop carries them: it would carry the halves one by one, and pack them anew each time.
    """
    rows = row + gl.arange(0, CHUNK_ROWS, layout=gl.SliceLayout(1, layout))
    cols = col // 2 + gl.arange(0, CHUNK_COLS // 2, layout=gl.SliceLayout(0, layout))
    mask = (rows < row_end)[:, None] & (cols < width // 2)[None, :]
    ptrs = h_ptr + (rows.to(gl.int64)[:, None] * width + cols[None, :])
    return gl.load(ptrs, mask=mask, other=0), gl.load(ptrs + width // 2, mask=mask, other=0)


@gluon.jit
def _numbers(words, DTYPE: gl.constexpr, layout: gl.constexpr):
    """Of words [CHUNK_ROWS, CHUNK_COLS / 2] the two numbers in each, the lower half first, in float32."""
    if gl.bfloat16 == DTYPE:  # a float32's upper half
        low = gl.cast(words << 16, gl.float32, bitcast=True)
        high = gl.cast(words & -65536, gl.float32, bitcast=True)
    else:
        low = gl.cast(words.to(gl.int16), DTYPE, bitcast=True).to(gl.float32)
        high = gl.cast((words >> 16).to(gl.int16), DTYPE, bitcast=True).to(gl.float32)
    both = gl.reshape(gl.join(low, high), [CHUNK_ROWS, CHUNK_COLS])
    return gl.convert_layout(both, layout, assert_trivial=True)


@gluon.jit
def _unit(unit, blocks, row0, col0, HALF: gl.constexpr):
    """(first row, first column) of a tile's `unit`: its blocks of rows in the left half, then those in the right."""
    half = gl.where(unit < blocks, 0, 1)
    return row0 + (unit - half * blocks) * CHUNK_ROWS, col0 + half * HALF


@gluon.jit
def _epilogue(
    pointers,
    tables,
    sizes,
    news,
    da,
    rows_of_tile,
    handed,
    HAS_WEIGHTS: gl.constexpr,
    EPILOGUE_WARPS: gl.constexpr,
):
    """Of each half of a tile its blocks of CHUNK_ROWS rows, of each block two chunks.

    H is asked for two blocks ahead, over the end of a half and of a tile, slots a tile ahead.
    """
    h_ptr, dh_ptr, scaled_a_ptr, ds_ptr, routing_weights_ptr = pointers
    gather_ptr = tables[3]
    width, M = sizes[4], sizes[5]
    DTYPE: gl.constexpr = da.dtype
    PARTS: gl.constexpr = da.shape[0]
    BLOCK_M: gl.constexpr = da.shape[1]
    BLOCKS: gl.constexpr = BLOCK_M // CHUNK_ROWS
    HALF: gl.constexpr = PARTS * CHUNK_COLS
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [EPILOGUE_WARPS, 1], [1, 0])
    words: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [EPILOGUE_WARPS, 1], [1, 0])  # the same threads' of H
    column: gl.constexpr = gl.SliceLayout(1, layout)
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [EPILOGUE_WARPS], [0])
    chunks = da._reinterpret(DTYPE, [PARTS * BLOCKS, CHUNK_ROWS, CHUNK_COLS], da.layout)
    lane = gl.arange(0, CHUNK_ROWS, layout=column)
    row_of_tile = gl.arange(0, BLOCK_M, layout=flat)
    offs = gl.arange(0, CHUNK_COLS, layout=gl.SliceLayout(0, layout))
    slots, scales = rows_of_tile
    handovers = 0
    turn = 0
    steps, row0, row_end, tile_n = told(news, turn)
    col0 = tile_n * (2 * HALF)  # said like this, the compiler knows what it divides
    blocks = gl.cdiv(gl.minimum(row_end - row0, BLOCK_M), CHUNK_ROWS)
    slot_ahead = gl.load(gather_ptr + row0 + row_of_tile, mask=row0 + row_of_tile < M, other=0)
    row1, col1 = _unit(1, blocks, row0, col0, HALF)
    h0 = _load_h(h_ptr, row0, row_end, col0, width, words)
    h1 = _load_h(h_ptr, row0, row_end, col0 + CHUNK_COLS, width, words)
    h2 = _load_h(h_ptr, row1, row_end, col1, width, words)
    h3 = _load_h(h_ptr, row1, row_end, col1 + CHUNK_COLS, width, words)
    while steps > 0:
        turn += 1
        next_steps, next_row0, next_end, next_n = told(news, turn)
        next_col0 = next_n * (2 * HALF)
        slots.store(slot_ahead)
        if HAS_WEIGHTS:
            scales.store(gl.load(routing_weights_ptr + slot_ahead).to(gl.float32))
        next_blocks = gl.cdiv(gl.minimum(next_end - next_row0, BLOCK_M), CHUNK_ROWS)
        slot_ahead = gl.load(gather_ptr + next_row0 + row_of_tile, mask=next_row0 + row_of_tile < M, other=0)
        for unit in range(2 * blocks):
            half = gl.where(unit < blocks, 0, 1)
            block = unit - half * blocks
            if block == 0:
                mbarrier.wait(handed.index(0), handovers & 1)
                handovers += 1
            row = row0 + block * CHUNK_ROWS + lane
            row_ok = row < row_end
            if HAS_WEIGHTS:
                scale = scales._reinterpret(gl.float32, [BLOCKS, CHUNK_ROWS], scales.layout).index(block).load(column)
            else:
                scale = gl.full([CHUNK_ROWS], 1.0, gl.float32, column)
            ahead = unit + 2
            here_row, here_col = _unit(ahead, blocks, row0, col0, HALF)
            there_row, there_col = _unit(ahead - 2 * blocks, next_blocks, next_row0, next_col0, HALF)
            here = ahead < 2 * blocks
            ahead_row, ahead_end = gl.where(here, here_row, there_row), gl.where(here, row_end, next_end)
            ahead_col = gl.where(here, here_col, there_col)
            ds = gl.zeros([CHUNK_ROWS], gl.float32, column)
            for part in gl.static_range(PARTS):
                gate, up = _numbers(h0[0], DTYPE, layout), _numbers(h0[1], DTYPE, layout)
                h0, h1, h2 = h1, h2, h3
                h3 = _load_h(h_ptr, ahead_row, ahead_end, ahead_col + part * CHUNK_COLS, width, words)
                cols = col0 + half * HALF + part * CHUNK_COLS + offs
                mask = row_ok[:, None] & (cols < width)[None, :]
                at_h = row.to(gl.int64)[:, None] * (2 * width) + cols[None, :]
                grad = chunks.index(part * BLOCKS + block).load(layout).to(gl.float32)
                sig = sigmoid(gate)
                silu = gate * sig
                a = silu * up
                ds += gl.sum(grad * a, axis=1)  # columns past the width are zeros on both sides
                grad = grad * scale[:, None]
                gl.store(dh_ptr + at_h, (grad * up * gl.fma(silu, 1.0 - sig, sig)).to(DTYPE), mask=mask)
                gl.store(dh_ptr + (at_h + width), (grad * silu).to(DTYPE), mask=mask)
                at_a = row.to(gl.int64)[:, None] * width + cols[None, :]
                gl.store(scaled_a_ptr + at_a, (a * scale[:, None]).to(DTYPE), mask=mask)
            flat_slots = slots._reinterpret(gl.int32, [BLOCKS, CHUNK_ROWS], slots.layout)
            slot = flat_slots.index(block).load(column).to(gl.int64)
            gl.store(ds_ptr + (col0 // HALF + half).to(gl.int64) * M + slot, ds, mask=row_ok)
            if block + 1 == blocks:
                mbarrier.arrive(handed.index(1), count=1)
        steps, row0, row_end, col0, blocks = next_steps, next_row0, next_end, next_col0, next_blocks


@gluon.jit
def _specialized_dX_dswiglu(
    x_desc,
    w_desc,
    x_ptr,
    h_ptr,
    dh_ptr,
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
    K,
    width,
    DIVISOR: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr,
    CLAIM: gl.constexpr,
    CHUNK: gl.constexpr,
    EVEN_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    PRODUCERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    EPILOGUE_REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    GATHERED: gl.constexpr = DIVISOR > 0
    gl.static_assert(STAGES + 3 <= NEWS)  # a tile may be one step, the epilogue two turns behind
    ring = make_ring(DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, STAGES, True, 32 * PRODUCERS if GATHERED else 1)
    news = make_news()
    da_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, CHUNK_COLS], DTYPE)
    da = gl.allocate_shared_memory(DTYPE, [BLOCK_N // 2 // CHUNK_COLS, BLOCK_M, CHUNK_COLS], da_layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows_of_tile = (  # slots and routing weights, a tile's at a time
        gl.allocate_shared_memory(gl.int32, [BLOCK_M], flat),
        gl.allocate_shared_memory(gl.float32, [BLOCK_M], flat),
    )
    handed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())  # over, and back
    mbarrier.init(handed.index(0), count=2)  # both consumers
    mbarrier.init(handed.index(1), count=1)
    fence_async_shared()
    tables = (tile_expert_ptr, tile_row_ptr, expert_offsets_ptr, gather_indices_ptr, num_tiles_ptr)
    # rows are whole 16 bytes; said like this, the compiler knows it, and copies 16 bytes at a time
    sizes = (gl.load(num_tiles_ptr), gl.cdiv(width, BLOCK_N), num_experts, K // 8 * 8, width // 8 * 8, M)
    pointers = (h_ptr, dh_ptr, scaled_a_ptr, ds_ptr, routing_weights_ptr)
    inputs = (x_desc, w_desc, x_ptr)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consumer, (upper, ring, news, da, handed, GATHERED, CLAIM)),
            (_consumer, (lower, ring, news, da, handed, GATHERED, CLAIM)),
            (
                producer,
                (
                    inputs,
                    tables,
                    sizes,
                    ring,
                    news,
                    DIVISOR,
                    False,
                    True,
                    EVEN_K,
                    1,
                    GROUP_M,
                    CLAIM,
                    CHUNK,
                    PRODUCERS,
                ),
            ),
            (_epilogue, (pointers, tables, sizes, news, da, rows_of_tile, handed, HAS_WEIGHTS, PRODUCERS)),
        ],
        [4, PRODUCERS, PRODUCERS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, EPILOGUE_REGISTERS],
    )


def specialized_dX_dswiglu(
    dy: Tensor,
    weight: Tensor,
    h: Tensor,
    routing_weights: Tensor | None,
    rows: Rows,
    config: KernelConfigBackward_dX,
    dh: Tensor,
    scaled_a: Tensor,
    ds: Tensor,
    *,
    dy_divisor: int,
) -> None:
    """Fill dh [T*K,2I], scaled_a [T*K,I] and ds [2*tiles,T*K]; see `backward_dX.dX_gemm_dswiglu`."""
    experts, n, k = weight.shape
    w_desc = descriptor(weight, [1, config.block_n, config.block_k])
    x_desc = w_desc if dy_divisor else descriptor(dy, [config.block_m // 2, config.block_n])  # gathered rows take none
    name, num_rows = "dX_dswiglu", rows.gather_indices.shape[0]
    claim = claims(name, weight, num_rows)
    launch(
        name,
        _specialized_dX_dswiglu,
        (min(num_programs(dy.device, rows.sm_margin), MOST_PROGRAMS, rows.table.max_tiles * cdiv(k, config.block_k)),),
        *(x_desc, w_desc, dy, laid_out(h).view(torch.int32)),  # two numbers a word: see `_load_h`
        *(dh, scaled_a, ds, dh if routing_weights is None else routing_weights),
        *(*rows.arguments, experts, num_rows, n, k),
        DIVISOR=dy_divisor,
        HAS_WEIGHTS=routing_weights is not None,
        CLAIM=claim,
        CHUNK=1 if claim else chunk(cdiv(n, config.block_n)),
        EVEN_K=bool(dy_divisor) and n % config.block_n == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_k,  # the sum is over n
        BLOCK_K=config.block_n,
        STAGES=config.num_stages,
        GROUP_M=GROUP_M,
        **WARPS,
    )
