"""Facts for the verbs that compute nothing: what a configuration means, what a block holds, what a machine can do."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ._version import __version__
from .config import (
    Backend,
    BackendConfig,
    ConfigError,
    DType,
    MachineError,
    ModelConfig,
    MoeConfig,
    ResolvedModel,
    WeightsSource,
    as_dict,
    resolve_model,
)
from .rules import broken_rules, make_case

PACKAGES = ("torch", "triton", "transformers", "hydra-core", "omegaconf", "safetensors", "numpy", "rich")


def describe_config(config: MoeConfig, tokens: int) -> dict[str, Any]:
    """The resolved config, whether it is legal, whether it runs here, and what would run.

    Raises:
        WeightsError: a checkpoint whose sizes cannot be read.
    """
    broken = [{"id": rule.id, "found": found, "repair": rule.repair} for rule, found in broken_rules(make_case(config))]
    facts: dict[str, Any] = {
        "config": as_dict(config), "legal": not broken, "broken_rules": broken, "model": None, "sizes_from": None,
        "runs_here": None, "reason": None, "would_run": None,
    }  # fmt: skip
    if broken:
        return facts
    from .machine import why_not_here

    model, origin = _sizes(config)
    _check_sizes(model)
    broken = [{"id": r.id, "found": f, "repair": r.repair} for r, f in broken_rules(make_case(config, model))]
    facts |= {"model": asdict(model), "sizes_from": origin, "legal": not broken, "broken_rules": broken}
    if not broken:
        reason = why_not_here(config)
        facts |= {"runs_here": reason is None, "reason": reason}
        facts["would_run"] = None if reason else explain_unbuilt(config, model, tokens)
    return facts


def _check_sizes(model: ResolvedModel) -> None:
    """ConfigError for weights of more bytes than an address has numbers: torch would say so in other words."""
    needed = 3 * model.num_experts * model.hidden_size * model.moe_intermediate_size * 8  # as float64, the widest
    if needed > sys.maxsize:
        raise ConfigError(f"model: its weights take {needed} bytes as float64; choose smaller sizes")


def _sizes(config: MoeConfig) -> tuple[ResolvedModel, str]:
    """The block's sizes without its weights, and who states them."""
    weights = config.weights
    if weights.source is WeightsSource.checkpoint:
        from .weights.checkpoint import _folder, _read_config, resolve_sizes
        from .weights.layout import CONFIG_KEYS

        assert weights.path is not None
        folder = _folder(weights.path)
        where = str(folder / "config.json")
        stated = _read_config(folder, where)
        brought = resolve_sizes({key: stated[key] for key in CONFIG_KEYS if key in stated}, where)
        return resolve_model(config.model, brought), where
    if weights.source is WeightsSource.live:
        return resolve_model(config.model), "the config; what it leaves open the live block brings (here: tiny)"
    return resolve_model(config.model), "the config" if config.model != ModelConfig() else "the preset tiny"


def explain_unbuilt(config: MoeConfig, model: ResolvedModel, tokens: int) -> str:
    """What the block would launch, without any of its weights in memory."""
    import torch

    from .factory import make_block
    from .weights import BlockWeights

    e, h, i = model.num_experts, model.hidden_size, model.moe_intermediate_size
    dtype, device = getattr(torch, (config.dtype or DType.float32).name), torch.device(config.device or "cpu")
    with _without_memory(device) as place:
        shapes = ((e, h), (e, 2 * i, h), (e, h, i))
        tensors = (torch.empty(shape, dtype=dtype, device=place) for shape in shapes)
        return str(make_block(config, BlockWeights(model, *tensors)).explain(tokens))


@contextmanager
def _without_memory(device: Any) -> Iterator[Any]:
    """Where to make tensors that hold nothing: on a GPU they must name it, as tuned configs are kept by GPU."""
    if device.type == "cpu":
        yield "meta"
        return
    from torch._subclasses.fake_tensor import FakeTensorMode  # two seconds to import

    with FakeTensorMode():
        yield device


def describe_block(block: Any, tokens: int) -> dict[str, Any]:
    """Class, sizes, parameters with their bytes, and what runs for this many tokens."""
    parameters = [
        {
            "name": name, "shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch."), "device": str(p.device),
            "trainable": p.requires_grad, "elements": p.numel(), "bytes": p.numel() * p.element_size(),
        }
        for name, p in block.named_parameters()
    ]  # fmt: skip
    return {
        "block": type(block).__name__,
        "model": asdict(block.model),
        "parameters": parameters,
        "elements": sum(p["elements"] for p in parameters),
        "bytes": sum(p["bytes"] for p in parameters),
        "runs": str(block.explain(tokens)),
    }


def describe_machine() -> dict[str, Any]:
    """Versions, GPUs, the cache folders, and which backends run here on which device in which dtype."""
    from .numerics.demo import cache_folder
    from .triton.cache import root, why_not_writable

    try:
        cache = cache_folder()
        cached: dict[str, Any] = {"path": str(cache), "writable": why_not_writable(cache) is None}
    except RuntimeError as error:  # no home
        cached = {"path": None, "writable": False, "reason": str(error)}
    tuned = root()
    return {
        "moefactory": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "gpus": _gpus(),
        "environment": {"TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "")},
        "cache": cached,
        "tuning_cache": {
            "path": tuned and str(tuned),
            "writable": tuned is not None and why_not_writable(tuned) is None,
        },
        "runs": _what_runs(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for n in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(n)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        capability = f"{p.major}.{p.minor}"
        found.append({"name": p.name, "capability": capability, "memory": memory, "cuda": torch.version.cuda})
    return found


def _what_runs() -> list[dict[str, Any]]:
    """For each backend, device and dtype: whether it runs here, and why not."""
    from .machine import why_not_here

    found = []
    for backend in Backend:
        for device in ("cpu", "cuda"):
            reasons: dict[str | None, list[str]] = {}
            for dtype in DType:
                config = replace(MoeConfig(), backend=BackendConfig(backend), device=device, dtype=dtype)
                reasons.setdefault(why_not_here(config), []).append(dtype.name)
            for reason, dtypes in reasons.items():
                found.append({
                    "backend": backend.name, "device": device, "dtypes": dtypes, "runs": reason is None,
                    "reason": reason,
                })  # fmt: skip
    return found


def require_here(config: MoeConfig, numbers: bool = True) -> None:
    """Raise what keeps a configuration from running: ConfigError for no such device, MachineError for none here.

    `numbers`: it is to compute some, which the meta device cannot.
    """
    import torch

    from .machine import why_not_here

    try:
        kind = torch.device("cpu" if config.device is None else config.device).type
    except RuntimeError:
        came = f"moe.device: got {config.device!r}, which is no torch device"
        raise ConfigError(f"{came}; allowed: cpu, cuda, cuda:0, ...") from None
    if numbers and kind == "meta":
        raise MachineError(f"device={config.device} holds no numbers; allowed: cpu, cuda, cuda:0, ...")
    if reason := why_not_here(config):
        raise MachineError(reason)
