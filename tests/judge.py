"""How the numbers of a block are judged: one rule, one exact problem, data that can tell, and bugs that must be caught.

The rule (`complaints`; the one that `moefactory check` applies): against a float64 oracle on the same low-precision
inputs with the same routing, a tensor's error is at most twice that of Hugging Face's eager block in the same dtype,
plus the rounding of the result itself.
It is applied to each expert of a weight's gradient and to each token of an activation, since one maximum over all
hides a wrong expert with small values. Data has unit scale: a fixed tolerance on values of 0.02 lets zeros pass.

The exact problem (`exact_problem`): small integers whose partial sums pass 256 while every intermediate is exact in
bfloat16. Sums in float32 give the right bits in any order, sums in bfloat16 do not, and one wrong element shows.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from moefactory.block import Qwen3MoeGroupedGEMMBlock
from moefactory.config import ResolvedModel
from moefactory.numerics.judge import Errors, Rounding
from moefactory.numerics.judge import judge as judge_groups
from moefactory.reference import act_and_mul, grouped_gemm
from moefactory.routing import RoutingPlan, combine, make_plan, permute, route, unpermute

LOW = (torch.float16, torch.bfloat16, torch.float32)
MODEL = ResolvedModel(64, 32, 8, 3, True, "silu")
WEIGHTS = ("gate", "gate_up_proj", "down_proj")
Tensors = dict[str, Tensor]


# --- data -------------------------------------------------------------------------------------------------------------


def unit_weights(model: ResolvedModel, dtype: torch.dtype, seed: int = 0, scale: float | None = None) -> Tensors:
    """gate, gate_up_proj and down_proj, normal with std 1/sqrt(fan in); drawn in float64, then rounded.

    With `scale` (of the tokens too) the experts' std is that scale, and the gate's undoes it: logits stay apart.
    """
    e, h, i = model.num_experts, model.hidden_size, model.moe_intermediate_size
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (e, h), "gate_up_proj": (e, 2 * i, h), "down_proj": (e, h, i)}
    std = {name: scale or shape[-1] ** -0.5 for name, shape in shapes.items()}
    std["gate"] = h**-0.5 / (scale or 1)
    return {
        name: (torch.randn(shape, generator=generator, dtype=torch.float64) * std[name]).to(dtype)
        for name, shape in shapes.items()
    }


def unit_tokens(tokens: int, model: ResolvedModel, dtype: torch.dtype, seed: int = 1, scale: float = 1.0) -> Tensor:
    """[1,T,H], standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, tokens, model.hidden_size, generator=generator, dtype=torch.float64) * scale).to(dtype)


def make_block(model: ResolvedModel, dtype: torch.dtype, **options: Any) -> Qwen3MoeGroupedGEMMBlock:
    """The torch block with `unit_weights`; traced unless said otherwise."""
    weights = unit_weights(model, dtype)
    return Qwen3MoeGroupedGEMMBlock(model, *(weights[name] for name in WEIGHTS), **options)


def weights_of(block: Any) -> Tensors:
    return {name: getattr(block, name).detach() for name in WEIGHTS}


