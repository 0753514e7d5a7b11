"""Live Hugging Face blocks in and out, by what a block holds, never by the version of transformers.

transformers 4 keeps a `ModuleList` of MLPs and a `Linear` gate; transformers 5 keeps stacked experts and a router
module. Both have ``experts`` and ``gate.weight``; what sets them apart is which tensors are under ``experts``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import ResolvedModel, WeightsError
from .layout import CONFIG_KEYS, BlockWeights, assemble, resolve_sizes
from .state_dict import to_hf_state_dict

# Flags of transformers' stacked experts -> the value that we understand, and what the other one means.
_FLAGS = {
    "is_transposed": (False, "its experts are stored transposed, [E, in, out]"),
    "is_concatenated": (True, "its gate and up rows are interleaved"),
    "has_bias": (False, "its experts have biases"),
    "has_gate": (True, "its experts have no gate projection"),
    "has_post_expert_norm": (False, "its experts end with a norm"),
    "_is_expert_parallel": (False, "it holds one rank's share of expert-parallel weights"),
}


def read_hf_block(moe_block: nn.Module) -> BlockWeights:
    """The weights of a live sparse MoE block of transformers 4 or 5.

    Stacked experts (5) are shared: the very same Parameters, no copy. Per-expert MLPs (4) are stacked into new
    Parameters with the same values and requires_grad; the gate is shared in both. The block is never written to.
    Routing is what the block does: its own or its gate's top_k and norm_topk_prob go before its config's.

    Raises:
        WeightsError: not a sparse block of Qwen3's kind (dense, shared expert, biases, another router), or one whose
            tensors are quantised, sharded, adapted, transposed, on the meta device, or not of its config's shapes.
    """
    where = type(moe_block).__name__
    experts = getattr(moe_block, "experts", None)
    if not isinstance(moe_block, nn.Module) or not isinstance(experts, nn.Module):
        raise WeightsError(f"{where} has no experts (a dense MLP?); needed: a sparse MoE block of transformers")
    for name, module in moe_block.named_modules():
        if hasattr(module, "base_layer"):
            what = f"{where}: {name or 'the block'} is wrapped by PEFT ({type(module).__name__})"
            raise WeightsError(f"{what}: reading past it would lose the adapter; merge it first (merge_and_unload)")
    for flag, (understood, otherwise) in _FLAGS.items():
        if bool(getattr(experts, flag, understood)) is not understood:
            raise WeightsError(f"{where}: {otherwise} ({flag}={getattr(experts, flag)}), which is not supported")
    named: dict[str, torch.Tensor] = dict(moe_block.named_buffers(remove_duplicate=False))
    named.update(moe_block.named_parameters(remove_duplicate=False))
    return assemble(named, resolve_sizes(_stated(moe_block, experts, where), where), where)


def _stated(moe_block: nn.Module, experts: nn.Module, where: str) -> dict[str, Any]:
    """What the block and its config state, under the config's names."""
    first = experts[0] if isinstance(experts, nn.ModuleList) and len(experts) else experts
    configs = (getattr(module, "config", None) for module in (first, moe_block))
    config = next((c for c in configs if c is not None), None)
    if config is None:
        raise WeightsError(f"{where}: no config on its experts or on itself; needed: one with hidden_act and the sizes")
    stated = {key: value for key in CONFIG_KEYS if (value := getattr(config, key, None)) is not None}
    gate = getattr(moe_block, "gate", None)
    for attribute, key in (("top_k", "num_experts_per_tok"), ("norm_topk_prob", "norm_topk_prob")):
        for module in (moe_block, gate):
            if hasattr(module, attribute):
                stated[key] = getattr(module, attribute)
    return stated


def hf_config(model: ResolvedModel, **extra: Any) -> Any:
    """A transformers `Qwen3MoeConfig` with these sizes; `extra` are more of its fields, such as num_hidden_layers."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        hidden_size=model.hidden_size,
        moe_intermediate_size=model.moe_intermediate_size,
        num_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        norm_topk_prob=model.norm_topk_prob,
        hidden_act=model.hidden_act,
        **extra,
    )


def to_hf_block(block_or_weights: Any) -> nn.Module:
    """The installed transformers' `Qwen3MoeSparseMoeBlock` over the same memory, computing its experts eagerly.

    Stacked experts (5) get the very same Parameters. Per-expert MLPs (4) get Parameters that are views: one memory,
    gradients of their own. A Parameter keeps its requires_grad, a plain tensor becomes trainable, a block's training
    flag is kept.

    Args:
        block_or_weights: `BlockWeights`, or a block with model, gate, gate_up_proj and down_proj.
    """
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = hf_config(block_or_weights.model)
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"
    with torch.device("meta"):  # the shell alone: no memory, no random initialisation
        shell = Qwen3MoeSparseMoeBlock(config)
    fused = {name: getattr(block_or_weights, name) for name in ("gate", "gate_up_proj", "down_proj")}
    stacked = not isinstance(shell.experts, nn.ModuleList)
    for name, view in to_hf_state_dict(block_or_weights, layout="fused" if stacked else "per_expert").items():
        owner, _, attribute = name.rpartition(".")
        source = fused["gate" if name == "gate.weight" else "down_proj" if "down_proj" in name else "gate_up_proj"]
        module = shell.get_submodule(owner)
        if attribute not in module._parameters:
            raise WeightsError(f"the installed transformers' {type(shell).__name__} has no parameter {name}")
        shared = isinstance(source, nn.Parameter) and source.shape == view.shape
        trained = source.requires_grad or not isinstance(source, nn.Parameter)
        setattr(module, attribute, source if shared else nn.Parameter(view, requires_grad=trained))
    return shell.train(getattr(block_or_weights, "training", True))
