"""The expert computation in plain torch: the specification that every other backend is held to.

H[r]  = X[r] * gate_up_proj[e(r)]^T          [T*K, 2I]   gate columns first, then up columns
A[r]  = act(H[r, :I]) * H[r, I:]             [T*K, I]
Y[r]  = A[r] * down_proj[e(r)]^T             [T*K, H]
O[t]  = sum over the K rows r of token t of routing_weight[r] * Y[r]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import ConfigError, nearest
from .routing import RoutingPlan, combine, permute, unpermute


@dataclass(frozen=True)
class ExpertOptions:
    """How the experts are to be computed; what a backend does not use does not change its result."""

    hidden_act: str = "silu"
    permute_x: bool = True
    permute_y: bool = True
    fuse_swiglu: bool = True
    fuse_combine: bool = True


@dataclass(frozen=True)
class ExpertSteps:
    """Every intermediate of the experts; rows in expert order unless said otherwise."""

    first_gemm: Tensor  # [T*K, 2I]
    intermediate: Tensor  # [T*K, I]
    second_gemm: Tensor  # [T*K, H]
    hidden_states_unpermute: Tensor  # [T*K, H], token order


def act_and_mul(x: Tensor, hidden_act: str = "silu") -> Tensor:
    """Gated activation, ``act(gate) * up``: x [..., 2I] (gate columns, then up columns) -> [..., I]."""
    gate, up = x.chunk(2, dim=-1)
    return activation(hidden_act)(gate) * up


def activation(hidden_act: str) -> torch.nn.Module:
    """The activation that transformers knows by this name. ConfigError with the nearest name otherwise."""
    from transformers.activations import ACT2FN

    if hidden_act not in ACT2FN:
        names = sorted(ACT2FN)
        hint = nearest(hidden_act, names)
        raise ConfigError(f"model.hidden_act: got {hidden_act!r}; allowed: {', '.join(names)}{hint}")
    return ACT2FN[hidden_act]


def grouped_gemm(
    x: Tensor, weight: Tensor, plan: RoutingPlan, *, permute_x: bool = False, permute_y: bool = False
) -> Tensor:
    """Multiply each expert's rows by that expert's weight.

    Args:
        x: [T*K, K] in expert order, or [T, K] in token order with `permute_x`.
        weight: [E, N, K].
        plan: who computes which row.
        permute_x: gather the rows from token order.
        permute_y: scatter the result to token order.

    Returns:
        [T*K, N] in expert order, or in token order with `permute_y`. Rows of dropped slots are zero.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    rows_needed = plan.num_tokens if permute_x else plan.gather_indices.shape[0]
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2] or x.shape[0] != rows_needed:
        got = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}"
        raise ValueError(f"grouped_gemm: got {got}; needed: x [{rows_needed}, K], weight [E, N, K]")
    if weight.shape[0] != plan.num_experts:
        raise ValueError(f"grouped_gemm: weight has {weight.shape[0]} experts, the plan {plan.num_experts}")
    rows = permute(x, plan) if permute_x else x
    counts = plan.token_counts_by_expert.tolist()
    dropped = rows.shape[0] - sum(counts)
    *groups, _ = rows.split([*counts, dropped])
    # unbind and split: their backward writes each gradient once, where indexing would add E tensors of full size
    products = [F.linear(group, w) for group, w in zip(groups, weight.unbind(0), strict=True)]
    y = torch.cat([*products, rows.new_zeros(dropped, weight.shape[1])])
    return unpermute(y, plan) if permute_y else y


def compute_experts(
    x: Tensor,
    routing_weights: Tensor,
    plan: RoutingPlan,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    options: ExpertOptions,
) -> tuple[Tensor, ExpertSteps]:
    """The experts' part of the block.

    Args:
        x: [T,H].
        routing_weights: [T,K].
        plan: the plan of the T*K rows.
        gate_up_proj: [E,2I,H].
        down_proj: [E,H,I].
        options: `hidden_act` decides the result; the permute flags only where the permutation happens.

    Returns:
        [T,H] and the intermediates.
    """
    rows = x if options.permute_x else permute(x, plan)
    first = grouped_gemm(rows, gate_up_proj, plan, permute_x=options.permute_x)
    intermediate = act_and_mul(first, options.hidden_act)
    second = grouped_gemm(intermediate, down_proj, plan)
    unpermuted = unpermute(second, plan)
    return combine(unpermuted, routing_weights), ExpertSteps(first, intermediate, second, unpermuted)
