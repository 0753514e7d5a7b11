"""Which expert sees which token, in plain torch: router, RoutingPlan, permute, unpermute and combine.

There are two orders of the M = T*K rows. **Token order**: flat slot ``token * top_k + slot``. **Expert order**: sorted
by expert, stable, so that an expert's rows keep their token order. *permute* goes token -> expert, *unpermute* back.

    array                    shape   index -> value
    selected_experts         [T,K]   (token, slot) -> expert
    token_counts_by_expert   [E]     expert -> number of its rows
    gather_indices           [T*K]   expert-order row -> flat slot (``// top_k`` is the token)
    scatter_indices          [T*K]   flat slot -> expert-order row (the inverse)

An expert id outside [0, E) is *dropped*: its slots come last in expert order, no expert computes them, and they add
nothing to the sum. Expert parallelism in transformers marks the slots of other ranks that way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RoutingPlan:
    """The rows sorted by expert. Every shape depends on T, K and E only, never on the routing.

    Attributes:
        token_counts_by_expert: [E] int32.
        gather_indices: [T*K] int32, expert-order row -> flat slot; dropped slots last.
        scatter_indices: [T*K] int32, flat slot -> expert-order row.
        top_k: K.
        offsets: [E+2] int32, `group_offsets` where it was made along the way; else it is made when asked for.
        table: the tile table of `moefactory.triton.schedule` where it was made along the way: tile_expert, tile_row
            and num_tiles of row tiles of `block_m`. Warp-specialised kernels count in it: one stream at a time.
        block_m: 0 without a table.
    """

    token_counts_by_expert: Tensor
    gather_indices: Tensor
    scatter_indices: Tensor
    top_k: int
    offsets: Tensor | None = None
    table: tuple[Tensor, Tensor, Tensor] | None = None
    block_m: int = 0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.token_counts_by_expert.shape[0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.gather_indices.shape[0] // self.top_k

    @property
    def group_offsets(self) -> Tensor:
        """[E+2] int32: expert e owns the rows from offsets[e] to offsets[e+1]; dropped rows follow, up to T*K."""
        if self.offsets is not None:
            return self.offsets
        ends = self.token_counts_by_expert.cumsum(0, dtype=torch.int32)
        return F.pad(F.pad(ends, (1, 0)), (0, 1), value=self.gather_indices.shape[0])


def route(
    hidden_states: Tensor,
    gate: Tensor,
    top_k: int,
    norm_topk_prob: bool,
    selected_experts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Score every expert and pick the best ``top_k``, as Hugging Face's Qwen3-MoE router does.

    Args:
        hidden_states: [T,H].
        gate: [E,H], same dtype.
        top_k: K.
        norm_topk_prob: whether a token's K weights are divided by their sum.
        selected_experts: [T,K]; given, these are taken instead of the best (a held routing, for comparisons).

    Returns:
        router_logits [T,E]; routing_weights [T,K] in the logits' dtype; selected_experts [T,K] int64.
        The softmax runs over all experts in float32 (float64 for float64 inputs), as does the normalisation.
    """
    logits = F.linear(hidden_states, gate)
    wide = torch.promote_types(logits.dtype, torch.float32)
    probabilities = torch.softmax(logits, dim=-1, dtype=wide)
    if selected_experts is None:
        weights, selected_experts = torch.topk(probabilities, top_k, dim=-1)
    else:
        weights = probabilities.gather(1, selected_experts)
    if norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights.to(logits.dtype), selected_experts


def check_selected(selected_experts: Tensor) -> None:
    """ValueError unless `selected_experts` is a matrix of integers."""
    kind = selected_experts.dtype
    if selected_experts.ndim != 2 or not selected_experts.shape[1] or kind.is_floating_point or kind == torch.bool:
        got = f"{tuple(selected_experts.shape)} {selected_experts.dtype}"
        raise ValueError(f"selected_experts: got {got}; needed: integers of shape [T, K], K of 1 or more")


def make_plan(selected_experts: Tensor, num_experts: int) -> RoutingPlan:
    """Sort the slots by expert: stable, no atomics, no host synchronisation.

    Args:
        selected_experts: [T,K] integers; ids outside [0, num_experts) are dropped.
        num_experts: E.

    Raises:
        ValueError: `selected_experts` is not a matrix of integers.
    """
    check_selected(selected_experts)
    experts = selected_experts.reshape(-1).long()
    kept = (experts >= 0) & (experts < num_experts)
    keys = torch.where(kept, experts, num_experts)
    gather = torch.argsort(keys, stable=True)
    scatter = torch.empty_like(gather).scatter_(0, gather, torch.arange(gather.numel(), device=gather.device))
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=keys.device)
    counts.scatter_add_(0, keys, torch.ones_like(keys))
    return RoutingPlan(counts[:num_experts].int(), gather.int(), scatter.int(), selected_experts.shape[1])


def get_token_counts_and_gather_indices(selected_experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(token_counts_by_expert [E] int32, gather_indices [T*K] int32) of `make_plan`."""
    plan = make_plan(selected_experts, num_experts)
    return plan.token_counts_by_expert, plan.gather_indices


def permute(hidden_states: Tensor, plan: RoutingPlan) -> Tensor:
    """Copy each token's row to its K places in expert order: [T,H] -> [T*K,H].

    Written as expand, then one index per row, so that the backward adds a token's K gradients in slot order: indexing
    by token would add them in any order.
    """
    width = hidden_states.shape[-1]
    slots = hidden_states.unsqueeze(1).expand(-1, plan.top_k, -1).reshape(-1, width)
    return slots.index_select(0, plan.gather_indices)


def unpermute(rows: Tensor, plan: RoutingPlan) -> Tensor:
    """Bring rows from expert order to token order: [T*K,H] -> [T*K,H]."""
    return rows.index_select(0, plan.scatter_indices)


def combine(rows: Tensor, routing_weights: Tensor) -> Tensor:
    """Sum a token's K rows, weighted: rows [T*K,H] in token order, routing_weights [T,K] -> [T,H]."""
    tokens, top_k = routing_weights.shape
    products = rows.view(tokens, top_k, rows.shape[-1]) * routing_weights.unsqueeze(-1)
    return products.sum(dim=1).to(rows.dtype)  # on a GPU autocast sums in float32 and returns that
