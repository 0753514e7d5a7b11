"""p = softmax(logits); the top_k largest p, lowest expert first among equals; divided by their sum if norm_topk_prob.

forward    w[t,k] = p[t, id[t,k]]  (/ S[t] = sum over k)                     float32, cast to the logits' dtype
backward   dp[id_k] = (dw[k] - sum_j dw[j] w[j]) / S  (norm_topk_prob), else dw[k]; 0 elsewhere
           dlogits[e] = p[e] * (dp[e] - sum_i dp[i] p[i]), whose sum is 0 with norm_topk_prob: there the weights
           before the cast and the ids are all it needs, not the logits

argument           shape    order
logits, dlogits    [T, E]   token order
weights, dweights  [T, K]   token order; dweights also as the sum of parts [P, T*K], rounded like the weights
selected           [T, K]   int64
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .combine import part_sum
from .launch import accumulator, cdiv, launch, on_device, power_of_2
from .library import call, define, differentiate, given_back, no_second_derivative, refuse_forward_mode
from .routed import Three, apart, parts_chosen

BLOCK_T = 8


@triton.jit
def probabilities(logits_ptr, offs_t, offs_e, T, E, ACC: tl.constexpr):
    """(softmax of the rows `offs_t` [., EXPERTS], zero past the last expert; what it was divided by [.])."""
    ptrs = logits_ptr + offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    inside = (offs_e < E)[None, :]
    # rows past the end read zeros, not -inf, whose softmax would be NaN
    logits = tl.where(inside, tl.load(ptrs, mask=(offs_t < T)[:, None] & inside, other=0.0).to(ACC), float("-inf"))
    shifted = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(shifted, axis=1)
    return shifted / total[:, None], total


@triton.jit
def choose(p, total, offs_e, offs_s, TOP_K: tl.constexpr, NORM: tl.constexpr):
    """(weights [., SLOTS] in p's type, selected [., SLOTS] int32, keys [., EXPERTS], -1 where an expert was chosen).

    `p` [., EXPERTS] and `total` [.] are those of `probabilities`; `offs_e` and `offs_s` number experts and slots.

    Floats of 0 and more are ordered as their bits, so that what is looked for is a largest integer, and its bits are
    the probability. A row of NaN selects the first experts: ids stay distinct and in range, its weights are NaN.
    """
    BITS: tl.constexpr = tl.int64 if p.dtype == tl.float64 else tl.int32
    TOKENS: tl.constexpr = p.shape[0]
    SLOTS: tl.constexpr = offs_s.shape[0]
    EXPERTS: tl.constexpr = p.shape[1]
    # `total`: NaN, or without NaN 1 or more
    broken = (total != total)[:, None]  # noqa: PLR0124
    # columns past the last expert lose to every expert: no key is less than theirs, no number higher
    key = tl.where(broken, EXPERTS - offs_e[None, :], p.to(BITS, bitcast=True))
    weights = tl.zeros((TOKENS, SLOTS), BITS)
    selected = tl.zeros((TOKENS, SLOTS), tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(key, axis=1)
        expert = tl.min(tl.where(key == best[:, None], offs_e[None, :], EXPERTS), axis=1)
        weights = tl.where((offs_s == k)[None, :], best[:, None], weights)
        selected = tl.where((offs_s == k)[None, :], expert[:, None], selected)
        key = tl.where(offs_e[None, :] == expert[:, None], -1, key)  # taken
    weights = tl.where(broken, float("nan"), weights.to(p.dtype, bitcast=True))
    if NORM:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    return weights, selected, key


@triton.jit
def _route_forward(
    logits_ptr,
    weights_ptr,
    selected_ptr,
    exact_ptr,
    tile_counts_ptr,
    T,
    E,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, EXPERTS)
    offs_s = tl.arange(0, SLOTS)
    row_mask = offs_t < T
    p, total = probabilities(logits_ptr, offs_t, offs_e, T, E, ACC)
    weights, selected, _ = choose(p, total, offs_e, offs_s, TOP_K, NORM)
    mask = row_mask[:, None] & (offs_s < TOP_K)[None, :]
    out = offs_t.to(tl.int64)[:, None] * TOP_K + offs_s[None, :]
    tl.store(weights_ptr + out, weights.to(weights_ptr.dtype.element_ty), mask=mask)
    tl.store(selected_ptr + out, selected.to(tl.int64), mask=mask)
    if NORM:
        tl.store(exact_ptr + out, weights, mask=mask)
    if GROUPS > 0:  # the plan's histogram, of a block of slots: none is dropped
        slots = tl.reshape(selected, (BLOCK_T * SLOTS,))
        counts = tl.histogram(
            slots, GROUPS, mask=tl.reshape(tl.broadcast_to(mask, (BLOCK_T, SLOTS)), (BLOCK_T * SLOTS,))
        )
        offs_g = tl.arange(0, GROUPS)
        tl.store(tile_counts_ptr + tl.program_id(0).to(tl.int64) * (E + 1) + offs_g, counts, mask=offs_g < E + 1)


@triton.jit
def _column(tile, k):
    """Column k of a tile."""
    here = (tl.arange(0, tile.shape[1]) == k)[None, :]
    return tl.sum(tl.where(here, tile, 0), axis=1)


@triton.jit
def _route_backward(
    saved_ptr,
    selected_ptr,
    dweights_ptr,
    dlogits_ptr,
    T,
    E,
    parts,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, EXPERTS)
    offs_s = tl.arange(0, SLOTS)
    row_mask = offs_t < T
    mask = row_mask[:, None] & (offs_e < E)[None, :]
    slots = offs_t.to(tl.int64)[:, None] * TOP_K + offs_s[None, :]
    slot_mask = row_mask[:, None] & (offs_s < TOP_K)[None, :]
    M = tl.cast(T, tl.int64) * TOP_K
    OUT: tl.constexpr = dlogits_ptr.dtype.element_ty
    # all of a token's slots at once: each load is waited for, one by one they were most of the kernel's time
    experts = tl.load(selected_ptr + slots, mask=slot_mask, other=0).to(tl.int32)
    dweights = part_sum(dweights_ptr, slots, slot_mask, parts, M).to(OUT).to(ACC)
    w = tl.zeros((BLOCK_T, EXPERTS), ACC)
    dw = tl.zeros((BLOCK_T, EXPERTS), ACC)
    if NORM:
        weights = tl.load(saved_ptr + slots, mask=slot_mask, other=0.0).to(ACC)
    for k in tl.static_range(TOP_K):
        here = offs_e[None, :] == _column(experts, k)[:, None]
        dw += tl.where(here, _column(dweights, k)[:, None], 0.0)
        if NORM:
            w += tl.where(here, _column(weights, k)[:, None], 0.0)
    if NORM:
        # sum_i dp[i] p[i] is 0 by algebra, and dw[k] less the mean of dw is the mean of the differences: no large
        # numbers cancel, and with one expert, or for one not selected, the gradient is exactly 0
        inner = tl.zeros((BLOCK_T, EXPERTS), ACC)
        for k in tl.static_range(TOP_K):
            inner += _column(weights, k)[:, None] * (dw - _column(dweights, k)[:, None])
        dlogits = w * inner
    else:
        p, _ = probabilities(saved_ptr, offs_t, offs_e, T, E, ACC)
        dlogits = p * (dw - tl.sum(dw * p, axis=1)[:, None])
    out = dlogits_ptr + offs_t.to(tl.int64)[:, None] * E + offs_e[None, :]
    tl.store(out, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


def _meta(logits: Tensor, top_k: int, norm: bool, block_t: int = BLOCK_T) -> dict[str, Any]:
    experts = power_of_2(logits.shape[1])
    # as many logits a thread whatever the block: for up to 128 experts the same sums, in the same order
    layout = {"EXPERTS": experts, "SLOTS": power_of_2(top_k), "BLOCK_T": block_t, "num_warps": block_t // 2}
    return {"TOP_K": top_k, "NORM": norm, "ACC": accumulator(logits.dtype), **layout}


def room_for_choice(logits: Tensor, top_k: int, norm_topk_prob: bool) -> Three:
    """Memory for the results of `top_k_softmax`; its fake."""
    return apart(parts_chosen(logits.shape[0], top_k, logits.dtype, norm_topk_prob), logits.device)


@define("top_k_softmax(Tensor logits, int top_k, bool norm_topk_prob) -> (Tensor, Tensor, Tensor)", room_for_choice)
def top_k_softmax(logits: Tensor, top_k: int, norm_topk_prob: bool) -> Three:
    """(routing_weights [T,K] in the logits' dtype, selected_experts [T,K] int64, weights before the cast) of [T,E].

    The last is empty without norm_topk_prob: the backward then needs every probability, and makes them from the logits.
    """
    chosen = room_for_choice(logits, top_k, norm_topk_prob)
    select_and_count(logits, norm_topk_prob, 0, chosen)
    return chosen


def counted(top_k: int, num_experts: int, slots: int) -> bool:
    """Whether `select_and_count` counts blocks of `slots` slots: whole tokens, and no more than a program holds.

    A row of more than 128 logits is divided among the program's warps, in a larger program among more: other sums.
    """
    return num_experts <= 128 and slots % top_k == 0 and 8 <= slots // top_k <= 32


def select_and_count(logits: Tensor, norm_topk_prob: bool, slots: int, chosen: Three) -> Tensor | None:
    """Fill `chosen` as `top_k_softmax` would; the plan's tile_counts [blocks, E+1] of blocks of `slots`; None for 0."""
    (tokens, experts), top_k = logits.shape, chosen[0].shape[1]
    block_t = slots // top_k if slots else BLOCK_T
    blocks = cdiv(tokens, block_t)
    counts = torch.empty(blocks, experts + 1, dtype=torch.int32, device=logits.device) if slots else None
    if tokens:
        meta = _meta(logits, top_k, norm_topk_prob, block_t)
        meta["GROUPS"] = power_of_2(experts + 1) if slots else 0
        with on_device(logits.device):
            args = (logits.contiguous(), *chosen, chosen[0] if counts is None else counts)
            launch("route_forward", _route_forward, (blocks,), *args, tokens, experts, **meta)
    return counts


def _backward_fake(dweights: Tensor, saved: Tensor, selected: Tensor, num_experts: int, norm_topk_prob: bool) -> Tensor:
    return dweights.new_empty(dweights.shape[0], num_experts)


@define(
    "top_k_softmax_backward(Tensor dweights, Tensor saved, Tensor selected, int num_experts, bool norm_topk_prob) "
    "-> Tensor",
    _backward_fake,
)
def top_k_softmax_backward(
    dweights: Tensor, saved: Tensor, selected: Tensor, num_experts: int, norm_topk_prob: bool
) -> Tensor:
    """dlogits [T,E] of dweights [T,K]; `saved`: the weights before the cast with norm_topk_prob, else the logits."""
    dtype, slots = dweights.dtype, dweights.shape
    selected = given_back("selected_experts", selected, slots, dweights, torch.int64)
    if norm_topk_prob:
        saved = given_back("routing weights", saved, slots, dweights, torch.promote_types(dtype, torch.float32))
    else:
        saved = given_back("logits", saved, (slots[0], num_experts), dweights)
    return backward_of_parts(dweights.contiguous().view(1, -1), dtype, saved, selected, num_experts, norm_topk_prob)


def backward_of_parts(
    parts: Tensor, dtype: torch.dtype, saved: Tensor, selected: Tensor, num_experts: int, norm_topk_prob: bool
) -> Tensor:
    """dlogits [T,E] in `dtype` of dweights that are the sum of `parts` [P,T*K] over P, rounded to `dtype`."""
    tokens, top_k = selected.shape
    dlogits = torch.empty(tokens, num_experts, dtype=dtype, device=parts.device)
    if tokens:
        meta = _meta(dlogits, top_k, norm_topk_prob)
        grid = (cdiv(tokens, BLOCK_T),)
        with on_device(parts.device):
            args = (saved.contiguous(), selected, parts, dlogits, tokens, num_experts, parts.shape[0])
            launch("route_backward", _route_backward, grid, *args, **meta)
    return dlogits


def select(logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """`top_k_softmax`, which has no forward-mode derivative: refused here, the dispatcher would drop the tangent."""
    refuse_forward_mode(logits)
    weights, selected, _ = call(top_k_softmax, logits, top_k, norm_topk_prob)
    return weights, selected


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, ctx.norm_topk_prob, *_ = inputs
    ctx.num_experts, ctx.constants = logits.shape[1], len(inputs) - 1
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2] if ctx.norm_topk_prob else logits, output[1])


def _backward(ctx: Any, dweights: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    constants = (None,) * ctx.constants
    if dweights is None:
        return None, *constants
    refuse_forward_mode(dweights)
    saved, selected = ctx.saved_tensors
    dlogits = call(top_k_softmax_backward, dweights, saved, selected, ctx.num_experts, ctx.norm_topk_prob)
    return dlogits, *constants


def differentiate_router(operator: Any) -> None:
    """Register the backward of an operator that takes and returns what `top_k_softmax` does, then anything else."""
    differentiate(operator, _backward, _save)


differentiate_router(top_k_softmax)
differentiate(top_k_softmax_backward, no_second_derivative)
