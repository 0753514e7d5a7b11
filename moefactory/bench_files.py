"""The files of ``moefactory bench``: looked at before anything is measured, written when the rows are there."""

from __future__ import annotations

import os

from .config import ConfigError
from .plot import check_plot


def check_files(out: str | None, plot: str | None) -> None:
    """ConfigError for files that could not be written afterwards. Nothing is opened or created."""
    for key, path in (("out", out), ("plot", plot)):
        if path is not None and (os.path.isdir(path) or not os.path.isdir(os.path.dirname(os.path.realpath(path)))):
            raise ConfigError(f"{key}: got {path!r}; allowed: a file in a folder that exists")
    if plot is not None:
        check_plot(plot)
    if out is not None and plot is not None and os.path.realpath(out) == os.path.realpath(plot):
        raise ConfigError(f"plot: got {plot!r}, the same file as out={out!r}; allowed: another file, or null")
