"""How much memory reading a layer of a checkpoint takes at its peak: the layer, one expert, and a stated slack.

A fresh process measures itself, because the peak of this one is whatever other tests left. It reads VmHWM, the peak
resident memory of its own address space, and not ru_maxrss, which a child inherits from the process that started it.
Mapped file pages count as resident, so a reader that maps shards shows here; `safe_open`, which does, is the control.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

MIB = 2**20
E, H, I = 88, 1024, 1024  # noqa: E741 - the vocabulary's letters; an expert has 6 MiB in bfloat16, the layer 528 MiB
EXPERT = 3 * H * I * 2
LAYER = E * EXPERT + E * H * 2
# Parsed headers and index, code pages touched for the first time, rounding to pages and arenas: 5 MiB were measured for
# all of it and the reader's buffer of 4 MiB, which the bound counts as the one expert.
SLACK = 6 * MIB

MEASURE = f"""
import json, struct, sys
from contextlib import ExitStack
from pathlib import Path
import torch
from safetensors import safe_open
from moefactory.weights import read_checkpoint_layer

E, H, I = {E}, {H}, {I}
folder, layout, how, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3], getattr(torch, sys.argv[4])
START = "model.layers.5.mlp."

def names():
    yield "gate.weight", (E, H)
    if layout == "fused":
        yield "experts.gate_up_proj", (E, 2 * I, H)
        yield "experts.down_proj", (E, H, I)
    else:
        for e in range(E):
            yield f"experts.{{e}}.gate_proj.weight", (I, H)
            yield f"experts.{{e}}.up_proj.weight", (I, H)
            yield f"experts.{{e}}.down_proj.weight", (H, I)

def write():
    '''Three shards of holes: zeros that take no disk, with a mark in the first element of each tensor.'''
    dealt = {{f"s{{n}}.safetensors": list(names())[n::3] for n in range(3)}}
    for file, tensors in dealt.items():
        header, end = {{}}, 0
        for name, shape in tensors:
            begin, end = end, end + 2 * torch.Size(shape).numel()
            header[START + name] = {{"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}}
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as f:
            f.write(struct.pack("<Q", len(raw)) + raw)
            for n, entry in enumerate(header.values()):
                f.seek(8 + len(raw) + entry["data_offsets"][0])
                f.write(torch.tensor([float(n + 1)]).bfloat16().view(torch.int16).numpy().tobytes())
            f.truncate(8 + len(raw) + end)
    index = {{START + name: file for file, tensors in dealt.items() for name, _ in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({{"weight_map": index}}))
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="qwen3_moe", hidden_size=H, moe_intermediate_size=I, num_experts=E, num_experts_per_tok=8,
        norm_topk_prob=True, hidden_act="silu", num_hidden_layers=6)))

def control():
    '''What copying out of mapped files takes: every page of the layer twice.'''
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / f"s{{n}}.safetensors", "pt")) for n in range(3)]
        return [file.get_tensor(name).clone() for file in files for name in file.keys()]

def status(key):
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key + ":"))
    return int(line.split()[1]) * 1024

write()
torch.zeros(8).bfloat16().double().sum()  # what a first operation loads
before = status("VmRSS")  # with everything imported; the peak so far is far below this and a layer
kept = control() if how == "control" else read_checkpoint_layer(folder, 5, dtype)
peak = status("VmHWM") - before
marks = 0
if how != "control":
    halves = kept.gate_up_proj.unflatten(1, (2, I))
    every = [*halves[:, :, 0, 0].flatten().tolist(), *kept.down_proj[:, 0, 0].tolist(), kept.gate[0, 0].item()]
    marks = sum(value != 0 for value in every)
print(json.dumps({{"peak": peak, "marks": marks}}))
"""


def measure(folder: Any, layout: str, how: str, dtype: str = "bfloat16") -> dict[str, int]:
    """{peak: bytes above what was resident before the call, marks: tensors whose first element arrived}."""
    command = [sys.executable, "-c", MEASURE, str(folder), layout, how, dtype]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout)
    return measured


@pytest.mark.parametrize(
    ("layout", "dtype", "marks"),
    [("per_expert", "bfloat16", 3 * E + 1), ("fused", "bfloat16", 3), ("per_expert", "float32", 3 * E + 1)],
)
def test_reading_a_layer_peaks_at_the_layer_and_one_expert(tmp_path: Any, layout: str, dtype: str, marks: int) -> None:
    """Also where the dtype changes on the way, for which the layer counts as it comes out."""
    assert LAYER > 512 * MIB
    measured = measure(tmp_path, layout, "ours", dtype)
    size = LAYER * (2 if dtype == "float32" else 1)
    assert size <= measured["peak"] <= size + EXPERT + SLACK, f"{measured['peak'] / MIB:.0f} MiB"
    assert measured["marks"] == marks


def test_the_measurement_sees_mapped_files(tmp_path: Any) -> None:
    """The control: through safe_open the same layer peaks near twice its size, far beyond the bound above."""
    assert measure(tmp_path, "per_expert", "control")["peak"] > 1.8 * LAYER
