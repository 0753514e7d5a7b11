"""Seconds of the first forward in a fresh process, without and with a warm Triton cache: `first_forward.py OUT.json`.

Imports, CUDA's start and the weights are not counted. 30B, 4,096 tokens, shipped choice, nothing tuned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

ONE = """
import time, torch
from moefactory import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import model_preset
shapes = (128, 2048), (128, 1536, 2048), (128, 2048, 768)
weights = (torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02 for s in shapes)
block = Qwen3MoeFusedGroupedGEMMBlock(model_preset("qwen3_30b_a3b"), *weights)
x = torch.randn(1, 4096, 2048, device="cuda", dtype=torch.bfloat16)
(x[0, :64] @ x[0, :64].T).sum().item()
start = time.perf_counter()
with torch.no_grad():
    block(x)
torch.cuda.synchronize()
print(time.perf_counter() - start)
start = time.perf_counter()
block(x.requires_grad_())[0].sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""


def main() -> None:
    from kernels import versions

    found = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            environment = {**os.environ, "TRITON_CACHE_DIR": cache}
            done = subprocess.run(
                [sys.executable, "-c", ONE], env=environment, check=True, capture_output=True, text=True
            )
            forward, step = map(float, done.stdout.split())
            found[name] = {"forward_s": forward, "step_s": step}
            print(name, found[name], flush=True)
    with open(sys.argv[1], "w") as out:
        json.dump({"versions": versions(), **found}, out, indent=1)


if __name__ == "__main__":
    main()
