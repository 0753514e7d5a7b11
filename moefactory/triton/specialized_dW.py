"""dweight[e][n, k] = sum over the rows r of expert e of dy[row(r), n] * x[row(r), k], warp-specialised.

The arguments are those of `backward_dW`. The tensor cores take 64 x 256 outputs at a time, so one operand of a tile is
256 columns wide and the other 128. The narrow one (p) should be the one that is reached through gather_indices, since
that comes row by row with cp.async, the wide one (q) by TMA: a gather on the wide side cost 1.7 times the time. Where x
is the narrow one, the tile is computed transposed and turned on its way to the store (X_NARROW).

Behind an expert's end both operands read as zeros (by a ragged descriptor, by a mask), so 0 * NaN of a neighbour cannot
arise. As in `specialized_rows`, two consumers take half of a tile each, of its narrow side, and a finished tile is
rounded, kept in registers and stored under the first products of the next one, here in two halves: with few rows an
expert, a tile's store takes as long as its products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from .specialized import RAGGED, WARPS, descriptor, phase, ragged, slots_of, split_columns, tile_of

if TYPE_CHECKING:
    from ..config import KernelConfigBackward_dW
    from .forward import Rows

TOGETHER = 144  # tiles that share operands: all wide ones with some narrow ones, about as many as programs work at once
LEAST = gl.constexpr(3)  # products of a tile, so that two halves of the one before are stored under every other


@gluon.jit
def _place(tile, tiles, num_p, num_q, offsets_ptr, GROUP: gl.constexpr):
    """(expert, its first row, its end, narrow tile, wide tile); past the last tile those of the last, without rows."""
    last = gl.minimum(tile, tiles - 1)
    expert = last // (num_p * num_q)
    tile_p, tile_q = tile_of(last % (num_p * num_q), num_p, num_q, GROUP)
    start = gl.load(offsets_ptr + expert)
    end = gl.load(offsets_ptr + expert + 1)
    return expert, start, gl.where(tile < tiles, end, start), tile_p, tile_q


@gluon.jit
def _steps(start, end, BLOCK_M: gl.constexpr):
    """How many products a tile takes: at least those under which the tile before it is stored."""
    return gl.maximum(gl.cdiv(end - start, BLOCK_M), LEAST)


@gluon.jit
def _copy_rows(stage, ptr, slots, row_ok, col0, width, DIVISOR: gl.constexpr, EVEN: gl.constexpr, layout: gl.constexpr):
    """Rows slots // DIVISOR of an operand into a stage, zeros where `row_ok` is false."""
    offs = col0 + gl.arange(0, stage.shape[1], layout=gl.SliceLayout(0, layout))
    row = (slots.to(gl.uint32) // DIVISOR).to(gl.int64)
    ptrs = ptr + row[:, None] * width + offs[None, :]
    if EVEN:
        async_copy.async_copy_global_to_shared(stage, ptrs, mask=row_ok[:, None] & (offs >= 0)[None, :])
    else:
        async_copy.async_copy_global_to_shared(stage, ptrs, mask=row_ok[:, None] & (offs < width)[None, :])


@gluon.jit
def _producer(
    inputs,
    tables,
    sizes,
    ring,
    P_DIVISOR: gl.constexpr,
    Q_DIVISOR: gl.constexpr,
    EVEN_P: gl.constexpr,
    EVEN_Q: gl.constexpr,
    GROUP: gl.constexpr,
    PRODUCERS: gl.constexpr,
):
    p_desc, q_desc, p_ptr, q_ptr = inputs
    offsets_ptr, gather_ptr = tables
    num_experts, P, Q = sizes
    p_stages, q_stages, full, empty = ring
    DTYPE: gl.constexpr = p_stages.dtype
    STAGES: gl.constexpr = p_stages.shape[0]
    BLOCK_M: gl.constexpr = p_stages.shape[1]
    BLOCK_P: gl.constexpr = p_stages.shape[2]
    BLOCK_Q: gl.constexpr = q_stages.shape[2]
    BYTES: gl.constexpr = BLOCK_M * ((0 if P_DIVISOR > 0 else BLOCK_P) + (0 if Q_DIVISOR > 0 else BLOCK_Q)) * 2
    # Eight threads a row, so a line of 128 bytes at once: a thread has few rows to find the address of. That is most of
    # what the producer does, and what the tensor cores wait for: 6 % of dW.
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [PRODUCERS, 1], [1, 0])
    lane = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    num_p = gl.cdiv(P, BLOCK_P)
    num_q = gl.cdiv(Q, BLOCK_Q)
    tiles = num_experts * num_p * num_q
    _, start, end, tile_p, tile_q = _place(gl.program_id(0), tiles, num_p, num_q, offsets_ptr, GROUP)
    p_slots = slots_of(start + lane, end, gather_ptr, P_DIVISOR)
    q_slots = slots_of(start + lane, end, gather_ptr, Q_DIVISOR)
    p_next = slots_of(start + BLOCK_M + lane, end, gather_ptr, P_DIVISOR)
    q_next = slots_of(start + BLOCK_M + lane, end, gather_ptr, Q_DIVISOR)
    step = 0
    for tile in range(gl.program_id(0), tiles + gl.num_programs(0), gl.num_programs(0)):
        following = tile + gl.num_programs(0)
        _, next_start, next_end, next_p, next_q = _place(following, tiles, num_p, num_q, offsets_ptr, GROUP)
        steps = _steps(start, end, BLOCK_M)
        for index in range(steps):
            row = start + index * BLOCK_M
            # slots are asked for two steps ahead, over a tile's end, and before anything else: used at once, or asked
            # for after the copies, each step would wait for them
            beyond = index + 2 - steps
            ahead = gl.where(beyond < 0, row + 2 * BLOCK_M, next_start + beyond * BLOCK_M)
            ahead_end = gl.where(beyond < 0, end, next_end)
            p_last = slots_of(ahead + lane, ahead_end, gather_ptr, P_DIVISOR)
            q_last = slots_of(ahead + lane, ahead_end, gather_ptr, Q_DIVISOR)
            s = step % STAGES
            ready = full.index(s)
            p_stage, q_stage = p_stages.index(s), q_stages.index(s)
            mbarrier.wait(empty.index(s), phase(step, STAGES) ^ 1)
            mbarrier.expect(ready, BYTES)
            if P_DIVISOR == 0:
                box = p_stage._reinterpret(DTYPE, [1, 1, BLOCK_M, BLOCK_P], p_desc.layout)
                tma.async_copy_global_to_shared(p_desc, [RAGGED, end, RAGGED - end + row, tile_p * BLOCK_P], ready, box)
            if Q_DIVISOR == 0:
                box = q_stage._reinterpret(DTYPE, [1, 1, BLOCK_M, BLOCK_Q], q_desc.layout)
                tma.async_copy_global_to_shared(q_desc, [RAGGED, end, RAGGED - end + row, tile_q * BLOCK_Q], ready, box)
            if P_DIVISOR > 0:
                _copy_rows(p_stage, p_ptr, p_slots, row + lane < end, tile_p * BLOCK_P, P, P_DIVISOR, EVEN_P, layout)
            if Q_DIVISOR > 0:
                _copy_rows(q_stage, q_ptr, q_slots, row + lane < end, tile_q * BLOCK_Q, Q, Q_DIVISOR, EVEN_Q, layout)
            if P_DIVISOR + Q_DIVISOR > 0:
                async_copy.mbarrier_arrive(ready, increment_count=False)
            p_slots, q_slots = p_next, q_next
            p_next, q_next = p_last, q_last
            step += 1
        start, end, tile_p, tile_q = next_start, next_end, next_p, next_q