def data(tokens: int, model: ResolvedModel, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(hidden states, dY), both [1,T,H]."""
    return unit_tokens(tokens, model, dtype), unit_tokens(tokens, model, dtype, seed=2)


def forced(model: ResolvedModel, dtype: torch.dtype, push: dict[int, float], tokens: int = 13) -> tuple[Any, Tensor]:
    """A block and tokens whose first feature is 1, and a gate that pushes experts up or down by it."""
    block = make_block(model, dtype)
    x = unit_tokens(tokens, model, dtype)
    x[..., 0] = 1
    with torch.no_grad():
        block.gate[:, 0] = 0
        for expert, by in push.items():
            block.gate[expert, 0] = by
    return block, x


@contextlib.contextmanager
def nan_memory() -> Iterator[None]:
    """Fresh memory of ``torch.empty`` and its kin is full of NaN (integers: their maximum)."""
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]


# --- the three computations -------------------------------------------------------------------------------------------


def hf_block(model: ResolvedModel, weights: Tensors) -> nn.Module:
    """The installed transformers' block, computing eagerly, with these weights; both of its layouts."""
    config = Qwen3MoeConfig(
        hidden_size=model.hidden_size, moe_intermediate_size=model.moe_intermediate_size,
        num_experts=model.num_experts, num_experts_per_tok=model.top_k, norm_topk_prob=model.norm_topk_prob,
        hidden_act=model.hidden_act,
    )  # fmt: skip
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config).to(weights["gate"].dtype)
    with torch.no_grad():
        block.gate.weight.copy_(weights["gate"])
        if hasattr(block.experts, "gate_up_proj"):
            block.experts.gate_up_proj.copy_(weights["gate_up_proj"])
            block.experts.down_proj.copy_(weights["down_proj"])
        else:
            for mlp, gate_up, down in zip(block.experts, weights["gate_up_proj"], weights["down_proj"], strict=True):
                mlp.gate_proj.weight.copy_(gate_up.chunk(2)[0])
                mlp.up_proj.weight.copy_(gate_up.chunk(2)[1])
                mlp.down_proj.weight.copy_(down)
    return block


def _hf_gradients(block: Any) -> Tensors:
    """Gradients by our names; an expert that saw no token has None in transformers 4: zeros."""

    def grad(p: Tensor) -> Tensor:
        return torch.zeros_like(p) if p.grad is None else p.grad

    experts = block.experts
    if hasattr(experts, "gate_up_proj"):
        both = {"gate_up_proj": grad(experts.gate_up_proj), "down_proj": grad(experts.down_proj)}
    else:
        up = [torch.cat([grad(mlp.gate_proj.weight), grad(mlp.up_proj.weight)]) for mlp in experts]
        both = {"gate_up_proj": torch.stack(up), "down_proj": torch.stack([grad(m.down_proj.weight) for m in experts])}
    return {"gate": grad(block.gate.weight), **both}


def run_hf(model: ResolvedModel, weights: Tensors, x: Tensor, dy: Tensor) -> Tensors:
    """Output and every gradient of Hugging Face's eager block, by the names that `run_block` uses."""
    block = hf_block(model, weights)
    x = x.detach().clone().requires_grad_()
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(dy)
    logits = block.gate(x.detach().reshape(-1, model.hidden_size))
    logits = logits[0] if isinstance(logits, tuple) else logits
    same = torch.equal(logits, F.linear(x.detach().reshape(-1, model.hidden_size), weights["gate"]))
    assert same, "Hugging Face's logits differ: it may have routed differently, and nothing can be compared"
    return {"hidden_states": out.detach(), "router_logits": logits.detach(), "dx": _grad(x), **_hf_gradients(block)}


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def run_block(block: Any, x: Tensor, dy: Tensor) -> Tensors:
    """Output and every gradient of one of our blocks; a gradient that is None stays out of the dict."""
    x = x.detach().clone().requires_grad_()
    block.zero_grad(set_to_none=True)
    out, logits = block(x)
    out = getattr(out, "hidden_states", out)
    out.backward(dy)
    found = {"dx": x.grad, **{name: getattr(block, name).grad for name in WEIGHTS}}
    gradients = {name: grad.clone() for name, grad in found.items() if grad is not None}
    return {"hidden_states": out.detach(), "router_logits": logits.detach(), **gradients}


