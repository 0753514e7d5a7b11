"""The one place where a configuration becomes a block."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .block import Qwen3MoeFusedGroupedGEMMBlock, Qwen3MoeGroupedGEMMBlock
from .config import (
    PASSES,
    Backend,
    ConfigError,
    DType,
    MachineError,
    MoeConfig,
    WeightsConfig,
    WeightsSource,
    from_mapping,
    kernel_pair,
    resolve_model,
)
from .machine import why_not_here
from .reference import activation
from .rules import check_rules, make_case
from .weights import BlockWeights, init_random, read_checkpoint_layer, read_hf_block


def build(config: MoeConfig | Mapping[str, Any] | None = None, source: nn.Module | None = None) -> nn.Module:
    """Build the block that a configuration describes.

    Args:
        config: a `MoeConfig`, or the same as plain or Hydra nodes; None is the default: torch, tiny, random weights.
        source: a live Hugging Face block whose weights are shared (or copied, where its layout is not ours).

    Returns:
        A `Qwen3MoeGroupedGEMMBlock`; its forward returns (hidden_states [B,S,H], router_logits [T,E]), or the traced
        result with ``trace``.

    Raises:
        ConfigError: an unknown key or value, a broken rule (by its id), or a legal configuration that this machine
            cannot run.
        WeightsError: weights that cannot be used.
    """
    config = from_mapping({} if config is None else config)
    config = _with_source(config, source)
    check_rules(make_case(config))
    weights = load_weights(config, source)
    dtype = DType(str(weights.gate.dtype).removeprefix("torch."))
    config = replace(config, dtype=dtype, device=str(weights.gate.device))
    check_rules(make_case(config, weights.model, dtype))
    if reason := why_not_here(config):
        raise MachineError(reason)
    block = make_block(config, weights)
    return block if source is None else block.train(source.training)


def from_nodes(source: nn.Module | None = None, /, **nodes: Any) -> nn.Module:
    """The one ``_target_``: `build` of Hydra's nodes, which arrive unconverted and are all checked here.

    A live block goes in by position, ``instantiate(cfg.moe, hf_block)``.
    """
    return build(nodes, source)


def make_block(config: MoeConfig, weights: BlockWeights) -> Qwen3MoeGroupedGEMMBlock:
    """The block of a legal configuration around weights that are there."""
    flags: dict[str, Any] = {"dW_only": config.dW_only, "dX_only": config.dX_only, "trace": config.trace}
    if config.backend.name is Backend.torch:
        return Qwen3MoeGroupedGEMMBlock.from_weights(weights, **flags)
    for name in ("permute_x", "permute_y", "fuse_swiglu", "fuse_combine", "autotune", "saved", "sm_margin"):
        flags[name] = getattr(config, name)
    for name in PASSES:
        flags[f"kernel_config_{name}"] = kernel_pair(getattr(config.kernels, name), PASSES[name], f"kernels.{name}")
    return Qwen3MoeFusedGroupedGEMMBlock.from_weights(weights, **flags)


def _with_source(config: MoeConfig, source: nn.Module | None) -> MoeConfig:
    """The config with its weights' source settled; a live block and a stated source must agree."""
    stated = config.weights.source
    if source is not None and not isinstance(source, nn.Module):
        raise ConfigError(f"source: got {type(source).__name__}; allowed: a Hugging Face sparse MoE block")
    if source is not None and stated not in {None, WeightsSource.live}:
        raise ConfigError(f"weights.source: the config states {stated.name}, and a live block was given; allowed: live")
    if source is None and stated is WeightsSource.live:
        raise ConfigError(
            "weights.source: live, but no block was given; pass it by position, instantiate(cfg.moe, block)"
        )
    settled = WeightsSource.live if source is not None else stated or WeightsSource.random
    weights = WeightsConfig(settled, config.weights.seed, config.weights.path, config.weights.layer)
    return replace(config, weights=weights)


def load_weights(config: MoeConfig, source: nn.Module | None = None) -> BlockWeights:
    """The weights of a configuration whose source is settled; sizes, dtype and device as stated, where stated."""
    dtype = getattr(torch, config.dtype.name) if config.dtype else None
    device = _device(config)
    if config.weights.source is WeightsSource.live:
        assert source is not None
        return _live(config, read_hf_block(source), dtype, device)
    if config.weights.source is WeightsSource.checkpoint:
        assert config.weights.path is not None and config.weights.layer is not None
        path, layer = config.weights.path, config.weights.layer
        weights = read_checkpoint_layer(path, layer, dtype=dtype, device=device or "cpu")
        resolve_model(config.model, weights.model)
        return weights
    model = resolve_model(config.model)
    activation(model.hidden_act)
    dtype = dtype or torch.float32
    _check_memory(model.num_experts * model.hidden_size * 3 * model.moe_intermediate_size * dtype.itemsize, device)
    return init_random(model, config.weights.seed, dtype, device or "cpu")


def _device(config: MoeConfig) -> str | None:
    """The stated device if this machine has it."""
    if config.device is None:
        return None
    if reason := why_not_here(replace(config, backend=type(config.backend)())):
        raise MachineError(reason)
    return config.device


def _live(config: MoeConfig, weights: BlockWeights, dtype: torch.dtype | None, device: str | None) -> BlockWeights:
    """A live block's weights, which the config may not contradict: we share them, we do not convert them."""
    resolve_model(config.model, weights.model)
    if dtype is not None and dtype != weights.gate.dtype:
        raise ConfigError(f"dtype: the config states {dtype}, the live block has {weights.gate.dtype}")
    here = weights.gate.device
    stated = torch.device(device) if device is not None else here
    if stated.type != here.type or (here.type == "cuda" and stated.index not in {None, here.index}):
        raise ConfigError(f"device: the config states {device}, the live block is on {here}")
    return weights


def _check_memory(needed: int, device: str | None) -> None:
    """Refuse random weights that the machine cannot hold before anything is allocated."""
    if device is not None and torch.device(device).type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ConfigError(f"model: its weights take {needed} bytes, this device has {there}; choose smaller sizes")
