"""Live blocks, state dicts and random weights: both transformers layouts, whichever transformers is installed.

Three kinds of block go through each test: the installed transformers' own, and two structural fakes, one per layout, so
that both layouts are read on every version. The reference for what a block computes is the float64 loop `expected`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP, Qwen3MoeSparseMoeBlock

from moefactory.config import ConfigError, ResolvedModel, WeightsError
from moefactory.weights import (
    BlockWeights,
    from_hf_state_dict,
    hf_config,
    init_random,
    read_hf_block,
    to_hf_block,
    to_hf_state_dict,
)

MODEL = ResolvedModel(
    hidden_size=12, moe_intermediate_size=5, num_experts=7, top_k=3, norm_topk_prob=True, hidden_act="silu"
)
KINDS = ("installed", "mlps", "stacked")
# transformers takes the softmax in float32 even for float64 weights: a few of its roundings (6e-8) on values of
# unit scale. A wrong row, a swapped half or a lost flag is off by 0.01 and more.
BOUND = {"rtol": 1e-6, "atol": 1e-6}


def config_of(model: ResolvedModel = MODEL) -> Any:
    config = Qwen3MoeConfig(
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.moe_intermediate_size,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=model.norm_topk_prob,
        hidden_act=model.hidden_act,
    )
    config._experts_implementation = "eager"
    return config


class MLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        h, i = config.hidden_size, config.moe_intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(a, b, bias=False) for a, b in ((h, i), (h, i), (i, h))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BlockOfMLPs(nn.Module):
    """The layout of transformers 4: a ModuleList of MLPs, a Linear gate, a pair returned."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(MLP(config) for _ in range(config.num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden_states.flatten(0, -2)
        logits = self.gate(x)
        weights, chosen = logits.softmax(-1).topk(self.top_k)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        every = torch.stack([expert(x) for expert in self.experts], 1)
        rows = every.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))
        return (rows * weights[..., None]).sum(1).view_as(hidden_states), logits


class StackedExperts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        e, h, i = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))


class Router(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))


class StackedBlock(nn.Module):
    """The layout of transformers 5: stacked experts, a router module, a tensor returned."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.experts, self.gate = StackedExperts(config), Router(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)
        weights, chosen = (x @ self.gate.weight.T).softmax(-1).topk(self.gate.top_k)
        if self.gate.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        both = torch.einsum("th,tkfh->tkf", x, self.experts.gate_up_proj[chosen])
        gate, up = both.chunk(2, -1)
        rows = torch.einsum("tki,tkhi->tkh", F.silu(gate) * up, self.experts.down_proj[chosen])
        return (rows * weights[..., None]).sum(1).view_as(hidden_states)


def make_block(kind: str, model: ResolvedModel = MODEL, dtype: torch.dtype = torch.float64) -> Any:
    cls = {"installed": Qwen3MoeSparseMoeBlock, "mlps": BlockOfMLPs, "stacked": StackedBlock}[kind]
    block = cls(config_of(model)).to(dtype)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return block


def stacked(block: Any) -> bool:
    return not isinstance(block.experts, nn.ModuleList)


def expected(weights: BlockWeights, hidden_states: Tensor) -> Tensor:
    """Token by token and expert by expert, in the tensors' own dtype (float64 in these tests)."""
    x = hidden_states.flatten(0, -2)
    half, out = weights.model.moe_intermediate_size, torch.zeros_like(x)
    for t, row in enumerate(x):
        chances = torch.softmax(weights.gate @ row, 0)
        chosen = chances.argsort(descending=True)[: weights.model.top_k].tolist()
        share = sum(chances[e] for e in chosen) if weights.model.norm_topk_prob else 1.0
        for e in chosen:
            gate, up = weights.gate_up_proj[e, :half] @ row, weights.gate_up_proj[e, half:] @ row
            out[t] += chances[e] / share * (weights.down_proj[e] @ (gate * torch.sigmoid(gate) * up))
    return out.view_as(hidden_states)


def computed(block: Any, hidden_states: Tensor) -> Tensor:
    out = block(hidden_states)
    return out[0] if isinstance(out, tuple) else out


