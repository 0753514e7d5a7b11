"""State dicts with Hugging Face names, in and out, in both layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..config import ConfigError, ResolvedModel
from .layout import FUSED, BlockWeights, Layout, assemble, show


def _check_prefix(prefix: str) -> None:
    """ConfigError unless the prefix is empty or ends with a dot, as in torch's ``state_dict(prefix=)``."""
    if prefix and not prefix.endswith("."):
        raise ConfigError(f"prefix={show(prefix)}; allowed: '' or a prefix that ends with '.'")


def to_hf_state_dict(weights_or_block: Any, prefix: str = "", layout: Layout = "fused") -> dict[str, Tensor]:
    """Hugging Face names of a block's weights, as detached views that share its memory.

    Args:
        weights_or_block: `BlockWeights`, or a block with the parameters gate, gate_up_proj and down_proj.
        prefix: put before each name, such as ``model.layers.3.mlp.``.
        layout: ``fused`` (transformers 5 in memory) or ``per_expert`` (transformers 4, and files on the hub).

    Raises:
        ConfigError: an unknown layout, or a prefix without its dot.
    """
    _check_prefix(prefix)
    if layout not in {"fused", "per_expert"}:
        raise ConfigError(f"layout={show(layout)}; allowed: fused, per_expert")
    gate, gate_up, down = (getattr(weights_or_block, n).detach() for n in ("gate", "gate_up_proj", "down_proj"))
    named = {"gate.weight": gate}
    if layout == "fused":
        named |= dict(zip(FUSED, (gate_up, down), strict=True))
    else:
        half = gate_up.shape[1] // 2
        for e in range(gate_up.shape[0]):
            named[f"experts.{e}.gate_proj.weight"] = gate_up[e, :half]
            named[f"experts.{e}.up_proj.weight"] = gate_up[e, half:]
            named[f"experts.{e}.down_proj.weight"] = down[e]
    return {prefix + name: tensor for name, tensor in named.items()}


def from_hf_state_dict(state: Mapping[str, Tensor], model: ResolvedModel, prefix: str = "") -> BlockWeights:
    """The weights under `prefix` in a state dict of either layout; fused tensors are shared, per-expert ones copied.

    Raises:
        ConfigError: a prefix without its dot.
        WeightsError: a missing or unexpected name under the prefix, or a tensor that does not fit `model`.
    """
    _check_prefix(prefix)
    own = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return assemble(own, model, f"state dict at {show(prefix)}")
