"""The tuned config of a launch, if the cache has one: a dictionary access from a launch's second time on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..config import KernelConfig
from . import cache, choice
from .choice import Launch, _capability
from .search_space import candidates


@dataclass(frozen=True)
class Result:
    """What a search kept for a launch: the winner, its milliseconds and the shipped choice's (None: struck out)."""

    winner: KernelConfig
    ms: float
    shipped_ms: float | None


_memo: dict[tuple[Launch, torch.device], KernelConfig | None] = {}
_UNKNOWN: Any = object()


def tuned(launch: Launch, device: torch.device) -> KernelConfig | None:
    """The config that a search found for this launch on this device. The disk is asked once, whatever it answers."""
    found = _memo.get((launch, device), _UNKNOWN)
    if found is _UNKNOWN:
        result = known(launch, device)
        found = _memo[launch, device] = result.winner if result else None
    return found


def known(launch: Launch, device: torch.device) -> Result | None:
    """What the cache has for this launch: a winner that is one of this run's candidates, or nothing."""
    if not cache.anything():
        return None
    choices = candidates(launch, _capability(device))

    def read(value: Any) -> Result:
        if not isinstance(value, dict) or set(value) != {"winner", "ms", "shipped_ms"}:
            raise ValueError("value: needed: an object with winner, ms and shipped_ms")
        text = cache.canonical(value["winner"])
        config = next((c for c in choices if cache.canonical(asdict(c)) == text), None)
        if config is None:
            raise ValueError(f"value.winner: got {text[:80]}; needed: a candidate of this run")
        shipped_ms = None if value["shipped_ms"] is None else cache.milliseconds(value["shipped_ms"])
        return Result(config, cache.milliseconds(value["ms"]), shipped_ms)

    return cache.load(cache.environment(device), key_of(launch, choices), read)


def keep(launch: Launch, device: torch.device, result: Result) -> None:
    """Write a search's result to the cache; from now on steps use it."""
    key = key_of(launch, candidates(launch, _capability(device)))
    cache.store(cache.environment(device), key, asdict(result))
    _memo.clear()
    choice.forget()


def key_of(launch: Launch, choices: Sequence[KernelConfig]) -> dict[str, Any]:
    """What a result depends on besides the environment: the launch, and the list that it was chosen from."""
    own = {f.name: getattr(launch, f.name) for f in fields(launch) if f.name != "options"}
    flags = {f.name: getattr(launch.options, f.name) for f in fields(launch.options) if f.init}
    del flags["kernels"], flags["autotune"]  # stated configs are not looked up, nor is anything without autotune
    listed = cache.digest([asdict(config) for config in choices])
    return {**own, "dtype": launch.dtype.value, **flags, "candidates": listed}


def forget() -> None:
    """Drop everything that this process remembers of searches; files stay."""
    _memo.clear()
    choice.forget()
    cache.forget()
