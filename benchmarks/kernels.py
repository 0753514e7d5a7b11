"""Each grouped GEMM of a step against plain cuBLAS at the same FLOPs, on one GPU: `kernels.py OUT.json`.

bf16, unit-scale normal data, near-balanced random routing. "share" is cuBLAS time over ours, in the same run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch
import triton
from triton.testing import do_bench

from moefactory.config import model_preset
from moefactory.routing import make_plan, route
from moefactory.triton.options import FusedOptions
from moefactory.triton.pipeline import Pipeline

MODELS = ("qwen3_30b_a3b", "qwen3_235b_a22b")
TOKENS = (4096, 16384)


def milliseconds(fn) -> float:
    return do_bench(fn, warmup=20, rep=60, return_mode="median")


def problem(name: str, tokens: int, dtype=torch.bfloat16):
    model = model_preset(name)
    e, h, i = model.num_experts, model.hidden_size, model.moe_intermediate_size
    make = lambda *s, scale=1.0: torch.randn(*s, device="cuda", dtype=dtype) * scale  # noqa: E731
    x, gate = make(tokens, h), make(e, h, scale=h**-0.5)
    w1, w2 = make(e, 2 * i, h, scale=h**-0.5), make(e, h, i, scale=i**-0.5)
    _, weights, selected = route(x, gate, model.top_k, True)
    return model, x, weights, make_plan(selected, e), w1, w2


def measure(name: str, tokens: int) -> list[dict]:
    model, x, s, plan, w1, w2 = problem(name, tokens)
    options = FusedOptions(top_k=model.top_k, autotune=False)
    h, i, rows = model.hidden_size, model.moe_intermediate_size, tokens * model.top_k
    p = Pipeline(plan.group_offsets, plan.gather_indices, plan.scatter_indices, options, w1, w2)
    a, pre = p.up(x, save_h=True)
    y = p.down(a)
    dout = torch.randn_like(x)
    dh, _, _ = p.d_down(dout, pre, s, need_dh=True, need_dw=False)
    big = torch.randn(rows, h, device="cuda", dtype=x.dtype)
    up, down = (torch.randn(n, k, device="cuda", dtype=x.dtype) for n, k in ((2 * i, h), (h, i)))
    cases = {
        "up": (lambda: p.up(x, save_h=False), lambda: big @ up.T),
        "up, storing h": (lambda: p.up(x, save_h=True), lambda: big @ up.T),
        "down": (lambda: p.down(a), lambda: a @ down.T),
        "combine": (lambda: p.combine(y, s), None),
        "dX of down, dSwiGLU": (lambda: p.d_down(dout, pre, s, need_dh=True, need_dw=False), lambda: big @ down),
        "dW of down": (lambda: p.d_down(dout, pre, s, need_dh=False, need_dw=True), lambda: big.T @ a),
        "dX of up and sum": (lambda: p.dx_up(dh), lambda: dh @ up),
        "dW of up": (lambda: p.dw_up(dh, x), lambda: dh.T @ big),
    }
    found = []
    for case, (ours, dense) in cases.items():
        mine = milliseconds(ours)
        cublas = milliseconds(dense) if dense else None
        share = cublas / mine if cublas else None
        found.append({"model": name, "tokens": tokens, "kernel": case, "ms": mine, "dense_ms": cublas, "share": share})
        print(f"{name:16s} {tokens:6d} {case:20s} {mine:8.3f} ms  share {share or 0:.2f}", flush=True)
    return found


def versions() -> dict:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    commit = os.environ.get("MOEFACTORY_COMMIT") or git.stdout.strip()  # a copied tree knows no commit of its own
    gpu = torch.cuda.get_device_name()
    return {"torch": torch.__version__, "triton": triton.__version__, "gpu": gpu, "commit": commit or None}


if __name__ == "__main__":
    rows = [row for name in MODELS for tokens in TOKENS for row in measure(name, tokens)]
    with open(sys.argv[1], "w") as out:
        json.dump({"versions": versions(), "rows": rows}, out, indent=1)
