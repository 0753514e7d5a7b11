"""The files of ``moefactory bench``: looked at before anything is measured, written when the rows are there."""

from __future__ import annotations

import os
from pathlib import Path

from .bench_report import as_json
from .bench_rows import BenchReport
from .config import ConfigError
from .plot import check_plot, draw
from .refusals import one_line


def check_files(out: str | None, plot: str | None) -> None:
    """ConfigError for files that could not be written afterwards. Nothing is opened or created."""
    for key, path in (("out", out), ("plot", plot)):
        if path is not None:
            _check_place(key, path)
    if plot is not None:
        check_plot(plot)
    if out is not None and plot is not None and _same(out, plot):
        raise ConfigError(f"plot: got {plot!r}, the same file as out={out!r}; allowed: another file, or null")


def _same(one: str, other: str) -> bool:
    """Whether two paths are one file: by any links, also hard ones."""
    there = os.path.exists(one) and os.path.exists(other)
    return os.path.samefile(one, other) if there else os.path.realpath(one) == os.path.realpath(other)


def _check_place(key: str, path: str) -> None:
    place = os.path.realpath(path)  # a link is written through
    folder = os.path.dirname(place)
    if os.path.isdir(place) or not os.path.isdir(folder):
        raise ConfigError(f"{key}: got {path!r}; allowed: a file in a folder that exists")
    try:
        os.stat(path)  # not the place: /dev/stdout may lead to a pipe, which has no name
        writable = os.access(path, os.W_OK)
    except FileNotFoundError:  # still to be created
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError:  # a name too long, links in a circle
        writable = False
    if not writable:
        raise ConfigError(f"{key}: got {path!r}, which cannot be written; allowed: a file that can be, or null")


def write_files(report: BenchReport, out: str | None, plot: str | None) -> tuple[list[str], list[str]]:
    """Write both, where asked for; nothing is raised, since the figures were dear.

    Returns:
        What is to be said of files that could not be written, and the files that were left as they are: with nothing
        to put into it, no file of an earlier run is overwritten.
    """
    measured = any(row.p50_ms is not None for row in report.rows)
    drawn = any(row.share is not None for row in report.rows)
    title = str(report.provenance["gpu"] or "CPU")
    lost, kept = [], []
    for key, path, found in (("out", out, measured), ("plot", plot, drawn)):
        if path is None:
            continue
        if not found and os.path.exists(path):
            kept.append(f"{key}={path!r}")
            continue
        try:
            if key == "out":
                Path(path).write_text(as_json(report))
            else:
                draw(report.plain()["rows"], path, title)
        except Exception as error:  # a full disk, or whatever matplotlib raises
            lost.append(f"{key}: got {path!r}, which could not be written: {one_line(error)}")
    return lost, kept
