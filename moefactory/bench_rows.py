"""What ``moefactory bench`` is asked for and what it gives: settings, rows, and the verdict in place of a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .config import ConfigError, MachineError, WeightsError
from .peers import UnavailableError
from .refusals import one_line, prefixed

SCHEMA = 2  # of the JSON; raise it when the meaning of a field changes
NOT_HERE = str(MachineError(""))  # how the refusal of a legal configuration begins
Lost = tuple[str, str]  # (status, reason) in place of figures


@dataclass(frozen=True)
class BenchRow:
    """One measure of one runner.

    Attributes:
        model: the preset with these sizes, or ``config``.
        tokens: T.
        runs: torch or triton (ours), or a peer.
        measure: forward (no_grad), step (forward and backward), or graph (replay of a captured forward).
        status: ok, refused (an illegal configuration, or this machine cannot run it), skipped (a peer that is not
            there), out of memory, or error; `reason` says more.
        p20_ms, p50_ms, p80_ms: quantiles over the calls, the median of `measure.ROUNDS` rounds.
        dense_ms: the dense products of this measure, in the same run; share: theirs over p50.
        tflops: 10^12 operations a second at p50, those of the dense products.
        held_mib, peak_mib: of a step on a GPU, beyond weights and inputs.
        load: rows of the busiest expert over the mean.
        kernels: tuned, shipped, stated or mixed, for backend triton.
        flags: permute, fuse and gradient flags that are on, for ours.
    """

    model: str
    tokens: int
    runs: str
    measure: str
    status: str = "ok"
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    dense_ms: float | None = None
    share: float | None = None
    tflops: float | None = None
    held_mib: float | None = None
    peak_mib: float | None = None
    load: float | None = None
    kernels: str = ""
    flags: str = ""
    dtype: str = ""
    device: str = ""
    routing: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """What to measure. None of models and backends is the configuration's own; of peers, what the device has."""

    tokens: Sequence[int] = (64, 256)
    models: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    peers: Sequence[str] | None = None
    graph: bool = False
    routing: str = "random"
    seed: int = 0
    ms: int = 100


@dataclass(frozen=True)
class BenchReport:
    """The rows, and where they come from; those that were there when Ctrl-C came, if it did.

    `config` is that of our blocks as they ran, sizes and dtype filled in, and None where they differ: there each row
    names its model and backend. Where no block could be made it is the one that was asked for.
    """

    settings: Settings
    config: dict[str, Any]
    provenance: dict[str, Any]
    rows: tuple[BenchRow, ...]
    notes: tuple[str, ...] = ()
    interrupted: bool = False

    @property
    def lost(self) -> list[BenchRow]:
        """The rows without figures, but for peers that are not there."""
        return [row for row in self.rows if row.status not in {"ok", "skipped"}]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        status = "incomplete" if self.lost or self.interrupted else "ok"
        return {"schema": SCHEMA, "status": status, **json.loads(json.dumps(asdict(self)))}


def verdict(error: Exception) -> tuple[str, str]:
    """(status, reason in one line) of what was raised in place of a figure."""
    text = one_line(error, 200)
    if isinstance(error, UnavailableError):
        return "skipped", text
    if isinstance(error, ConfigError | WeightsError):
        return "refused", text if isinstance(error, MachineError) else prefixed(text)
    memory = any(words in text.lower() for words in ("out of memory", "can't allocate memory"))
    if memory or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory", text
    return "error", f"{type(error).__name__}: {text}"
