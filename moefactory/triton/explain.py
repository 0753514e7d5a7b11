"""What a block would launch, in words: read before a run, asserted in tests."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from ..config import GEMMS, PASSES, DType, KernelConfig
from . import decode
from .choice import Launch, bucket, choose
from .few_tokens import few

if TYPE_CHECKING:
    from ..block import Qwen3MoeFusedGroupedGEMMBlock


def _computed(block: Qwen3MoeFusedGroupedGEMMBlock) -> torch.dtype:
    """The dtype of a step now: autocast's, or the weights'."""
    kind, stored = block.gate.device.type, block.gate.dtype
    if kind == "meta":  # `show` has weights without memory; torch knows of no autocast there
        return stored
    lowered = torch.is_autocast_enabled(kind) and stored != torch.float64
    return torch.get_autocast_dtype(kind) if lowered else stored


def launches(block: Qwen3MoeFusedGroupedGEMMBlock, num_tokens: int) -> list[Launch]:
    """The six grouped GEMMs of a step with this many tokens, in the dtype that a step would have now (autocast)."""
    computed, stored = _computed(block), block.gate.dtype
    dtype = DType(str(computed).removeprefix("torch."))
    found = []
    for pass_name in PASSES:
        for gemm in GEMMS:
            weight = block.gate_up_proj if gemm == "up" else block.down_proj
            experts, n, k = weight.shape
            rows = bucket(num_tokens * block.model.top_k, experts)
            aligned = computed != stored or weight.data_ptr() % 16 == 0  # a cast weight is a fresh tensor
            found.append(Launch(pass_name, gemm, experts, n, k, rows, dtype, block.fused, aligned))
    return found


def explain(block: Qwen3MoeFusedGroupedGEMMBlock, num_tokens: int) -> str:
    """A line on the rows, then one a grouped GEMM: pass, GEMM, what is fused, its config and where that is from."""
    model = block.model
    rows = num_tokens * model.top_k
    front = "; router, plan and tile table in one launch" if few(num_tokens, model.num_experts) else ""
    margin = block.fused.sm_margin
    front += f"; GEMMs leave {margin} of the GPU's multiprocessors to others" if margin else ""
    lines = [f"backend triton: {rows} rows, {rows / model.num_experts:.4g} per expert{front}"]
    x = torch.empty(num_tokens, model.hidden_size, dtype=_computed(block), device="meta")
    if not block.trace and decode.suits(x, model.num_experts, model.top_k, block.fused):
        lines.append("without gradients: decode_gate and decode_experts, two launches, in place of all below")
    for launch in launches(block, num_tokens):
        config, origin = choose(launch, block.gate.device)
        values = " ".join(f"{k}={v}" for k, v in asdict(config).items() if v is not False)
        lines.append(f"{launch.pass_name} {launch.gemm}: {_fused(launch, config)}; {values} ({origin})")
    return "\n".join(lines)


def _fused(launch: Launch, config: KernelConfig) -> str:
    """What happens inside the GEMM besides the product, and whether a warp-specialised kernel does it."""
    o = launch.options
    how = "from a gathered copy of" if getattr(config, "gather_first", False) else "gathers"
    parts = {
        ("fwd", "up"): [o.permute_x and "gathers x", o.fuse_swiglu and "SwiGLU in the epilogue"],
        ("fwd", "down"): [o.permute_y and "scatters y to token order"],
        ("bwd_dX", "up"): [o.permute_x and "scatters dx to token order"],
        ("bwd_dX", "down"): [o.permute_y and "gathers dy", o.fuse_swiglu and "dSwiGLU in the epilogue"],
        ("bwd_dW", "up"): [o.permute_x and f"{how} x"],
        ("bwd_dW", "down"): [o.permute_y and f"{how} dy"],
    }[launch.pass_name, launch.gemm]
    words = ", ".join(p for p in parts if p) or "the product alone"
    return f"{words}, warp-specialised" if config.warp_specialize else words
