"""Plain and warp-specialised kernels side by side, as shares of cuBLAS: `python benchmarks/specialized.py OUT.json`.

Variants of one GEMM take turns within a round (medians of rounds), since clocks drift by more than some of them differ.
"gathered" reads rows through the index, "in order" the same rows from expert order (by TMA, without the copy's time).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from statistics import median

import torch
from kernels import problem, versions
from torch import Tensor

from moefactory.config import DType, KernelConfigBackward_dW, KernelConfigBackward_dX, KernelConfigForward
from moefactory.measure import turns
from moefactory.triton import choice
from moefactory.triton.backward_dW import dW_gemm
from moefactory.triton.backward_dX import dX_gemm, dX_gemm_dswiglu
from moefactory.triton.choice import Launch, bucket, shipped
from moefactory.triton.forward import Rows, forward_gemm
from moefactory.triton.options import FusedOptions
from moefactory.triton.schedule import tile_table

SIZES = {"qwen3_30b_a3b": (16384, 4096, 1024, 512, 256), "qwen3_235b_a22b": (16384, 4096, 1024)}
ROUNDS, ROUND_MS = 5, 8.0
FORWARD = KernelConfigForward(128, 256, 64, 8, 4, warp_specialize=True)
DX = KernelConfigBackward_dX(128, 64, 256, 8, 4, warp_specialize=True)
DW = {
    "x wide": KernelConfigBackward_dW(64, 128, 256, 8, 4, warp_specialize=True),
    "x narrow": KernelConfigBackward_dW(64, 256, 128, 8, 4, warp_specialize=True),
}
Cases = dict[str, Callable[[], object]]


def elapsed(call: Callable[[], object], repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def taking_turns(cases: Cases) -> dict[str, float]:
    """Milliseconds of each case."""
    for call in cases.values():
        call()  # compiles
    repeats = {name: max(3, int(ROUND_MS / elapsed(call, 2))) for name, call in cases.items()}
    found = turns([lambda name=name, call=call: elapsed(call, repeats[name]) for name, call in cases.items()], ROUNDS)
    return {name: median(times) for name, times in zip(cases, found, strict=True)}


def plain(pass_name: str, gemm: str, weight: Tensor, tokens: int, options: FusedOptions):
    """What would be shipped without the specialised kernels."""
    experts, n, k = weight.shape
    rows, kept = bucket(tokens * options.top_k, experts), choice.SPECIALIZED_TRITON
    choice.SPECIALIZED_TRITON = ()
    shipped.cache_clear()
    try:
        return shipped(Launch(pass_name, gemm, experts, n, k, rows, DType.bfloat16, options), 90)
    finally:
        choice.SPECIALIZED_TRITON = kept
        shipped.cache_clear()


def families(name: str, tokens: int) -> dict[str, tuple[Callable[[], object], Cases]]:
    """GEMM -> (cuBLAS at the same FLOPs, variants)."""
    model, x, s, plan, w1, w2 = problem(name, tokens)
    top_k, experts, rows_total = model.top_k, model.num_experts, tokens * model.top_k
    options = FusedOptions(top_k=top_k, autotune=False)
    new = lambda *size: torch.randn(*size, device="cuda", dtype=x.dtype)  # noqa: E731
    h, i = model.hidden_size, model.moe_intermediate_size
    big, a, dh, dout, up, down = (
        new(rows_total, h),
        new(rows_total, i),
        new(rows_total, 2 * i),
        new(tokens, h),
        w1[0],
        w2[0],
    )
    pre, scores = new(rows_total, 2 * i), s.reshape(-1)

    def rows(block_m: int) -> Rows:
        table = tile_table(plan.group_offsets, rows_total, block_m)
        return Rows(plan.group_offsets, plan.gather_indices, top_k, table)

    kept = {"fwd up": plain("fwd", "up", w1, tokens, options), "fwd down": plain("fwd", "down", w2, tokens, options)}
    kept |= {f"bwd_dX {g}": plain("bwd_dX", g, w, tokens, options) for g, w in (("up", w1), ("down", w2))}
    kept |= {f"bwd_dW {g}": plain("bwd_dW", g, w, tokens, options) for g, w in (("up", w1), ("down", w2))}
    by_block = {config.block_m: rows(config.block_m) for config in (*kept.values(), FORWARD)}

    def up_gemm(config, of=x, gathered=True, store_h=True):
        flags = {"permute_x": gathered, "swiglu": True, "store_h": store_h}
        return lambda: forward_gemm(of, w1, by_block[config.block_m], config, **flags)

    def dh_gemm(config, of=dout, divisor=top_k):
        return lambda: dX_gemm_dswiglu(of, w2, pre, scores, by_block[config.block_m], config, dy_divisor=divisor)

    def dw_gemm(dy, of, config, **divisors):
        return lambda: dW_gemm(dy, of, by_block[128], experts, config, **divisors)

    return {
        "up, storing h": (lambda: big @ up.T, {
            "plain, gathered": up_gemm(kept["fwd up"]),
            "specialised, gathered": up_gemm(FORWARD),
            "specialised, in order": up_gemm(FORWARD, big, False),
        }),
        "up": (lambda: big @ up.T, {
            "plain, gathered": up_gemm(kept["fwd up"], store_h=False),
            "specialised, gathered": up_gemm(FORWARD, store_h=False),
        }),
        "down": (lambda: a @ down.T, {
            "plain, scattered": lambda: forward_gemm(a, w2, by_block[128], kept["fwd down"], permute_y=True),
            "specialised, scattered": lambda: forward_gemm(a, w2, by_block[128], FORWARD, permute_y=True),
            "specialised, in order": lambda: forward_gemm(a, w2, by_block[128], FORWARD),
        }),
        "dX of down, dSwiGLU": (lambda: big @ down, {
            "plain, gathered": dh_gemm(kept["bwd_dX down"]),
            "specialised, gathered": dh_gemm(DX),
            "specialised, in order": dh_gemm(DX, big, 0),
        }),
        "dX of up": (lambda: dh @ up, {
            "plain, scattered": lambda: dX_gemm(dh, w1, by_block[128], kept["bwd_dX up"], scatter=True),
            "specialised, scattered": lambda: dX_gemm(dh, w1, by_block[128], DX, scatter=True),
            "specialised, in order": lambda: dX_gemm(dh, w1, by_block[128], DX),
        }),
        "dW of down": (lambda: big.T @ a, {
            "plain, gathered": dw_gemm(dout, a, kept["bwd_dW down"], dy_divisor=top_k),
            "specialised, gathered": dw_gemm(dout, a, DW["x wide"], dy_divisor=top_k),
            "specialised, in order": dw_gemm(big, a, DW["x wide"]),
        }),
        "dW of up": (lambda: dh.T @ big, {
            "plain, gathered": dw_gemm(dh, x, kept["bwd_dW up"], x_divisor=top_k),
            "specialised, gathered": dw_gemm(dh, x, DW["x narrow"], x_divisor=top_k),
            "specialised, gathered on the wide side": dw_gemm(dh, x, DW["x wide"], x_divisor=top_k),
            "specialised, in order": dw_gemm(dh, big, DW["x wide"]),
        }),
    }  # fmt: skip


def main() -> None:
    found = []
    for name, tokens in ((name, t) for name, counts in SIZES.items() for t in counts):
        for gemm, (dense, variants) in families(name, tokens).items():
            times = taking_turns({"dense": dense, **variants})
            dense_ms = times.pop("dense")
            for variant, ms in times.items():
                row = {"model": name, "tokens": tokens, "gemm": gemm, "variant": variant}
                found.append({**row, "ms": ms, "dense_ms": dense_ms, "share": dense_ms / ms})
            shares = ", ".join(f"{variant} {dense_ms / ms:.2f}" for variant, ms in times.items())
            print(f"{name:16s} {tokens:6d} {gemm:20s} {dense_ms:.3f} ms: {shares}", flush=True)
    with open(sys.argv[1], "w") as out:
        json.dump({"versions": versions(), "rows": found}, out, indent=1)


if __name__ == "__main__":
    main()
