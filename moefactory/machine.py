"""Whether this machine can run a legal configuration: the second answer, each refusal with its own reason."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .config import Backend, DType, KernelConfig, MoeConfig, resolve_kernels
from .rules import tma_flags

if TYPE_CHECKING:
    import torch

NO_BFLOAT16 = "Triton's interpreter does not compute bfloat16 rightly; choose float32 or float16, or a GPU"


def interpreting() -> bool:
    """Whether Triton kernels are interpreted in this process (``TRITON_INTERPRET=1``, read before triton's import)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}


def why_not_here(config: MoeConfig) -> str | None:
    """Why this machine cannot run `config`, in one line, or None when it can."""
    import torch

    device = "cpu" if config.device is None else config.device
    try:
        place = torch.device(device)
    except RuntimeError:
        return f"device={device!r} is no torch device; allowed: cpu, cuda, cuda:0, ..."
    kind = place.type
    if kind == "cuda" and not torch.cuda.is_available():
        return f"device={device} but torch sees no GPU here"
    there = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and (place.index or 0) >= there:
        return f"device={device} but torch sees {there} GPU{'' if there == 1 else 's'} here"
    if kind not in {"cpu", "cuda", "meta"} and not _known_to_torch(place):
        return f"device={device} but this torch cannot use it here; allowed: cpu, cuda, cuda:0, ..."
    if config.backend.name is Backend.triton:
        return _why_not_triton(config, kind)
    return None


def _known_to_torch(device: torch.device) -> bool:
    """Whether torch makes tensors on another kind of device. If not, it says so in a different way for each."""
    import torch

    try:
        torch.empty(0, device=device)
    except Exception:
        return False
    return True


def _why_not_triton(config: MoeConfig, kind: str) -> str | None:
    if find_spec("triton") is None:
        return "backend triton needs the package triton, which is not installed"
    if interpreting():
        return _why_not_interpreted(config)
    if kind != "cuda":
        return f"backend triton on device={config.device or 'cpu'} needs a GPU, or TRITON_INTERPRET=1 from the start"
    if config.dtype is DType.float64:
        return "backend triton computes float64 only in the interpreter (TRITON_INTERPRET=1)"
    return _why_not_margin(config) or _why_not_tma(config)


def _why_not_margin(config: MoeConfig) -> str | None:
    """At least one multiprocessor is left to the block."""
    import torch

    there = torch.cuda.get_device_properties(config.device).multi_processor_count if config.sm_margin else 1
    if config.sm_margin < there:
        return None
    return f"sm_margin={config.sm_margin} leaves none of this GPU's {there} multiprocessors"


def _why_not_interpreted(config: MoeConfig) -> str | None:
    """Triton's own interpreter truncates casts to bfloat16 and multiplies its bit patterns (3.6 to 3.9).

    It does not know Gluon, in which the warp-specialised kernels are written.
    """
    for key, kernel in _stated(config):
        if kernel.warp_specialize:
            return f"{key}.warp_specialize=true needs a GPU: its kernel is compiled only, Triton does not interpret it"
    if config.dtype is not DType.bfloat16:
        return None
    from .triton.launch import bfloat16_is_rounded

    if bfloat16_is_rounded():
        return None
    return NO_BFLOAT16


def _why_not_tma(config: MoeConfig) -> str | None:
    """TMA came with Hopper (compute capability 9.0), and the specialised kernels use what only Hopper has."""
    import torch

    capability = torch.cuda.get_device_capability(config.device)
    for key, kernel in _stated(config):
        used = [name for name in tma_flags(kernel) if getattr(kernel, name) and capability < (9, 0)]
        used += ["warp_specialize"] if kernel.warp_specialize and capability != (9, 0) else []
        if used:
            needs = f"{key}.{used[0]}=true needs compute capability 9.0"
            return f"{needs}, this GPU has {capability[0]}.{capability[1]}"
    return None


def _stated(config: MoeConfig) -> list[tuple[str, KernelConfig]]:
    """(key, config) of every stated kernel config."""
    configs = resolve_kernels(config.kernels).configs.items()
    return [(f"kernels.{pass_name}.{gemm}", kernel) for (pass_name, gemm), kernel in configs if kernel is not None]