def oracle(model: ResolvedModel, weights: Tensors, x: Tensor, dy: Tensor, selected_experts: Tensor) -> Tensors:
    """The block in float64, one token and one slot at a time, with a held routing; ids outside [0, E) add nothing."""
    w = {name: tensor.detach().double().requires_grad_() for name, tensor in weights.items()}
    wide = x.detach().double().reshape(-1, model.hidden_size).requires_grad_()
    logits = wide @ w["gate"].T
    probabilities = logits.softmax(-1)
    scores = probabilities.gather(1, selected_experts.clamp(0, model.num_experts - 1))
    scores = scores / scores.sum(-1, keepdim=True) if model.norm_topk_prob else scores
    out = naive_experts(wide, scores, selected_experts, w["gate_up_proj"], w["down_proj"], model.hidden_act)
    out.backward(dy.double().reshape(out.shape))
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in {"dx": wide, **w}.items()}
    gradients["dx"] = gradients["dx"].view(x.shape)
    return {"hidden_states": out.detach().view(x.shape), "router_logits": logits.detach(), **gradients}


def naive_experts(
    x: Tensor, scores: Tensor, selected: Tensor, gate_up_proj: Tensor, down_proj: Tensor, hidden_act: str
) -> Tensor:
    """Token by token, slot by slot: [T,H]."""
    rows = []
    for t, experts in enumerate(selected.tolist()):
        total = torch.zeros_like(x[t])
        for k, e in enumerate(experts):
            if 0 <= e < gate_up_proj.shape[0]:
                gate, up = (gate_up_proj[e] @ x[t]).chunk(2)
                total = total + scores[t, k] * (down_proj[e] @ (ACT2FN[hidden_act](gate) * up))
        rows.append(total)
    return torch.stack(rows) if rows else x * 0


# --- the rule ---------------------------------------------------------------------------------------------------------


def complaints(
    got: Tensors, eager: Tensors, exact: Tensors, dtype: torch.dtype, terms: Tensors | None = None
) -> list[str]:
    """What the rule finds wrong with each tensor of `got`, by name and by expert, token or router column.

    Every tensor of `exact` must be in `got`. In each group of values (an expert of a weight, a token of an activation)
    the largest error is at most 2 * eager's + 2 * eps * the largest exact value, and the mean error at most
    2 * eager's + eps * the mean exact value. Where a tensor's exact values are differences of larger ones, `terms` says
    how large: their rounding is what is left.
    """
    found = []
    for name, right in exact.items():
        if name not in got:
            found.append(f"{name}: missing")
            continue
        groups = [_groups(name, tensor) for tensor in (got[name], eager[name], right)]
        if groups[0].shape != groups[2].shape or got[name].dtype != dtype:
            found.append(f"{name}: {tuple(got[name].shape)} {got[name].dtype}, not {tuple(right.shape)} {dtype}")
            continue
        parts = [f"{name}[{i}]" for i in range(groups[0].shape[0])]
        errors = Errors.of(*groups)
        if terms and name in terms:
            sizes = Errors.of(*[_groups(name, terms[name])] * 3).oracle
            errors = replace(errors, oracle=tuple(map(torch.maximum, errors.oracle, sizes)))
        for v in judge_groups(name, errors, _rule(dtype), parts) if parts else []:
            if not v.ok:
                numbers = f"{v.error:.3g} of {v.bound:.3g}, mean {v.mean_error:.3g} of {v.mean_bound:.3g}"
                found.append(f"{v.part}: {v.note}: {numbers}")
    return found


def _rule(dtype: torch.dtype) -> Rounding:
    """The rule of `moefactory check`, sums of about 64 terms; in float64 its eager is one of ours and counts too."""
    return replace(Rounding.of(dtype, 64), hf_counts=True)


def _groups(name: str, tensor: Tensor) -> Tensor:
    """[group, values]: an expert a group in weights, a token in activations."""
    rows = tensor if name in WEIGHTS else tensor.flatten(0, -2)
    return rows.flatten(1).double()


