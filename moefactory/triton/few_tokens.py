"""Everything between the router's logits and the up GEMM in one launch of one program, for few tokens.

    p = softmax(logits); w, id = the top_k largest p, lowest expert first among equals (/ their sum if norm_topk_prob)
    row(t, k) = offsets[id[t,k]] + how many of the tokens before t chose id[t,k] too

The bits are those of `router`, `plan` and `schedule`, one after the other: at few tokens each of their launches costs
more than its work. The ids of a token are distinct, so that the stable sort of the slots needs no sorting: a word for
each expert, with bit t set where token t chose it, holds the expert's count (its ones) and a token's rank there (the
ones below bit t). No id lies outside [0, E), so that the group of dropped slots is empty.

    argument               shape           order, or index -> value
    logits                 [T, E]          token order
    weights, exact         [T, K]          token order; exact (before the cast to the logits' dtype) with NORM only
    selected               [T, K] int64    token order
    counts                 [E+1] int32     group -> its slots (group E: none)
    offsets                [E+2] int32     group -> its first expert-order row; then T*K
    gather, scatter        [T*K] int32     expert-order row -> slot, slot -> expert-order row
    tile_expert, tile_row  [max] int32     row tile of BLOCK_M -> its expert, its first row; not written past num_tiles
    num_tiles              [WORDS] int32   how many row tiles there are; zeros, as in `schedule`
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..routing import RoutingPlan
from .launch import accumulator, launch, on_device, power_of_2
from .library import call, define, refuse_forward_mode, within
from .routed import Three, apart, parts_planned
from .router import choose, differentiate_router, probabilities, room_for_choice
from .schedule import WORDS, most_tiles, store_counters

MIN_TOKENS, MAX_TOKENS = 8, 64  # the router's rows a program; the bits of a word, and at two a warp all the warps
MAX_EXPERTS = 128  # with more than MIN_TOKENS: beyond, warps share a row, and more of them add in another order
MAX_ROW = 1024  # experts, padded: with MIN_TOKENS rows as many logits as MAX_TOKENS rows of MAX_EXPERTS


@triton.jit
def _ones_of_32(word):
    """How many bits are set, without the usual last multiplication, which wraps."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    word = word + (word >> 16)
    return (word & 0x3F).to(tl.int32)


@triton.jit
def _ones(word):
    """How many bits are set in each uint32 or uint64."""
    if word.dtype == tl.uint64:
        return _ones_of_32((word & 0xFFFFFFFF).to(tl.uint32)) + _ones_of_32((word >> 32).to(tl.uint32))
    else:
        return _ones_of_32(word)


@triton.jit
def _flat(matrix, lane):
    """The elements of a matrix, one after the other.

    As a gather of itself: a reshape would leave each thread what it holds, several elements or copies, and every use
    from there on would do that much more work, every store convert anew.
    """
    return tl.gather(tl.reshape(matrix, lane.shape), lane, 0)


