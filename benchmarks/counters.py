"""What each grouped GEMM asks of tensor cores, L2 and memory, by ncu's counters: `benchmarks/counters.py OUT.json`.

30B, 16,384 tokens, each kernel once, with the caches and clocks as they are. tensor and l2 are per cent of what they
could do in the kernel's time; sectors are the 32 bytes that were read from the L2, delivered the bytes that arrived at
the multiprocessors, more where one read serves neighbours that ask for the same, or a cluster is sent one copy.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from kernels import problem, versions
from specialized import DW, DX, FORWARD

from moefactory.triton.backward_dW import dW_gemm
from moefactory.triton.backward_dX import dX_gemm
from moefactory.triton.forward import Rows, forward_gemm
from moefactory.triton.schedule import tile_table

METRICS = {  # ncu's name -> (ours, factor)
    "gpu__time_duration.sum": ("ms", 1e-6),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("tensor", 1),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("l2", 1),
    "lts__t_sectors_op_read.sum": ("sectors", 1),
    "l1tex__m_xbar2l1tex_read_bytes.sum": ("delivered", 1),
    "dram__bytes_read.sum": ("memory_read", 1),
    "dram__bytes_write.sum": ("memory_written", 1),
}
NCU = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none", "--csv", "--metrics"]


def cases() -> dict[str, Callable[[], object]]:
    """Name -> a call that launches one kernel."""
    _, x, _, plan, up, down = problem("qwen3_30b_a3b", 16384)
    rows_total = plan.gather_indices.shape[0]
    new = lambda *size: torch.randn(*size, device="cuda", dtype=x.dtype)  # noqa: E731
    big, dh, a = new(rows_total, up.shape[2]), new(rows_total, up.shape[1]), new(rows_total, down.shape[2])
    table = tile_table(plan.group_offsets, rows_total, FORWARD.block_m)
    rows = Rows(plan.group_offsets, plan.gather_indices, plan.top_k, table)
    experts, gathered = plan.num_experts, {"permute_x": True, "swiglu": True}
    return {
        "dense up": lambda: big @ up[0].T,
        "up without SwiGLU, in order": lambda: forward_gemm(big, up, rows, FORWARD),
        "up, gathered": lambda: forward_gemm(x, up, rows, FORWARD, **gathered),
        "up storing h, gathered": lambda: forward_gemm(x, up, rows, FORWARD, **gathered, store_h=True),
        "dense dX of up": lambda: dh @ up[0],
        "dX of up, in order": lambda: dX_gemm(dh, up, rows, DX),
        "dX of up, scattered": lambda: dX_gemm(dh, up, rows, DX, scatter=True),
        "down, in order": lambda: forward_gemm(a, down, rows, FORWARD),
        "dense dW of up": lambda: dh.T @ big,
        "dW of up, gathered": lambda: dW_gemm(dh, x, rows, experts, DW["x narrow"], x_divisor=plan.top_k),
        "dW of up, in order": lambda: dW_gemm(dh, big, rows, experts, DW["x wide"]),
    }


def launch_each() -> None:
    calls = cases()
    print(json.dumps(list(calls)), flush=True)
    for start in (lambda: None, torch.cuda.cudart().cudaProfilerStart):  # compiled before ncu looks
        torch.cuda.synchronize()
        start()
        for call in calls.values():
            call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def counted(text: str) -> list[dict[str, Any]]:
    """The kernels of ncu's output by name, in order: METRICS by our names."""
    names = json.loads(next(line for line in text.splitlines() if line.startswith("[")))
    found: dict[int, dict[str, float]] = {}
    for row in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        if row["Metric Name"] in METRICS:
            name, factor = METRICS[row["Metric Name"]]
            value = round(float(row["Metric Value"].replace(",", "")) * factor, 6)
            found.setdefault(int(row["ID"]), {})[name] = value
    return [{"kernel": name, **found[number]} for name, number in zip(names, sorted(found), strict=True)]


def main() -> None:
    command = [*NCU, ",".join(METRICS), sys.executable, __file__]
    environment = {**os.environ, "MOEFACTORY_COUNTED": "1"}
    text = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = counted(text)
    for row in rows:
        print(row, flush=True)
    with open(sys.argv[1], "w") as out:
        json.dump({"versions": versions(), "rows": rows}, out, indent=1)


if __name__ == "__main__":
    launch_each() if os.environ.get("MOEFACTORY_COUNTED") else main()
