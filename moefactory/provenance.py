"""Where a figure comes from: versions, the commit, the GPU and its clocks. Nothing here raises."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ._version import __version__
from .describe import PACKAGES, _version

_SOURCE = Path(__file__).resolve().parent.parent
_CLOCKS = {
    "sm_mhz": "clocks.sm", "sm_max_mhz": "clocks.max.sm", "memory_mhz": "clocks.mem", "power_w": "power.draw",
    "celsius": "temperature.gpu",
}  # fmt: skip


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, commit, machine and GPU as plain values; None for what cannot be known."""
    on_gpu = device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "moefactory": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",  # no release of a kernel: results are committed
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "gpu": torch.cuda.get_device_name(device) if on_gpu else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "clocks": clocks(device) if on_gpu else None,
    }


def commit(source: Path = _SOURCE) -> str | None:
    """The commit of this installation: $MOEFACTORY_COMMIT, else git's where the package runs from its own source tree.

    A package in the site-packages of somebody's repository is not that repository's commit.
    """
    if stated := os.environ.get("MOEFACTORY_COMMIT"):
        return stated
    top = _said(["git", "-C", str(source), "rev-parse", "--show-toplevel"])
    if not top or Path(top).resolve() != source:
        return None
    return _said(["git", "-C", str(source), "describe", "--always", "--dirty", "--exclude", "*"])


def clocks(device: torch.device) -> dict[str, float | None] | None:
    """Clocks in MHz, watts and degrees of a GPU, as nvidia-smi says at this moment; None without nvidia-smi."""
    index = torch.cuda.current_device() if device.index is None else device.index
    # By its uuid: nvidia-smi counts all GPUs, torch those that CUDA_VISIBLE_DEVICES leaves.
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = str(index) if uuid is None else f"GPU-{uuid}"
    query = f"--query-gpu={','.join(_CLOCKS.values())}"
    said = _said(["nvidia-smi", "-i", which, query, "--format=csv,noheader,nounits"])
    values = said.splitlines()[0].split(",") if said else []
    return dict(zip(_CLOCKS, map(_number, values), strict=True)) if len(values) == len(_CLOCKS) else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]"
        return None


def _said(command: Sequence[str]) -> str | None:
    """What a program prints, or None: it is missing, failed, hung, or said nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