# --- the exact problem ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExactProblem:
    """Integers for the experts alone: the routing and its weights are given, the activation is silu or relu."""

    x: Tensor  # [T,H]
    routing_weights: Tensor  # [T,K]
    selected_experts: Tensor  # [T,K]
    gate_up_proj: Tensor  # [E,2I,H]
    down_proj: Tensor  # [E,H,I]
    dy: Tensor  # [T,H]
    exact: Tensors  # out, dx, drouting_weights, dgate_up_proj, ddown_proj in float64

    @property
    def plan(self) -> RoutingPlan:
        return make_plan(self.selected_experts, self.gate_up_proj.shape[0])

    def expected(self, dtype: torch.dtype) -> Tensors:
        """The results rounded once."""
        return {name: tensor.to(dtype) for name, tensor in self.exact.items()}


def exact_problem(dtype: torch.dtype, tokens: int = 12, experts: int = 6, top_k: int = 3) -> ExactProblem:
    """Each sum's second half undoes the first but for one term: large on the way, small at the end.

    On the way it passes 256, and 2048 in float16: from there on that type (bfloat16, float16) skips integers. Every
    gate is 32 or more, where silu and relu are the same: the sigmoid of 32 is 1 in float32. H = I = 512 in float16,
    256 otherwise. The last expert gets no token.
    """
    size, largest, largest_up = (512, 8, 8) if dtype == torch.float16 else (256, 4, 2)
    g = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=g).double()

    def one(*shape: int, negative: bool = True) -> Tensor:
        """A single 1 or -1 in each row."""
        place = F.one_hot(torch.randint(shape[-1], shape[:-1], generator=g), shape[-1]).double()
        return place * (draw(0, 1, *shape[:-1], 1) * 2 - 1) if negative else place

    half = size // 2
    x = draw(1, 3, tokens, half).repeat(1, 2)
    gate = draw(1, largest, experts, half, half)
    up = draw(1, largest_up, experts, half, half)
    gate = torch.cat([gate, 32 * one(experts, half, half, negative=False) - gate], dim=2)
    up = torch.cat([up, one(experts, half, half, negative=False) - up], dim=2)
    gate_up = torch.cat([gate, gate, up, up], dim=1)  # half of the features repeat the other half
    down = draw(1, largest, experts, size, half)
    down = torch.cat([down, one(experts, size, half) - down], dim=2)
    scores = draw(1, 2, tokens, top_k)
    selected = torch.stack([torch.randperm(experts - 1, generator=g)[:top_k] for _ in range(tokens)])
    problem = ExactProblem(x, scores, selected, gate_up, down, one(tokens, size), {})
    exact = _exact_results(problem, dtype)
    rounded = {n: getattr(problem, n).to(dtype) for n in ("x", "routing_weights", "gate_up_proj", "down_proj", "dy")}
    return replace(problem, exact=exact, **rounded)


RESULTS = ("dx", "drouting_weights", "dgate_up_proj", "ddown_proj")


def _exact_results(p: ExactProblem, dtype: torch.dtype) -> Tensors:
    """Results in float64, after checking what the problem promises: exact intermediates, large partial sums."""
    x, scores, up, down = (t.clone().requires_grad_() for t in (p.x, p.routing_weights, p.gate_up_proj, p.down_proj))
    rows = permute(x, p.plan)
    h = grouped_gemm(rows, up, p.plan)
    a = act_and_mul(h, "relu")
    y = grouped_gemm(a, down, p.plan)
    out = combine(unpermute(y, p.plan), scores)
    naive = naive_experts(p.x, p.routing_weights, p.selected_experts, p.gate_up_proj, p.down_proj, "relu")
    assert h.chunk(2, dim=1)[0].min() >= 32
    assert torch.equal(out, naive), "the float64 reference is not exact on integers"
    gradients = torch.autograd.grad(out, [rows, h, a, y, x, scores, up, down], p.dy)
    for tensor in (h, a, y, *gradients[:4], p.x, p.gate_up_proj, p.down_proj):
        assert torch.equal(tensor.to(dtype).double(), tensor), "an intermediate has no exact value in this dtype"
    enough = 2048 if dtype == torch.float16 else 256
    for left, weight in ((p.x, p.gate_up_proj), (a[p.plan.scatter_indices.view(-1, p.plan.top_k)[:, 0]], p.down_proj)):
        partial = (left[:, None] * weight[p.selected_experts[:, 0]]).cumsum(-1).abs().amax(-1)
        assert (partial > enough).double().mean() > 0.5, "the partial sums are too small to tell"
    return {"out": out.detach(), **dict(zip(RESULTS, gradients[4:], strict=True))}