@gluon.jit
def _store_half(half, place, PART: gl.constexpr, dw_desc, out, X_NARROW: gl.constexpr):
    """Half of a finished tile's wide columns, turned where they are the rows of the result."""
    expert, row, col = place
    tma.store_wait(0)  # of the half before
    if X_NARROW:
        out.store(half.permute((1, 0)))
        row, col = col + PART * out.shape[0], row
    else:
        out.store(half)
        col += PART * out.shape[1]
    fence_async_shared()
    box = out._reinterpret(out.dtype, [1, out.shape[0], out.shape[1]], dw_desc.layout)
    tma.async_copy_shared_to_global(dw_desc, [expert, row, col], box)


@gluon.jit
def _consumer(
    WHICH: gl.constexpr,
    dw_desc,
    tables,
    sizes,
    ring,
    outs,
    GATHERED: gl.constexpr,
    X_NARROW: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The first (WHICH 0) or the second half of each tile's narrow side."""
    offsets_ptr, _ = tables
    num_experts, P, Q = sizes
    p_stages, q_stages, full, empty = ring
    DTYPE: gl.constexpr = p_stages.dtype
    STAGES: gl.constexpr = p_stages.shape[0]
    BLOCK_M: gl.constexpr = p_stages.shape[1]
    BLOCK_P: gl.constexpr = p_stages.shape[2]
    BLOCK_Q: gl.constexpr = q_stages.shape[2]
    SIDE: gl.constexpr = BLOCK_P // 2  # of 64 columns: in shared memory, 128 are two blocks of 64
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, SIDE], DTYPE)
    p_halves = p_stages._reinterpret(DTYPE, [2 * STAGES, BLOCK_M, SIDE], p_layout)
    out = outs.index(WHICH)
    num_p = gl.cdiv(P, BLOCK_P)
    num_q = gl.cdiv(Q, BLOCK_Q)
    tiles = num_experts * num_p * num_q
    expert, start, end, tile_p, tile_q = _place(gl.program_id(0), tiles, num_p, num_q, offsets_ptr, GROUP)
    finished = split_columns(gl.zeros([SIDE, BLOCK_Q], DTYPE, mma))
    place = (num_experts, 0, 0)  # past the end of the result: in the first turn nothing is stored
    step = 0
    for tile in range(gl.program_id(0), tiles + gl.num_programs(0), gl.num_programs(0)):
        following = tile + gl.num_programs(0)
        next_expert, next_start, next_end, next_p, next_q = _place(following, tiles, num_p, num_q, offsets_ptr, GROUP)
        acc = gl.zeros([SIDE, BLOCK_Q], gl.float32, mma)
        for turn in gl.static_range(LEAST):
            s = step % STAGES
            mbarrier.wait(full.index(s), phase(step, STAGES))
            if GATHERED:
                fence_async_shared()  # cp.async wrote through the generic proxy, the product reads through the other
            p_stage = p_halves.index(2 * s + WHICH).permute((1, 0))
            acc = warpgroup_mma(p_stage, q_stages.index(s), acc, use_acc=turn > 0, is_async=True)
            if turn % 2 == 0:  # by then the half before has left `out`
                _store_half(finished[turn // 2], place, turn // 2, dw_desc, out, X_NARROW)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            if turn > 0:
                mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            step += 1
        # Triton (3.6, 3.7) takes a carried value whose only use is a loop's bound for invariant: `rest` is also added
        rest = _steps(start, end, BLOCK_M) - LEAST
        for index in range(rest):
            s = (step + index) % STAGES
            mbarrier.wait(full.index(s), phase(step + index, STAGES))
            if GATHERED:
                fence_async_shared()
            acc = warpgroup_mma(p_halves.index(2 * s + WHICH).permute((1, 0)), q_stages.index(s), acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + index + STAGES - 1) % STAGES), count=1)
        step += rest
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
        finished = split_columns(acc.to(DTYPE))
        place = (expert, tile_p * BLOCK_P + WHICH * SIDE, tile_q * BLOCK_Q)
        expert, start, end, tile_p, tile_q = next_expert, next_start, next_end, next_p, next_q
    tma.store_wait(0)


