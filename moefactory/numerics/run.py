"""Running two blocks on the same tokens: ours and Hugging Face's, forward and backward, each routing by itself.

Where rounding makes the two pick different experts for a token (its scores are closer than an ulp), comparing them says
nothing. Such a token's gradient of the output is set to zero, for both and for float64 afterwards, so that it adds
nothing to any weight's gradient.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MoeConfig
from ..routing import route
from ..weights import BlockWeights, from_hf_state_dict

WEIGHTS = ("gate", "gate_up_proj", "down_proj")
MAX_DRAWS = 256


@dataclass(frozen=True)
class Run:
    """One forward and backward: what came out, and how long each took in milliseconds."""

    output: Tensor
    router_logits: Tensor
    selected_experts: Tensor
    gradients: Mapping[str, Tensor | None]
    forward_ms: float
    backward_ms: float


def wanted_gradients(config: MoeConfig) -> tuple[str, ...]:
    """The gradients that a configuration asks for; the others must be None."""
    weights = () if config.dX_only else tuple(f"d{name}" for name in WEIGHTS)
    return weights if config.dW_only else ("dX", *weights)


def seeded(seed: int) -> torch.Generator:
    """Seeded apart from the weights: the same seed for both would make x a multiple of the gate's rows.

    Torch's CPU generator reads 32 bits of its seed, so adding 2**32 or more changes nothing.
    """
    return torch.Generator().manual_seed((seed + 1) * 0x9E3779B9 % 2**32)


def draw_tokens(weights: BlockWeights, count: int, seed: int) -> tuple[Tensor, int | None]:
    """(x [T,H], the expert that none of them selects, or None where every expert is always selected).

    The weights stay as they are: tokens that select the least popular expert are drawn again.
    """
    model, gate = weights.model, weights.gate.detach()
    generator = seeded(2 * seed)

    def draw() -> Tensor:
        return torch.randn(count, model.hidden_size, generator=generator).to(gate)

    def selected(x: Tensor, dtype: torch.dtype) -> Tensor:
        return route(x.to(dtype), gate.to(dtype), model.top_k, model.norm_topk_prob)[2]

    first = draw()
    if model.top_k == model.num_experts:
        return first, None
    empty = int(torch.bincount(selected(first, gate.dtype).flatten(), minlength=model.num_experts).argmin())
    kept: list[Tensor] = []
    x = first
    for _ in range(MAX_DRAWS):
        # By float64 as well: a token on the border would be routed to the empty expert by one of them.
        hit = (selected(x, gate.dtype) == empty).any(1) | (selected(x, torch.float64) == empty).any(1)
        kept.append(x[~hit])
        if sum(map(len, kept)) >= count:
            return torch.cat(kept)[:count], empty
        x = draw()
    return first, None


def clock(x: Tensor) -> float:
    """Milliseconds on the wall, once the device has done what it was given."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() * 1000


class Passage:
    """A block on its way through forward and backward: two steps, as dO waits for the other block's routing."""

    def __init__(self, block: Any, x: Tensor) -> None:
        tokens = x.shape[0]
        batch = 2 if tokens % 2 == 0 else 1
        self.x = x.detach().clone().view(batch, tokens // batch, -1).requires_grad_()
        block.zero_grad(set_to_none=True)
        start = clock(x)
        returned = block(self.x)
        self.forward_ms = clock(x) - start
        first: Any = returned[0] if isinstance(returned, tuple) else returned
        self.output: Tensor = getattr(first, "hidden_states", first)
        self.returned = returned

    def back(self, grad_output: Tensor) -> float:
        """Run backward; milliseconds."""
        start = clock(self.x)
        self.output.backward(grad_output.view_as(self.output))
        return clock(self.x) - start

    def run(self, logits: Tensor, selected: Tensor, gradients: Mapping[str, Tensor | None], backward_ms: float) -> Run:
        """What was found, rows flattened to [T, ...]."""
        flat = self.output.detach().flatten(0, -2)
        dx = None if self.x.grad is None else self.x.grad.flatten(0, -2)
        return Run(flat, logits.detach(), selected, {"dX": dx, **gradients}, self.forward_ms, backward_ms)


def _hf_routing(hf: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(router_logits [T,E], selected_experts [T,K]) of Hugging Face's block, by its own gate."""
    gate: Any = hf.gate
    with torch.no_grad():
        logits = F.linear(x, gate.weight)  # what every version's gate computes first; 5.0 does not return it
        returned = gate(x)
        if isinstance(returned, tuple):
            return logits, returned[-1]
        top_k: int = hf.top_k  # type: ignore[assignment]
        return logits, torch.softmax(returned, -1, dtype=torch.float32).topk(top_k, -1).indices


def _hf_gradients(hf: nn.Module, weights: BlockWeights) -> dict[str, Tensor | None]:
    """Gradients of Hugging Face's parameters in our layout; an expert that was not reached has zeros."""
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in hf.named_parameters()}
    fused = from_hf_state_dict(named, weights.model)
    return {f"d{name}": getattr(fused, name) for name in WEIGHTS}


def run_both(
    block: Any, hf: nn.Module, weights: BlockWeights, x: Tensor, grad_output: Tensor
) -> tuple[Run, Run, Tensor]:
    """(ours, Hugging Face's, the gradient of the output that both were given)."""
    ours, theirs = Passage(block, x), Passage(hf, x)
    with torch.no_grad():
        selected = block.run_router(x)[2]
    hf_logits, hf_selected = _hf_routing(hf, x)
    grad_output = grad_output.clone()
    grad_output[flipped(selected, hf_selected)] = 0
    spent = ours.back(grad_output)
    gradients = {f"d{name}": getattr(block, name).grad for name in WEIGHTS}
    mine = ours.run(ours.returned[1], selected, gradients, spent)
    spent = theirs.back(grad_output)
    return mine, theirs.run(hf_logits, hf_selected, _hf_gradients(hf, weights), spent), grad_output


def flipped(one: Tensor, other: Tensor) -> Tensor:
    """[T] bool: the tokens whose two sets of selected experts [T,K] differ."""
    return (one.sort(-1).values != other.sort(-1).values).any(-1)
