"""What the warp-specialised kernels share: TMA descriptors that end where an expert ends, and the order of tiles.

A program of these kernels is partitions of 4 warps that meet in a ring of shared-memory stages. The producer fills a
stage, by TMA or row by row through gather_indices, and arrives at the stage's `full` barrier; two consumers multiply
it, each one half of the tile, and arrive at `empty`. So the loads of the next tile run under the end of this one, which
a plain Triton kernel cannot do with a gathered operand on Hopper, and this one's results are stored under the products
of the next: by the consumers, some of a tile's columns at a time (`specialized_rows`, `specialized_dW`), or by a
partition of their own where the epilogue is long (`specialized_dswiglu`). The consumers do not wait for each other: one
rounds and stores while the other multiplies. They are written in Gluon, Triton's lower layer: compiled only, for
compute capability 9.0. The plain kernels are their reference and give the same bits, but for the last one of what
follows the fused dSwiGLU.

Which tiles programs work on at a time decides what the L2 and the memory are asked for. The row tiles of an expert
sweep over its weights' columns together: a group that reached into the next expert would have these read twice.
Programs that go round in turn stay in step, and neighbours, who ask for the same weights at the same time, are served
by one read. They stay in step only while each tile takes as long as another; out of step, weights come from memory two
or three times. Where an expert's weights are so small that the L2 keeps them meanwhile, GEMMs with an epilogue claim
their tiles from a counter instead: programs drift, but neighbours begin together, and a tile that is half padding may
take less time; so does a forward of few rows where the memory is wide. The producer takes the tiles (`turns`), and
tells the other partitions in `news`.

A ragged descriptor clips at a row that is known on the device only. Its row dimension is RAGGED long, and a box is
placed so that the expert's end lies at RAGGED: the hardware writes nothing behind it and reads zeros from there. Two
leading dimensions move the address back: with 64-bit wrap-around, for row stride s in elements and coordinates
[RAGGED, end, RAGGED - end + row], RAGGED * (2**34 - s) + end * s + (RAGGED - end + row) * s = row * s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .launch import memory_bandwidth, refuse_misaligned

RAGGED = gl.constexpr(2**30)
# 12 warps share 65,536 registers: 168 a thread at the start, then what a kernel says, 504 for one of each partition
WARPS = {"PRODUCERS": 4, "num_warps": 4, "maxnreg": 168}
MAX_CLAIMED = 2**22  # elements of an expert's weights up to which tiles are claimed
WIDE_MEMORY, FEW_ROWS = 4000, 256  # GB/s (an H200 has 4,800, an H100 3,350), rows per expert: see `claims`
_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def descriptor(tensor: Tensor, box: list[int], shape: list[int] | None = None, strides: list[int] | None = None) -> Any:
    """A TMA descriptor of boxes of a contiguous tensor, or of a view of it by `shape` and `strides`.

    ValueError where the address is not a multiple of 16 bytes.
    """
    refuse_misaligned(tensor)
    layout = gl.NVMMASharedLayout.get_default_for(box, _TYPES[tensor.dtype])
    return TensorDescriptor(tensor, shape or list(tensor.shape), strides or list(tensor.stride()), box, layout)


def ragged(tensor: Tensor, box: list[int], shape: list[int] | None = None, strides: list[int] | None = None) -> Any:
    """The same, clipped at an expert's end: rows are the last dimension but one, two dimensions are put in front.

    ValueError for more than 2**30 rows.
    """
    shape, strides = shape or list(tensor.shape), strides or list(tensor.stride())
    if shape[-2] > RAGGED.value:
        raise ValueError(f"rows: got {shape[-2]}; a warp-specialised kernel takes at most {RAGGED.value}")
    row = strides[-2]
    rows = [*shape[:-2], RAGGED.value, shape[-1]]
    return descriptor(tensor, [1, 1, *box], [2**31 - 2**16] * 2 + rows, [2**34 - row, row, *strides])


def claims(name: str, weight: Tensor, num_rows: int) -> bool:
    """Whether the kernel that is launched as `name` claims its tiles, for these weights [E, ...] and so many rows.

    Those with an epilogue, where the weights are small; and those of the forward where rows are few, so that many tiles
    are half padding, and the memory is wide enough to be read more often.
    """
    few = num_rows <= FEW_ROWS * weight.shape[0]
    if name in {"forward", "forward_up"} and few and memory_bandwidth(weight.device) >= WIDE_MEMORY:
        return True
    return name in {"forward_up", "dX_dswiglu"} and weight[0].numel() <= MAX_CLAIMED


def halves(h: Tensor) -> tuple[list[int], list[int]]:
    """(shape, strides) of [M, 2I] seen as [2, M, I]: gate and up apart, so that a box ends with its half."""
    rows, width = h.shape[0], h.shape[1] // 2
    return [2, rows, width], [width, 2 * width, 1]


@gluon.jit
def tile_of(tile, num_rows, num_cols, GROUP: gl.constexpr):
    """(row tile, column tile): GROUP row tiles share a sweep over the columns."""
    width = GROUP * num_cols
    first = (tile // width) * GROUP
    rows = gl.minimum(num_rows - first, GROUP)
    return first + (tile % width) % rows, (tile % width) // rows


@gluon.jit
def slots_of(rows, end, gather_ptr, DIVISOR: gl.constexpr):
    """The slots of expert-order rows, 0 from `end` on; for an operand in expert order (DIVISOR 0) nothing is loaded."""
    if DIVISOR > 0:
        return gl.load(gather_ptr + rows, mask=rows < end, other=0)
    else:
        return rows


NEWS = gl.constexpr(8)  # tiles that are told of at a time: at most STAGES + 3 that not every partition has read


@gluon.jit
def make_news():
    """(numbers of a tile [NEWS, 4], its barriers): what the producer tells the other partitions of."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [NEWS, 4], flat)
    known = gl.allocate_shared_memory(gl.int64, [NEWS, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(NEWS):
        mbarrier.init(known.index(place), count=1)
    fence_async_shared()
    return numbers, known


@gluon.jit
def tell(news, turn, first, second, third, fourth):
    """Four numbers of this turn's tile, for `told`."""
    numbers, known = news
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    place = gl.arange(0, 4, layout=layout)
    value = gl.where(place == 0, first, gl.where(place == 1, second, gl.where(place == 2, third, fourth)))
    numbers.index(turn % NEWS).store(value)
    mbarrier.arrive(known.index(turn % NEWS), count=1)


@gluon.jit
def told(news, turn):
    """The four numbers of this turn's tile, once they are there."""
    numbers, known = news
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    mbarrier.wait(known.index(turn % NEWS), phase(turn, NEWS))
    value = numbers.index(turn % NEWS).load(layout)
    place = gl.arange(0, 4, layout=layout)
    first = gl.sum(gl.where(place == 0, value, 0), axis=0)
    second = gl.sum(gl.where(place == 1, value, 0), axis=0)
    third = gl.sum(gl.where(place == 2, value, 0), axis=0)
    fourth = gl.sum(gl.where(place == 3, value, 0), axis=0)
    return first, second, third, fourth


@gluon.jit
def phase(step, STAGES: gl.constexpr):
    """The parity of a barrier's phase at this step of the ring."""
    return (step // STAGES) & 1


@gluon.jit
def sigmoid(x):
    """See `activation.sigmoid`, whose bits these are."""
    power = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def split_columns(tile):
    """The left and the right half of a tile's columns."""
    ROWS: gl.constexpr = tile.shape[0]
    HALF: gl.constexpr = tile.shape[1] // 2
    return gl.split(tile.reshape([ROWS, 2, HALF]).permute((0, 2, 1)))


@gluon.jit
def quarters_of(tile):
    """A tile's columns in four."""
    left, right = split_columns(tile)
    first, second = split_columns(left)
    third, fourth = split_columns(right)
    return first, second, third, fourth
