"""Time kernel configs one GEMM at a time against cuBLAS, checking each against the shipped one's result.

    python benchmarks/sweep.py OUT.json [--models a,b] [--tokens 4096,16384] [--launches up,down,...]

Every candidate is compiled first, in parallel processes on a small problem (the compiled kernels do not depend on the
number of tokens); then one process times them. "share" is the time of a plain cuBLAS product of the same FLOPs over
the candidate's, in the same run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import sys
import time

import torch
from kernels import milliseconds, problem, versions

from moefactory.config import KernelConfigBackward_dW, KernelConfigBackward_dX, KernelConfigForward
from moefactory.triton.options import FusedOptions
from moefactory.triton.pipeline import Pipeline


def forward_configs(*, tma_x: bool, tma_store: bool = False):
    for m, n, k, w, s in (
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 3), (256, 128, 64, 8, 3), (64, 256, 64, 4, 3),
        (64, 256, 64, 8, 4),
    ):  # fmt: skip
        for flatten, store in ((False, False), (True, False), (False, tma_store), (True, tma_store)):
            tma = {"use_tma_load_x": tma_x, "use_tma_load_w": True, "use_tma_store": store}
            yield KernelConfigForward(m, n, k, w, s, flatten, **tma)


def dX_configs(*, tma_dy: bool, tma_store: bool = False):
    for m, n, k, w, s in (
        (128, 64, 256, 8, 3), (128, 64, 256, 8, 4), (128, 64, 128, 8, 4), (128, 64, 128, 4, 3), (64, 64, 256, 4, 3),
        (64, 64, 256, 8, 4), (64, 64, 128, 4, 4),
    ):  # fmt: skip
        for flatten, store in ((False, False), (True, False), (False, tma_store), (True, tma_store)):
            tma = {"use_tma_load_dy": tma_dy, "use_tma_load_w": True, "use_tma_store": store}
            yield KernelConfigBackward_dX(m, n, k, w, s, flatten, **tma)


def dW_configs(*, tma_dy: bool, tma_x: bool, first: bool = False):
    for m, n, k, w, s in (
        (64, 128, 256, 8, 3), (64, 256, 128, 8, 3), (64, 128, 128, 4, 3), (32, 128, 128, 4, 4), (32, 128, 256, 8, 5),
        (32, 256, 128, 8, 5), (128, 128, 128, 8, 2), (32, 128, 128, 4, 5),
    ):  # fmt: skip
        for store in (False, True):
            for flatten in (False, True):
                tma = {"use_tma_load_dy": tma_dy, "use_tma_load_x": tma_x, "use_tma_store": store}
                yield KernelConfigBackward_dW(m, n, k, w, s, flatten, first, **tma)


# launch -> (pass, gemm, permute_x, permute_y, configs)
LAUNCHES = {
    "up": ("fwd", "up", True, True, forward_configs(tma_x=False, tma_store=True)),
    "down scatter": ("fwd", "down", True, True, forward_configs(tma_x=True)),
    "down": ("fwd", "down", True, False, forward_configs(tma_x=True, tma_store=True)),
    "dX down": ("bwd_dX", "down", True, True, dX_configs(tma_dy=False)),
    "dX up scatter": ("bwd_dX", "up", True, True, dX_configs(tma_dy=True)),
    "dX up": ("bwd_dX", "up", False, True, dX_configs(tma_dy=True, tma_store=True)),
    "dW down": ("bwd_dW", "down", True, True, dW_configs(tma_dy=False, tma_x=True)),
    "dW down copy": ("bwd_dW", "down", True, True, dW_configs(tma_dy=True, tma_x=True, first=True)),
    "dW up": ("bwd_dW", "up", True, True, dW_configs(tma_dy=True, tma_x=False)),
    "dW up copy": ("bwd_dW", "up", True, True, dW_configs(tma_dy=True, tma_x=True, first=True)),
}
LAUNCHES = {name: (*rest, list(dict.fromkeys(configs))) for name, (*rest, configs) in LAUNCHES.items()}


def small_configs(kind, names):
    """Tiles for few rows per expert, where weights are read once and the product hides behind them."""
    for m in (16, 32, 64):
        for wide, deep, w, s in ((64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (256, 64, 4, 4), (64, 64, 4, 6)):
            n, k = (wide, deep) if kind is KernelConfigForward else (deep, wide)
            yield kind(m, n, k, w, s, **names)


def small_dW(names):
    for m in (16, 32, 64):
        for n, k, w, s in ((128, 128, 4, 3), (128, 256, 8, 3), (256, 128, 8, 3), (128, 64, 4, 3), (64, 256, 4, 2)):
            for store in (False, True):
                yield KernelConfigBackward_dW(m, n, k, w, s, use_tma_store=store, **names)


W, X, DY = {"use_tma_load_w": True}, {"use_tma_load_x": True}, {"use_tma_load_dy": True}
SMALL = {
    "up": ("fwd", "up", True, True, small_configs(KernelConfigForward, W)),
    "up pointers": ("fwd", "up", True, True, small_configs(KernelConfigForward, {})),
    "down scatter": ("fwd", "down", True, True, small_configs(KernelConfigForward, W | X)),
    "dX down": ("bwd_dX", "down", True, True, small_configs(KernelConfigBackward_dX, W)),
    "dX up scatter": ("bwd_dX", "up", True, True, small_configs(KernelConfigBackward_dX, W | DY)),
    "dW down": ("bwd_dW", "down", True, True, small_dW(X)),
    "dW up": ("bwd_dW", "up", True, True, small_dW(DY)),
}
if "--small" in sys.argv:
    LAUNCHES = {name: (*rest, list(configs)) for name, (*rest, configs) in SMALL.items()}


class Bench:
    """The tensors of one problem and a closure for each launch."""

    def __init__(self, model: str, tokens: int) -> None:
        self.model, self.x, self.s, self.plan, self.w1, self.w2 = problem(model, tokens)
        self.dout = torch.randn_like(self.x)
        p = self.pipeline(True, True, ())
        self.a, self.h = p.up(self.x, save_h=True)
        self.dh = torch.randn_like(self.h)

    def pipeline(self, permute_x: bool, permute_y: bool, kernels) -> Pipeline:
        options = FusedOptions(self.model.top_k, permute_x, permute_y, autotune=False, kernels=kernels)
        plan = self.plan
        indices = (plan.group_offsets, plan.gather_indices, plan.scatter_indices)
        return Pipeline(*indices, options, self.w1, self.w2)

    def call(self, name: str, config):
        pass_name, gemm, permute_x, permute_y, _ = LAUNCHES[name]
        p = self.pipeline(permute_x, permute_y, ((pass_name, gemm, config),) if config else ())
        return {
            ("fwd", "up"): lambda: p.up(self.x, save_h=True)[0],
            ("fwd", "down"): lambda: p.down(self.a),
            ("bwd_dX", "down"): lambda: p.d_down(self.dout, self.h, self.s, need_dh=True, need_dw=False)[0],
            ("bwd_dX", "up"): lambda: p.dx_up(self.dh),
            ("bwd_dW", "down"): lambda: p.d_down(self.dout, self.h, self.s, need_dh=False, need_dw=True)[2],
            ("bwd_dW", "up"): lambda: p.dw_up(self.dh, self.x),
        }[pass_name, gemm]

    def dense(self, name: str):
        _, gemm, *_ = LAUNCHES[name]
        n, k = self.w1.shape[1:] if gemm == "up" else self.w2.shape[1:]
        left = torch.randn(self.plan.gather_indices.shape[0], k, device="cuda", dtype=self.x.dtype)
        right = torch.randn(n, k, device="cuda", dtype=self.x.dtype)
        return lambda: left @ right.T


def compile_share(part: tuple[list[str], list[str], int, int]) -> None:
    models, launches, index, parts = part
    for model in models:
        bench = Bench(model, 256)
        for i, (name, config) in enumerate((n, c) for n in launches for c in LAUNCHES[n][-1]):
            if i % parts == index:
                try:
                    bench.call(name, config)()
                except Exception as error:
                    print("compile", name, config, type(error).__name__, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--models", default="qwen3_30b_a3b")
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--launches", default=",".join(LAUNCHES))
    parser.add_argument("--small", action="store_true", help="configs for few rows per expert")
    parser.add_argument("--processes", type=int, default=14)
    args = parser.parse_args()
    models, launches = args.models.split(","), args.launches.split(",")
    start = time.time()
    with mp.get_context("spawn").Pool(args.processes) as pool:
        pool.map(compile_share, [(models, launches, i, args.processes) for i in range(args.processes)], chunksize=1)
    print(f"compiled in {time.time() - start:.0f} s", flush=True)
    rows = []
    for model in models:
        for tokens in map(int, args.tokens.split(",")):
            bench = Bench(model, tokens)
            for name in launches:
                rows += time_launch(bench, model, tokens, name)
            del bench
    with open(args.out, "w") as out:
        json.dump({"versions": versions(), "rows": rows}, out)


def time_launch(bench: Bench, model: str, tokens: int, name: str) -> list[dict]:
    dense = milliseconds(bench.dense(name))
    expected = bench.call(name, None)().float()
    found = []
    for config in LAUNCHES[name][-1]:
        row = {"model": model, "tokens": tokens, "launch": name, "config": vars(config), "dense_ms": dense}
        try:
            call = bench.call(name, config)
            error = float((call().float() - expected).norm() / expected.norm())
            ms = milliseconds(call)
            row |= {"ms": ms, "share": dense / ms, "error": error}
        except Exception as error:
            row |= {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        found.append(row)
    good = sorted((r for r in found if "ms" in r), key=lambda r: r["ms"])
    wrong = [r for r in good if not r["error"] < 1e-2]
    print(f"-- {model} {tokens} {name}: dense {dense:.3f} ms, {len(found) - len(good)} failed, {len(wrong)} wrong")
    for r in good[:4]:
        c = r["config"]
        flags = ",".join(k.removeprefix("use_") for k, v in c.items() if v is True)
        sides = f"{c['block_m']}x{c['block_n']}x{c['block_k']} w{c['num_warps']} s{c['num_stages']}"
        print(f"   {r['ms']:.3f} ms share {r['share']:.2f} error {r['error']:.1e} {sides} {flags}", flush=True)
    return found


if __name__ == "__main__":
    main()
