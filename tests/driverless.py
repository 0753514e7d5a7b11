"""Triton's own launchers without a GPU: compiled kernels, launched over a CUDA driver that only notes what it is given.

``python tests/driverless.py FOLDER`` prints {case: what was found} as JSON. Triton's interpreter has no launcher, so
this is a process of its own, without TRITON_INTERPRET. The driver is some lines of C, compiled into FOLDER; tensors are
on the CPU, and no kernel runs. What the package tells the driver is compared with what Triton tells it.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

DRIVER = r"""
#include <string.h>
#include "cuda.h"
int sizes[64], count, launches, encoded, length;
unsigned char noted[16384];
#define SAYS(name, ...) CUresult name(__VA_ARGS__)
SAYS(cuGetErrorString, CUresult e, const char **s) { *s = "noted"; return 0; }
SAYS(cuDriverGetVersion, int *v) { *v = 12080; return 0; }
SAYS(cuCtxGetCurrent, CUcontext *c) { *c = (CUcontext)1; return 0; }
SAYS(cuCtxSetCurrent, CUcontext c) { return 0; }
SAYS(cuCtxGetLimit, size_t *v, CUlimit l) { *v = 1; return 0; }
SAYS(cuCtxSetLimit, CUlimit l, size_t v) { return 0; }
SAYS(cuDeviceGet, CUdevice *d, int i) { *d = i; return 0; }
SAYS(cuDevicePrimaryCtxRetain, CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
SAYS(cuDeviceGetAttribute, int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return 0; }
SAYS(cuModuleLoadData, CUmodule *m, const void *p) { *m = (CUmodule)1; return 0; }
SAYS(cuModuleGetFunction, CUfunction *f, CUmodule m, const char *n) {
  static size_t made = 0;
  *f = (CUfunction)++made;
  return 0;
}
SAYS(cuFuncGetAttribute, int *v, CUfunction_attribute a, CUfunction f) { *v = 1024; return 0; }
SAYS(cuFuncSetAttribute, CUfunction f, CUfunction_attribute a, int v) { return 0; }
SAYS(cuFuncSetCacheConfig, CUfunction f, CUfunc_cache c) { return 0; }
SAYS(cuPointerGetAttribute, void *d, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)d = p; return 0; }
SAYS(cuTensorMapEncodeTiled, CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
     const cuuint64_t *sides, const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
     CUtensorMapInterleave i, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion p, CUtensorMapFloatOOBfill fill) {
  unsigned long long *word = (unsigned long long *)map;
  memset(map, 0, sizeof *map);
  word[0] = (unsigned long long)address;
  word[1] = type + 256 * rank + 65536 * swizzle + 16777216 * fill;
  for (unsigned d = 0; d < rank; d++) {
    word[2 + d] = sides[d] + ((unsigned long long)box[d] << 40);
    if (d + 1 < rank) word[8 + d] = strides[d];
  }
  encoded++;
  return 0;
}
SAYS(cuLaunchKernelEx, const CUlaunchConfig *config, CUfunction f, void **arguments, void **extra) {
  unsigned long long head[8] = {(unsigned long long)f, (unsigned long long)config->hStream, config->gridDimX,
                                config->gridDimY, config->gridDimZ, config->blockDimX, config->sharedMemBytes,
                                config->numAttrs};
  memcpy(noted, head, sizeof head);
  length = sizeof head;
  for (int i = 0; i < count; length += sizes[i++]) memcpy(noted + length, arguments[i], sizes[i]);
  launches++;
  return 0;
}
"""
STREAM = 77  # a handle that nobody guesses


def build(folder: Path) -> None:
    """Compile the driver and let Triton find it; the process must be started anew to load it."""
    import triton.backends.nvidia

    include = Path(triton.backends.nvidia.__file__).parent / "include"
    (folder / "driver.c").write_text(DRIVER)
    library = folder / "libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-w", f"-I{include}", str(folder / "driver.c"), "-o", str(library)]
    subprocess.run(command, check=True)


class Driver:
    """The driver that notes."""

    def __init__(self, folder: Path) -> None:
        import torch
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        self._library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        torch.cuda.current_device = lambda: 0
        torch.cuda.get_device_capability = lambda *device: (9, 0)  # type: ignore[assignment]
        active = CudaDriver()
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda device: STREAM
        driver.set_active(active)
        from moefactory.triton import launch, tape

        launch.current_stream = tape.current_stream = lambda device: STREAM  # type: ignore[attr-defined]

    def number(self, name: str) -> int:
        """How many launches, or tensor maps encoded, there were."""
        return ctypes.c_int.in_dll(self._library, name).value

    def expect(self, signature: dict[str, str] | None) -> None:
        """Say what the next kernels' parameters are: how many bytes of each to note. None: note none."""
        ctypes.c_int.in_dll(self._library, "count").value = 0
        if signature is None:
            return
        sizes = []
        for kind in signature.values():
            if kind.startswith("tensordesc"):
                rank = re.search(r"\[([^]]*)\]", kind)[1].count(",") + 1  # type: ignore[index]
                sizes += [128, *[4] * rank, *[8] * rank]
            elif kind != "constexpr":
                sizes.append(8 if kind[0] == "*" else int(kind[1:]) // 8)
        sizes += [8, 8]  # Triton's two scratch buffers
        (ctypes.c_int * 64).in_dll(self._library, "sizes")[: len(sizes)] = sizes
        ctypes.c_int.in_dll(self._library, "count").value = len(sizes)

    def noted(self) -> bytes:
        """Function, stream, grid, block, shared memory and the parameters of the last launch."""
        return bytes((ctypes.c_ubyte * self.number("length")).in_dll(self._library, "noted"))


def _step(few: bool = False, **options: Any) -> list[str]:
    """A forward and a backward of the experts; the names of what was launched. `few`: the plan is made on the way."""
    import fused
    import torch

    from moefactory.triton import few_tokens
    from moefactory.triton.launch import record_launches
    from moefactory.triton.ops import compute_experts

    p = fused.problem(fused.Shape(24, 4, 2, 64, 32), torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in p.leaves]
    flags = {name: options.pop(name, True) for name in fused.FLAGS}
    with record_launches() as names:
        weights, plan = few_tokens.route(leaves[0][:, :4].contiguous(), 2, True, 16) if few else (leaves[1], p.plan)
        out, _ = compute_experts(leaves[0], weights, plan, *leaves[2:], fused.options(flags, 2, **options))
        out.backward(p.dy)
    return names


def _tensors(experts: int, hidden: int, tokens: int) -> Any:
    """(x, gate, gate_up_proj, down_proj) in bfloat16, of 32 columns an expert."""
    import torch

    shapes = (tokens, hidden), (experts, hidden), (experts, 64, hidden), (experts, hidden, 32)
    return tuple(torch.randn(shape).bfloat16() for shape in shapes)


def ahead(driver: Driver) -> dict[str, Any]:
    """What three steps compile and launch in a process that has compiled nothing, of 24, 24 and 26 tokens: of each
    kernel its name, the thread that compiled it, and how many launches there had been."""
    import threading

    from triton import knobs

    from moefactory.triton import lookup

    compiled: list[tuple[str, str, int]] = []

    def heard(*, src: Any, cache_hit: bool, **more: Any) -> None:
        compiled.append((src.name, threading.current_thread().name, driver.number("launches")))

    found: dict[str, Any] = {}
    knobs.compilation.listener = heard
    for name, tokens in (("first", 24), ("again", 24), ("near", 26)):
        compiled.clear()
        before = driver.number("launches")
        names = _whole(_tensors(4, 64, tokens), {})
        launched = driver.number("launches") - before
        since = [(kernel, thread, at - before) for kernel, thread, at in compiled]
        found[name] = {"names": names, "launched": launched, "compiled": since}
    knobs.compilation.listener = None
    lookup.forget()  # other cases begin anew
    return found


def ahead_in_trouble(driver: Driver) -> dict[str, Any]:
    """What is said of a kernel that does not compile; the launches of others after interrupts and failures that pass,
    and beside an asynchronous mode of the caller's."""
    import _thread
    import contextlib
    import threading
    from concurrent.futures import ThreadPoolExecutor
    from unittest import mock

    import torch
    import triton
    import triton.language as tl
    from triton import knobs

    from moefactory.triton import launch, lookup

    @triton.jit
    def refused(out, ONE: tl.constexpr):
        tl.static_assert(ONE != 1, "one is not two")

    def failing(**compiled: Any) -> None:
        raise MemoryError

    def interrupted(**compiled: Any) -> None:
        _thread.interrupt_main()  # as by Ctrl-C: whoever compiles goes on

    found: dict[str, Any] = {}

    def run(one: int) -> None:
        launch.launch("refused", refused, (1,), torch.zeros(1), ONE=one)

    launch.compile_ahead(lambda: run(1))
    try:
        run(1)
    except triton.CompilationError as failed:
        found["refused"] = str(failed).strip().splitlines()[-1]
    for constant, trouble in ((2, interrupted), (3, failing)):
        knobs.compilation.listener = trouble
        with contextlib.suppress(KeyboardInterrupt):
            launch.compile_ahead(lambda constant=constant: run(constant))
            found[f"no interrupt by {trouble.__name__}"] = True
        knobs.compilation.listener = None
        before = driver.number("launches")
        launch.compile_ahead(lambda constant=constant: run(constant))
        run(constant)
        found[f"launched after {trouble.__name__}"] = driver.number("launches") - before

    def interrupting(*args: Any) -> Any:
        raise KeyboardInterrupt

    def no_threads(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with mock.patch.object(launch, "ThreadPoolExecutor", interrupting), contextlib.suppress(KeyboardInterrupt):
        _whole(_tensors(4, 72, 24), {})
        found["no interrupt at its start"] = True
    with mock.patch.object(threading.Thread, "start", no_threads), torch.autograd.set_multithreading_enabled(False):
        before = driver.number("launches")
        names = _whole(_tensors(4, 72, 24), {})
        names += _whole(_tensors(4, 80, 24), {})
        found["launched without threads"] = (len(names), driver.number("launches") - before)
    with ThreadPoolExecutor(1) as workers, triton.AsyncCompileMode(workers):
        before = driver.number("launches")
        names = _whole(_tensors(4, 88, 24), {})
        with mock.patch.object(launch, "direct", lambda *kernel: None):  # then it is kept as Triton gives it
            run(4), run(4)
        found["launched in a mode of the caller's"] = (len(names), driver.number("launches") - before)
    lookup.forget()  # other cases begin anew
    launch._compiled.clear()
    return found


def same_parameters(driver: Driver) -> dict[str, bool]:
    """{launch: whether the driver is told what Triton tells it}, each looked at once its kernel is known."""
    import fused

    from moefactory.triton import (
        activation,
        backward_dW,
        backward_dX,
        combine,
        decode,
        few_tokens,
        gate,
        gather,
        launch,
        replay,
        router,
        schedule,
    )

    found: dict[str, bool] = {}
    real = launch.launch
    options: dict[str, Any] = {}

    def comparing(name: str, kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        real(name, kernel, grid, *args, **meta)
        compiled = kernel[grid](*args, **meta)
        driver.expect(compiled.src.signature)
        kernel[grid](*args, **meta)
        told = driver.noted()
        before = driver.number("launches")
        real(name, kernel, grid, *args, **meta)
        same = driver.noted() == told and driver.number("launches") == before + 1
        direct = all(known.direct is not None for known in launch._compiled.values())
        found[name] = found.get(name, True) and same and direct
        driver.expect(None)

    from moefactory.triton import forward

    users = (activation, backward_dW, backward_dX, combine, decode, few_tokens, forward, gate, gather, router, schedule)
    for user in users:
        user.launch = comparing  # type: ignore[attr-defined]
    prepare, replay._prepare = replay._prepare, lambda *call: None  # there nothing is launched
    for flags in (fused.COMBINATIONS[0], fused.COMBINATIONS[-1]):
        options = {**flags, "kernels": fused.tma_kernels(flags)}
        _step(**options)
    _step(few=True)
    _whole(_tensors(4, 64, 24), {})
    decode.decode(_tensors(4, 64, 2), 2, True)
    for user in users:
        user.launch = real  # type: ignore[attr-defined]
    replay._prepare = prepare
    return found


def descriptors(driver: Driver) -> dict[str, int]:
    """How many tensor maps are encoded for a descriptor, again, for other sides, fewer rows, another address, again."""
    import torch
    import triton
    import triton.language as tl

    from moefactory.triton.launch import descriptor, launch

    @triton.jit
    def copy(desc, out, BLOCK: tl.constexpr):
        tl.store(out + tl.arange(0, BLOCK), tl.reshape(desc.load([0, 0]), (BLOCK,)))

    memory, out = torch.zeros(4096).half(), torch.zeros(64 * 64).half()
    wide, narrow, later = memory.view(64, 64), memory.view(128, 32), memory[2048:].view(32, 64)
    few = wide[:32]  # as after a call with more tokens: the address and the strides of the other
    launch("copy", copy, (1,), descriptor(wide, [16, 16]), out, BLOCK=256)
    found = {}
    sequence = {"first": wide, "again": wide, "sides": narrow, "rows": few, "address": later, "all": wide}
    for name, tensor in sequence.items():
        before = driver.number("encoded")
        launch("copy", copy, (1,), descriptor(tensor, [16, 16]), out, BLOCK=256)
        found[name] = driver.number("encoded") - before
    return found


def hooks(driver: Driver) -> dict[str, Any]:
    """What Triton's hooks hear of a step, and what `record_launches` does."""
    from triton import knobs

    heard: list[str] = []
    names = _step()
    knobs.runtime.launch_enter_hook.add(lambda metadata: heard.append(metadata.get()["name"]))
    try:
        again = _step()
    finally:
        knobs.runtime.launch_enter_hook.calls.clear()
    return {"names": names, "again": again, "heard": heard}


def played(driver: Driver) -> list[dict[str, Any]]:
    """Steps of each kind, written out and played: their launches, less the addresses, and the names recorded."""
    import fused

    from moefactory.triton import direct, lookup, replay

    told: list[list[Any]] = []
    call = direct.Direct.call

    def noting(self: Any, grid: Any, stream: int, args: Any) -> None:
        values = [a if isinstance(a, int) and a < 2**30 else type(a).__name__ for a in args]
        told.append([self.fixed[0], list(grid), stream, values])
        call(self, grid, stream, args)

    direct.Direct.call = noting  # type: ignore[method-assign]
    found = []
    for few, flags in [*product((False,), fused.COMBINATIONS), (True, fused.COMBINATIONS[0])]:
        lookup.forget()
        _step(few, **flags, kernels=fused.tma_kernels(flags))  # compiles
        lookup.forget()
        steps = []
        for _ in range(4):
            told.clear()
            names = _step(few, **flags, kernels=fused.tma_kernels(flags))
            steps.append([names, [list(one) for one in told]])
        tapes = [type(kept).__name__ for kept in replay._tapes.values()]
        same = all(one == steps[0] for one in steps)
        found.append({"same": same, "launches": len(steps[0][1]), "tapes": tapes, "few": few, "names": names})
    direct.Direct.call = call  # type: ignore[method-assign]
    return found


def _whole(tensors: Any, flags: dict[str, Any], top_k: int = 2) -> list[str]:
    """A step of the block as one operator; the names of what was launched."""
    import torch

    from moefactory.triton.launch import record_launches
    from moefactory.triton.options import FusedOptions
    from moefactory.triton.whole import compute_block

    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    with record_launches() as names:
        out, logits = compute_block(leaves, True, FusedOptions(top_k, **flags))  # type: ignore[arg-type]
        torch.autograd.backward((out, logits), (torch.ones_like(out), torch.ones_like(logits)))
    return names


def blocks(driver: Driver) -> list[dict[str, Any]]:
    """Of steps of the block, and of decoding: what is launched, four times, and what became of their kinds.

    64 tokens of 8 experts have row tiles of more than the 16 rows that few tokens usually have.
    """
    import torch

    from moefactory.triton import decode, lookup, replay
    from moefactory.triton.launch import record_launches

    def decoded() -> list[str]:
        with record_launches() as names, torch.no_grad():
            decode.decode(one, 2, True)
        return names

    one, few, many, high = _tensors(4, 64, 1), _tensors(4, 64, 24), _tensors(4, 64, 70), _tensors(8, 64, 64)
    runs: dict[str, Callable[[], list[str]]] = {
        "decoding": decoded,
        "few tokens": lambda: _whole(few, {}),
        "high tiles": lambda: _whole(high, {}, 8),
        "many tokens": lambda: _whole(many, {}),
        "recomputed": lambda: _whole(many, {"saved": "x"}),
        "reused": lambda: _whole(many, {"saved": "h_reused"}),
    }
    found = []
    for name, run in runs.items():
        lookup.forget()
        steps = [run() for _ in range(4)]
        tapes = [type(kept).__name__ for kept in replay._tapes.values()]
        found.append({"case": name, "same": all(one == steps[0] for one in steps), "tapes": tapes, "names": steps[0]})
    return found


def moved(driver: Driver) -> dict[str, str]:
    """A weight that is elsewhere, once its kind has a tape: what is said, and what is launched."""
    import torch

    from moefactory.triton import decode, lookup, whole
    from moefactory.triton.launch import record_launches
    from moefactory.triton.options import FusedOptions

    ways: dict[str, Callable[[Any], Any]] = {
        "block": lambda tensors: whole.compute_block(tensors, True, FusedOptions(2)),
        "decode": lambda tensors: decode.decode(tensors, 2, True),
    }
    found = {}
    for (way, run), index in product(ways.items(), (2, 3)):
        lookup.forget()
        tensors = list(_tensors(4, 64, 2))
        with torch.no_grad():
            for _ in range(4):
                run(tuple(tensors))
            tensors[index] = tensors[index].to("meta")
            with record_launches() as names:
                try:
                    run(tuple(tensors))
                    found[f"{way} {index}"] = f"launched {names}"
                except (ValueError, NotImplementedError) as refused:
                    found[f"{way} {index}"] = f"{type(refused).__name__}: {refused}{names or ''}"
    return found


CASES: dict[str, Callable[[Driver], Any]] = {
    "ahead": ahead,
    "ahead, in trouble": ahead_in_trouble,
    "same parameters": same_parameters,
    "descriptors": descriptors,
    "hooks": hooks,
    "played": played,
    "blocks": blocks,
    "moved": moved,
}


def main() -> None:
    """Build the driver, start anew with it, and print what each case finds."""
    folder = Path(sys.argv[1])
    if not (folder / "libcuda.so.1").exists():
        build(folder)
        paths = {name: str(folder) for name in ("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH", "MOEFACTORY_CACHE")}
        environment = {**os.environ, **paths, "TRITON_CACHE_DIR": str(folder / "triton")}
        environment.pop("TRITON_INTERPRET", None)
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    driver = Driver(folder)
    print(json.dumps({name: case(driver) for name, case in CASES.items()}))


if __name__ == "__main__":
    main()
