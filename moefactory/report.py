"""What the verbs print: tables for people (rich), JSON and CSV for programs. Everything is returned as text."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .check import CheckReport
    from .matrix import Row
    from .numerics.judge import Comparison

MAX_FAILURES = 3  # lines for each tensor
_BLOCKS = " ▁▂▃▄▅▆▇█"


def as_json(data: Any, indent: int | None = 2) -> str:
    """JSON, with numbers that JSON does not have (nan, inf) as strings."""
    return json.dumps(_finite(data), indent=indent, allow_nan=False) + "\n"


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data


def render(*parts: Any) -> str:
    """The parts as text: coloured and as wide as the terminal there, plain and 120 wide in a pipe."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    width = shutil.get_terminal_size((120, 40)).columns if terminal else 120
    buffer = io.StringIO()
    Console(file=buffer, force_terminal=terminal, width=width, highlight=False).print(Group(*parts))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def _table(*columns: str, right: Sequence[str] = (), title: str = "") -> Table:
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _pairs(pairs: Iterable[tuple[str, Any]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(_plain(value)))
    return table


def _plain(value: Any) -> str:
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


# --- check ------------------------------------------------------------------------------------------------------------


def check(report: CheckReport) -> str:
    """The verdicts, worst part first in each tensor; failures; expert load; times."""
    routing, times = report.routing, report.times_ms
    facts = _pairs([
        ("block", f"{_sizes(report)}, {report.config['dtype']} on {report.config['device']}"),
        ("weights", report.source),
        ("ran", report.ran),
        ("routing", f"{routing['tokens']} tokens x {routing['top_k']}; other experts than ours are selected for "
                    f"{routing['differ_from_hf']} tokens by Hugging Face's block, for "
                    f"{routing['differ_from_float64']} by float64"),
        ("load", _load(report.expert_load)),
        ("time", f"forward {times['forward']:.1f} ms, backward {times['backward']:.1f} ms (Hugging Face's eager "
                 f"{times['hf_forward']:.1f} and {times['hf_backward']:.1f}; first calls, compilation included); "
                 f"all {times['total'] / 1000:.1f} s"),
        *(("note", note) for note in report.notes),
    ])  # fmt: skip
    failed = [c for c in report.comparisons if not c.ok]
    parts: list[Any] = [facts, "", _verdicts(report.comparisons), ""]
    shown = _first_of_each(failed)
    for c in shown:
        parts.append(Text(f"mismatch: {c.problem}, {c.tensor}, {c.part}: {_numbers(c)}{c.note}", style="red"))
    if len(failed) > len(shown):
        parts.append(Text(f"... and {len(failed) - len(shown)} more (format=json has all)", style="red"))
    summary = f"{len(report.comparisons)} comparisons, {len(failed)} mismatches"
    parts.append(Text(f"{report.status}: {summary}", style="bold red" if failed else "bold green"))
    return render(*parts)


def _first_of_each(failed: Sequence[Comparison]) -> list[Comparison]:
    """The first few failures of each tensor."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for c in failed:
        groups.setdefault((c.problem, c.tensor), []).append(c)
    return [c for group in groups.values() for c in group[:MAX_FAILURES]]


def _sizes(report: CheckReport) -> str:
    m = report.model
    norm = "renormalised" if m.norm_topk_prob else "not renormalised"
    sizes = f"E={m.num_experts} K={m.top_k} H={m.hidden_size} I={m.moe_intermediate_size}"
    return f"backend {report.config['backend']['name']}, {sizes}, {m.hidden_act}, {norm}"


def _numbers(c: Comparison) -> str:
    return f"error {c.error:.3g}, bound {c.bound:.3g}; " if c.error else ""


def _ratio(c: Comparison) -> float:
    """How much of its bound a comparison uses."""
    pairs = ((c.error, c.bound), (c.mean_error, c.mean_bound))
    used = max(e / b if b else (math.inf if e else 0.0) for e, b in pairs)
    return used if c.ok else max(used, 1.0) + 1e9


def _verdicts(comparisons: Sequence[Comparison]) -> Table:
    """One line per problem and tensor: the whole, and the part that is nearest to its bound."""
    numbers = ("error", "HF eager", "bound", "used")
    table = _table("problem", "tensor", "worst part", *numbers, "verdict", right=numbers)
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for c in comparisons:
        groups.setdefault((c.problem, c.tensor), []).append(c)
    for (problem, tensor), group in groups.items():
        worst = max(group, key=_ratio)
        failed = sum(not c.ok for c in group)
        verdict = Text(f"{failed} of {len(group)} fail", style="red") if failed else Text("ok", style="green")
        part = worst.part if len(group) == 1 else f"{worst.part} (of {len(group)})"
        exact = problem in {"integer", "weights"}
        row = [problem, tensor, part, f"{worst.error:.2e}"]
        row.append("" if worst.hf_error is None else f"{worst.hf_error:.2e}")
        row += ["bit for bit", ""] if exact else [f"{worst.bound:.2e}", _used(worst)]
        table.add_row(*map(Text, row), verdict)
    return table


def _used(c: Comparison) -> str:
    if not c.bound or not math.isfinite(c.error):
        return ""
    return f"{c.error / c.bound:.0%}" if c.error < 10 * c.bound else "> 10 x"


def _load(load: Sequence[int]) -> str:
    """A bar per expert, and the figures."""
    top = max(load, default=0)
    bars = "".join(_BLOCKS[math.ceil(8 * n / top)] if top else " " for n in load)
    mean = sum(load) / max(1, len(load))
    empty = sum(n == 0 for n in load)
    return f"|{bars}| tokens per expert: least {min(load, default=0)}, mean {mean:.3g}, most {top}; {empty} without"


# --- the other verbs --------------------------------------------------------------------------------------------------


def show(facts: dict[str, Any]) -> str:
    """The config, then the answers."""
    config = [(f"moe.{key}", value) for key, value in _flat(facts["config"]) if value is not None]
    broken = [("legal", f"no: {r['id']}: {r['found']}; {r['repair']}") for r in facts["broken_rules"]]
    answers: list[tuple[str, Any]] = list(broken or [("legal", "yes")])
    if facts["model"]:
        sizes = ", ".join(f"{k}={_plain(v)}" for k, v in facts["model"].items())
        answers.append(("sizes", f"{sizes} (from {facts['sizes_from']})"))
    if facts["runs_here"] is not None:
        answers.append(("runs here", "yes" if facts["runs_here"] else f"no: {facts['reason']}"))
    if facts["would_run"]:
        answers.append(("would run", facts["would_run"]))
    return render(_pairs(config), "", _pairs(answers))


def _flat(node: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def block(facts: dict[str, Any]) -> str:
    """The parameters and their sizes."""
    table = _table("parameter", "shape", "dtype", "device", "trainable", "elements", "MiB", right=("elements", "MiB"))
    for p in [*facts["parameters"], {"name": "all", "elements": facts["elements"], "bytes": facts["bytes"]}]:
        shape = " x ".join(map(str, p.get("shape", [])))
        trainable = "" if "trainable" not in p else _plain(p["trainable"])
        table.add_row(
            p["name"], shape, p.get("dtype", ""), p.get("device", ""), trainable, f"{p['elements']:,}",
            f"{p['bytes'] / 2**20:,.2f}",
        )  # fmt: skip
    sizes = ", ".join(f"{k}={_plain(v)}" for k, v in facts["model"].items())
    return render(_pairs([("block", f"{facts['block']}({sizes})"), ("runs", facts["runs"])]), "", table)


def machine(facts: dict[str, Any]) -> str:
    """Versions, GPUs, and what runs."""
    packages = ", ".join(f"{name} {number or 'missing'}" for name, number in facts["packages"].items())
    gpus = [
        ("GPU", f"{g['name']}, capability {g['capability']}, {g['memory']}, CUDA {g['cuda']}") for g in facts["gpus"]
    ]
    about = _pairs([
        ("moefactory", facts["moefactory"]), ("python", f"{facts['python']}, {facts['platform']}"),
        ("packages", packages), *(gpus or [("GPU", "none that torch sees")]),
        *((name, value or "not set") for name, value in facts["environment"].items()),
        *(
            (name, f"{facts[key]['path']}{'' if facts[key]['writable'] else ' (cannot be written)'}")
            for name, key in (("cache", "cache"), ("tuned configs", "tuning_cache"))
        ),
    ])  # fmt: skip
    table = _table("backend", "device", "dtypes", "runs here", "why not")
    for row in facts["runs"]:
        table.add_row(row["backend"], row["device"], ", ".join(row["dtypes"]), _plain(row["runs"]), row["reason"] or "")
    return render(about, "", table)


def matrix(rows: Sequence[Row]) -> str:
    """One line per row, and the counts."""
    table = _table("id", "valid", "rule", "runnable", "reason")
    for row in rows:
        runnable = "" if row.runnable is None else _plain(row.runnable)
        table.add_row(Text(row.id), _plain(row.valid), row.rule or "", runnable, Text(row.reason or ""))
    valid, here = sum(row.valid for row in rows), sum(row.runnable is True for row in rows)
    return render(table, "", f"{len(rows)} rows: {valid} legal, {here} of them run here, {len(rows) - valid} refused")


def matrix_json(rows: Sequence[Row]) -> str:
    """Every row with all its fields."""
    return as_json([asdict(row) for row in rows])


def matrix_csv(rows: Sequence[Row]) -> str:
    """Every row; the overrides are joined by blanks."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = list(asdict(rows[0])) if rows else []
    writer.writerow(names)
    for row in rows:
        fields = asdict(row)
        fields["overrides"] = " ".join(row.overrides)
        writer.writerow(["" if fields[n] is None else _plain(fields[n]) for n in names])
    return buffer.getvalue()
