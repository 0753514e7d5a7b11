"""What ``moefactory bench`` prints: a table for people, JSON and CSV for programs, and a line for what is missing."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from rich.text import Text

from . import report as plain
from .bench_rows import NOT_HERE, BenchReport, BenchRow

ORIGIN = ("date", "moefactory", "commit", "torch", "triton", "transformers", "gpu", "sm_mhz")
COLUMNS = (*(f.name for f in fields(BenchRow)), *ORIGIN)


def as_json(report: BenchReport) -> str:
    """Everything."""
    return plain.as_json(report.plain())


def as_csv(report: BenchReport) -> str:
    """Every row, each with where it comes from, so that files can be put one under the other."""
    origin = _origin(report.provenance)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in report.rows:
        values = {**asdict(row), **origin}
        writer.writerow(["" if values[name] is None else values[name] for name in COLUMNS])
    return buffer.getvalue()


def _origin(known: dict[str, Any]) -> dict[str, Any]:
    clocks = known.get("clocks_after") or known["clocks"] or {}
    return {**known["packages"], **known, "sm_mhz": clocks.get("sm_mhz")}


def table(report: BenchReport) -> str:
    """The facts, then a line for each row."""
    numbers = ("tokens", "p50 ms", "p20 to p80", "share", "TFLOP/s", "held MiB", "peak MiB", "load")
    lines = plain._table("model", "tokens", "runs", "measure", *numbers[1:], "status", right=numbers)
    on_gpu = any(row.peak_mib is not None for row in report.rows)
    for row in report.rows:
        lines.add_row(*map(Text, _cells(row)), Text(_status(row), style="" if row.status == "ok" else "red"))
    if not on_gpu:  # nothing to show there
        lines.columns = [c for c in lines.columns if c.header not in {"held MiB", "peak MiB"}]
    return plain.render(_facts(report), "", lines)


def _cells(row: BenchRow) -> list[str]:
    spread = "" if row.p20_ms is None else f"{row.p20_ms:.4g} to {row.p80_ms:.4g}"
    figures = (row.p50_ms, "4g"), (row.share, "2f"), (row.tflops, "3g"), (row.held_mib, "0f"), (row.peak_mib, "0f")
    p50, *others = ("" if value is None else f"{value:.{form}}" for value, form in figures)
    load = "" if row.load is None else f"{row.load:.2f}"
    return [row.model, str(row.tokens), row.runs, row.measure, p50, spread, *others, load]


def _status(row: BenchRow) -> str:
    said = f"{row.status}: {row.reason}" if row.reason else row.status
    return f"{said}, {row.kernels} kernels" if row.kernels else said


def _facts(report: BenchReport) -> Any:
    known, first = report.provenance, next(iter(report.rows), None)
    origin = _origin(known)
    versions = ", ".join(f"{name} {origin[name] or 'missing'}" for name in ("torch", "triton", "transformers"))
    s = report.settings
    pairs = [
        ("block", f"{first.dtype} on {first.device}{_flags(report)}" if first else ""),
        ("data", f"unit normal, routing {s.routing}, seed {s.seed}; {s.ms} ms for each figure"),
        ("versions", f"moefactory {known['moefactory']} (commit {known['commit'] or 'unknown'}), {versions}"),
        ("machine", f"{known['gpu'] or known['platform']}, {_clocks(known)}"),
        *(("note", note) for note in report.notes),
    ]  # fmt: skip
    return plain._pairs(pairs)


def _flags(report: BenchReport) -> str:
    return next((f"; {row.runs} with {row.flags}" for row in reversed(report.rows) if row.flags), "")


def _clocks(known: dict[str, Any]) -> str:
    if not known["gpu"]:
        return f"{known['threads']} threads"
    pairs = [
        f"{when} {c['sm_mhz']:.0f} MHz of {c['sm_max_mhz']:.0f}"
        for when, c in (("before", known["clocks"]), ("after", known.get("clocks_after")))
        if c and c["sm_mhz"] and c["sm_max_mhz"]
    ]
    return f"clock {', '.join(pairs)}" if pairs else "clock unknown"


def complain(report: BenchReport) -> tuple[str, str]:
    """(ok, refused or failed; the line that says why)."""
    lost = report.lost
    if report.interrupted:
        return "failed", f"interrupted: the {len(report.rows)} rows until then are printed"
    if not lost:
        return "ok", ""
    where = f"{lost[0].model}, {lost[0].tokens} tokens, {lost[0].runs} {lost[0].measure}"
    line = f"{len(lost)} of {len(report.rows)} rows have no figures, first {where}: {_status(lost[0])}"
    illegal = all(row.status == "refused" and not row.reason.startswith(NOT_HERE) for row in lost)
    return "refused" if illegal else "failed", line


TEXTS: dict[str, Callable[[BenchReport], str]] = {"table": table, "json": as_json, "csv": as_csv}
