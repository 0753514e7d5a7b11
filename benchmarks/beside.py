"""The block beside a kernel that holds some of the GPU's multiprocessors, as a collective does: `beside.py OUT.json`.

held       multiprocessors on which a program of another stream's kernel waits all the while; it takes a quarter of the
           registers, so that no GEMM's program fits beside it
margin     the block's `sm_margin`
forward, step, dense: milliseconds, medians; dense is the six cuBLAS products of a step, which know of no margin
"""

from __future__ import annotations

import json
import statistics
import sys

import torch
import triton
import triton.language as tl
from block import DEVICE, make_block, one_step
from kernels import versions

from moefactory import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.measure import Times, dense_ms, turns

CASES = (("qwen3_30b_a3b", 16384), ("qwen3_30b_a3b", 4096), ("qwen3_235b_a22b", 16384), ("qwen3_235b_a22b", 4096))
PAIRS = ((0, 0), (0, 8), (0, 16), (8, 8), (16, 0), (16, 8), (16, 16))  # (margin, held)
ROUNDS, CALLS = 5, 4
LANES = 8192  # of a waiting program's 8 warps: 32 numbers a thread
LONGEST = 2_000_000  # turns of a waiting program, some seconds: it ends though nobody tells it to


@triton.jit
def _wait(end_ptr, out_ptr, LANES: tl.constexpr, LONGEST: tl.constexpr):
    lane = tl.arange(0, LANES)
    numbers = lane
    turn = 0
    while (tl.atomic_add(end_ptr, 0, sem="relaxed") == 0) & (turn < LONGEST):
        numbers = numbers * 3 + lane
        turn += 1
    tl.store(out_ptr + tl.program_id(0) * LANES + lane, numbers)


class Neighbour:
    """A kernel on a stream of its own, from `start` until an event of another stream has come."""

    def __init__(self, held: int) -> None:
        self.held, self.end = held, torch.ones(1, dtype=torch.int32, device=DEVICE)
        self.out = torch.empty(max(1, held), LANES, dtype=torch.int32, device=DEVICE)
        self.stream, self.stopper = torch.cuda.Stream(), torch.cuda.Stream()
        self._launch()  # compiled
        torch.cuda.synchronize()

    def _launch(self) -> None:
        if self.held:
            _wait[(self.held,)](self.end, self.out, LANES=LANES, LONGEST=LONGEST, num_warps=8)

    def start(self) -> None:
        self.end.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            self._launch()
        torch.cuda._sleep(2_000_000)  # a millisecond: it is there before what is timed begins

    def stop_after(self, event: torch.cuda.Event) -> None:
        with torch.cuda.stream(self.stopper):
            event.wait(self.stopper)
            self.end.fill_(1)


def timer(neighbour: Neighbour):
    def timed(run, device, ms) -> Times:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        neighbour.start()
        run()
        start.record()
        for _ in range(CALLS):
            run()
        end.record()
        neighbour.stop_after(end)
        torch.cuda.synchronize()
        return Times(*[start.elapsed_time(end) / CALLS] * 3)

    return timed


def measure(block, name: str, tokens: int) -> list[dict]:
    found = []
    for margin, held in PAIRS:
        weights = (block.gate, block.gate_up_proj, block.down_proj)
        run = one_step(Qwen3MoeFusedGroupedGEMMBlock(block.model, *weights, sm_margin=margin), tokens)
        for _ in range(3):
            run.step(), run.forward()
        timed = timer(Neighbour(held))
        dense, forward, step = turns(
            (
                lambda timed=timed: sum(dense_ms(block.model, tokens, torch.bfloat16, DEVICE, timed, 0).values()),
                lambda timed=timed, run=run: timed(run.forward, DEVICE, 0).p50,
                lambda timed=timed, run=run: timed(run.step, DEVICE, 0).p50,
            ),
            ROUNDS,
        )
        row = {"model": name, "tokens": tokens, "margin": margin, "held": held}
        row |= {"forward_ms": statistics.median(forward), "step_ms": statistics.median(step)}
        row["dense_step_ms"] = statistics.median(dense)
        found.append(row)
        print(
            " ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()), flush=True
        )
    return found


def main() -> None:
    result = {"versions": versions(), "rows": []}
    names = dict.fromkeys(name for name, _ in CASES)
    for name in names:
        block = make_block(name)
        for tokens in (tokens for other, tokens in CASES if other == name):
            result["rows"] += measure(block, name, tokens)
            with open(sys.argv[1], "w") as file:
                json.dump(result, file, indent=1)
                file.write("\n")
        del block
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
