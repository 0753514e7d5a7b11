"""Whether this machine can run a legal configuration: the second answer, each refusal with its own reason."""

from __future__ import annotations

import os

from .config import Backend, MoeConfig


def interpreting() -> bool:
    """Whether Triton kernels are interpreted in this process (``TRITON_INTERPRET=1``, read before triton's import)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}


def why_not_here(config: MoeConfig) -> str | None:
    """Why this machine cannot run `config`, in one line, or None when it can."""
    import torch

    device = config.device or "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        return f"device={device!r} is no torch device; allowed: cpu, cuda, cuda:0, ..."
    if kind == "cuda" and not torch.cuda.is_available():
        return f"device={device} but torch sees no GPU here"
    if config.backend.name is Backend.triton:
        return _why_not_triton(config, kind)
    return None


def _why_not_triton(config: MoeConfig, kind: str) -> str | None:
    return "backend triton is not built yet"
