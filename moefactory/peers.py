"""Hugging Face's block around the weights that we measure: eager, with grouped_mm, and that compiled."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import nn

from .weights import BlockWeights, to_hf_block


class UnavailableError(RuntimeError):
    """A peer that the installed transformers or torch does not have."""


def hf_eager(weights: BlockWeights) -> nn.Module:
    """Hugging Face's block: a loop over the experts."""
    return to_hf_block(weights)


def hf_grouped_mm(weights: BlockWeights) -> nn.Module:
    """Hugging Face's block with ``experts_implementation="grouped_mm"``: torch's own grouped GEMM."""
    block = to_hf_block(weights)
    config: Any = getattr(block.experts, "config", None)
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as KNOWN
    except ImportError:
        KNOWN = {}
    if "grouped_mm" not in KNOWN or not hasattr(config, "_experts_implementation"):
        raise UnavailableError(f"transformers {version('transformers')} has no experts implementation grouped_mm")
    config._experts_implementation = "grouped_mm"
    return block


def hf_grouped_mm_compiled(weights: BlockWeights) -> nn.Module:
    """The same under ``torch.compile``, for these sizes alone."""
    block = hf_grouped_mm(weights)
    torch.compiler.reset()  # or the next token count would be compiled for any number of tokens
    compiled: Any = torch.compile(block, dynamic=False)
    return cast(nn.Module, compiled)


PEERS: dict[str, Callable[[BlockWeights], nn.Module]] = {
    "hf_eager": hf_eager,
    "hf_grouped_mm": hf_grouped_mm,
    "hf_grouped_mm_compiled": hf_grouped_mm_compiled,
}


def default_peers(device: torch.device) -> tuple[str, ...]:
    """All of them on a GPU; on a CPU, where compiling takes longer than all the rest, the eager one."""
    return tuple(PEERS) if device.type == "cuda" else ("hf_eager",)
