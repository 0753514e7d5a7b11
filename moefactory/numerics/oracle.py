"""The block in float64, one expert at a time, with the routing held.

O[t] = sum over k of w[t,k] * down[e] (act(gate[e] x[t]) * (up[e] x[t])),   e = selected[t,k]

Held routing: with a routing of its own, float64 picks other experts for tokens on the border, and a bound wide enough
for those tokens lets real faults pass. One expert's weights and gradients are in float64 at a time, so the peak over
what is there already is one expert, whatever E.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import act_and_mul
from ..routing import route
from ..weights import BlockWeights

OnExpert = Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True)
class Oracle:
    """What float64 says, all of it float64.

    Attributes:
        output: [T,H].
        router_logits: [T,E].
        dX: [T,H].
        dgate: [E,H].
        dgate_terms: [E,H], how large the terms are whose differences dgate sums up: the softmax's gradient cancels,
            down to nothing for an expert that no token selects, and leaves the rounding of those terms.
    """

    output: Tensor
    router_logits: Tensor
    dX: Tensor
    dgate: Tensor
    dgate_terms: Tensor


def float64_block(
    weights: BlockWeights, x: Tensor, selected_experts: Tensor, grad_output: Tensor, on_expert: OnExpert
) -> Oracle:
    """Forward and backward in float64.

    Args:
        weights: in the dtype under test.
        x: [T,H], in the dtype under test.
        selected_experts: [T,K], held.
        grad_output: [T,H], the gradient of the output; router_logits get none of their own.
        on_expert: called with (e, dgate_up_proj[e] [2I,H], ddown_proj[e] [H,I]) for each expert in turn.
    """
    model = weights.model
    x64 = x.detach().double().requires_grad_()
    gate = weights.gate.detach().double().requires_grad_()
    logits, routing, _ = route(x64, gate, model.top_k, model.norm_topk_prob, selected_experts)
    scores, grad = routing.detach(), grad_output.double()
    output, dx_experts = torch.zeros_like(grad), torch.zeros_like(grad)
    d_routing, sizes = torch.zeros_like(scores), torch.zeros_like(scores)
    for e in range(model.num_experts):
        token, slot = (selected_experts == e).nonzero(as_tuple=True)
        rows = x64.detach()[token].requires_grad_()
        up = weights.gate_up_proj[e].detach().double().requires_grad_()
        down = weights.down_proj[e].detach().double().requires_grad_()
        y = act_and_mul(rows @ up.T, model.hidden_act) @ down.T
        weight = scores[token, slot].unsqueeze(-1)
        output.index_add_(0, token, weight * y.detach())
        products = grad[token] * y.detach()
        d_routing[token, slot] = products.sum(-1)
        sizes[token, slot] = 2 * (products.norm(dim=-1) + products.sum(-1).abs())
        d_rows, d_up, d_down = torch.autograd.grad(y, (rows, up, down), weight * grad[token])
        dx_experts.index_add_(0, token, d_rows)
        on_expert(e, d_up, d_down)
    dx_router, dgate = torch.autograd.grad(routing, (x64, gate), d_routing)
    share = torch.softmax(logits.detach(), -1)
    if model.norm_topk_prob:
        share = share / share.gather(1, selected_experts).sum(-1, keepdim=True)
    terms = ((share * sizes.amax(-1, keepdim=True)).square().T @ x64.detach().square()).sqrt()
    return Oracle(output, logits.detach(), dx_experts + dx_router, dgate, terms)
