"""Every variant of the warp-specialised kernels compiled for compute capability 9.0; no GPU is needed for that.

``python tests/sm90.py`` prints {variant: what its code holds} as JSON. Triton's interpreter does not know Gluon, so
this is a process of its own, without TRITON_INTERPRET. The host code of the package says what is compiled: its
launches are recorded, not run, and each argument tells the compiler what it would tell it on a GPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

TILES: dict[str, dict[str, int]] = {
    "fwd": {"block_m": 128, "block_n": 256, "block_k": 64, "num_warps": 8, "num_stages": 4},
    "dX": {"block_m": 128, "block_n": 64, "block_k": 256, "num_warps": 8, "num_stages": 4},
    "dW 128x256": {"block_m": 64, "block_n": 128, "block_k": 256, "num_warps": 8, "num_stages": 4},
    "dW 256x128": {"block_m": 64, "block_n": 256, "block_k": 128, "num_warps": 8, "num_stages": 4},
}
SIZES = {"whole": (512, 256), "eights": (72, 40)}  # (hidden, intermediate): whole tiles; of 8 elements, not of 16
ROWS, TOP_K, EXPERTS = 96, 2, 4


@dataclass(frozen=True)
class Variant:
    """One launch: the kernel, the operand that it reaches through an index, and what else changes its code."""

    kernel: str
    gathered: str = ""
    flags: tuple[str, ...] = ()
    sizes: str = "whole"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        gathered = f"gathers {self.gathered}" if self.gathered else "gathers nothing"
        return ", ".join((self.kernel, gathered, *self.flags, self.sizes, self.dtype))


def _variants() -> list[Variant]:
    whole = [Variant("forward", x, flags) for x, flags in product(("", "x"), ((), ("permute_y",)))]
    whole += [Variant("forward_up", x, flags) for x, flags in product(("", "x"), ((), ("store_h",)))]
    whole += [Variant("dX", dy, flags) for dy, flags in product(("", "dy"), ((), ("scatter",)))]
    whole += [Variant("dX_dswiglu", dy, flags) for dy, flags in product(("", "dy"), ((), ("weights",)))]
    whole += [Variant(dw, operand) for dw, operand in product(("dW 128x256", "dW 256x128"), ("", "dy", "x"))]
    eights = [Variant(v.kernel, v.gathered, v.flags, "eights") for v in whole if v.gathered]
    float16 = [
        Variant("forward_up", "x", ("store_h",), dtype="float16"),
        Variant("dX_dswiglu", "dy", ("weights",), dtype="float16"),
        Variant("dW 128x256", "dy", dtype="float16"),
    ]
    in_turn = [Variant("forward_up", "x", flags) for flags in (("in_turn",), ("store_h", "in_turn"))]
    in_turn += [Variant("dX_dswiglu", "dy", ("weights", "in_turn"))]  # as with large weights
    claimed = [Variant("forward", "", flags) for flags in (("claimed",), ("permute_y", "claimed"))]  # by a wide memory
    return whole + eights + float16 + in_turn + claimed


VARIANTS = {str(variant): variant for variant in _variants()}


# --- what is read off the compiler's output -------------------------------------------------------------------------


def gather_widths(ptx: str) -> list[int]:
    """Bytes of each cp.async: the copies of a gathered operand."""
    return [int(width, 0) for width in re.findall(r"cp\.async\.c[ag]\.shared\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)]


def unguarded_arrivals(ptx: str) -> list[str]:
    """Arrivals at a barrier after an access to shared memory, a product or a wait that no barrier of the partition
    follows: one thread arrives for all, and would do so before the others are done, or have seen the phase they wait
    for."""
    found, access = [], ""
    for line in ptx.splitlines():
        if re.search(r"\bbar(rier)?\.sync\b", line):
            access = ""
        elif re.search(r"\bmbarrier\.arrive\.shared\S* ", line):
            found += [access] if access else []
        elif re.search(r"\b(ld|st)\.shared\b|\b(ld|st)matrix\b|\bwgmma\.mma_async\b|\bmbarrier\.try_wait\b", line):
            access = line.strip()
    return found


def nested_loops(ttgir: str) -> list[tuple[str, list[str]]]:
    """(partition, stale bounds) of every loop inside a loop. A bound is stale if it is made of a load before the outer
    loop, from global or shared memory, and of nothing that the outer loop carries: then it is the first tile's at every
    tile."""
    found = []
    partition, made, loads = "", dict[str, set[str]](), set[str]()  # `made`: value -> what it is made of
    around: list[tuple[int, set[str]]] = []  # (indentation, carried values) of the loops around this line
    for line in ttgir.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if region := re.match(r"(default|partition\d+)\b", text):
            partition, around, loads = region[1], [], set()
        while around and text.startswith("}") and indent <= around[-1][0]:
            around.pop()
        if loop := re.search(r"scf\.for %\S+ = (%[\w-]+)\S* to (%[\w-]+)\S* step", text):
            if around:
                origins = {bound: _origins(bound, made) for bound in loop.groups()}
                stale = [b for b, parts in origins.items() if parts & loads and not parts & around[-1][1]]
                found.append((partition, stale))
            carried = re.search(r"iter_args\((.*?)\) ->", text)
            around.append((indent, set(re.findall(r"(%[\w-]+) = ", carried[1])) if carried else set()))
        elif outer := re.search(r"scf\.while \((.*?)\) : \(", text):
            around.append((indent, set(re.findall(r"(%[\w-]+) = ", outer[1]))))
        elif text.startswith("} do {"):  # a while loop's body, which names what is carried anew
            around.append((indent, set()))
        elif text.startswith("^bb0(") and around and not around[-1][1] and indent == around[-1][0]:
            around[-1] = indent, set(re.findall(r"(%[\w-]+):", text))
        elif value := re.match(r"(%[\w-]+)(?::\d+)? = (.*)", text):
            made[value[1]] = set(re.findall(r"%[\w-]+", value[2]))
            if not around and value[2].startswith(("tt.load ", "ttg.local_load ")):
                loads.add(value[1])
    return found


def _origins(value: str, made: dict[str, set[str]]) -> set[str]:
    """Everything that a value is made of, itself included."""
    seen, new = set[str](), {value}
    while new:
        seen |= new
        new = {part for one in new for part in made.get(one, ())} - seen
    return seen


# --- compiling ------------------------------------------------------------------------------------------------------


def _recorded(variant: Variant) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(kernel, arguments by name, constants) of the launch that this variant's host code makes."""
    import torch

    from moefactory import config
    from moefactory.triton import (
        backward_dW,
        backward_dX,
        forward,
        specialized,
        specialized_dswiglu,
        specialized_dW,
        specialized_rows,
    )
    from moefactory.triton.schedule import WORDS, TileTable

    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def record(name: str, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        launched.append((kernel, args, meta))

    specialized_rows.launch = specialized_dswiglu.launch = specialized_dW.launch = record  # type: ignore[attr-defined]
    dtype = getattr(torch, variant.dtype)

    def index(size: int) -> Any:
        return torch.zeros(size, dtype=torch.int32)

    def matrix(*shape: int) -> Any:
        return torch.zeros(*shape, dtype=dtype)

    table = TileTable(index(8), index(8), index(WORDS), 8)
    rows = forward.Rows(index(EXPERTS + 2), index(ROWS), TOP_K, table)
    hidden, width = SIZES[variant.sizes]
    flags = dict.fromkeys(variant.flags, True)
    specialized.MAX_CLAIMED = 0 if flags.pop("in_turn", False) else 2**22
    specialized.WIDE_MEMORY = 0 if flags.pop("claimed", False) else 4000  # of a CPU it counts as 0
    divisor = TOP_K if variant.gathered else 0
    if variant.kernel.startswith("forward"):
        swiglu = variant.kernel == "forward_up"
        weight = matrix(EXPERTS, 2 * width, hidden)
        kernel_config = config.KernelConfigForward(**TILES["fwd"], warp_specialize=True)
        forward.forward_gemm(
            matrix(ROWS, hidden), weight, rows, kernel_config, permute_x=bool(divisor), swiglu=swiglu, **flags
        )
    elif variant.kernel.startswith("dX"):
        dy, weight = matrix(ROWS, hidden), matrix(EXPERTS, hidden, width)
        kernel_config = config.KernelConfigBackward_dX(**TILES["dX"], warp_specialize=True)
        if variant.kernel == "dX":
            backward_dX.dX_gemm(dy, weight, rows, kernel_config, dy_divisor=divisor, **flags)
        else:
            scores = matrix(ROWS) if flags else None
            h = matrix(ROWS, 2 * width)
            how = {"dy_divisor": divisor, "in_parts": True}  # no sum, which would be a second launch
            backward_dX.dX_gemm_dswiglu(dy, weight, h, scores, rows, kernel_config, **how)
    else:
        dy, x = matrix(ROWS, hidden), matrix(ROWS, width)
        kernel_config = config.KernelConfigBackward_dW(**TILES[variant.kernel], warp_specialize=True)
        divisors = {"dy_divisor": 0, "x_divisor": 0, **({f"{variant.gathered}_divisor": divisor} if divisor else {})}
        backward_dW.dW_gemm(dy, x, rows, EXPERTS, kernel_config, **divisors)
    ((kernel, args, meta),) = launched
    return kernel, dict(zip(kernel.arg_names, args, strict=False)), meta


def _typed(value: Any) -> str:
    """An argument's type as Triton's signatures write it."""
    import torch

    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
    if isinstance(value, torch.Tensor):
        return f"*{names[value.dtype]}"
    if isinstance(value, int):
        return "i32"
    return f"tensordesc<{names[value.base.dtype]}[{','.join(map(str, value.block_shape))}],{value.layout!r}>"


def _sixteens(value: Any) -> bool:
    """Whether the compiler is told that this argument is a multiple of 16."""
    return value.data_ptr() % 16 == 0 if hasattr(value, "data_ptr") else isinstance(value, int) and value % 16 == 0


def compiled(variant: Variant) -> dict[str, Any]:
    """What the code of a variant holds."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    kernel, arguments, meta = _recorded(variant)
    names = kernel.arg_names
    signature = {name: _typed(arguments[name]) if name in arguments else "constexpr" for name in names}
    constants = {(names.index(name),): value for name, value in meta.items() if name in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n, value in arguments.items() if _sixteens(value)}
    options = {"num_warps": meta["num_warps"], "maxnreg": meta["maxnreg"]}
    source = GluonASTSource(kernel, signature, constants, attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = binary.asm["ptx"]
    return {
        "options": options,
        "shared memory": binary.metadata.shared,
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        "mma": len(re.findall(r"\bmma\.sync\b", ptx)),
        "tma loads": len(re.findall(r"\bcp\.async\.bulk\.tensor\S*\.shared::c\w+\.global\b", ptx)),
        "tma stores": len(re.findall(r"\bcp\.async\.bulk\.tensor\S*\.global\.shared::cta\b", ptx)),
        "gather widths": gather_widths(ptx),
        "nested loops": nested_loops(binary.asm["ttgir"]),
        "arrivals": len(re.findall(r"\bmbarrier\.arrive\.shared\S* ", ptx)),
        "unguarded arrivals": unguarded_arrivals(ptx),
        "spills": _spills(ptx),
    }


def _spills(ptx: str) -> int:
    """Bytes that ptxas stores to and loads from local memory for want of registers."""
    import triton.backends.nvidia

    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.ptx"
        code.write_text(ptx)
        command = [str(ptxas), "-v", "--gpu-name=sm_90a", str(code), "-o", str(code.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))


if __name__ == "__main__":
    print(json.dumps({name: compiled(variant) for name, variant in VARIANTS.items()}))