def tensors_of(block: nn.Module) -> dict[str, tuple[int, int, bytes]]:
    """Identity, version counter and bytes of each parameter: unchanged means never written to, nor replaced."""
    return {n: (id(p), p._version, p.detach().numpy().tobytes()) for n, p in block.named_parameters()}


# ----------------------------------------------------------------------------------------------------- reading blocks


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_read_weights_compute_what_the_block_computes(kind: str, norm: bool) -> None:
    """Against the float64 loop, to BOUND: catches a swapped gate and up, a wrong expert, a lost flag."""
    block = make_block(kind, _norm(norm))
    before = tensors_of(block)
    weights = read_hf_block(block)
    x = torch.randn(2, 4, MODEL.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(expected(weights, x), computed(block, x), **BOUND)
    assert weights.model == _norm(norm)
    assert tensors_of(block) == before


def _norm(norm: bool) -> ResolvedModel:
    return ResolvedModel(**{**vars(MODEL), "norm_topk_prob": norm})


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts_and_every_gate_are_shared(kind: str) -> None:
    """The same Parameter objects, so an optimizer that holds them goes on training this block."""
    block = make_block(kind)
    weights = read_hf_block(block)
    assert weights.gate is block.gate.weight
    if stacked(block):
        assert weights.gate_up_proj is block.experts.gate_up_proj
        assert weights.down_proj is block.experts.down_proj
    else:
        theirs = {p.untyped_storage().data_ptr() for p in block.experts.parameters()}
        assert weights.gate_up_proj.untyped_storage().data_ptr() not in theirs
        assert isinstance(weights.gate_up_proj, nn.Parameter) and weights.gate_up_proj.is_leaf


@pytest.mark.parametrize("frozen", ["gate", "gate_up", "down"])
@pytest.mark.parametrize("kind", KINDS)
def test_requires_grad_and_dtype_are_kept(kind: str, frozen: str) -> None:
    block = make_block(kind, dtype=torch.bfloat16)
    part_of = {"gate": ("gate.weight",), "gate_up": ("gate_up_proj", "gate_proj", "up_proj"), "down": ("down_proj",)}
    for name, parameter in block.named_parameters():
        parameter.requires_grad = not any(part in name for part in part_of[frozen])
    weights = read_hf_block(block)
    assert [t.requires_grad for t in (weights.gate, weights.gate_up_proj, weights.down_proj)] == [
        frozen != name for name in part_of
    ]
    assert {t.dtype for t in (weights.gate, weights.gate_up_proj, weights.down_proj)} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_block_does_goes_before_what_its_config_says(kind: str) -> None:
    """A block whose top_k was changed after construction routes by the attribute; so must we."""
    block = make_block(kind)
    owner = block if hasattr(block, "top_k") else block.gate
    owner.top_k, owner.norm_topk_prob = 2, False
    weights = read_hf_block(block)
    assert (weights.model.top_k, weights.model.norm_topk_prob) == (2, False)
    x = torch.randn(1, 5, MODEL.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(expected(weights, x), computed(block, x), **BOUND)


def test_qwen3_vl_blocks_renormalise_whatever_their_config_says() -> None:
    """Its router has no norm_topk_prob and always renormalises; transformers 4 stored its experts transposed."""
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

    config = Qwen3VLMoeTextConfig(
        hidden_size=12, moe_intermediate_size=5, num_experts=7, num_experts_per_tok=3, num_attention_heads=2
    )
    config.norm_topk_prob = False
    config._experts_implementation = "eager"
    block = Qwen3VLMoeTextSparseMoeBlock(config).double()
    for parameter in block.parameters():
        parameter.data.normal_(std=0.3)
    block.experts.config = config  # transformers 4 keeps none there
    if tuple(block.experts.gate_up_proj.shape) == (7, 10, 12):
        weights = read_hf_block(block)
        x = torch.randn(1, 6, 12, dtype=torch.float64)
        torch.testing.assert_close(expected(weights, x), computed(block, x), **BOUND)
    else:
        with pytest.raises(WeightsError, match="transposed layout"):
            read_hf_block(block)


# ----------------------------------------------------------------------------------------------------- refused blocks


class Wrapper(nn.Module):
    """What PEFT puts in a module's place: the module below, its attributes still reachable."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["base_layer"], name)


class Quantised(Tensor):
    """A tensor subclass that reports an ordinary dtype, as torchao's and DTensor do."""


def a_weight(block: Any) -> tuple[nn.Module, str]:
    """(owner, attribute) of one of the experts' parameters."""
    return (block.experts, "down_proj") if stacked(block) else (block.experts[1].down_proj, "weight")


def replace_weight(block: Any, change: Callable[[Tensor], Tensor], trained: bool = False) -> None:
    owner, name = a_weight(block)
    setattr(owner, name, nn.Parameter(change(getattr(owner, name).detach()), requires_grad=trained))


def restate(block: Any, **changes: Any) -> None:
    """Give the experts a config that says something else; None takes a key away."""
    keys = (
        "hidden_size",
        "moe_intermediate_size",
        "num_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        "hidden_act",
    )
    config = block.experts.config if stacked(block) else block.experts[0].config
    stated = {key: getattr(config, key) for key in keys} | {"model_type": config.model_type} | changes
    for module in [block.experts] if stacked(block) else block.experts:
        module.config = SimpleNamespace(**{key: value for key, value in stated.items() if value is not None})


def unstate_norm(block: Any) -> None:
    restate(block, norm_topk_prob=None)
    delattr(block if hasattr(block, "norm_topk_prob") else block.gate, "norm_topk_prob")


def expert_bias(block: Any) -> None:
    if stacked(block):
        block.experts.down_proj_bias = nn.Parameter(torch.zeros(7, 12).double())
    else:
        block.experts[3].up_proj.bias = nn.Parameter(torch.zeros(5).double())


def wrap_with_peft(block: Any) -> None:
    if stacked(block):
        block.experts = Wrapper(Wrapper(block.experts))
    else:
        block.experts[2].gate_proj = Wrapper(block.experts[2].gate_proj)


def drop_parameter(block: Any) -> None:
    owner, name = a_weight(block)
    value = getattr(owner, name).detach()
    delattr(owner, name)
    setattr(owner, name, value)


def lose_config(block: Any) -> None:
    for module in [block.experts] if stacked(block) else block.experts:
        module.config = None


def empty(block: Any) -> None:
    block.experts = nn.ModuleList()


def parametrise(block: Any) -> None:
    parametrize.register_parametrization(*a_weight(block), nn.Identity())


BROKEN: dict[str, tuple[Callable[[Any], object], str]] = {
    "no experts": (lambda b: delattr(b, "experts"), "has no experts"),
    "no expert in the list": (empty, "no config"),
    "gate bias": (lambda b: b.gate.register_parameter("bias", nn.Parameter(torch.zeros(7))), "gate.bias'.*biases"),
    "expert bias": (expert_bias, "bias'.*biases are not supported"),
    "scale": (
        lambda b: a_weight(b)[0].register_parameter("weight_scale_inv", nn.Parameter(torch.ones(7))),
        "weight_scale_inv'.*quantised",
    ),
    "float8": (
        lambda b: replace_weight(b, lambda t: t.to(torch.float8_e4m3fn)),
        "dtype torch.float8_e4m3fn.*quantised",
    ),
    "int8": (lambda b: replace_weight(b, lambda t: t.to(torch.int8)), "dtype torch.int8.*quantised"),
    "tensor subclass": (lambda b: replace_weight(b, lambda t: t.as_subclass(Quantised)), "is a Quantised"),
    "sparse": (lambda b: replace_weight(b, lambda t: t.to_sparse()), "torch.sparse_coo.*plain dense"),
    "meta": (lambda b: b.to("meta"), "meta device"),
    "one meta tensor": (lambda b: replace_weight(b, lambda t: t.to("meta")), "meta device"),
    "PEFT": (wrap_with_peft, "wrapped by PEFT .Wrapper.*merge"),
    "LoRA tensors": (
        lambda b: b.experts.register_parameter("lora_A", nn.Parameter(torch.zeros(1))),
        "lora_A'.*PEFT",
    ),
    "parametrised": (parametrise, "parametrizations.*remove the parametrisation"),
    "unregistered": (drop_parameter, "down_proj.* is missing"),
    "is_transposed": (lambda b: setattr(b.experts, "is_transposed", True), "is_transposed=True"),
    "interleaved": (lambda b: setattr(b.experts, "is_concatenated", False), "interleaved.*is_concatenated=False"),
    "has_bias": (lambda b: setattr(b.experts, "has_bias", True), "has_bias=True"),
    "no gate projection": (lambda b: setattr(b.experts, "has_gate", False), "has_gate=False"),
    "post norm": (lambda b: setattr(b.experts, "has_post_expert_norm", True), "has_post_expert_norm=True"),
    "expert parallel": (lambda b: setattr(b.experts, "_is_expert_parallel", True), "expert-parallel"),
    "transposed": (lambda b: replace_weight(b, lambda t: t.mT.contiguous()), "has shape .* the config gives"),
    "hidden_size": (lambda b: restate(b, hidden_size=13), r"has shape \[.*12.*\], the config gives \[.*13"),
    "moe_intermediate_size": (lambda b: restate(b, moe_intermediate_size=6), "has shape .*, the config gives"),
    "more experts": (lambda b: restate(b, num_experts=6), "has shape|not one of the 6 experts"),
    "fewer experts": (lambda b: restate(b, num_experts=8), "has shape|experts.7.gate_proj.weight is missing"),
    "disagreeing config": (lambda b: restate(b, num_local_experts=9), "num_experts=7 and num_local_experts=9 disagree"),
    "shared expert": (lambda b: setattr(b, "shared_expert", nn.Linear(2, 2)), "shared_expert.*not supported"),
    "another router": (
        lambda b: b.gate.register_buffer("e_score_correction_bias", torch.zeros(7)),
        "e_score_correction_bias'.*not Qwen3's softmax",
    ),
    "another family": (lambda b: restate(b, model_type="flint"), "model_type='flint'.*known: qwen3_moe"),
    "unknown buffer": (lambda b: b.register_buffer("odd", torch.zeros(1)), "unexpected tensor 'odd'"),
    "no config": (lose_config, "no config"),
    "no activation": (lambda b: restate(b, hidden_act=None), "hidden_act=None"),
    "norm unstated": (unstate_norm, "norm_topk_prob=None"),
    "top_k": (
        lambda b: setattr(b if hasattr(b, "top_k") else b.gate, "top_k", 8),
        "num_experts_per_tok=8; allowed: 1 to num_experts=7",
    ),
    "mixed dtypes": (lambda b: b.gate.float(), "has dtype torch.float.*; needed: one dtype"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_a_qwen3_block_is_refused(case: str, kind: str) -> None:
    """In one line that names the thing. The same block, unbroken, is read by the tests above."""
    block = make_block(kind)
    breaking, message = BROKEN[case]
    breaking(block)
    with pytest.raises(WeightsError, match=message) as caught:
        read_hf_block(block)
    assert "\n" not in str(caught.value)


def test_experts_that_are_frozen_in_part_cannot_be_stacked() -> None:
    block = make_block("mlps")
    block.experts[4].up_proj.weight.requires_grad = False
    with pytest.raises(WeightsError, match=r"experts\.4\.up_proj\.weight has False; needed: one requires_grad"):
        read_hf_block(block)


def test_a_dense_mlp_and_no_module_at_all_are_refused() -> None:
    for thing in (Qwen3MoeMLP(config_of(), intermediate_size=8), object(), None):
        with pytest.raises(WeightsError, match="has no experts"):
            read_hf_block(thing)


# -------------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("prefix", ["", "model.layers.3.mlp."])
@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_a_state_dict_is_views_and_reads_back(layout: Any, prefix: str) -> None:
    """Bitwise; the names are those of a block in that layout, in both directions."""
    weights = read_hf_block(make_block("stacked"))
    state = to_hf_state_dict(weights, prefix, layout)
    block = make_block("stacked" if layout == "fused" else "mlps")
    assert set(state) == {prefix + name for name in block.state_dict()}
    ours = {t.untyped_storage().data_ptr() for t in (weights.gate, weights.gate_up_proj, weights.down_proj)}
    assert {t.untyped_storage().data_ptr() for t in state.values()} == ours
    assert not any(t.requires_grad for t in state.values())
    back = from_hf_state_dict(
        {**state, "model.layers.4.mlp.gate.weight": torch.ones(1)} if prefix else state, MODEL, prefix
    )
    for name in ("gate", "gate_up_proj", "down_proj"):
        assert torch.equal(getattr(back, name), getattr(weights, name))
    assert (back.gate_up_proj.data_ptr() == weights.gate_up_proj.data_ptr()) is (layout == "fused")


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_loads_into_a_block(kind: str) -> None:
    """With strict=True, in the layout of that block; it then computes the same."""
    weights, block = init_random(MODEL, 3, torch.float64), make_block(kind)
    block.load_state_dict(to_hf_state_dict(weights, layout="fused" if stacked(block) else "per_expert"), strict=True)
    x = torch.randn(3, 2, MODEL.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(computed(block, x), expected(weights, x), **BOUND)


def test_a_per_expert_state_dict_can_be_saved(tmp_path: Any) -> None:
    """safetensors refuses tensors that overlap; ours are disjoint views of one memory."""
    state = to_hf_state_dict(init_random(MODEL, 0), layout="per_expert")
    save_file(state, tmp_path / "block.safetensors")
    saved = load_file(tmp_path / "block.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)


STATE_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing": (lambda s: s.pop("m.experts.2.up_proj.weight"), "experts.2.up_proj.weight is missing"),
    "no gate": (lambda s: s.pop("m.gate.weight"), "gate.weight is missing"),
    "nothing": (lambda s: s.clear(), "gate.weight is missing"),
    "extra": (lambda s: s.update({"m.extra": torch.ones(1)}), "unexpected tensor 'extra'"),
    "extra expert": (lambda s: s.update({"m.experts.7.up_proj.weight": torch.ones(5, 12)}), "not one of the 7 experts"),
    "odd number": (lambda s: s.update({"m.experts.01.up_proj.weight": torch.ones(5, 12)}), "unexpected tensor"),
    "both layouts": (lambda s: s.update({"m.experts.down_proj": torch.ones(7, 12, 5)}), "in the fused layout"),
    "shape": (lambda s: s.update({"m.experts.0.up_proj.weight": torch.ones(5, 11)}), r"\[5, 11\], the config gives"),
    "dtype": (lambda s: s.update({"m.experts.0.up_proj.weight": torch.ones(5, 12).half()}), "needed: one dtype"),
    "not a tensor": (lambda s: s.update({"m.experts.0.up_proj.weight": [1.0]}), "is a list"),
}


@pytest.mark.parametrize("case", STATE_FAULTS)
def test_a_state_dict_with_other_names_or_tensors_is_refused(case: str) -> None:
    state = to_hf_state_dict(init_random(MODEL, 0), "m.", "per_expert")
    assert from_hf_state_dict(state, MODEL, "m.").model == MODEL
    breaking, message = STATE_FAULTS[case]
    breaking(state)
    with pytest.raises(WeightsError, match=message):
        from_hf_state_dict(state, MODEL, "m.")


def test_an_unknown_layout_and_a_prefix_without_its_dot_are_refused() -> None:
    weights = init_random(MODEL, 0)
    with pytest.raises(ConfigError, match="layout='v4'; allowed: fused, per_expert"):
        to_hf_state_dict(weights, layout="v4")  # type: ignore[arg-type]
    for call in (lambda: to_hf_state_dict(weights, "mlp"), lambda: from_hf_state_dict({}, MODEL, "mlp")):
        with pytest.raises(ConfigError, match=r"prefix='mlp'.*ends with"):
            call()


def test_weights_that_contradict_their_model_cannot_be_made() -> None:
    w = init_random(MODEL, 0)
    with pytest.raises(WeightsError, match=r"gate_up_proj' has shape \[7, 12, 5\]"):
        BlockWeights(MODEL, w.gate, w.down_proj, w.gate_up_proj)
    with pytest.raises(WeightsError, match=r"gate\.weight has dtype torch\.float64.*needed: one dtype"):
        BlockWeights(MODEL, w.gate.double(), w.gate_up_proj, w.down_proj)


# ---------------------------------------------------------------------------------------------------- back to a block


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_to_hf_block_gives_the_installed_block_over_the_same_memory(kind: str, training: bool) -> None:
    """It computes the same, keeps the flags, and a step on its memory is a step on ours."""
    weights = read_hf_block(make_block(kind))
    weights.down_proj.requires_grad = False
    source = SimpleNamespace(**vars(weights), training=training)
    block: Any = to_hf_block(source)
    assert type(block) is Qwen3MoeSparseMoeBlock
    assert all(module.training is training for module in block.modules())
    x = torch.randn(2, 3, MODEL.hidden_size, dtype=torch.float64)
    torch.testing.assert_close(computed(block, x), expected(weights, x), **BOUND)
    assert {n for n, p in block.named_parameters() if not p.requires_grad} == {
        n for n, _ in block.named_parameters() if "down_proj" in n
    }
    ours = {t.untyped_storage().data_ptr() for t in (weights.gate, weights.gate_up_proj, weights.down_proj)}
    assert {p.untyped_storage().data_ptr() for p in block.parameters()} == ours
    if stacked(block):
        assert block.experts.gate_up_proj is weights.gate_up_proj
        assert block.experts.config._experts_implementation == "eager"
    assert read_hf_block(block).model == MODEL


def test_to_hf_block_makes_plain_tensors_trainable() -> None:
    weights = init_random(MODEL, 1)
    block = to_hf_block(weights)
    ours = {t.untyped_storage().data_ptr() for t in (weights.gate, weights.gate_up_proj, weights.down_proj)}
    assert {p.untyped_storage().data_ptr() for p in block.parameters()} == ours
    assert block.training and all(p.requires_grad and p.is_leaf for p in block.parameters())
    x = torch.randn(1, 40, MODEL.hidden_size)
    computed(block, x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


def test_to_hf_block_allocates_nothing() -> None:
    """Weights of 12 TB on the meta device: a block that allocated its own first would fail."""
    size = 10**6
    model = ResolvedModel(size, size, 1, 1, True, "silu")
    made = (torch.empty(*shape, device="meta") for shape in ((1, size), (1, 2 * size, size), (1, size, size)))
    assert all(p.is_meta for p in to_hf_block(BlockWeights(model, *made)).parameters())


def test_hf_config_states_the_sizes_and_takes_more() -> None:
    config = hf_config(MODEL, num_hidden_layers=3, mlp_only_layers=[1])
    assert isinstance(config, Qwen3MoeConfig)
    got = [getattr(config, n) for n in ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")]
    assert [*got, config.norm_topk_prob, config.hidden_act] == list(vars(MODEL).values())
    assert (config.num_hidden_layers, config.mlp_only_layers) == (3, [1])


# ------------------------------------------------------------------------------------------------------------- random


def test_random_weights_depend_on_the_seed_alone() -> None:
    """Same bits again, another dtype is that rounded, another seed is other weights, the global generator is left."""
    state = torch.get_rng_state()
    first, again, other = init_random(MODEL, 7), init_random(MODEL, 7), init_random(MODEL, 8)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("gate", "gate_up_proj", "down_proj"):
        tensor = getattr(first, name)
        assert torch.equal(tensor, getattr(again, name))
        assert not torch.equal(tensor, getattr(other, name))
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            assert torch.equal(getattr(init_random(MODEL, 7, dtype), name), tensor.to(dtype))
    assert len({first.gate_up_proj[e].sum().item() for e in range(MODEL.num_experts)}) == MODEL.num_experts


def test_random_weights_do_not_depend_on_torchs_defaults() -> None:
    first, default = init_random(MODEL, 7), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            again = init_random(MODEL, 7)
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(again.gate, first.gate) and torch.equal(again.down_proj, first.down_proj)


def test_random_weights_keep_unit_scale() -> None:
    """The standard deviation is 1/sqrt(fan_in) within 5 % (over 10,000 draws each, so 7 sigma)."""
    model = ResolvedModel(64, 32, 160, 2, True, "silu")
    weights = init_random(model, 0)
    for tensor, fan_in in ((weights.gate, 64), (weights.gate_up_proj, 64), (weights.down_proj, 32)):
        assert tensor.std().item() == pytest.approx(fan_in**-0.5, rel=0.05)
        assert abs(tensor.mean().item()) < 0.05 * fan_in**-0.5