Experts = Callable[..., tuple[Tensor, Any]]


def run_experts(experts: Experts, p: ExactProblem, options: Any) -> Tensors:
    """Output and gradients of an experts function on the exact problem, by the names of `ExactProblem.exact`."""
    leaves = [t.detach().clone().requires_grad_() for t in (p.x, p.routing_weights, p.gate_up_proj, p.down_proj)]
    out, _ = experts(leaves[0], leaves[1], p.plan, leaves[2], leaves[3], options)
    gradients = torch.autograd.grad(out, leaves, p.dy)
    return {"out": out.detach(), **dict(zip(RESULTS, gradients, strict=True))}


def unequal(got: Tensors, expected: Tensors) -> list[str]:
    """The names of tensors that differ in a single bit (0 and -0 are the same number)."""
    return [name for name, right in expected.items() if not torch.equal(got[name], right)]


# --- planted bugs -----------------------------------------------------------------------------------------------------
# Each takes an experts function and returns one that is wrong in one way. The rule must reject the first seven, at any
# scale of the data; the last two are below its resolution, and the exact problem must reject them.


def _zero(experts: Experts) -> Experts:
    def wrong(*args: Any) -> tuple[Tensor, Any]:
        out, steps = experts(*args)
        return out * 0, steps

    return wrong


def _one_expert_zero(experts: Experts) -> Experts:
    def wrong(x: Tensor, scores: Tensor, plan: RoutingPlan, up: Tensor, down: Tensor, options: Any) -> Any:
        return experts(x, scores, plan, up, _scaled(down, _busiest(plan), 0), options)

    return wrong


def _last_k_block_dropped(experts: Experts) -> Experts:
    def wrong(x: Tensor, scores: Tensor, plan: RoutingPlan, up: Tensor, down: Tensor, options: Any) -> Any:
        keep = torch.ones_like(up)
        keep[_busiest(plan), :, -16:] = 0
        return experts(x, scores, plan, up * keep, down, options)

    return wrong


def _last_row_by_neighbour(experts: Experts) -> Experts:
    def wrong(x: Tensor, scores: Tensor, plan: RoutingPlan, *rest: Any) -> Any:
        counts = plan.token_counts_by_expert.clone()
        e = _busiest(plan) if _busiest(plan) + 1 < counts.numel() else _busiest(plan) - 1
        counts[e] -= 1
        counts[e + 1] += 1
        return experts(x, scores, replace(plan, token_counts_by_expert=counts), *rest)

    return wrong


def _two_rows_swapped(experts: Experts) -> Experts:
    def wrong(x: Tensor, scores: Tensor, plan: RoutingPlan, *rest: Any) -> Any:
        gather, scatter = plan.gather_indices.clone(), plan.scatter_indices
        gather[[0, -1]] = gather[[-1, 0]]  # read in the wrong order, written back as if in the right one
        return experts(x, scores, replace(plan, gather_indices=gather, scatter_indices=scatter), *rest)

    return wrong


def _scores_reversed(experts: Experts) -> Experts:
    def wrong(x: Tensor, scores: Tensor, *rest: Any) -> Any:
        return experts(x, scores.flip(1), *rest)

    return wrong


