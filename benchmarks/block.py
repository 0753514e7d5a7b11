"""The whole block against plain cuBLAS at the same FLOPs, on one GPU: `python benchmarks/block.py OUT.json`.

dense    one [T*K, .] cuBLAS product per GEMM of the layer: 2 for a forward, 6 for a step, nothing else
forward  the block under no_grad, router included; step: forward and backward, gradients to x and every weight
share    dense time over the block's, in the same run, taking turns (medians of do_bench, bf16, unit-scale normal data)
memory   MiB held after a training forward beyond weights and x, and the peak of a step, gradients included; of the
         two results the logits are dropped, as a training step without an auxiliary loss does
host     microseconds of host time for an eager call, median of batches that the launch queue holds
decode   microseconds of a replay of a CUDA graph of a forward (do_bench, which leaves the L2 full of what it wrote);
         read: of one that does nothing but read the weights of as many experts, once;
         after_read: of the forward's after 400 MB were read, as in a model, where nothing has to be written back first
skew     the experts alone with a stated routing, balanced, Zipf 1.0 and all tokens on 8 experts: forward, step
sweep    forward over T in powers of two; one graph replay up to 4,096 tokens, where the host would be what is timed
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from functools import partial

import torch
import triton
import triton.language as tl
from kernels import versions

from moefactory import MoeConfig, Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import model_preset
from moefactory.measure import PRODUCTS, Step, captured, chosen, dense_ms, time_calls, turns
from moefactory.triton.ops import compute_experts
from moefactory.triton.plan import make_plan

DEVICE = torch.device("cuda")
MS = 60  # for a median
ROUNDS, ROUND_MS = 9, 12  # dense, forward and step take turns: a GPU's clocks fall while it works
REPLAYS = 100
HOST_BATCH, HOST_BATCHES = 15, 20  # fewer launches a batch than the queue holds: no call waits for the GPU


def milliseconds(call) -> float:
    return time_calls(call, DEVICE, MS).p50


def make_block(name: str, **options) -> Qwen3MoeFusedGroupedGEMMBlock:
    m = model_preset(name)
    e, h, i = m.num_experts, m.hidden_size, m.moe_intermediate_size
    new = lambda *s: torch.randn(*s, device=DEVICE, dtype=torch.bfloat16).mul_(s[-1] ** -0.5)  # noqa: E731
    return Qwen3MoeFusedGroupedGEMMBlock(m, new(e, h), new(e, 2 * i, h), new(e, h, i), **options)


def random_x(block, tokens: int) -> torch.Tensor:
    return torch.randn(1, tokens, block.model.hidden_size, device=DEVICE, dtype=torch.bfloat16)


def one_step(block, tokens: int) -> Step:
    x = random_x(block, tokens)
    return Step(block, x, torch.randn_like(x), MoeConfig())


def host_microseconds(call) -> float:
    for _ in range(HOST_BATCH):
        call()
    found = []
    for _ in range(HOST_BATCHES):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(HOST_BATCH):
            call()
        found.append((time.perf_counter() - start) / HOST_BATCH * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found)


def after_reading(call) -> float:
    other = torch.randn(100 << 20, device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPLAYS)]
    for start, end in events:
        other.sum()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1e3 for start, end in events)


def graph_microseconds(block, tokens: int) -> float:
    return milliseconds(one_step(block, tokens).graph()) * 1e3


@triton.jit
def _read(ptr, out_ptr, n, BLOCK: tl.constexpr, UNROLL: tl.constexpr, EVICT: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(tl.program_id(0) * BLOCK * UNROLL, n, tl.num_programs(0) * BLOCK * UNROLL):
        for part in tl.static_range(UNROLL):
            offs = first + part * BLOCK + tl.arange(0, BLOCK)
            total += tl.load(ptr + offs, mask=offs < n, other=0.0, eviction_policy=EVICT).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total))


def decode(block, name: str, tokens: int) -> dict:
    run = one_step(block, tokens)
    experts = block.run_router(run.x[0].detach())[2].unique().numel()
    programs = 4 * torch.cuda.get_device_properties(DEVICE).multi_processor_count
    sums = torch.empty(programs, device=DEVICE)
    weights = [weight.detach()[:experts] for weight in (block.gate_up_proj, block.down_proj)]

    def read(evict: str) -> torch.Tensor:
        for weight in weights:
            _read[(programs,)](weight, sums, weight.numel(), BLOCK=2048, UNROLL=4, EVICT=evict, num_warps=8)
        return sums

    graph = run.graph()
    row = {"model": name, "tokens": tokens, "experts": experts, "graph_us": milliseconds(graph) * 1e3}
    row["after_read_us"] = after_reading(graph)
    reads = [captured(partial(read, evict), DEVICE) for evict in ("", "evict_first")]
    row["read_us"] = min(milliseconds(one) for one in reads) * 1e3
    print(
        f"{name:16s} {tokens:6d} graph {row['graph_us']:.1f} us, after reading {row['after_read_us']:.1f}, "
        f"{experts} experts read {row['read_us']:.1f}",
        flush=True,
    )
    return row


def measure(block, name: str, tokens: int, saved: str = "h") -> dict:
    run = one_step(block, tokens)
    for _ in range(3):
        run.step()
    dense, forward, step = turns(
        (
            lambda: dense_ms(block.model, tokens, torch.bfloat16, DEVICE, time_calls, ROUND_MS),
            lambda: time_calls(run.forward, DEVICE, ROUND_MS).p50,
            lambda: time_calls(run.step, DEVICE, ROUND_MS).p50,
        ),
        ROUNDS,
    )
    forward_ms, step_ms = statistics.median(forward), statistics.median(step)
    dense_forward = statistics.median(sum(one[product] for product in PRODUCTS["forward"]) for one in dense)
    dense_step = statistics.median(sum(one.values()) for one in dense)
    held, peak = run.memory()
    row = {"model": name, "tokens": tokens, "saved": saved, "forward_ms": forward_ms, "step_ms": step_ms}
    row |= {"dense_forward_ms": dense_forward, "dense_step_ms": dense_step, "held_mib": held, "peak_mib": peak}
    row |= {"forward_share": dense_forward / forward_ms, "step_share": dense_step / step_ms}
    shares = f"forward {row['forward_share']:.2f} step {row['step_share']:.2f}"
    memory_used = f"{held:.0f}/{peak:.0f} MiB"
    print(f"{name:16s} {tokens:6d} {saved:8s} {forward_ms:.3f} {step_ms:.3f} ms  {shares}  {memory_used}", flush=True)
    return row


def host(block) -> dict:
    one, many = one_step(block, 1), one_step(block, 256)
    found = {"forward_1_us": host_microseconds(one.forward), "step_256_us": host_microseconds(many.step)}
    with torch.autograd.set_multithreading_enabled(False):  # no change of threads for the backward, nor back
        found["step_256_one_thread_us"] = host_microseconds(many.step)
    print("host", found, flush=True)
    return found


def skew(block, tokens: int = 16384) -> list[dict]:
    x = random_x(block, tokens)[0].requires_grad_()
    scores = torch.rand(tokens, block.model.top_k, device=DEVICE).softmax(-1).bfloat16().requires_grad_()
    dout = torch.randn_like(x)
    leaves = [x, scores, block.gate_up_proj, block.down_proj]
    draw = torch.Generator().manual_seed(0)
    found = []
    for routing in ("balanced", "zipf", "one"):
        ids = chosen(routing, tokens, block.model.num_experts, block.model.top_k, draw).to(DEVICE)
        plan = make_plan(ids, block.model.num_experts)

        def run(plan=plan):
            return compute_experts(x, scores, plan, block.gate_up_proj, block.down_proj, block.fused)[0]

        with torch.no_grad():
            forward_ms = milliseconds(run)
        step_ms = milliseconds(lambda run=run: torch.autograd.grad(run(), leaves, dout))
        found.append({"routing": routing, "tokens": tokens, "forward_ms": forward_ms, "step_ms": step_ms})
        print("skew", found[-1], flush=True)
    return found


def sweep(block) -> list[dict]:
    found = []
    for tokens in (2**n for n in range(17)):
        if tokens <= 4096:
            ms = graph_microseconds(block, tokens) / 1e3
        else:
            ms = milliseconds(one_step(block, tokens).forward)
        found.append({"tokens": tokens, "forward_ms": ms})
    print("sweep", " ".join(f"{row['tokens']}:{row['forward_ms']:.3f}" for row in found), flush=True)
    return found


def main() -> None:
    result = {"versions": versions(), "rows": [], "decode": [], "host": {}, "skew": [], "sweep": []}
    for name in ("qwen3_30b_a3b", "qwen3_235b_a22b"):
        block = make_block(name)
        for tokens in (16384, 4096, 1024, 256):
            result["rows"].append(measure(block, name, tokens))
        for tokens in (1, 16, 128):
            result["decode"].append(decode(block, name, tokens))
        if name == "qwen3_30b_a3b":
            for saved in ("h_reused", "x"):
                other = Qwen3MoeFusedGroupedGEMMBlock(
                    block.model, block.gate, block.gate_up_proj, block.down_proj, saved=saved
                )
                result["rows"].append(measure(other, name, 16384, saved))
            result |= {"host": host(block), "skew": skew(block), "sweep": sweep(block)}
        del block
    with open(sys.argv[1], "w") as out:
        json.dump(result, out, indent=1)


if __name__ == "__main__":
    main()
