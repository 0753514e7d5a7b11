"""``moefactory bench``: forward and step of a block beside dense products and beside Hugging Face's block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from .bench_files import check_files, write_files
from .bench_report import TEXTS, complain
from .bench_rows import BenchReport, BenchRow, Settings
from .bench_sweep import Sweep
from .config import Backend, BackendConfig, ConfigError, MoeConfig, as_dict, model_preset
from .describe import require_here
from .machine import interpreting
from .measure import Timer, time_calls
from .numerics.theirs import quiet_transformers
from .peers import default_peers
from .progress import Tell, bar
from .provenance import clocks, provenance


def run_bench(
    config: MoeConfig, settings: Settings | None = None, *, timer: Timer = time_calls, tell: Tell | None = None
) -> BenchReport:
    """Measure the block of a configuration.

    Args:
        config: flags, dtype, device and weights of every row; its own model and backend, where none are named.
        settings: what to measure.
        timer: quantiles of a call's milliseconds.
        tell: called before each runner with what goes on, how many are done, and of how many.

    Raises:
        ConfigError, MachineError: a model beside another one in `settings`, a device that does not exist or is not
            there.
    """
    settings = settings or Settings()
    _check_models(config, settings.models or ())
    require_here(replace(config, backend=BackendConfig(Backend.torch)))
    device = torch.device(config.device or "cpu")
    peers = default_peers(device) if settings.peers is None else settings.peers
    backends = settings.backends or [config.backend.name.name]
    settings = replace(settings, backends=tuple(backends), peers=tuple(peers))
    known = provenance(device)
    sweep, rows = Sweep(config, settings, device, timer, tell), list[BenchRow]()
    stopped = False
    with quiet_transformers(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        try:
            rows.extend(sweep.rows())
        except KeyboardInterrupt:  # the rows until now were dear
            stopped = True
    if device.type == "cuda":
        known["clocks_after"] = clocks(device)
    notes = sweep.notes
    if interpreting() and "triton" in backends:
        notes.append("Triton's interpreter ran the kernels: their times mean nothing")
    ran = _common([as_dict(one) for one in sweep.ran or [config]])
    return BenchReport(settings, ran, known, tuple(rows), tuple(notes), stopped)


def _check_models(config: MoeConfig, models: Sequence[str]) -> None:
    """ConfigError for a size that the configuration states and a model of the sweep has not: one would be dropped."""
    for name in models:
        preset = model_preset(name)
        for key, stated in asdict(config.model).items():
            if stated is not None and stated != (brought := getattr(preset, key)):
                came = f"model.{key}: got {stated!r}, but models names {name}, which has {brought!r}"
                raise ConfigError(f"{came}; allowed: the same value, or models=null")


def _common(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all configurations say; None where they differ, as models and backends of a sweep do."""
    common = dict[str, Any]()
    for key, value in configs[0].items():
        values = [one[key] for one in configs]
        if isinstance(value, dict):
            common[key] = _common(values)
        else:
            common[key] = value if all(other == value for other in values) else None
    return common


def bench_verb(
    config: MoeConfig, format: str, out: str | None, plot: str | None, **settings: Any
) -> tuple[str, str, str]:
    """(what to print, status, what to complain of) of ``moefactory bench``.

    The status is ok; refused, if all rows without figures are illegal configurations; else failed.
    """
    check_files(out, plot)
    with bar() as tell:
        report = run_bench(config, Settings(**settings), tell=tell)
    status, complaint = complain(report)
    lost, kept = write_files(report, out, plot)
    if lost or (kept and status == "ok"):
        status = "failed"
    said = [complaint] if complaint else []
    if lost:
        said += [*lost, "the figures are printed"]
    if kept:
        said.append(f"nothing to put into {', '.join(kept)}: left as before")
    return TEXTS[format](report), status, "; ".join(said)
