"""What starting costs: import, composition, building, `moefactory check`, each in fresh processes.

Writes ``benchmarks/results/startup.json``: seconds (median, least and most of the repeats), versions and the commit;
the README's table is made from it. Run it with `make startup` on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from moefactory.provenance import commit

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "startup.json"

# Each snippet prints the seconds that it measured itself; a list is a command whose wall time counts.
COMPOSE = """
import time
begin = time.perf_counter()
from hydra import compose, initialize
with initialize(version_base="1.3", config_path=None):
    first = time.perf_counter()
    compose(overrides=["+moe=qwen3"])
    loaded = time.perf_counter()
    compose(overrides=["+moe=qwen3", "moe/model=qwen3_30b_a3b"])
    again = time.perf_counter()
print({which})
"""
BUILD = """
import time, moefactory
begin = time.perf_counter()
block = moefactory.build(moefactory.MoeConfig())
first = time.perf_counter()
moefactory.build(moefactory.MoeConfig())
again = time.perf_counter()
print({which})
"""
STEPS: dict[str, str | list[str]] = {
    "python: start and stop, nothing imported": ["-c", "pass"],
    "import moefactory": (
        "import time; begin = time.perf_counter(); import moefactory; print(time.perf_counter() - begin)"
    ),
    "import torch, for comparison": (
        "import time; begin = time.perf_counter(); import torch; print(time.perf_counter() - begin)"
    ),
    "compose `moe: qwen3`, first in a process (with Hydra's import)": COMPOSE.format(which="loaded - begin"),
    "compose again in the same process": COMPOSE.format(which="again - loaded"),
    "build the default block, first in a process (with the imports)": BUILD.format(which="first - begin"),
    "build again in the same process": BUILD.format(which="again - first"),
    "command `moefactory matrix format=github`": ["-m", "moefactory", "matrix", "format=github"],
    "command `moefactory show`": ["-m", "moefactory", "show"],
    "command `moefactory check`": ["-m", "moefactory", "check"],
}


def seconds(step: str | list[str], folder: str) -> float:
    """One fresh process, run in an empty folder."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    command = [sys.executable, *(["-c", step] if isinstance(step, str) else step)]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    wall = time.perf_counter() - begin
    return float(done.stdout) if isinstance(step, str) else wall


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Every step, once to warm the file cache and then `repeats` times."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, step in STEPS.items():
            seconds(step, folder)
            runs = [seconds(step, folder) for _ in range(repeats)]
            table[name] = {"median": statistics.median(runs), "least": min(runs), "most": max(runs)}
            print(f"{table[name]['median']:9.4f} s  {name}", flush=True)
    return table


def origin() -> dict[str, object]:
    """Versions, commit and the kind of machine: no name, no path."""
    names = ("moefactory", "torch", "triton", "transformers", "hydra-core", "omegaconf")
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7, help="fresh processes per step")
    parser.add_argument("--output", type=Path, default=RESULT, help="where the JSON goes")
    options = parser.parse_args()
    result = {**origin(), "repeats": options.repeats, "seconds": measure(options.repeats)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
