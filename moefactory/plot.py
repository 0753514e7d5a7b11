"""A drawing of a benchmark: the share of dense over the number of tokens. Needs matplotlib (``moefactory[plot]``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .config import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """ConfigError, before anything is measured, for a drawing that could not be made afterwards."""
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError(f"plot: got {path!r}; allowed: a file that ends in {', '.join(SUFFIXES)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("plot: needs matplotlib, which is not installed: pip install 'moefactory[plot]'")


def draw(rows: Sequence[Mapping[str, Any]], path: str, title: str = "") -> None:
    """Draw `rows` (a benchmark's, as plain values) into a file: one panel for each measure, one line for each runner.

    Rows without a share are left out.
    """
    from matplotlib.figure import Figure  # not pyplot: no windows, no global state

    rows = [row for row in rows if row["share"] is not None]
    measures = list(dict.fromkeys(row["measure"] for row in rows)) or ["step"]
    figure = Figure(figsize=(5.5 * len(measures), 4), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    ticks = sorted({row["tokens"] for row in rows})
    for panel, measure in zip(panels, measures, strict=True):
        here = [row for row in rows if row["measure"] == measure]
        for model, runner in dict.fromkeys((row["model"], row["runs"]) for row in here):
            line = sorted(
                (row["tokens"], row["share"]) for row in here if (row["model"], row["runs"]) == (model, runner)
            )
            panel.plot(*zip(*line, strict=True), marker="o", label=f"{runner}, {model}")
        panel.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
        panel.set(title=measure, xlabel="tokens", xscale="log")
        panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        if here:
            panel.legend(fontsize="small")
    panels[0].set_ylabel("share of dense")
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=150)