def _token_doubled(experts: Experts) -> Experts:
    def wrong(*args: Any) -> tuple[Tensor, Any]:
        out, steps = experts(*args)
        twice = torch.ones_like(out[:, :1])
        twice[out.shape[0] // 2] = 2
        return out * twice, steps

    return wrong


def _bfloat16_sums(experts: Experts) -> Experts:
    def wrong(x: Tensor, scores: Tensor, plan: RoutingPlan, up: Tensor, down: Tensor, options: Any) -> Any:
        h = grouped_gemm(x, up, plan, permute_x=True)
        rows = permute(x, plan).bfloat16()
        expert = torch.repeat_interleave(torch.arange(up.shape[0]), plan.token_counts_by_expert)
        total = torch.zeros(h.shape, dtype=torch.bfloat16)
        for k in range(rows.shape[1]):  # one product after the other, rounded each time
            total = total + rows[:, k, None] * up[expert, :, k].bfloat16()
        a = act_and_mul(h + (total.to(h.dtype) - h).detach(), options.hidden_act)
        return combine(unpermute(grouped_gemm(a, down, plan), plan), scores), None

    return wrong


def _one_element_off(experts: Experts) -> Experts:
    def wrong(*args: Any) -> tuple[Tensor, Any]:
        out, steps = experts(*args)
        factor = torch.ones_like(out)
        at = int(out.detach().abs().flatten().argsort()[out.numel() * 3 // 4])  # not the largest, not a zero
        factor.view(-1)[at] = 1.06
        return out * factor, steps

    return wrong


def _busiest(plan: RoutingPlan) -> int:
    return int(plan.token_counts_by_expert.argmax())


def _scaled(weight: Tensor, expert: int, factor: float) -> Tensor:
    scale = torch.ones(weight.shape[0], 1, 1, dtype=weight.dtype)
    scale[expert] = factor
    return weight * scale


SEVEN_BUGS: dict[str, Callable[[Experts], Experts]] = {
    "output all zero": _zero,
    "one expert zero": _one_expert_zero,
    "last K block of one expert dropped": _last_k_block_dropped,
    "last row of an expert with the neighbour's weights": _last_row_by_neighbour,
    "two rows swapped": _two_rows_swapped,
    "top-k weights reversed": _scores_reversed,
    "a token doubled": _token_doubled,
}
FINE_BUGS: dict[str, Callable[[Experts], Experts]] = {
    "sums in bfloat16": _bfloat16_sums,
    "one element wrong by 6 %": _one_element_off,
}


def held_routing(model: ResolvedModel, weights: Tensors, x: Tensor) -> Tensor:
    """The experts that the block in this dtype chooses: [T,K]."""
    flat = x.reshape(-1, model.hidden_size)
    return route(flat, weights["gate"], model.top_k, model.norm_topk_prob)[2]


def write_checkpoint(folder: Path, model: ResolvedModel, layers: int = 2) -> Tensors:
    """A checkpoint of `layers` sparse layers, one tensor per expert; returns the last layer's weights by our names."""
    stored: Tensors = {}
    weights: Tensors = {}
    for layer in range(layers):
        weights = unit_weights(model, torch.float32, seed=layer)
        prefix = f"model.layers.{layer}.mlp"
        stored[f"{prefix}.gate.weight"] = weights["gate"]
        for e in range(model.num_experts):
            gate, up = (part.contiguous() for part in weights["gate_up_proj"][e].chunk(2))
            parts = {"gate_proj": gate, "up_proj": up, "down_proj": weights["down_proj"][e].contiguous()}
            stored.update({f"{prefix}.experts.{e}.{name}.weight": tensor for name, tensor in parts.items()})
    config = {
        "model_type": "qwen3_moe", "hidden_size": model.hidden_size, "hidden_act": model.hidden_act,
        "moe_intermediate_size": model.moe_intermediate_size, "num_experts": model.num_experts,
        "num_experts_per_tok": model.top_k, "norm_topk_prob": model.norm_topk_prob, "num_hidden_layers": layers,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors")
    return weights