@gluon.jit
def _specialized_dW(
    p_desc,
    q_desc,
    dw_desc,
    p_ptr,
    q_ptr,
    expert_offsets_ptr,
    gather_indices_ptr,
    num_experts,
    P,
    Q,
    P_DIVISOR: gl.constexpr,
    Q_DIVISOR: gl.constexpr,
    X_NARROW: gl.constexpr,
    EVEN_P: gl.constexpr,
    EVEN_Q: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP: gl.constexpr,
    PRODUCERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = p_ptr.dtype.element_ty
    GATHERED: gl.constexpr = P_DIVISOR + Q_DIVISOR > 0
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_P], DTYPE)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_Q], DTYPE)
    OUT: gl.constexpr = [BLOCK_Q // 2, BLOCK_P // 2] if X_NARROW else [BLOCK_P // 2, BLOCK_Q // 2]
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(OUT, DTYPE)
    p_stages = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_P], p_layout)
    q_stages = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_Q], q_layout)
    outs = gl.allocate_shared_memory(DTYPE, [2, OUT[0], OUT[1]], out_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        # one arrival says which bytes TMA brings; with a gather every producing thread arrives for its copies, too
        mbarrier.init(full.index(s), count=1 + (32 * PRODUCERS if GATHERED else 0))
        mbarrier.init(empty.index(s), count=2)  # both consumers
    fence_async_shared()
    tables = (expert_offsets_ptr, gather_indices_ptr)
    # TMA needs rows of whole 16 bytes; said like this, the compiler knows it, and copies 16 bytes at a time
    sizes = (num_experts, P // 8 * 8, Q // 8 * 8)
    ring = (p_stages, q_stages, full, empty)
    inputs = (p_desc, q_desc, p_ptr, q_ptr)
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consumer, (first, dw_desc, tables, sizes, ring, outs, GATHERED, X_NARROW, GROUP)),
            (_consumer, (second, dw_desc, tables, sizes, ring, outs, GATHERED, X_NARROW, GROUP)),
            (_producer, (inputs, tables, sizes, ring, P_DIVISOR, Q_DIVISOR, EVEN_P, EVEN_Q, GROUP, PRODUCERS)),
        ],
        [4, PRODUCERS],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


