"""y[r] = x[row(r)] @ weight[e(r)], warp-specialised, for forward and dX alike: the equations of these two files.

    MODE      product                                   stored
    PLAIN     forward: x @ W^T; dX: dy @ W (TRANS_W)    y [T*K, width], in expert order or scattered (SCATTER)
    SWIGLU    H = x @ W^T, [gate | up] of a tile        A = silu(gate) * up [T*K, I]; with STORE_H also H [T*K, 2I]

Two consumers multiply the upper and the lower 64 rows of a tile, or skip a half without rows (MAX_SKIPPED). A finished
tile is rounded, kept in registers, and stored in parts (the halves of y; of H, then of A) under every other of the
first products of the next one. One part at a time is staged in `out`, apart from the ring. A program's loop has a turn
more than it has tiles, for the last tile's parts, and in its first turn the parts lie outside of the result and are
clipped; every tile has at least LEAST products, of zeros where it has too few of its own (dropped rows, a short
reduction).
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
from .specialized import (
    RAGGED,
    WARPS,
    ask,
    claimed,
    descriptor,
    halves,
    make_news,
    phase,
    ragged,
    slots_of,
    split_columns,
    tell,
    tile_of,
    told,
)

if TYPE_CHECKING:
    from ..config import KernelConfigBackward_dX, KernelConfigForward
    from .forward import Rows

PLAIN, SWIGLU = gl.constexpr(0), gl.constexpr(1)
GROUP_M = 4
AHEAD = gl.constexpr(4)  # steps before a tile's end, and again before that
# With up to so many weights an expert, a lower half without rows is skipped: 3 % of a forward of the 30B model. Tiles
# then differ in time, and the L2 has dropped larger weights before the last tile that shares them asks for them: for
# the 235B model it costs 4 %.
MAX_SKIPPED = 2**22


@gluon.jit
def place_of(tile, tables, num_m, num_n, num_experts, GROUP_M: gl.constexpr):
    """(expert, first row, column tile) of a tile; past the last one its row, and no expert."""
    tile_expert_ptr, tile_row_ptr = tables[0], tables[1]
    tiles = num_m * num_n
    tile_m, tile_n = tile_of(gl.minimum(tile, tiles - 1), num_m, num_n, GROUP_M)
    expert = gl.load(tile_expert_ptr + tile_m)
    return gl.where(tile < tiles, expert, num_experts), gl.load(tile_row_ptr + tile_m), tile_n


@gluon.jit
def _copy_steps(
    first,
    end,
    step,
    place,
    slot,
    inputs,
    sizes,
    ring,
    DIVISOR: gl.constexpr,
    WIDE_W: gl.constexpr,
    TRANS_W: gl.constexpr,
    EVEN_K: gl.constexpr,
    rows_layout: gl.constexpr,
):
    """Fill the ring with a tile's products `first` to `end`, the tile's first at `step`."""
    expert, row0, row_end, tile_n = place
    num_experts, K = sizes[2], sizes[3]
    x_desc, w_desc, x_ptr = inputs
    x_stages, w_stages, full, empty = ring
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    STAGES: gl.constexpr = x_stages.shape[0]
    BLOCK_M: gl.constexpr = x_stages.shape[1]
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    BLOCK_N: gl.constexpr = w_stages.shape[2] if TRANS_W else w_stages.shape[1]
    OUT_N: gl.constexpr = BLOCK_N // 2 if WIDE_W else BLOCK_N
    kept = expert < num_experts  # of dropped rows both operands are zeros
    if DIVISOR > 0:
        lane = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rows_layout))
        offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, rows_layout))
        x_ptrs = x_ptr + (slot // DIVISOR).to(gl.int64)[:, None] * K + offs_k[None, :]
        row_ok = (row0 + lane < row_end) & kept
    for index in range(first, end):
        k = index * BLOCK_K
        s = (step + index) % STAGES
        ready = full.index(s)
        w_stage = w_stages.index(s)
        mbarrier.wait(empty.index(s), phase(step + index, STAGES) ^ 1)
        mbarrier.expect(ready, (BLOCK_N * BLOCK_K + (BLOCK_M * BLOCK_K if DIVISOR == 0 else 0)) * 2)
        if TRANS_W:
            w_box = w_stage._reinterpret(DTYPE, [1, BLOCK_K, BLOCK_N], w_desc.layout)
            tma.async_copy_global_to_shared(w_desc, [expert, k, tile_n * OUT_N], ready, w_box)
        elif WIDE_W:
            w_box = w_stage._reinterpret(DTYPE, [2, OUT_N, BLOCK_K], w_desc.layout)
            tma.async_copy_global_to_shared(w_desc, [expert * 2, tile_n * OUT_N, k], ready, w_box)
        else:
            w_box = w_stage._reinterpret(DTYPE, [1, BLOCK_N, BLOCK_K], w_desc.layout)
            tma.async_copy_global_to_shared(w_desc, [expert, tile_n * OUT_N, k], ready, w_box)
        if DIVISOR == 0:
            tma.async_copy_global_to_shared(x_desc, [gl.where(kept, row0, RAGGED), k], ready, x_stages.index(s))
        else:
            if EVEN_K:
                mask = (offs_k >= 0)[None, :] & row_ok[:, None]
            else:
                mask = (offs_k < K - k)[None, :] & row_ok[:, None]
            async_copy.async_copy_global_to_shared(x_stages.index(s), x_ptrs + k, mask=mask)
            async_copy.mbarrier_arrive(ready, increment_count=False)


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
    PRODUCERS: gl.constexpr,
):
    """Choose tiles, tell of them, and fill the ring: rows of x, by TMA or through the index, and W, with WIDE_W gate
    and up rows side by side.

    A tile is claimed late, so that tiles are begun in their order: neighbours share W, which the L2 does not keep for
    long. Claim, place and slots wait for one another; each is asked for a few steps before it is needed.
    """
    offsets_ptr, gather_ptr, counter_ptr = tables[2], tables[3], tables[4]
    num_m, num_n, num_experts, K, _, M = sizes
    BLOCK_M: gl.constexpr = ring[0].shape[1]
    BLOCK_K: gl.constexpr = ring[0].shape[2]
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [PRODUCERS, 1], [1, 0])
    lane = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rows_layout))
    thread = gl.arange(0, 32 * PRODUCERS, layout=gl.BlockedLayout([1], [32], [PRODUCERS], [0]))
    tiles = num_m * num_n
    steps = gl.maximum(gl.cdiv(K, BLOCK_K), LEAST)
    tile = gl.program_id(0)
    expert, row0, tile_n = place_of(tile, tables, num_m, num_n, num_experts, GROUP_M)
    row_end = gl.load(offsets_ptr + expert + 1)
    slot = slots_of(row0 + lane, M, gather_ptr, DIVISOR)
    step = 0
    turn = 0
    while tile < tiles:
        # dropped rows take LEAST products, of zeros, so that nobody is told of more tiles than `news` hold
        count = gl.where(expert < num_experts, steps, LEAST)
        tell(news, turn, count, row0, row_end, tile_n)
        place = (expert, row0, row_end, tile_n)
        first = gl.maximum(count - 3 * AHEAD, 0)
        second = gl.maximum(count - 2 * AHEAD, 0)
        third = gl.maximum(count - AHEAD, 0)
        _copy_steps(0, first, step, place, slot, inputs, sizes, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, rows_layout)
        answer = ask(tile, tiles, counter_ptr, thread)
        _copy_steps(
            first, second, step, place, slot, inputs, sizes, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, rows_layout
        )
        tile = claimed(answer, tile, tiles, counter_ptr, thread)
        next_expert, next_row0, next_n = place_of(tile, tables, num_m, num_n, num_experts, GROUP_M)
        _copy_steps(
            second, third, step, place, slot, inputs, sizes, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, rows_layout
        )
        next_end = gl.load(offsets_ptr + next_expert + 1)
        next_slot = slots_of(next_row0 + lane, M, gather_ptr, DIVISOR)
        _copy_steps(third, count, step, place, slot, inputs, sizes, ring, DIVISOR, WIDE_W, TRANS_W, EVEN_K, rows_layout)
        expert, row0, row_end, tile_n, slot = next_expert, next_row0, next_end, next_n, next_slot
        step += count
        turn += 1
    tell(news, turn, 0, 0, 0, 0)  # the last tile is stored under a turn without products
    tell(news, turn + 1, -1, 0, 0, 0)


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
    left,
    right,
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
    """One part of a finished tile, given its halves: y's halves in turn; with SWIGLU H's (STORE_H), then A's."""
    row_end, ragged_row, col0 = place
    y_desc, h_desc, y_ptr = outputs
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    ROWS: gl.constexpr = out.shape[0]
    HALF: gl.constexpr = out.shape[1]
    tma.store_wait(0)  # of the part before
    SIDE: gl.constexpr = PART - 2 if STORE_H else PART
    if MODE == SWIGLU and SIDE >= 0:
        # H is rounded before the activation, as it is when the activation is a kernel of its own
        gate = split_columns(left)[SIDE].to(gl.float32)
        a = gate * (1.0 / (1.0 + gl.exp(-gate))) * split_columns(right)[SIDE].to(gl.float32)
        quarter: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HALF // 2], DTYPE)
        stage = out._reinterpret(DTYPE, [2, ROWS, HALF // 2], quarter).index(SIDE)
        stage.store(a.to(DTYPE))
        fence_async_shared()
        box = stage._reinterpret(DTYPE, [1, 1, ROWS, HALF // 2], y_desc.layout)
        tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0 + SIDE * (HALF // 2)], box)
    else:
        if PART == 0:
            out.store(left)
        else:
            out.store(right)
        if SCATTER:
            _scatter(out, y_ptr, slot, col0 + PART * HALF, width, layout)
        else:
            fence_async_shared()
            if MODE == SWIGLU:
                box = out._reinterpret(DTYPE, [1, 1, 1, ROWS, HALF], h_desc.layout)
                tma.async_copy_shared_to_global(h_desc, [RAGGED, row_end, PART, ragged_row, col0], box)
            else:
                box = out._reinterpret(DTYPE, [1, 1, ROWS, HALF], y_desc.layout)
                tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0 + PART * HALF], box)


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
    SKIP: gl.constexpr,
):
    """The upper (WHICH 0) or the lower half of each tile's rows; with SKIP, nothing for a half without rows."""
    outputs, gather_ptr, width, ring, news, outs = operands
    x_stages, w_stages, full, empty = ring
    DTYPE: gl.constexpr = x_stages.dtype
    STAGES: gl.constexpr = x_stages.shape[0]
    ROWS: gl.constexpr = x_stages.shape[1] // 2
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    BLOCK_N: gl.constexpr = w_stages.shape[2] if TRANS_W else w_stages.shape[1]
    HALF: gl.constexpr = BLOCK_N // 2
    OUT_N: gl.constexpr = HALF if MODE == SWIGLU else BLOCK_N
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [4, 1], [1, 0])
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], DTYPE)
    x_halves = x_stages._reinterpret(DTYPE, [2 * STAGES, ROWS, BLOCK_K], x_layout)
    out = outs.index(WHICH)
    lane = WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    left, right = split_columns(gl.zeros([ROWS, BLOCK_N], DTYPE, mma))
    place = (0, RAGGED, 0)  # past the end of the result: of the first turn nothing is stored
    slot = gl.full([ROWS], -1, gl.int32, gl.SliceLayout(1, layout))
    step = 0
    turn = 0
    steps, row0, row_end, tile_n = told(news, turn)
    while steps >= 0:
        some = steps > 0
        if SKIP:
            some = some & (row0 + WHICH * ROWS < row_end)
        if some:
            acc = gl.zeros([ROWS, BLOCK_N], gl.float32, mma)
            for index in gl.static_range(LEAST):
                s = (step + index) % STAGES
                mbarrier.wait(full.index(s), phase(step + index, STAGES))
                if GATHERED:
                    fence_async_shared()  # cp.async wrote through the generic proxy, the product reads another way
                w_stage = w_stages.index(s) if TRANS_W else w_stages.index(s).permute((1, 0))
                acc = warpgroup_mma(x_halves.index(2 * s + WHICH), w_stage, acc, use_acc=index > 0, is_async=True)
                if index % 2 == 0:  # every other product: by then the part before has left `out`
                    _store_part(
                        index // 2, left, right, place, slot, outputs, out, width, layout, MODE, SCATTER, STORE_H
                    )
                acc = warpgroup_mma_wait(1, deps=(acc,))
                if index > 0:
                    mbarrier.arrive(empty.index((step + index + STAGES - 1) % STAGES), count=1)
            if SCATTER:
                slot = gl.load(gather_ptr + row0 + lane, mask=row0 + lane < row_end, other=-1)
            for index in range(LEAST, steps):
                s = (step + index) % STAGES
                mbarrier.wait(full.index(s), phase(step + index, STAGES))
                if GATHERED:
                    fence_async_shared()
                w_stage = w_stages.index(s) if TRANS_W else w_stages.index(s).permute((1, 0))
                acc = warpgroup_mma(x_halves.index(2 * s + WHICH), w_stage, acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index((step + index + STAGES - 1) % STAGES), count=1)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index((step + steps + STAGES - 1) % STAGES), count=1)
            left, right = split_columns(acc.to(DTYPE))
        else:
            for part in gl.static_range((LEAST + 1) // 2):
                _store_part(part, left, right, place, slot, outputs, out, width, layout, MODE, SCATTER, STORE_H)
            for index in range(steps):
                s = (step + index) % STAGES
                mbarrier.wait(full.index(s), phase(step + index, STAGES))
                mbarrier.arrive(empty.index(s), count=1)
            if SCATTER:
                slot = gl.load(gather_ptr + row0 + lane, mask=row0 + lane < row_end, other=-1)
            left, right = split_columns(gl.zeros([ROWS, BLOCK_N], DTYPE, mma))
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
    SKIP: gl.constexpr,
    EVEN_K: gl.constexpr,
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
    HALF: gl.constexpr = BLOCK_N // 2
    ring = make_ring(DTYPE, BLOCK_M, BLOCK_N, BLOCK_K, STAGES, TRANS_W, 1 + (32 * PRODUCERS if GATHERED else 0))
    news = make_news()
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M // 2, HALF], DTYPE)
    outs = gl.allocate_shared_memory(DTYPE, [2, BLOCK_M // 2, HALF], out_layout)
    tables = (tile_expert_ptr, tile_row_ptr, expert_offsets_ptr, gather_indices_ptr, num_tiles_ptr + 1)
    # TMA needs rows of whole 16 bytes; said like this, the compiler knows it, and copies 16 bytes at a time
    num_n = gl.cdiv(width, HALF if WIDE_W else BLOCK_N)
    sizes = (gl.load(num_tiles_ptr), num_n, num_experts, K // 8 * 8, width // 8 * 8, M)
    outputs = (y_desc, h_desc, y_ptr)
    inputs = (x_desc, w_desc, x_ptr)
    operands = (outputs, gather_indices_ptr, sizes[4], ring, news, outs)
    upper: gl.constexpr = 0
    lower: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_consumer, (upper, operands, GATHERED, MODE, TRANS_W, SCATTER, STORE_H, LEAST, SKIP)),
            (_consumer, (lower, operands, GATHERED, MODE, TRANS_W, SCATTER, STORE_H, LEAST, SKIP)),
            (
                producer,
                (inputs, tables, sizes, ring, news, DIVISOR, WIDE_W, TRANS_W, EVEN_K, LEAST, GROUP_M, PRODUCERS),
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
    TRANS_W: gl.constexpr,
    ARRIVALS: gl.constexpr,
):
    """(stages of x, stages of W, their `full` and `empty` barriers), ready for use."""
    W_SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if TRANS_W else [BLOCK_N, BLOCK_K]
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], DTYPE)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(W_SHAPE, DTYPE)
    x_stages = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], x_layout)
    w_stages = gl.allocate_shared_memory(DTYPE, [STAGES, W_SHAPE[0], W_SHAPE[1]], w_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        # one arrival says which bytes TMA brings; with a gather every producing thread arrives for its copies, too
        mbarrier.init(full.index(s), count=ARRIVALS)
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
    block_m, block_n, block_k = sides
    reduced, width = (n, k) if flags["TRANS_W"] else (k, n)
    out_n, least = block_n, 3  # products, so that two parts are stored under every other one
    if flags["TRANS_W"]:
        w_desc = descriptor(weight, [1, block_k, block_n])
    elif flags["MODE"] == SWIGLU.value:
        width, out_n = n // 2, block_n // 2
        least = 7 if flags["STORE_H"] else 3
        w_desc = descriptor(weight.view(2 * experts, width, k), [2, out_n, block_k])
    else:
        w_desc = descriptor(weight, [1, block_n, block_k])
    x_desc = w_desc if flags["DIVISOR"] else descriptor(x, [block_m, block_k])  # gathered rows take none
    launch(
        name,
        _specialized_rows,
        (min(num_programs(x.device), rows.table.max_tiles * cdiv(width, out_n)),),
        *(x_desc, w_desc, *outputs[:2], x, outputs[2], *rows.arguments),
        *(experts, rows.gather_indices.shape[0], reduced, width),
        **{"SCATTER": False, "STORE_H": False, **flags},
        LEAST=least,
        SKIP=n * k <= MAX_SKIPPED,
        EVEN_K=reduced % block_k == 0 and reduced >= least * block_k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=config.num_stages,
        GROUP_M=GROUP_M,
        PRODUCER_REGISTERS=56 if flags["DIVISOR"] else 48,
        CONSUMER_REGISTERS=224 if flags["DIVISOR"] else 232,
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
    half, quarter = config.block_n // 2, config.block_n // 4
    flags = {"DIVISOR": rows.top_k if permute_x else 0, "TRANS_W": False}
    if swiglu:
        y_desc = ragged(y, [config.block_m // 2, quarter])
        h_desc = y_desc if h is None else ragged(h, [1, config.block_m // 2, half], *halves(h))
        flags |= {"MODE": SWIGLU.value, "STORE_H": h is not None}
        _launch("forward_up", x, weight, rows, config, sides, (y_desc, h_desc, y), **flags)
        return
    y_desc = ragged(y, [config.block_m // 2, half])
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
    dx_desc = ragged(dx, [config.block_m // 2, config.block_k // 2])
    flags = {"DIVISOR": dy_divisor, "MODE": PLAIN.value, "TRANS_W": True, "SCATTER": scatter}
    _launch("dX", dy, weight, rows, config, sides, (dx_desc, dx_desc, dx), **flags)