@triton.jit
def _route_few_tokens(
    logits_ptr,
    weights_ptr,
    selected_ptr,
    exact_ptr,
    counts_ptr,
    offsets_ptr,
    gather_ptr,
    scatter_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    num_tiles_ptr,
    T,
    E,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    WORD: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    offs_t = tl.arange(0, TOKENS)
    offs_e = tl.arange(0, EXPERTS)
    offs_s = tl.arange(0, SLOTS)
    row_mask = (offs_t < T)[:, None]
    p, total = probabilities(logits_ptr, offs_t, offs_e, T, E, ACC)  # of rows past the end: what they choose is masked
    weights, selected, key = choose(p, total, offs_e, offs_s, TOP_K, NORM)

    bit = tl.full((TOKENS,), 1, WORD) << offs_t.to(WORD)
    word = _flat(tl.sum(tl.where((key < 0) & row_mask, bit[:, None], 0), axis=0), offs_e)  # [EXPERTS]
    counts = _ones(word)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum((tiles << 16) + counts, axis=0)  # of both in one scan: T*K stays below 2^16
    starts = (ends & 0xFFFF) - counts
    first_tile = (ends >> 16) - tiles
    tl.store(counts_ptr + offs_e, counts, mask=offs_e < E)
    tl.store(offsets_ptr + offs_e, starts, mask=offs_e < E)
    tl.store(counts_ptr + E, 0)
    tl.store(offsets_ptr + E, T * TOP_K)
    tl.store(offsets_ptr + E + 1, T * TOP_K)
    for tile in tl.static_range((TOKENS + BLOCK_M - 1) // BLOCK_M):  # an expert has at most one slot of each token
        tl.store(tile_expert_ptr + first_tile + tile, offs_e, mask=tile < tiles)
        tl.store(tile_row_ptr + first_tile + tile, starts + tile * BLOCK_M, mask=tile < tiles)
    tl.store(num_tiles_ptr + offs_e - (EXPERTS - 1), ends >> 16, mask=offs_e == EXPERTS - 1)  # the last of them: all
    store_counters(num_tiles_ptr)

    lane = tl.arange(0, TOKENS * SLOTS)
    token = lane // SLOTS
    mask = (token < T) & (lane % SLOTS < TOP_K)
    slot = token * TOP_K + lane % SLOTS
    expert = _flat(selected, lane)
    w = _flat(weights, lane)
    earlier = (tl.full((TOKENS * SLOTS,), 1, WORD) << token.to(WORD)) - 1
    row = tl.gather(starts, expert, 0) + _ones(tl.gather(word, expert, 0) & earlier)
    tl.store(weights_ptr + slot, w.to(weights_ptr.dtype.element_ty), mask=mask)
    tl.store(selected_ptr + slot, expert.to(tl.int64), mask=mask)
    if NORM:
        tl.store(exact_ptr + slot, w, mask=mask)
    tl.store(scatter_ptr + slot, row, mask=mask)
    tl.store(gather_ptr + row, slot, mask=mask)


def few(tokens: int, num_experts: int) -> bool:
    """Whether `route_few_tokens` takes this many. Where a graph is for any number of tokens, they are not few."""
    most = MAX_TOKENS if num_experts <= MAX_EXPERTS else MIN_TOKENS if num_experts <= MAX_ROW else 0
    return within(tokens, most)


def _padded(tokens: int) -> int:
    return max(MIN_TOKENS, power_of_2(tokens))


def _counts_and_table(logits: Tensor, top_k: int, block_m: int) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    max_tiles = most_tiles(experts + 1, tokens * top_k, block_m)
    sizes = (experts + 1, max_tiles, max_tiles, WORDS)
    return tuple(torch.empty(n, dtype=torch.int32, device=logits.device) for n in sizes)


def _empty(logits: Tensor, top_k: int, norm_topk_prob: bool, block_m: int) -> tuple[Tensor, ...]:
    """Memory for the results of `route_few_tokens`; its fake."""
    counts, *table = _counts_and_table(logits, top_k, block_m)
    indices = apart(parts_planned(logits.shape[1], logits.shape[0] * top_k), logits.device)
    return *room_for_choice(logits, top_k, norm_topk_prob), counts, *indices, *table


@define(
    "route_few_tokens(Tensor logits, int top_k, bool norm_topk_prob, int block_m) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _empty,
)
def route_few_tokens(logits: Tensor, top_k: int, norm_topk_prob: bool, block_m: int) -> tuple[Tensor, ...]:
    """Router, plan and tile table of `few` tokens' logits [T,E], in one launch.

    Returns:
        routing_weights [T,K] in the logits' dtype, selected_experts [T,K] int64, the weights before the cast [T,K]
        (empty without norm_topk_prob); counts [E+1], offsets [E+2], gather [T*K], scatter [T*K]; tile_expert [max],
        tile_row [max], num_tiles [WORDS] for row tiles of `block_m`.

    Raises:
        ValueError: too many tokens, or none.
    """
    tokens, experts = logits.shape
    if not few(tokens, experts):
        raise ValueError(f"logits: got {tokens} tokens of {experts} experts; see moefactory.triton.few_tokens.few")
    out = _empty(logits, top_k, norm_topk_prob, block_m)
    _launch(logits, out, top_k, norm_topk_prob, block_m)
    return out


def route_into(chosen: Three, indices: Three, logits: Tensor, norm_topk_prob: bool, block_m: int) -> Three:
    """Fill (routing weights, selected experts, weights before the cast) and (offsets, gather, scatter); the table."""
    top_k = chosen[0].shape[1]
    counts, *table = _counts_and_table(logits, top_k, block_m)
    _launch(logits, (*chosen, counts, *indices, *table), top_k, norm_topk_prob, block_m)
    return table[0], table[1], table[2]


def _launch(logits: Tensor, out: tuple[Tensor, ...], top_k: int, norm_topk_prob: bool, block_m: int) -> None:
    tokens, experts = logits.shape
    padded = _padded(tokens)
    with on_device(logits.device):
        launch(
            "route_few_tokens",
            _route_few_tokens,
            (1,),
            *(logits.contiguous(), *out, tokens, experts),
            TOP_K=top_k,
            SLOTS=power_of_2(top_k),
            NORM=norm_topk_prob,
            ACC=accumulator(logits.dtype),
            WORD=tl.uint32 if padded <= 32 else tl.uint64,
            TOKENS=padded,
            EXPERTS=power_of_2(experts),
            BLOCK_M=block_m,
            # as many logits a thread as in the router's program of 8 rows and 4 warps: its sums, its order of adding
            num_warps=padded // 2,
        )


differentiate_router(route_few_tokens)


def route(logits: Tensor, top_k: int, norm_topk_prob: bool, block_m: int) -> tuple[Tensor, RoutingPlan]:
    """(routing_weights [T,K], the plan with the tile table of `block_m`) of `few` tokens' logits [T,E]."""
    refuse_forward_mode(logits)
    out = call(route_few_tokens, logits, top_k, norm_topk_prob, block_m)
    weights, _, _, counts, offsets, gather, scatter, tile_expert, tile_row, num_tiles = out
    table = (tile_expert, tile_row, num_tiles)
    return weights, RoutingPlan(counts[: logits.shape[1]], gather, scatter, top_k, offsets, table, block_m)