def specialized_dW(
    dy: Tensor,
    x: Tensor,
    rows: Rows,
    config: KernelConfigBackward_dW,
    dw: Tensor,
    *,
    dy_divisor: int,
    x_divisor: int,
) -> None:
    """Fill dw [E,N,K]; see `backward_dW.dW_gemm`."""
    experts, n, k = dw.shape
    sides = (dy, n, config.block_n, dy_divisor), (x, k, config.block_k, x_divisor)
    x_narrow = config.block_k < config.block_n
    (p, p_size, p_block, p_divisor), (q, q_size, q_block, q_divisor) = sides[::-1] if x_narrow else sides
    sides_of_half = (q_block // 2, p_block // 2) if x_narrow else (p_block // 2, q_block // 2)
    dw_desc = descriptor(dw, [1, *sides_of_half])  # a consumer stores half of its wide side at a time
    p_desc = dw_desc if p_divisor else ragged(p, [config.block_m, p_block])  # gathered rows take none
    q_desc = dw_desc if q_divisor else ragged(q, [config.block_m, q_block])
    tiles = experts * cdiv(n, config.block_n) * cdiv(k, config.block_k)
    launch(
        "dW",
        _specialized_dW,
        (min(num_programs(x.device, rows.sm_margin), tiles),),
        *(p_desc, q_desc, dw_desc, p, q, rows.expert_offsets, rows.gather_indices, experts, p_size, q_size),
        P_DIVISOR=p_divisor,
        Q_DIVISOR=q_divisor,
        X_NARROW=x_narrow,
        EVEN_P=p_size % p_block == 0,
        EVEN_Q=q_size % q_block == 0,
        BLOCK_M=config.block_m,
        BLOCK_P=p_block,
        BLOCK_Q=q_block,
        STAGES=config.num_stages,
        GROUP=max(1, TOGETHER // cdiv(q_size, q_block)),
        PRODUCER_REGISTERS=72,  # two steps of slots on each side
        CONSUMER_REGISTERS=216,
        **WARPS,
    )
