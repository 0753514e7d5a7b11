"""The whole block against plain cuBLAS at the same FLOPs, on one GPU: `python benchmarks/block.py OUT.json`.

dense    one [T*K, .] cuBLAS product per GEMM of the layer: 2 for a forward, 6 for a step, nothing else
forward  the block under no_grad, router included; step: forward and backward, gradients to x and every weight
share    dense time over the block's, in the same run (medians of do_bench, bf16, unit-scale normal data)
memory   MiB held after a training forward beyond weights and x, and the peak of a step, gradients included; of the
         two results the logits are dropped, as a training step without an auxiliary loss does
host     microseconds of host time for an eager call; graph: microseconds of one CUDA graph replay of a forward
skew     the experts alone with a stated routing, near-balanced, Zipf 1.0 and all tokens on 8 experts: forward, step
sweep    forward over T in powers of two; one graph replay up to 4,096 tokens, where the host would be what is timed
"""

from __future__ import annotations

import json
import sys
import time

import torch
from kernels import milliseconds, versions

from moefactory import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import model_preset
from moefactory.triton.ops import compute_experts
from moefactory.triton.plan import make_plan

MIB = 2**20


def make_block(name: str, **options) -> Qwen3MoeFusedGroupedGEMMBlock:
    m = model_preset(name)
    e, h, i = m.num_experts, m.hidden_size, m.moe_intermediate_size
    new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16).mul_(s[-1] ** -0.5)  # noqa: E731
    return Qwen3MoeFusedGroupedGEMMBlock(m, new(e, h), new(e, 2 * i, h), new(e, h, i), **options)


def random_x(block, tokens: int) -> torch.Tensor:
    return torch.randn(1, tokens, block.model.hidden_size, device="cuda", dtype=torch.bfloat16)


def dense(block, tokens: int) -> tuple[float, float]:
    """(forward, step) milliseconds of the dense products."""
    m = block.model
    rows, h, i = tokens * m.top_k, m.hidden_size, m.moe_intermediate_size
    new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, a, z, up, down = new(rows, h), new(rows, i), new(rows, 2 * i), new(2 * i, h), new(h, i)
    forward = [lambda: x @ up.T, lambda: a @ down.T]
    backward = [lambda: x @ down, lambda: x.T @ a, lambda: z @ up, lambda: z.T @ x]
    forward_ms = sum(map(milliseconds, forward))
    return forward_ms, forward_ms + sum(map(milliseconds, backward))


def step(block, x, dout) -> None:
    for p in block.parameters():
        p.grad = None
    x.grad = None
    block(x)[0].backward(dout)


def memory(block, x, dout) -> tuple[float, float]:
    for p in block.parameters():
        p.grad = None
    x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = block(x)[0]
    held = torch.cuda.memory_allocated() - before
    out.backward(dout)
    return held / MIB, (torch.cuda.max_memory_allocated() - before) / MIB


def host_microseconds(call, repeats: int = 50) -> float:
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


def graph_microseconds(block, tokens: int) -> float:
    x = random_x(block, tokens)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                block(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            block(x)
    return milliseconds(graph.replay) * 1e3


def measure(block, name: str, tokens: int, saved: str = "h") -> dict:
    x = random_x(block, tokens).requires_grad_()
    dout = torch.randn_like(x)
    step(block, x, dout)
    dense_forward, dense_step = dense(block, tokens)
    with torch.no_grad():
        forward_ms = milliseconds(lambda: block(x))
    step_ms = milliseconds(lambda: step(block, x, dout))
    held, peak = memory(block, x, dout)
    row = {"model": name, "tokens": tokens, "saved": saved, "forward_ms": forward_ms, "step_ms": step_ms}
    row |= {"dense_forward_ms": dense_forward, "dense_step_ms": dense_step, "held_mib": held, "peak_mib": peak}
    row |= {"forward_share": dense_forward / forward_ms, "step_share": dense_step / step_ms}
    shares = f"forward {row['forward_share']:.2f} step {row['step_share']:.2f}"
    memory_used = f"{held:.0f}/{peak:.0f} MiB"
    print(f"{name:16s} {tokens:6d} {saved:8s} {forward_ms:.3f} {step_ms:.3f} ms  {shares}  {memory_used}", flush=True)
    return row


def host(block) -> dict:
    one, many = random_x(block, 1), random_x(block, 256).requires_grad_()
    dout = torch.randn_like(many)
    with torch.no_grad():
        found = {"forward_1_us": host_microseconds(lambda: block(one))}
    found["step_256_us"] = host_microseconds(lambda: step(block, many, dout))
    print("host", found, flush=True)
    return found


def routings(block, tokens: int) -> dict[str, torch.Tensor]:
    """[T,K] ids without repetition within a token."""
    experts, top_k = block.model.num_experts, block.model.top_k
    zipf = 1 / torch.arange(1, experts + 1, device="cuda")
    return {
        "balanced": torch.rand(tokens, experts, device="cuda").topk(top_k).indices,
        "zipf 1.0": torch.multinomial(zipf.expand(tokens, -1), top_k),
        "8 experts": torch.arange(top_k, device="cuda").expand(tokens, -1).contiguous(),
    }


def skew(block, tokens: int = 16384) -> list[dict]:
    x = random_x(block, tokens)[0].requires_grad_()
    scores = torch.rand(tokens, block.model.top_k, device="cuda").softmax(-1).bfloat16().requires_grad_()
    dout = torch.randn_like(x)
    leaves = [x, scores, block.gate_up_proj, block.down_proj]
    found = []
    for name, ids in routings(block, tokens).items():
        plan = make_plan(ids, block.model.num_experts)

        def run(plan=plan):
            return compute_experts(x, scores, plan, block.gate_up_proj, block.down_proj, block.fused)[0]

        with torch.no_grad():
            forward_ms = milliseconds(run)
        step_ms = milliseconds(lambda run=run: torch.autograd.grad(run(), leaves, dout))
        found.append({"routing": name, "tokens": tokens, "forward_ms": forward_ms, "step_ms": step_ms})
        print("skew", found[-1], flush=True)
    return found


def sweep(block) -> list[dict]:
    found = []
    for tokens in (2**n for n in range(17)):
        if tokens <= 4096:
            ms = graph_microseconds(block, tokens) / 1e3
        else:
            x = random_x(block, tokens)
            with torch.no_grad():
                ms = milliseconds(lambda x=x: block(x))
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
            us = graph_microseconds(block, tokens)
            result["decode"].append({"model": name, "tokens": tokens, "graph_us": us})
            print(f"{name:16s} {tokens:6d} graph {us:.1f} us", flush=True)
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
