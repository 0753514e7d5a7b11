"""A forward of one to four tokens, without gradients, in two launches: its time is the weights that it reads.

    decode_gate      logits[t, e] = <x[t], gate[e]>
    decode_experts   p = softmax(logits[t]); the top_k largest p, lowest expert first among equals: see `router`
                     A[s] = silu(Wg[id(s)] x[t]) * (Wu[id(s)] x[t])         slot s = t * top_k + k
                     -- every program waits until all of A is there --
                     out[t] = sum over k of w[t, k] * Wd[id(s)] A[s]

There is one row to multiply a weight by, so that nothing is sorted, and products are sums over registers, without
tensor cores. Programs of `decode_experts` each choose the experts for themselves, which is cheaper than to wait for one
that does. Each asks for its first rows of Wg and Wu when it knows their experts, before it knows the others, and has
asked for its first rows of Wd when it begins to wait for A. What is read once is the first to leave the L2 again.

They all wait for each other, so that all must run at once: the launch is a cooperative one. Interpreted, where programs
run one after the other, its two products are two launches.

    argument        shape        order
    x               [T, H]
    gate            [E, H]
    gate_up_proj    [E, 2I, H]   Hugging Face's layout: gate rows (Wg), then up rows (Wu)
    down_proj       [E, H, I]    (Wd)
    logits          [T, E]
    a (A)           [T*K, I]     token order
    arrived         [1] int32    the programs that have stored their part of A
    out             [T, H]

H, A and the rows of the down product are rounded to the weights' dtype, as where they are stored.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..machine import interpreting
from .activation import swiglu
from .choice import _capability
from .gate import MAX_WIDTH, gate_kernel, gate_launch
from .launch import cdiv, laid_out, launch, num_programs, on_device, power_of_2
from .library import call, define, differentiate, refuse_forward_mode, within
from .ops import check_weights
from .options import FusedOptions
from .router import choose, probabilities

MAX_TOKENS = 4  # beyond, tokens share experts, whose weights the ordinary kernels read once
MAX_TOKENS_WIDE = 2  # where a row of x is more than PIECE, as in the 235B model, which gains nothing from then on
PIECE = 4096  # bytes of each row of weights that a program takes at a time
MAX_EXPERTS = 1024  # each program holds all of a token's probabilities
MAX_TOP_K = 16  # the down product takes a row of each of a token's experts at a time
READ_AGAIN = 16 << 20  # bytes that tokens with an expert in common read once more, on average: what the L2 is to keep
PROGRAMS = 4  # a multiprocessor: with 128 registers a thread and 4 warps each, no more fit
UP, DOWN, BOTH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _up_rows(
    ptr,
    step,
    steps,
    experts,
    H: tl.constexpr,
    I: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVICT: tl.constexpr,
):
    """(rows of Wg, rows of Wu) of this program's `step`, [BLOCK_N, BLOCK_K]; zeros, not loaded, from `steps` on."""
    NUM_N: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    NUM_K: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    unit = tl.program_id(0) + (step // NUM_K) * tl.num_programs(0)
    slots = tl.arange(0, experts.shape[0])[:, None] * TOP_K + tl.arange(0, experts.shape[1])[None, :]
    here = (slots == unit // NUM_N) & (tl.arange(0, experts.shape[1]) < TOP_K)[None, :]
    expert = tl.sum(tl.sum(tl.where(here, experts, 0), axis=1), axis=0).to(tl.int64)
    offs_n = ((unit % NUM_N) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_k = (step % NUM_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (offs_n < tl.where(step < steps, I, 0))[:, None] & (offs_k < H)[None, :]
    ptrs = ptr + expert * (2 * I * H) + offs_n[:, None] * H + offs_k[None, :]
    gate_rows = tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICT)
    return gate_rows, tl.load(ptrs + I * H, mask=mask, other=0.0, eviction_policy=EVICT)


@triton.jit
def _down_at(
    ptr,
    step,
    steps,
    experts,
    H: tl.constexpr,
    I: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Where rows of Wd are for this program's `step`, of each of a token's experts: (addresses, mask).

    Both [SLOTS, BLOCK_H, BLOCK_I]; the mask is false likewise.
    """
    NUM_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    NUM_I: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
    unit = tl.program_id(0) + (step // NUM_I) * tl.num_programs(0)
    of_token = (tl.arange(0, experts.shape[0]) == unit // NUM_H)[:, None]
    expert = tl.sum(tl.where(of_token, experts, 0), axis=0).to(tl.int64)  # [SLOTS]
    offs_h = ((unit % NUM_H) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    offs_i = (step % NUM_I) * BLOCK_I + tl.arange(0, BLOCK_I)
    kept = tl.arange(0, experts.shape[1]) < tl.where(step < steps, TOP_K, 0)
    mask = kept[:, None, None] & (offs_h < H)[None, :, None] & (offs_i < I)[None, None, :]
    ptrs = ptr + expert[:, None, None] * (H * I) + offs_h[None, :, None] * I + offs_i[None, None, :]
    return ptrs, mask


@triton.jit
def _experts(
    x_ptr,
    logits_ptr,
    gate_up_ptr,
    down_ptr,
    a_ptr,
    out_ptr,
    arrived_ptr,
    PARTS: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_I: tl.constexpr,
    FIRST: tl.constexpr,
    EVICT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    offs_s = tl.arange(0, SLOTS)
    offs_e = tl.arange(0, EXPERTS)
    p, total = probabilities(logits_ptr, tl.arange(0, TOKENS), offs_e, T, E, tl.float32)

    if PARTS != DOWN:
        NUM_N: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
        NUM_K: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
        steps = tl.cdiv(tl.maximum(T * TOP_K * NUM_N - program, 0), programs) * NUM_K
        _, first, _ = choose(p, total, offs_e, offs_s, FIRST, False)
        gate_rows, up_rows = _up_rows(gate_up_ptr, 0, steps, first, H, I, TOP_K, BLOCK_N, BLOCK_K, EVICT)
        # Always so. The compiler does not know, and asks for the first rows before it chooses the other experts.
        known = tl.sum(tl.sum(first, axis=1), axis=0) >= 0
    else:
        known = True
    weights = tl.zeros((TOKENS, SLOTS), tl.float32)
    experts = tl.zeros((TOKENS, SLOTS), tl.int32)
    if known:
        weights, experts, _ = choose(p, total, offs_e, offs_s, TOP_K, NORM)
    weights = weights.to(OUT).to(tl.float32)

    if PARTS != DOWN:
        gate = tl.zeros((BLOCK_N,), tl.float32)
        up = tl.zeros((BLOCK_N,), tl.float32)
        for step in range(steps):
            unit = program + (step // NUM_K) * programs
            slot = (unit // NUM_N).to(tl.int64)
            offs_k = (step % NUM_K) * BLOCK_K + tl.arange(0, BLOCK_K)
            # x first: asked for after the next rows, it would be answered after them
            x = tl.load(x_ptr + (slot // TOP_K) * H + offs_k, mask=offs_k < H, other=0.0)
            next_gate, next_up = _up_rows(gate_up_ptr, step + 1, steps, experts, H, I, TOP_K, BLOCK_N, BLOCK_K, EVICT)
            x = x.to(tl.float32)[None, :]
            gate += tl.sum(gate_rows.to(tl.float32) * x, axis=1)
            up += tl.sum(up_rows.to(tl.float32) * x, axis=1)
            if step % NUM_K == NUM_K - 1:
                offs_n = (unit % NUM_N) * BLOCK_N + tl.arange(0, BLOCK_N)
                a = swiglu(gate.to(OUT).to(tl.float32), up.to(OUT).to(tl.float32))
                tl.store(a_ptr + slot * I + offs_n, a.to(OUT), mask=offs_n < I)
                gate = tl.zeros((BLOCK_N,), tl.float32)
                up = tl.zeros((BLOCK_N,), tl.float32)
            gate_rows, up_rows = next_gate, next_up

    if PARTS != UP:
        NUM_H: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
        NUM_I: tl.constexpr = (I + BLOCK_I - 1) // BLOCK_I
        steps = tl.cdiv(tl.maximum(T * NUM_H - program, 0), programs) * NUM_I
        ptrs, mask = _down_at(down_ptr, 0, steps, experts, H, I, TOP_K, BLOCK_H, BLOCK_I)
        if PARTS == BOTH:
            tl.debug_barrier()  # after the stores of all threads one of them says so
            tl.atomic_add(arrived_ptr, 1, sem="release", scope="gpu")  # which waits for all it has asked for: so before
        rows = tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICT)
        if PARTS == BOTH:
            while tl.atomic_add(arrived_ptr, 0, sem="acquire", scope="gpu") < programs:
                pass
            tl.debug_barrier()
        is_slot = offs_s < TOP_K
        y = tl.zeros((SLOTS, BLOCK_H), tl.float32)
        for step in range(steps):
            ptrs, mask = _down_at(down_ptr, step + 1, steps, experts, H, I, TOP_K, BLOCK_H, BLOCK_I)
            next_rows = tl.load(ptrs, mask=mask, other=0.0, eviction_policy=EVICT)
            unit = program + (step // NUM_I) * programs
            token = (unit // NUM_H).to(tl.int64)
            offs_i = (step % NUM_I) * BLOCK_I + tl.arange(0, BLOCK_I)
            a_ptrs = a_ptr + (token * TOP_K + offs_s)[:, None] * I + offs_i[None, :]
            a = tl.load(a_ptrs, mask=is_slot[:, None] & (offs_i < I)[None, :], other=0.0).to(tl.float32)
            y += tl.sum(rows.to(tl.float32) * a[:, None, :], axis=2)
            if step % NUM_I == NUM_I - 1:
                of_token = (tl.arange(0, TOKENS) == token)[:, None]
                weight = tl.sum(tl.where(of_token, weights, 0.0), axis=0)[:, None]
                weighted = tl.where(is_slot[:, None], y.to(OUT).to(tl.float32) * weight, 0.0)
                offs_h = (unit % NUM_H) * BLOCK_H + tl.arange(0, BLOCK_H)
                tl.store(out_ptr + token * H + offs_h, tl.sum(weighted, axis=0).to(OUT), mask=offs_h < H)
                y = tl.zeros((SLOTS, BLOCK_H), tl.float32)
            rows = next_rows


def suits(x: Tensor, num_experts: int, top_k: int, options: FusedOptions) -> bool:
    """Whether `decode` computes a forward without gradients of x [T,H].

    It does where everything is fused and no kernel config is stated: it has no GEMM that one could be for, and no order
    of rows that a permutation would change. Where a graph is for any number of tokens, it does not, nor where a trace
    would hold on to the number that it sees.
    """
    fused = options.permute_x and options.permute_y and options.fuse_swiglu and options.fuse_combine
    fit = top_k <= MAX_TOP_K and num_experts <= MAX_EXPERTS and x.shape[1] <= MAX_WIDTH and x.itemsize <= 4
    if not fused or options.kernels or not fit:
        return False
    most = MAX_TOKENS if x.shape[1] * x.itemsize <= PIECE else MAX_TOKENS_WIDE
    return within(x.shape[0], most) and (torch.compiler.is_compiling() or not torch._C._is_tracing())


def _fake(x: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], gate.shape[0])


@define(
    "decode(Tensor x, Tensor gate, Tensor gate_up_proj, Tensor down_proj, int top_k, bool norm_topk_prob, "
    "int sm_margin=0) -> (Tensor, Tensor)",
    _fake,
)
def decode_tokens(
    x: Tensor,
    gate: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k: int,
    norm_topk_prob: bool,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """(out [T,H], router logits [T,E]) of x [T,H]; see `suits`. No backward.

    Raises:
        ValueError: no tokens or more than MAX_TOKENS, a weight of another shape, dtype or device than x needs, or one
            that is not contiguous.
    """
    tokens, experts = x.shape[0], gate.shape[0]
    if not 0 < tokens <= MAX_TOKENS:
        raise ValueError(f"x: got {tokens} tokens; needed: 1 to {MAX_TOKENS}")
    if not 0 < top_k <= min(MAX_TOP_K, experts) or experts > MAX_EXPERTS:
        raise ValueError(f"top_k: got {top_k} of {experts} experts; needed: 1 to {MAX_TOP_K}, of at most {MAX_EXPERTS}")
    check_weights(x, experts, gate_up_proj, down_proj, gate)
    logits = torch.empty(tokens, experts, dtype=x.dtype, device=x.device)
    a = torch.empty(tokens * top_k, down_proj.shape[2], dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    arrived = torch.empty(1, dtype=torch.int32, device=x.device)
    x, gate = laid_out(x), gate.contiguous()
    with on_device(x.device):
        sizes = (tokens, experts, *down_proj.shape[1:], top_k, norm_topk_prob)
        # from Hopper on a kernel may be put in place before the one in front of it has ended
        dependent, most = _capability(x.device) >= 90, num_programs(x.device, sm_margin, PROGRAMS)
        grid, first, programs, second = _constants(sizes, x.dtype, dependent, most)
        launch("decode_gate", gate_kernel, grid, x, gate, logits, arrived, tokens, experts, **first)
        args = (x, logits, gate_up_proj, down_proj, a, out, arrived)
        for parts in (UP, DOWN) if interpreting() else (BOTH,):
            launch("decode_experts", _experts, (programs,), *args, PARTS=parts.value, **second)
    return out, logits


@lru_cache(maxsize=1024)
def _constants(
    sizes: tuple[int, ...], dtype: torch.dtype, dependent: bool, most: int
) -> tuple[tuple[int, int], dict[str, Any], int, dict[str, Any]]:
    """Grid and constexprs of the two launches; made once, as they take longer than a launch."""
    tokens, experts, hidden, width, top_k, norm = sizes
    size, slots = dtype.itemsize, power_of_2(top_k)
    grid, gate = gate_launch(tokens, experts, hidden, dtype)
    # 8 KB in each of the tiles that a program holds: a unit's rows while it asks for the next one's
    tiles = {"BLOCK_N": 2, "BLOCK_K": min(power_of_2(hidden), PIECE // size)}
    tiles |= {"BLOCK_H": max(1, 64 // size // slots), "BLOCK_I": min(power_of_2(width), 256)}
    of_an_expert = cdiv(width, tiles["BLOCK_N"])
    up = tokens * top_k * of_an_expert, 2 * tiles["BLOCK_N"] * hidden
    down = tokens * cdiv(hidden, tiles["BLOCK_H"]), tiles["BLOCK_H"] * top_k * width
    programs = _even(most, up, down)
    again = tokens * (tokens - 1) // 2 * top_k**2 / experts * 3 * hidden * width * size
    # TOKENS: at least one for each warp, so that each chooses without the others
    more: dict[str, Any] = {"TOKENS": max(4, power_of_2(tokens)), "EXPERTS": power_of_2(experts), "SLOTS": slots}
    more |= {"FIRST": min(top_k, cdiv(programs, of_an_expert)), "EVICT": "evict_first" if again <= READ_AGAIN else ""}
    given = {"T": tokens, "E": experts, "H": hidden, "I": width, "TOP_K": top_k, "NORM": bool(norm), **tiles, **more}
    given["DEPENDENT"] = dependent
    if not interpreting():
        given |= {"num_warps": 4, "maxnreg": 128, "launch_cooperative_grid": True, "launch_pdl": dependent}
    return grid, {**gate, "DECODE": True, "DEPENDENT": dependent}, programs, given


def _even(most: int, *parts: tuple[int, int]) -> int:
    """How many programs, half of `most` or more, so that the busiest has least to read; of equals the fewest.

    They read at one pace and wait for each other. `parts`: (units, elements of each), one part after the other.
    """
    choice = range(max(1, most // 2), most + 1)
    return min(choice, key=lambda n: (sum(cdiv(units, n) * size for units, size in parts), n))


def _no_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("moefactory: decode has no backward; run the block, which takes other kernels for gradients")


differentiate(decode_tokens, _no_backward)


def decode(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor], top_k: int, norm_topk_prob: bool, sm_margin: int = 0
) -> tuple[Tensor, Tensor]:
    """`decode_tokens`, which has no forward-mode derivative: refused here, the dispatcher would drop the tangent."""
    refuse_forward_mode(*tensors)
    out, logits = call(decode_tokens, *tensors, top_k, norm_topk_prob, sm_margin)
    return out, logits
