"""Clock and power of the GPU under each grouped GEMM, kept up for half a second: `benchmarks/clocks.py OUT.json`.

A GPU at its power limit slows its clock: a kernel then is as fast as it is frugal, and a share by time is not one by
cycles. `reasons` are the bits by which nvidia-smi says why the clock is held back (4: the power limit). Samples of the
first quarter of a second, in which the clock still falls, are left out.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from statistics import mean

from kernels import versions
from specialized import elapsed, families

SECONDS, SETTLING = 0.6, 0.25
QUERY = "clocks.sm,power.draw.instant,clocks_event_reasons.active"


class Samples:
    """What nvidia-smi says every 20 ms: (host time, MHz, W, reasons)."""

    def __init__(self) -> None:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits", "-lms", "20"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.seen: list[tuple[float, float, float, int]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            mhz, watts, reasons = line.split(",")
            self.seen.append((time.perf_counter(), float(mhz), float(watts), int(reasons, 16)))

    def under(self, call: Callable[[], object]) -> dict[str, float | list[int]]:
        """Milliseconds of a call, and means over the time in which it is repeated."""
        call()
        repeats = max(5, int(SECONDS * 1000 / elapsed(call, 5)))
        start = time.perf_counter()
        ms = elapsed(call, repeats)
        seen = [one for one in self.seen if start + SETTLING < one[0] < time.perf_counter()]
        _, mhz, watts, reasons = zip(*seen, strict=True)
        return {"ms": ms, "mhz": mean(mhz), "watts": mean(watts), "reasons": sorted(set(reasons))}


def main() -> None:
    samples, rows = Samples(), []
    for tokens in (16384, 4096):
        for gemm, (dense, variants) in families("qwen3_30b_a3b", tokens).items():
            cases = {
                "dense": dense,
                **{name: call for name, call in variants.items() if "plain" not in name and "wide" not in name},
            }
            for variant, call in cases.items():
                row = {"model": "qwen3_30b_a3b", "tokens": tokens, "gemm": gemm, "variant": variant}
                rows.append(row | samples.under(call))
                print(rows[-1], flush=True)
    samples.process.kill()
    with open(sys.argv[1], "w") as out:
        json.dump({"versions": versions(), "rows": rows}, out, indent=1)


if __name__ == "__main__":
    main()
