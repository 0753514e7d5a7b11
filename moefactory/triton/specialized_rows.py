"""y[r] = x[row(r)] @ weight[e(r)], warp-specialised, for forward and dX alike: the equations of these two files.

    MODE      product                                   stored
    PLAIN     forward: x @ W^T; dX: dy @ W (TRANS_W)    y [T*K, width], in expert order or scattered (SCATTER)
    SWIGLU    H = x @ W^T, [gate | up] of a tile        A = silu(gate) * up [T*K, I]; with STORE_H also H [T*K, 2I]
    DSWIGLU   dA = dO @ W                               dH [T*K, 2I], s * A [T*K, I], <dA, A> per column tile

The epilogue borrows stages of the ring: results are staged there on their way to TMA, and in DSWIGLU the producer has
put H there before, so that its loads, too, run under the products. A borrowed stage is given back under the first
product of the next tile, when its stores have been read.
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
    descriptor,
    halves,
    phase,
    ragged,
    split_columns,
    tile_of,
)

if TYPE_CHECKING:
    from ..config import KernelConfigBackward_dX, KernelConfigForward
    from .forward import Rows

PLAIN, SWIGLU, DSWIGLU = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
GROUP_M = 8


@gluon.jit
def _producer(
    inputs,
    tables,
    sizes,
    ring,
    DIVISOR: gl.constexpr,
    MODE: gl.constexpr,
    TRANS_W: gl.constexpr,
    EVEN_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    PRODUCERS: gl.constexpr,
):
    tile_expert_ptr, tile_row_ptr, offsets_ptr, gather_ptr = tables
    num_m, num_n, num_experts, K, _ = sizes
    x_desc, w_desc, h_desc, x_ptr = inputs
    x_stages, w_stages, full, empty = ring
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    STAGES: gl.constexpr = x_stages.shape[0]
    BLOCK_M: gl.constexpr = x_stages.shape[1]
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    BLOCK_N: gl.constexpr = w_stages.shape[2] if TRANS_W else w_stages.shape[1]
    OUT_N: gl.constexpr = BLOCK_N // 2 if MODE == SWIGLU else BLOCK_N
    QUARTER: gl.constexpr = BLOCK_N // 4
    rows_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_K, BLOCK_K // 8], [PRODUCERS, 1], [1, 0])
    lane = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, rows_layout))
    offs_k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, rows_layout))
    tiles = num_m * num_n
    tile_m, _ = tile_of(gl.minimum(gl.program_id(0), tiles - 1), num_m, num_n, GROUP_M)
    expert = gl.load(tile_expert_ptr + tile_m)
    row0 = gl.load(tile_row_ptr + tile_m)
    row_end = gl.load(offsets_ptr + expert + 1)
    slot = gl.load(gather_ptr + row0 + lane, mask=row0 + lane < row_end, other=0)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, num_m, num_n, GROUP_M)
        next_m, _ = tile_of(gl.minimum(tile + gl.num_programs(0), tiles - 1), num_m, num_n, GROUP_M)
        next_expert = gl.load(tile_expert_ptr + next_m)
        next_row0 = gl.load(tile_row_ptr + next_m)
        if DIVISOR > 0:
            # rows past the end read a row that exists and are never stored
            x_ptrs = x_ptr + (slot // DIVISOR).to(gl.int64)[:, None] * K + offs_k[None, :]
        for k in range(0, gl.where(expert < num_experts, K, 0), BLOCK_K):
            s = step % STAGES
            ready = full.index(s)
            w_stage = w_stages.index(s)
            mbarrier.wait(empty.index(s), phase(step, STAGES) ^ 1)
            mbarrier.expect(ready, (BLOCK_N * BLOCK_K + (BLOCK_M * BLOCK_K if DIVISOR == 0 else 0)) * 2)
            if TRANS_W:
                w_box = w_stage._reinterpret(DTYPE, [1, BLOCK_K, BLOCK_N], w_desc.layout)
                tma.async_copy_global_to_shared(w_desc, [expert, k, tile_n * OUT_N], ready, w_box)
            elif MODE == SWIGLU:
                w_box = w_stage._reinterpret(DTYPE, [2, OUT_N, BLOCK_K], w_desc.layout)
                tma.async_copy_global_to_shared(w_desc, [expert * 2, tile_n * OUT_N, k], ready, w_box)
            else:
                w_box = w_stage._reinterpret(DTYPE, [1, BLOCK_N, BLOCK_K], w_desc.layout)
                tma.async_copy_global_to_shared(w_desc, [expert, tile_n * OUT_N, k], ready, w_box)
            if DIVISOR == 0:
                tma.async_copy_global_to_shared(x_desc, [row0, k], ready, x_stages.index(s))
            else:
                if EVEN_K:
                    async_copy.async_copy_global_to_shared(x_stages.index(s), x_ptrs + k)
                else:
                    mask = (offs_k < K - k)[None, :] & (lane >= 0)[:, None]
                    async_copy.async_copy_global_to_shared(x_stages.index(s), x_ptrs + k, mask=mask)
                async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1
        # the next tile's rows: loads that wait for one another, while the consumer still multiplies
        expert = next_expert
        row0_here = row0
        row0 = next_row0
        row_end = gl.load(offsets_ptr + expert + 1)
        if DIVISOR > 0:
            slot = gl.load(gather_ptr + row0 + lane, mask=row0 + lane < row_end, other=0)
        for part in gl.static_range(4 if MODE == DSWIGLU else 2):
            s = step % STAGES
            ready = full.index(s)
            mbarrier.wait(empty.index(s), phase(step, STAGES) ^ 1)
            if MODE == DSWIGLU:
                mbarrier.expect(ready, 2 * BLOCK_M * QUARTER * 2)
                pair = w_stages.index(s)._reinterpret(DTYPE, [2, BLOCK_M, QUARTER], h_desc.layout)
                coordinates = [0, row0_here, tile_n * BLOCK_N + part * QUARTER]
                tma.async_copy_global_to_shared(h_desc, coordinates, ready, pair)
            else:
                mbarrier.arrive(ready, count=1)
            if DIVISOR > 0:
                async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _scatter(stage, y_ptr, slot, row_ok, col0, width, layout: gl.constexpr):
    """Rows of a staged tile to the rows `slot` of y."""
    offs_n = col0 + gl.arange(0, stage.shape[1], layout=gl.SliceLayout(0, layout))
    ptrs = y_ptr + slot.to(gl.int64)[:, None] * width + offs_n[None, :]
    gl.store(ptrs, stage.load(layout), mask=row_ok[:, None] & (offs_n < width)[None, :])


@gluon.jit
def _give_back(empty, step, STAGES: gl.constexpr, BORROWED: gl.constexpr):
    """The last stages before `step` to the producer, once the stores out of them have been read."""
    tma.store_wait(0)
    fence_async_shared()
    for back in gl.static_range(BORROWED):
        mbarrier.arrive(empty.index((step + STAGES - 1 - back) % STAGES), count=1)


@gluon.jit
def _consumer(
    outputs,
    tables,
    sizes,
    M,
    ring,
    GATHERED: gl.constexpr,
    MODE: gl.constexpr,
    TRANS_W: gl.constexpr,
    SCATTER: gl.constexpr,
    STORE_H: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr,
    GROUP_M: gl.constexpr,
):
    tile_expert_ptr, tile_row_ptr, offsets_ptr, gather_ptr = tables
    num_m, num_n, num_experts, K, width = sizes
    y_desc, h_desc, scaled_a_desc, y_ptr, ds_ptr, routing_weights_ptr = outputs
    x_stages, w_stages, full, empty = ring
    DTYPE: gl.constexpr = y_ptr.dtype.element_ty
    STAGES: gl.constexpr = x_stages.shape[0]
    BLOCK_M: gl.constexpr = x_stages.shape[1]
    BLOCK_K: gl.constexpr = x_stages.shape[2]
    BLOCK_N: gl.constexpr = w_stages.shape[2] if TRANS_W else w_stages.shape[1]
    HALF: gl.constexpr = BLOCK_N // 2
    QUARTER: gl.constexpr = BLOCK_N // 4
    OUT_N: gl.constexpr = HALF if MODE == SWIGLU else BLOCK_N
    BORROWED: gl.constexpr = 1 if MODE == DSWIGLU else 2  # stages whose stores may still be read when a tile ends
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_N, 16])
    half: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, HALF], DTYPE)
    quarter: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, QUARTER], DTYPE)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HALF, HALF // 8], [8, 1], [1, 0])
    slot_layout: gl.constexpr = gl.SliceLayout(1, mma if MODE == DSWIGLU else store_layout)
    lane = gl.arange(0, BLOCK_M, layout=slot_layout)
    tiles = num_m * num_n
    tile_m, _ = tile_of(gl.minimum(gl.program_id(0), tiles - 1), num_m, num_n, GROUP_M)
    expert = gl.load(tile_expert_ptr + tile_m)
    row0 = gl.load(tile_row_ptr + tile_m)
    row_end = gl.load(offsets_ptr + expert + 1)
    step = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        tile_m, tile_n = tile_of(tile, num_m, num_n, GROUP_M)
        next_m, _ = tile_of(gl.minimum(tile + gl.num_programs(0), tiles - 1), num_m, num_n, GROUP_M)
        next_expert = gl.load(tile_expert_ptr + next_m)  # nothing below waits for it
        next_row0 = gl.load(tile_row_ptr + next_m)
        row_ok = row0 + lane < row_end
        if SCATTER or MODE == DSWIGLU:
            slot = gl.load(gather_ptr + row0 + lane, mask=row_ok, other=0)
        acc = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, mma)
        k_end = gl.where(expert < num_experts, K, 0)  # dropped rows: no product, zeros
        for k in range(0, k_end, BLOCK_K):
            s = step % STAGES
            mbarrier.wait(full.index(s), phase(step, STAGES))
            if GATHERED:
                fence_async_shared()  # cp.async wrote through the generic proxy, the product reads through the other
            w_stage = w_stages.index(s) if TRANS_W else w_stages.index(s).permute((1, 0))
            acc = warpgroup_mma(x_stages.index(s), w_stage, acc, is_async=True)
            if k == 0:
                if tile >= gl.num_programs(0):
                    _give_back(empty, step, STAGES, BORROWED)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k > 0)
            step += 1
        if MODE == DSWIGLU:
            if HAS_WEIGHTS:  # under the last product
                weight = gl.load(routing_weights_ptr + slot, mask=row_ok, other=0.0).to(gl.float32)
        next_end = gl.load(offsets_ptr + next_expert + 1)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=k_end > 0)
        if k_end == 0:
            if tile >= gl.num_programs(0):
                _give_back(empty, step, STAGES, BORROWED)
        ragged_row = RAGGED - row_end + row0
        col0 = tile_n * OUT_N
        if MODE == DSWIGLU:
            left, right = split_columns(acc)
            part0, part1 = split_columns(left)
            part2, part3 = split_columns(right)
            parts = (part0, part1, part2, part3)
            layout: gl.constexpr = part0.type.layout
            if HAS_WEIGHTS:
                scale = gl.convert_layout(weight, gl.SliceLayout(1, layout))
            else:
                scale = gl.full([BLOCK_M], 1.0, gl.float32, gl.SliceLayout(1, layout))
            ds = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, layout))
            for part in gl.static_range(4):
                s = step % STAGES
                mbarrier.wait(full.index(s), phase(step, STAGES))
                pair = w_stages.index(s)._reinterpret(DTYPE, [2, BLOCK_M, QUARTER], quarter)
                gate = pair.index(0).load(layout).to(gl.float32)
                up = pair.index(1).load(layout).to(gl.float32)
                da = parts[part]
                col = col0 + part * QUARTER
                sig = 1.0 / (1.0 + gl.exp(-gate))
                a = gate * sig * up
                ds += gl.sum(da * a, axis=1)  # columns past the width are zeros on both sides
                da = da * scale[:, None]
                pair.index(0).store((da * up * sig * (1 + gate * (1 - sig))).to(DTYPE))
                pair.index(1).store((da * gate * sig).to(DTYPE))
                a_stage = x_stages.index(s)._reinterpret(DTYPE, [BLOCK_M, QUARTER], quarter)
                a_stage.store((a * scale[:, None]).to(DTYPE))
                fence_async_shared()
                dh_box = pair._reinterpret(DTYPE, [1, 1, 2, BLOCK_M, QUARTER], y_desc.layout)
                a_box = a_stage._reinterpret(DTYPE, [1, 1, BLOCK_M, QUARTER], scaled_a_desc.layout)
                tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, 0, ragged_row, col], dh_box)
                tma.async_copy_shared_to_global(scaled_a_desc, [RAGGED, row_end, ragged_row, col], a_box)
                if part > 0:
                    tma.store_wait(2)  # all but the two stores just made: the stage before this one has been read
                    fence_async_shared()
                    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
                step += 1
            gl.store(ds_ptr + tile_n.to(gl.int64) * M + slot, gl.convert_layout(ds, slot_layout), mask=row_ok)
        else:
            left, right = split_columns(acc.to(DTYPE))
            s0 = step % STAGES
            s1 = (step + 1) % STAGES
            mbarrier.wait(full.index(s0), phase(step, STAGES))
            mbarrier.wait(full.index(s1), phase(step + 1, STAGES))
            step += 2
            stage0 = w_stages.index(s0)._reinterpret(DTYPE, [BLOCK_M, HALF], half)
            stage1 = w_stages.index(s1)._reinterpret(DTYPE, [BLOCK_M, HALF], half)
            if MODE == PLAIN:
                stage0.store(left)
                stage1.store(right)
                if SCATTER:
                    _scatter(stage0, y_ptr, slot, row_ok, col0, width, store_layout)
                    _scatter(stage1, y_ptr, slot, row_ok, col0 + HALF, width, store_layout)
                else:
                    fence_async_shared()
                    box0 = stage0._reinterpret(DTYPE, [1, 1, BLOCK_M, HALF], y_desc.layout)
                    box1 = stage1._reinterpret(DTYPE, [1, 1, BLOCK_M, HALF], y_desc.layout)
                    tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0], box0)
                    tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0 + HALF], box1)
            else:
                if STORE_H:
                    stage0.store(left)
                    stage1.store(right)
                    fence_async_shared()
                    gate_box = stage0._reinterpret(DTYPE, [1, 1, 1, BLOCK_M, HALF], h_desc.layout)
                    up_box = stage1._reinterpret(DTYPE, [1, 1, 1, BLOCK_M, HALF], h_desc.layout)
                    tma.async_copy_shared_to_global(h_desc, [RAGGED, row_end, 0, ragged_row, col0], gate_box)
                    tma.async_copy_shared_to_global(h_desc, [RAGGED, row_end, 1, ragged_row, col0], up_box)
                # H is rounded before the activation, as it is when the activation is a kernel of its own
                gate = left.to(gl.float32)
                a = gate * (1.0 / (1.0 + gl.exp(-gate))) * right.to(gl.float32)
                a0, a1 = split_columns(a.to(DTYPE))
                a_stage0 = x_stages.index(s0)._reinterpret(DTYPE, [BLOCK_M, QUARTER], quarter)
                a_stage1 = x_stages.index(s1)._reinterpret(DTYPE, [BLOCK_M, QUARTER], quarter)
                a_stage0.store(a0)
                a_stage1.store(a1)
                fence_async_shared()
                a_box0 = a_stage0._reinterpret(DTYPE, [1, 1, BLOCK_M, QUARTER], y_desc.layout)
                a_box1 = a_stage1._reinterpret(DTYPE, [1, 1, BLOCK_M, QUARTER], y_desc.layout)
                tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0], a_box0)
                tma.async_copy_shared_to_global(y_desc, [RAGGED, row_end, ragged_row, col0 + QUARTER], a_box1)
        expert = next_expert
        row0 = next_row0
        row_end = next_end
    tma.store_wait(0)


@gluon.jit
def _specialized_rows(
    x_desc,
    w_desc,
    y_desc,
    h_desc,
    scaled_a_desc,
    x_ptr,
    y_ptr,
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
    MODE: gl.constexpr,
    TRANS_W: gl.constexpr,
    SCATTER: gl.constexpr,
    STORE_H: gl.constexpr,
    HAS_WEIGHTS: gl.constexpr,
    EVEN_K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    PRODUCERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    W_SHAPE: gl.constexpr = [BLOCK_K, BLOCK_N] if TRANS_W else [BLOCK_N, BLOCK_K]
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_K], DTYPE)
    w_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(W_SHAPE, DTYPE)
    x_stages = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, BLOCK_K], x_layout)
    w_stages = gl.allocate_shared_memory(DTYPE, [STAGES, W_SHAPE[0], W_SHAPE[1]], w_layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        # one arrival says which bytes TMA brings; with a gather every producing thread arrives for its copies, too
        mbarrier.init(full.index(s), count=1 + (32 * PRODUCERS if DIVISOR > 0 else 0))
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    tables = (tile_expert_ptr, tile_row_ptr, expert_offsets_ptr, gather_indices_ptr)
    num_m = gl.load(num_tiles_ptr)
    OUT_N: gl.constexpr = BLOCK_N // 2 if MODE == SWIGLU else BLOCK_N
    # TMA needs rows of whole 16 bytes; said like this, the compiler knows it, and copies 16 bytes at a time
    sizes = (num_m, gl.cdiv(width, OUT_N), num_experts, K // 8 * 8, width // 8 * 8)
    GATHERED: gl.constexpr = DIVISOR > 0
    ring = (x_stages, w_stages, full, empty)
    inputs = (x_desc, w_desc, h_desc, x_ptr)
    outputs = (y_desc, h_desc, scaled_a_desc, y_ptr, ds_ptr, routing_weights_ptr)
    gl.warp_specialize(
        [
            (
                _consumer,
                (outputs, tables, sizes, M, ring, GATHERED, MODE, TRANS_W, SCATTER, STORE_H, HAS_WEIGHTS, GROUP_M),
            ),
            (_producer, (inputs, tables, sizes, ring, DIVISOR, MODE, TRANS_W, EVEN_K, GROUP_M, PRODUCERS)),
        ],
        [PRODUCERS],
        [PRODUCER_REGISTERS],
    )


def _launch(
    name: str,
    x: Tensor,
    weight: Tensor,
    rows: Rows,
    config: Any,
    sides: tuple[int, int, int],
    descriptors: tuple[Any, Any, Any],
    outputs: tuple[Tensor, Tensor, Tensor],
    **flags: Any,
) -> None:
    """`sides`: rows, output and reduction columns of a tile; `descriptors` of y, h and s*A; y, ds, routing_weights."""
    experts, n, k = weight.shape
    block_m, block_n, block_k = sides
    reduced, width = (n, k) if flags["TRANS_W"] else (k, n)
    out_n = block_n
    if flags["TRANS_W"]:
        w_desc = descriptor(weight, [1, block_k, block_n])
    elif flags["MODE"] == SWIGLU.value:
        width, out_n = n // 2, block_n // 2
        w_desc = descriptor(weight.view(2 * experts, width, k), [2, out_n, block_k])
    else:
        w_desc = descriptor(weight, [1, block_n, block_k])
    x_desc = w_desc if flags["DIVISOR"] else descriptor(x, [block_m, block_k])  # gathered rows take none
    programs = min(num_programs(x.device), rows.table.max_tiles * cdiv(width, out_n))
    m = rows.gather_indices.shape[0]
    launch(
        name,
        _specialized_rows,
        (programs,),
        *(x_desc, w_desc, *descriptors, x, *outputs, *rows.arguments),
        *(experts, m, reduced, width),
        **{"SCATTER": False, "STORE_H": False, "HAS_WEIGHTS": False, **flags},
        EVEN_K=reduced % block_k == 0,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        STAGES=config.num_stages,
        GROUP_M=GROUP_M,
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
    divisor = rows.top_k if permute_x else 0
    if swiglu:
        y_desc = ragged(y, [config.block_m, quarter])
        h_desc = y_desc if h is None else ragged(h, [1, config.block_m, half], *halves(h))
        flags = {"MODE": SWIGLU.value, "STORE_H": h is not None}
        descriptors = (y_desc, h_desc, y_desc)
        _launch(
            "forward_up",
            x,
            weight,
            rows,
            config,
            sides,
            descriptors,
            (y, y, y),
            DIVISOR=divisor,
            TRANS_W=False,
            **flags,
        )
        return
    y_desc = ragged(y, [config.block_m, half])
    flags = {"MODE": PLAIN.value, "SCATTER": permute_y}
    descriptors = (y_desc, y_desc, y_desc)
    _launch("forward", x, weight, rows, config, sides, descriptors, (y, y, y), DIVISOR=divisor, TRANS_W=False, **flags)


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
    dx_desc = ragged(dx, [config.block_m, config.block_k // 2])
    flags = {"DIVISOR": dy_divisor, "MODE": PLAIN.value, "TRANS_W": True, "SCATTER": scatter}
    _launch("dX", dy, weight, rows, config, sides, (dx_desc, dx_desc, dx_desc), (dx, dx, dx), **flags)


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
    """Fill dh [T*K,2I], scaled_a [T*K,I] and ds [tiles,T*K]; see `backward_dX.dX_gemm_dswiglu`."""
    sides = config.block_m, config.block_k, config.block_n  # the sum is over n
    single = [config.block_m, config.block_k // 4]
    h_desc = descriptor(h, [2, *single], *halves(h))
    descriptors = ragged(dh, [2, *single], *halves(dh)), h_desc, ragged(scaled_a, single)
    outputs = dh, ds, dh if routing_weights is None else routing_weights
    flags = {"DIVISOR": dy_divisor, "MODE": DSWIGLU.value, "TRANS_W": True, "HAS_WEIGHTS": routing_weights is not None}
    _launch("dX_dswiglu", dy, weight, rows, config, sides, descriptors, outputs, **flags)
