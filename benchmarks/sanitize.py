"""Every kernel once or more, small, for compute-sanitizer: all flags, TMA and pointers, ragged, empty, dropped, few.

On Hopper the warp-specialised kernels, too: each with and without its gather, in either tile of dW.

python benchmarks/sanitize.py [plain] [specialized]                     compiles into Triton's cache
compute-sanitizer --tool memcheck  --error-exitcode 9 python benchmarks/sanitize.py
compute-sanitizer --tool racecheck --error-exitcode 9 python benchmarks/sanitize.py
"""

from __future__ import annotations

import sys
from itertools import product

import torch

from moefactory.config import KernelConfigBackward_dW, KernelConfigBackward_dX, KernelConfigForward
from moefactory.routing import route
from moefactory.triton import specialized_dswiglu, specialized_dW, specialized_rows
from moefactory.triton.combine import sum_dX
from moefactory.triton.decode import decode_tokens
from moefactory.triton.few_tokens import route_few_tokens
from moefactory.triton.ops import compute_experts
from moefactory.triton.options import FusedOptions
from moefactory.triton.plan import make_plan
from moefactory.triton.router import top_k_softmax

TOKENS, EXPERTS, TOP_K, HIDDEN, WIDTH = 77, 7, 3, 136, 72  # rows of 16 bytes, and no size a multiple of a tile
SPECIALIZED_TOKENS = 300  # about a tile's 128 rows an expert: whole tiles and ragged ones
SPECIALIZED_PROGRAMS = 3  # each walks several tiles, so that its ring comes round and a store runs under a product
TILES = {"block_m": 16, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 2}


def kernels(*, tma: bool, permute_x: bool, permute_y: bool, fuse_swiglu: bool):
    """Explicit configs for all six launches; with `tma` every flag that the rules leave."""
    yes = {
        ("fwd", "up"): {"use_tma_load_x": not permute_x, "use_tma_load_w": True, "use_tma_store": True},
        ("fwd", "down"): {"use_tma_load_x": True, "use_tma_load_w": True, "use_tma_store": not permute_y},
        ("bwd_dX", "up"): {"use_tma_load_dy": True, "use_tma_load_w": True, "use_tma_store": not permute_x},
        ("bwd_dX", "down"): {
            "use_tma_load_dy": not permute_y,
            "use_tma_load_w": True,
            "use_tma_store": not fuse_swiglu,
        },
        ("bwd_dW", "up"): {"use_tma_load_dy": True, "use_tma_load_x": not permute_x, "use_tma_store": True},
        ("bwd_dW", "down"): {"use_tma_load_dy": not permute_y, "use_tma_load_x": True, "use_tma_store": True},
    }
    kinds = {"fwd": KernelConfigForward, "bwd_dX": KernelConfigBackward_dX, "bwd_dW": KernelConfigBackward_dW}
    return tuple((p, g, kinds[p](**TILES, **(flags if tma else {}))) for (p, g), flags in yes.items())


def specialized(*, wide_x: bool):
    """The warp-specialised configs for all six launches; `wide_x` puts x on the wide side of dW, else dy."""
    more = {"num_warps": 8, "warp_specialize": True}
    fwd = KernelConfigForward(block_m=128, block_n=256, block_k=64, num_stages=4, **more)
    dX = KernelConfigBackward_dX(block_m=128, block_n=64, block_k=256, num_stages=4, **more)
    n, k = (128, 256) if wide_x else (256, 128)
    dW = KernelConfigBackward_dW(block_m=64, block_n=n, block_k=k, num_stages=4, **more)
    return tuple((p, g, c) for p, c in (("fwd", fwd), ("bwd_dX", dX), ("bwd_dW", dW)) for g in ("up", "down"))


def step(dtype: torch.dtype, configs, tokens: int = TOKENS, **flags: bool) -> None:
    new = lambda *s, scale=1.0: (torch.randn(*s, device="cuda") * scale).to(dtype).requires_grad_()  # noqa: E731
    x, gate = new(tokens, HIDDEN), new(EXPERTS, HIDDEN, scale=HIDDEN**-0.5)
    up, down = new(EXPERTS, 2 * WIDTH, HIDDEN, scale=HIDDEN**-0.5), new(EXPERTS, HIDDEN, WIDTH, scale=WIDTH**-0.5)
    logits, _, _ = route(x, gate, TOP_K, True)
    weights, selected, _ = top_k_softmax(logits, TOP_K, True)
    selected = torch.where(selected == 2, EXPERTS, selected)  # expert 2 gets no row, its slots are dropped
    options = FusedOptions(TOP_K, **flags, autotune=False, kernels=configs)
    out, _ = compute_experts(x, weights, make_plan(selected, EXPERTS), up, down, options)
    out.backward(torch.randn_like(out))


def main() -> None:
    parts = sys.argv[1:] or ["plain", "specialized"]
    names = ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine")
    count = 0
    for dtype, tma in ((torch.bfloat16, True), (torch.bfloat16, False)) if "plain" in parts else ():
        for values in product((True, False), repeat=4):
            flags = dict(zip(names, values, strict=True))
            chosen = {name: flags[name] for name in names[:3]}
            step(dtype, kernels(tma=tma, **chosen), **flags)
            count += 1
    for tokens in (1, 3, 64) if "plain" in parts else ():
        logits = torch.randn(tokens, EXPERTS, device="cuda", dtype=torch.bfloat16)
        route_few_tokens(logits, TOP_K, True, TILES["block_m"])
        count += 1
    new = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    for tokens in (1, 4) if "plain" in parts else ():
        weights = new(EXPERTS, HIDDEN), new(EXPERTS, 2 * WIDTH, HIDDEN), new(EXPERTS, HIDDEN, WIDTH)
        decode_tokens(new(tokens, HIDDEN), *weights, TOP_K, True)
        count += 1
    for permute_x in (True, False) if "plain" in parts else ():  # the router's part of dX
        rows, scatter = new(TOKENS * TOP_K, HIDDEN), torch.randperm(TOKENS * TOP_K, device="cuda", dtype=torch.int32)
        sum_dX(rows, scatter, new(TOKENS, EXPERTS), new(EXPERTS, HIDDEN), TOP_K, token_order=permute_x)
        count += 1
    if "specialized" in parts and torch.cuda.get_device_capability() == (9, 0):
        for module in (specialized_rows, specialized_dswiglu, specialized_dW):
            module.num_programs = lambda device, sm_margin: SPECIALIZED_PROGRAMS
        for permute, fuse, wide_x in product((True, False), repeat=3):
            flags = dict(zip(names, (permute, permute, fuse, fuse), strict=True))
            step(torch.bfloat16, specialized(wide_x=wide_x), SPECIALIZED_TOKENS, **flags)
            count += 1
    torch.cuda.synchronize()
    print(f"{count} steps, routings, forwards and sums ran")


if __name__ == "__main__":
    main()
