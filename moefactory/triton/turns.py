"""Who computes which row tile of a warp-specialised GEMM.

A GEMM is one program for each multiprocessor, which stays until the last tile. Program p's own tiles are p, p + P, and
so on, for P programs: neighbours stay in step (`specialized`). But where another kernel holds a multiprocessor, as a
collective's does, a program finds no room and begins when others end; with its tiles waiting for it a GEMM would take
twice its time, for one such program as for thirty. So programs take their own tiles by counting, CHUNK at a time, the
next chunk while they compute this one, and who has no more takes chunks that nobody has begun. All are busy until the
end, whenever each of them began, and what a tile holds does not depend on who computes it.

Where tiles are claimed from one counter for all (CLAIM), only a program's first tile is its own. dW goes round in a
fixed order: counted like this it took 2 to 7 % longer (LOG 87).

    counters of a launch   behind the number of tiles (`schedule`), 0 before it and after it: the last program to leave
                           sets them back
    [CLAIMS]               tiles claimed
    [LEFT]                 programs that are done
    [CHUNKS + p]           chunks of program p that are taken
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import schedule

CLAIMS, LEFT, CHUNKS = gl.constexpr(1), gl.constexpr(2), gl.constexpr(schedule.CHUNKS)
PROGRAMS = gl.constexpr(schedule.PROGRAMS)
NONE = gl.constexpr(2**30)  # more tiles than there are
CHUNK_STEPS = 48  # products of a chunk, or a few more: some 15 us


def chunk(steps: int) -> int:
    """How many tiles of so many products are taken at a time."""
    return max(1, -(-CHUNK_STEPS // max(1, steps)))


@gluon.jit
def _numbers(SIZE: gl.constexpr, WARPS: gl.constexpr):
    """[SIZE], 0 and up, spread over the threads of WARPS warps."""
    return gl.arange(0, SIZE, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))


@gluon.jit
def ask(counter_ptr, WARPS: gl.constexpr):
    """Take a counter's next number; `answered` has it, for which nothing waits here. One thread of WARPS warps asks."""
    thread = _numbers(32 * WARPS, WARPS)
    one = (thread >= 0).to(gl.int32)
    # each thread at an address of its own: for the same one ptxas lets a warp ask together, and wait
    return gl.atomic_add(counter_ptr + thread, one, mask=thread == 0, sem="relaxed")


@gluon.jit
def answered(answer, WARPS: gl.constexpr):
    """The number that was asked for."""
    return gl.sum(gl.where(_numbers(32 * WARPS, WARPS) == 0, answer, 0), axis=0)


@gluon.jit
def take_over(tiles, counters_ptr, CHUNK: gl.constexpr, WARPS: gl.constexpr):
    """The first tile of a chunk that nobody had begun; NONE, where there is none.

    Programs that look at the same time take from different ones, neighbours from neighbours: from the one whose number
    differs least from their own in its last five bits, since those that are missing follow one another.
    """
    programs = gl.num_programs(0)
    tile = NONE + 0 * tiles
    nearest = 0
    while nearest < NONE:
        word = _numbers(PROGRAMS, WARPS)
        taken = gl.load(counters_ptr + CHUNKS + word, mask=word < programs, other=0, volatile=True)
        waits = (word < programs) & (word + taken * (CHUNK * programs) < tiles)
        nearest = gl.min(gl.where(waits, ((word ^ gl.program_id(0)) & 31) * PROGRAMS + word, NONE), axis=0)
        if nearest < NONE:
            whose = nearest % PROGRAMS
            first = whose + answered(ask(counters_ptr + CHUNKS + whose, WARPS), WARPS) * (CHUNK * programs)
            if first < tiles:  # else somebody was faster
                tile = first
                nearest = NONE + 0 * tiles
    return tile


@gluon.jit
def leave(counters_ptr, WARPS: gl.constexpr):
    """The last program to be done sets the counters back."""
    word = _numbers(PROGRAMS, WARPS)
    programs = gl.num_programs(0)
    last = answered(ask(counters_ptr + LEFT, WARPS), WARPS) == programs - 1
    gl.store(counters_ptr + CHUNKS + word, 0, mask=(word < programs) & last)
    gl.store(counters_ptr + CLAIMS + 0 * word, 0, mask=(word == 0) & last)
    gl.store(counters_ptr + LEFT + 0 * word, 0, mask=(word == 0) & last)
