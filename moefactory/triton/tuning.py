"""Searching the fastest right kernel config of each launch (`tune`), and finding it again at a step (`tuned`).

Nothing here runs inside a step but the lookup, which is a dictionary access from the second step on. A search judges
every candidate by `probe` before it is timed; what is wrong or cannot run is struck out with its reason. The result of a
launch is written as soon as that launch is done: an interrupted search goes on where it was.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..config import PASSES, ConfigError, DType, KernelConfig
from ..routing import make_plan
from . import cache
from .choice import Launch, _capability
from .explain import launches
from .probe import Problem, complaint, integer_problem, runner, shapes, truth
from .search_space import candidates

if TYPE_CHECKING:
    from ..block import Qwen3MoeFusedGroupedGEMMBlock

FINALISTS = 4  # timed once more, one after the other: a GPU's clock drifts by some percent during a search
TIE = 1.01  # of configs this close to the fastest, the one nearest to the shipped choice wins

Run = Callable[[], Any]
Timer = Callable[[Run], float]
_memo: dict[tuple[Launch, torch.device], KernelConfig | None] = {}


@dataclass(frozen=True)
class TuneRow:
    """One candidate of one launch.

    Attributes:
        launch, config: what was tried for what.
        status: ``ok``, ``wrong`` (another result than torch's), ``failed`` (did not compile or run), or ``cached``
            (the winner of an earlier search; nothing was run).
        ms: milliseconds of the launch with what belongs to it (a permuted copy, the sum over K), else None.
        reason: why it was struck out.
        shipped, winner: whether it is the shipped choice, and whether steps now use it.
    """

    launch: Launch
    config: KernelConfig
    status: str
    ms: float | None = None
    reason: str = ""
    shipped: bool = False
    winner: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        one = self.launch
        place = {"pass": one.pass_name, "gemm": one.gemm, "rows_per_expert": one.rows_per_expert}
        rest = {name: getattr(self, name) for name in ("status", "ms", "reason", "shipped", "winner")}
        return {**place, "config": asdict(self.config), **rest}


@dataclass(frozen=True)
class TuneProgress:
    """After each candidate: `done` of `total`, and the row that it gave. A cached launch counts as done at once."""

    done: int
    total: int
    row: TuneRow


@dataclass(frozen=True)
class TuneReport:
    """What a search found, in the order in which it ran."""

    device: str
    num_tokens: int
    rows: tuple[TuneRow, ...]

    @property
    def winners(self) -> list[TuneRow]:
        """The row of each launch that has a result."""
        return [row for row in self.rows if row.winner]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return {**vars(self), "rows": [row.as_dict() for row in self.rows]}

    def __str__(self) -> str:
        lines = [f"tuned for {self.num_tokens} tokens on {self.device}"]
        for row in self.winners:
            values = " ".join(f"{k}={v}" for k, v in asdict(row.config).items() if v is not False)
            tried = [other for other in self.rows if other.launch == row.launch]
            lost = sum(other.status in {"wrong", "failed"} for other in tried)
            shipped = next((other.ms for other in tried if other.shipped and other.ms), None)
            gain = f", {shipped / row.ms:.2f}x the shipped choice's speed" if shipped and row.ms else ""
            count = "from the cache" if row.status == "cached" else f"{len(tried)} tried, {lost} struck out"
            lines.append(f"{_name(row.launch)}: {row.ms:.4g} ms{gain}; {count}; {values}")
        return "\n".join(lines)


def tune(
    block: Qwen3MoeFusedGroupedGEMMBlock,
    num_tokens: int,
    *,
    passes: Sequence[str] = tuple(PASSES),
    progress: Callable[[TuneProgress], None] | None = None,
    timer: Timer | None = None,
    redo: bool = False,
) -> TuneReport:
    """Search the kernel configs of a step with `num_tokens` tokens and keep them in the cache.

    Args:
        block: its weights are read, never written; under autocast its launches have autocast's dtype.
        num_tokens: T. The results hold for every T of the same power-of-two bucket of rows per expert.
        passes: fwd, bwd_dX, bwd_dW; launches that the block's dW_only or dX_only rules out are left out.
        progress: called after each candidate.
        timer: milliseconds of a function; by default the GPU's own clock (in the interpreter the host's).
        redo: search again what the cache has.

    Raises:
        ConfigError: a block with autotune=false, which would not use the results.
        ValueError: `num_tokens` below 1, an unknown pass.
    """
    todo = _launches(block, num_tokens, passes)
    device = block.gate.device
    capability = _capability(device)
    total = sum(len(candidates(one, capability)) for one in todo)
    rows: list[TuneRow] = []
    done = 0
    for one in todo:
        known = None if redo else _cached_row(one, device)
        count = len(candidates(one, capability))
        found = [known] if known else _search(one, block, num_tokens, timer or _default_timer(device))
        for number, row in enumerate(found, start=1):
            rows.append(row)
            if progress:
                progress(TuneProgress(done + (count if known else number), total, row))
        done += count
    rows = _settled(rows)
    name = str(cache.environment(device)["device"])
    return TuneReport(name, num_tokens, tuple(rows))
