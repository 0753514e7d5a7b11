"""``moefactory tune``: search the kernel configs of one block for several token counts, and say what was found.

The search itself is `moefactory.triton.tuning`; here it gets its block, its bar, its table and its exit code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from .config import PASSES, Backend, ConfigError, DType, MachineError, MoeConfig, ResolvedModel, as_dict
from .describe import require_here
from .machine import interpreting
from .progress import Tell, bar
from .report import _pairs, _table, as_json, render
from .rules import check_rules, make_case

if TYPE_CHECKING:
    from .triton.choice import Launch
    from .triton.tuning import Timer, TuneProgress, TuneReport, TuneRow

INTERPRETED = "Triton's interpreter ran the kernels: right or wrong it can tell, its times mean nothing for a GPU"


@dataclass(frozen=True)
class Tuned:
    """What a search of several token counts found.

    Attributes:
        status: ``ok``; ``mismatch`` where a launch has no right config and candidates were wrong; ``failed`` where it
            has none because none could run. The shipped choice stays in use there.
        config, model: of the block that was tuned.
        cache: the folder of the results, None where there is no home for one (results then end with the process).
        seconds: of the whole search.
        reports: one for each token count.
        notes: what the reader should know besides.
    """

    status: str
    config: dict[str, Any]
    model: ResolvedModel
    cache: str | None
    seconds: float
    reports: tuple[TuneReport, ...]
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found = {name: getattr(self, name) for name in ("status", "config", "cache", "seconds", "notes")}
        return {**found, "model": asdict(self.model), "reports": [report.as_dict() for report in self.reports]}


def run_tune(
    config: MoeConfig,
    tokens: Sequence[int],
    passes: Sequence[str] = tuple(PASSES),
    redo: bool = False,
    *,
    timer: Timer | None = None,
    tell: Tell | None = None,
) -> Tuned:
    """Build the block of a configuration and tune it for each token count.

    Args:
        config: with backend triton and autotune.
        tokens: token counts T. Two of one power-of-two bucket of rows per expert share their results.
        passes: fwd, bwd_dX, bwd_dW.
        redo: search again what the cache has, once for each bucket.
        timer: milliseconds of a function; by default the GPU's clock.
        tell: called after each candidate with what goes on, how many are done, and of how many.

    Raises:
        ConfigError: an illegal configuration, or one whose block has no use for tuned configs.
        MachineError: this machine cannot run it, or the results could not be kept.
    """
    start = time.perf_counter()
    check_rules(make_case(config))
    if config.backend.name is not Backend.triton:
        came = f"backend: got {config.backend.name.name}, which has no kernels to tune"
        raise ConfigError(f"{came}; allowed: triton (moe/backend=triton)")
    if not config.autotune:
        raise ConfigError("autotune: got false; allowed: true, since a block without it never uses tuned configs")
    require_here(config)
    _require_something(config, passes)
    from .factory import build
    from .triton.cache import root, why_not_writable

    folder = root()
    if folder is not None and (reason := why_not_writable(folder)):
        raise MachineError(f"tuning cache: {reason}; name another folder in MOEFACTORY_CACHE")
    block: Any = build(config)
    reports = tuple(_reports(block, tokens, passes, redo, timer, tell))
    notes = (INTERPRETED,) if interpreting() else ()
    seconds = time.perf_counter() - start
    where = None if folder is None else str(folder)
    placed = replace(config, dtype=DType(str(block.gate.dtype).removeprefix("torch.")), device=str(block.gate.device))
    return Tuned(_status(reports), as_dict(placed), block.model, where, seconds, reports, notes)


def _require_something(config: MoeConfig, passes: Sequence[str]) -> None:
    """ConfigError where no stated pass has a launch to tune: dX_only leaves out all of one."""
    from .measure import products

    run = {name for name, _ in products("step", config)}
    if passes and not run & set(passes):
        allowed = ", ".join(name for name in PASSES if name in run)
        raise ConfigError(f"passes: got {', '.join(passes)}, which does not run with dX_only=true; allowed: {allowed}")


def _reports(
    block: Any, tokens: Sequence[int], passes: Sequence[str], redo: bool, timer: Timer | None, tell: Tell | None
) -> list[TuneReport]:
    from .triton.choice import bucket

    fresh, reports = set[int](), []
    for count in tokens:
        rows = bucket(count * block.model.top_k, block.model.num_experts)
        again = redo and rows not in fresh
        fresh.add(rows)
        progress = _teller(tell, count) if tell else None
        reports.append(block.tune(count, passes=passes, progress=progress, timer=timer, redo=again))
    return reports


def _teller(tell: Tell, tokens: int) -> Callable[[TuneProgress], None]:
    def progress(event: TuneProgress) -> None:
        one = event.row.launch
        tell(f"{tokens} tokens, {one.pass_name} {one.gemm}", event.done, event.total)

    return progress


def _status(reports: Sequence[TuneReport]) -> str:
    lost = [rows for report in reports for rows in by_launch(report).values() if not any(row.winner for row in rows)]
    if not lost:
        return "ok"
    return "mismatch" if any(row.status == "wrong" for rows in lost for row in rows) else "failed"


def by_launch(report: TuneReport) -> dict[Launch, list[TuneRow]]:
    """The rows of each launch, in the order of the search."""
    found: dict[Launch, list[TuneRow]] = {}
    for row in report.rows:
        found.setdefault(row.launch, []).append(row)
    return found


def tune_verb(
    config: MoeConfig, tokens: Sequence[int], passes: Sequence[str], redo: bool, format: str
) -> tuple[str, str, str]:
    """(what to print, status, what to complain of) of ``moefactory tune``."""
    with bar() as tell:
        found = run_tune(config, tokens, passes, redo, tell=tell)
    complaint = "" if found.status == "ok" else "a launch has no right config: the shipped choice stays in use there"
    return as_json(found.plain()) if format == "json" else table(found), found.status, complaint


def table(found: Tuned) -> str:
    """One line for each launch of each token count: what steps use from now on, and what it won."""
    numbers = ("tokens", "rows/expert", "ms", "shipped ms", "gain", "tried", "struck out")
    lines = _table(*numbers[:1], "launch", *numbers[1:], "from", "config", right=numbers)
    for report in found.reports:
        for launch, rows in by_launch(report).items():
            lines.add_row(str(report.num_tokens), f"{launch.pass_name} {launch.gemm}", *_cells(launch, rows))
    m = found.model
    sizes = f"E={m.num_experts} K={m.top_k} H={m.hidden_size} I={m.moe_intermediate_size}"
    facts = _pairs([
        ("block", f"{sizes}, {found.config['dtype']} on {found.config['device']}"),
        ("device", ", ".join(dict.fromkeys(report.device for report in found.reports))),
        ("cache", found.cache or "none: there is no home directory, the results end with this process"),
        ("time", f"{found.seconds:.1f} s"), *(("note", note) for note in found.notes),
    ])  # fmt: skip
    struck = [row for report in found.reports for row in report.rows if row.status in {"wrong", "failed"}]
    reasons = [Text(f"struck out: {r.launch.pass_name} {r.launch.gemm}, {r.status}: {r.reason}") for r in struck[:3]]
    more = [f"... and {len(struck) - 3} more (format=json has all)"] if len(struck) > 3 else []
    return render(facts, "", lines, *reasons, *more)


def _cells(launch: Launch, rows: Sequence[TuneRow]) -> list[str]:
    """What a launch's rows come to."""
    winner = next((row for row in rows if row.winner), None)
    shipped = next((row.ms for row in rows if row.shipped), None)
    cached = rows[0].status == "cached"
    ms = winner.ms if winner else None
    struck = sum(row.status in {"wrong", "failed"} for row in rows)
    return [
        str(launch.rows_per_expert), f"{ms:.4g}" if ms else "", f"{shipped:.4g}" if shipped else "",
        f"{shipped / ms:.2f}x" if shipped and ms else "", "" if cached else str(len(rows)),
        "" if cached else str(struck), "cache" if cached else "search" if winner else "none is right: shipped",
        _values(winner),
    ]  # fmt: skip


def _values(row: TuneRow | None) -> str:
    return " ".join(f"{k}={v}" for k, v in asdict(row.config).items() if v is not False) if row else ""
