"""Tapes of calls: what is played gives the bits of what was written, for other tensors, and only where it may.

The calls here launch Python functions in place of kernels; they read and write memory at the addresses that they get.
That the package's own calls repeat bit for bit is asserted for all flags below, which on a GPU plays tapes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from itertools import product
from threading import get_ident
from typing import Any

import fused
import judge
import pytest
import torch
from fused import COMBINATIONS, DEVICE, GPU, Shape, differing, flag_id, options
from torch import Tensor

from moefactory.block import Qwen3MoeFusedGroupedGEMMBlock
from moefactory.config import ResolvedModel
from moefactory.triton import launch, lookup, replay, tape
from moefactory.triton.direct import Direct
from moefactory.triton.ops import compute_experts
from moefactory.triton.replay import replayed

SIZE = 24


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


def add(x: int, y: int, z: int, stream: int, args: Any) -> None:
    """The kernel: out = a + b, float32, at three addresses."""
    a, b, out, count, _ = args
    floats = ctypes.c_float * count
    left, right, into = (floats.from_address(address) for address in (a, b, out))
    for i in range(count):
        into[i] = left[i] + right[i]


ADD = Direct(add, (), True, ("a constexpr",), ())


def run(name: str, direct: Direct | None, *args: Any) -> None:
    """What `launch` does of it."""
    if watcher := launch._watchers.get(get_ident()):
        watcher(name, direct, (1,), args)
    values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    ADD.run((1, 1, 1), 0, values)


Call = Callable[..., Any]


@pytest.fixture
def playing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Call], tuple[Call, list[int]]]:
    """Turns a function into (the replayed function, a list that grows whenever the function itself runs).

    None is run ahead of its first call: `run` below would launch.
    """
    monkeypatch.setattr(replay, "_prepare", lambda *call: None)
    monkeypatch.setattr(replay, "interpreting", lambda: False)
    monkeypatch.setattr(tape, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def of(function: Call) -> tuple[Call, list[int]]:
        ran: list[int] = []

        def counted(*args: Any) -> Any:
            ran.append(1)
            return function(*args)

        return replayed(counted), ran

    return of


def sums(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, None, Tensor]:
    """(2a + 2b scaled, None, a view of it), by scratch, an operator of torch, a view and memory in the middle."""
    first, out = torch.empty_like(a), torch.empty(2 * SIZE)
    run("first", ADD, a, b, first, SIZE)
    scaled = first * scale
    run("low", ADD, scaled, scaled, out, SIZE)
    run("high", ADD, first, scaled, out[SIZE:], SIZE)
    return out, None, out.view(2, SIZE)


def spread(a: Tensor, none: None, b: Tensor) -> Tensor:
    """Sums in four places of one memory, of which one is read again from two of them; None between the tensors."""
    out = torch.empty(4 * SIZE)
    run("first", ADD, a, b, out, SIZE)
    run("second", ADD, a, a, out[SIZE:], SIZE)
    run("third", ADD, out[SIZE:], b, out[2 * SIZE :], SIZE)
    run("fourth", ADD, out[SIZE:], out[2 * SIZE :], out[3 * SIZE :], SIZE)
    return out


def pair(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, generator=g), torch.randn(SIZE, generator=g)


@pytest.mark.interpreter
def test_what_is_run_ahead_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first call, a kind whose like has not been: rows with another power of two above them or that divides
    them, up to 16, another width, dtype or flag. Not under Triton's hooks, which would hear of kernels; once more after
    other kernel configs may have been chosen."""
    ahead: list[Call] = []
    monkeypatch.setattr(replay, "interpreting", lambda: False)
    monkeypatch.setattr(replay, "compile_ahead", ahead.append)
    monkeypatch.setattr(tape, "current_stream", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    played = replayed(lambda x, flag: x)

    def runs(rows: int, width: int = 3, flag: bool = True, dtype: torch.dtype = torch.float32) -> bool:
        before = len(ahead)
        played(torch.zeros(rows, width, dtype=dtype), flag)
        return len(ahead) > before

    assert [runs(rows) for rows in (64, 64, 48, 32, 80, 40, 56, 36, 34, 33, 63, 1, 0)] == [
        *(True, False, False),  # 48 is like 64
        *(True, True),  # 32 and 80: other powers
        *(True, False),  # 40 and 56 are multiples of 8 alone
        *(True, True, True, False),  # of 4, of 2, of none
        *(True, True),
    ]
    assert runs(32, width=4)
    assert runs(32, flag=False)
    assert runs(32, dtype=torch.float64)
    assert not runs(32)
    lookup.forget()
    monkeypatch.setattr(replay, "hooked", lambda: True)
    assert not runs(32)
    monkeypatch.setattr(replay, "hooked", lambda: False)
    assert not runs(32)  # no longer its first call
    assert runs(64)  # met, and forgotten


@pytest.mark.interpreter
def test_a_tape_gives_the_bits_of_the_call(playing: Any) -> None:
    """From the third call on the function is not run, for whatever tensors, and names are recorded as ever."""
    played, ran = playing(sums)
    kept = []
    for seed in range(6):
        a, b = pair(seed)
        with launch.record_launches() as names:
            got = played(a, b, 3.0)
        kept.append((a, b, got))  # no memory is used twice
        assert names == (["first", "low", "high"] if seed > 1 else [])  # `run` names nothing itself
        for a, b, (out, nothing, view) in kept:
            first = a + b
            assert torch.equal(out, torch.cat([first * 3 + first * 3, first + first * 3]))
            assert nothing is None
            assert view.data_ptr() == out.data_ptr()
            assert view.shape == (2, SIZE)
    assert len(ran) == 2


@pytest.mark.interpreter
def test_places_of_one_memory_are_kept_apart(playing: Any) -> None:
    """Each offset has its own address, worked out once for all launches; None may stand among the tensors."""
    played, ran = playing(spread)
    for seed in range(4):
        a, b = pair(seed)
        assert torch.equal(played(a, None, b), torch.cat([a + b, a + a, a + a + b, a + a + (a + a + b)]))
    assert len(ran) == 2


@pytest.mark.interpreter
def test_results_are_tensors_of_their_own(playing: Any) -> None:
    """Empty ones, too: the results of an operator may not be one and the same."""
    played, ran = playing(lambda a: (a.new_empty(0), a.new_empty(0), torch.zeros(0, 3), a * 2))
    for _ in range(4):
        results = played(pair(0)[0])
        assert len({id(one) for one in results}) == 4
        assert [tuple(one.shape) for one in results] == [(0,), (0,), (0, 3), (SIZE,)]
    assert len(ran) == 2


@pytest.mark.interpreter
def test_each_kind_has_a_tape_of_its_own(playing: Any) -> None:
    """Another flag, another shape, another dtype, another alignment."""
    played, ran = playing(lambda a, flag: a * (2.0 if flag else 3.0))
    memory = torch.ones(64)
    kinds = [(memory, True), (memory, False), (memory[:32], True), (memory.double(), True), (memory[1:33], True)]
    for _ in range(4):
        for tensor, flag in kinds:
            assert torch.equal(played(tensor, flag), tensor * (2.0 if flag else 3.0))
    assert len(ran) == 2 * 4 + 4  # what is not aligned is not played


@pytest.mark.interpreter
def test_news_are_heard(playing: Any) -> None:
    """After a search, or when memories are dropped, the function runs again; so it does under a hook of Triton's."""
    from triton import knobs

    played, ran = playing(sums)
    a, b = pair(0)
    for _ in range(4):
        played(a, b, 2.0)
    lookup.forget()
    played(a, b, 2.0)
    assert len(ran) == 3
    for _ in range(3):
        played(a, b, 2.0)
    assert len(ran) == 4
    knobs.runtime.launch_exit_hook.add(print)
    try:
        played(a, b, 2.0)
    finally:
        knobs.runtime.launch_exit_hook.remove(print)
    assert len(ran) == 5


def _of_a_list(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b])


def _of_somebody_else(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(a)
    run("somebody's", ADD, a, SOMEBODY, out, SIZE)
    return out


def _another_way(a: Tensor, b: Tensor) -> Tensor:
    out = torch.empty_like(a)
    run("another way", None, a, b, out, SIZE)
    return out


SOMEBODY = torch.ones(SIZE)


@pytest.mark.interpreter
@pytest.mark.parametrize("function", [_of_a_list, _of_somebody_else, _another_way])
def test_what_is_not_understood_is_not_played(playing: Any, function: Call) -> None:
    """An operator of a list of tensors, memory that is nobody's argument, a launch that went Triton's way."""
    played, ran = playing(function)
    for seed in range(4):
        assert torch.equal(played(*pair(seed)), function(*pair(seed)))
    assert len(ran) == 4


@pytest.mark.interpreter
def test_arguments_that_share_memory_make_no_tape(playing: Any) -> None:
    """Which of the two a kernel was given could not be told."""
    played, ran = playing(sums)
    a, b = pair(0)
    for _ in range(3):
        played(a, a, 2.0)
    assert len(ran) == 3
    assert torch.equal(played(a, b, 2.0)[0], sums(a, b, 2.0)[0])


@pytest.mark.interpreter
def test_recording_keeps_no_memory_alive(playing: Any) -> None:
    """What the call lets go is gone at once in the recorded call, too: its peak is the call's own."""
    owners: list[int] = []

    def lets_go(a: Tensor, b: Tensor) -> Tensor:
        first, out = torch.empty_like(a), torch.empty_like(a)
        run("first", ADD, a, b, first, SIZE)
        owners.append(torch._C._storage_Use_Count(first.untyped_storage()._cdata))
        run("again", ADD, first, b, out, SIZE)
        return out

    played, _ = playing(lets_go)
    for seed in range(4):
        a, b = pair(seed)
        assert torch.equal(played(a, b), a + b + b)
    assert len(owners) == 2
    assert owners[0] == owners[1]


@pytest.mark.gpu
def test_no_step_needs_more_memory_than_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is recorded and those that are played, at sizes where buffers take turns: a buffer is 16 MiB, what
    is in one piece until the end 1."""
    monkeypatch.setattr(tape, "MAX_SCRATCH", 1 << 20)
    p = fused.problem(Shape(4096, 8, 4, 512, 512), torch.bfloat16).to(DEVICE)
    peaks, held = [], []
    for _ in range(5):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        leaves = [t.clone().requires_grad_() for t in p.leaves]
        out, _ = compute_experts(leaves[0], leaves[1], p.plan, leaves[2], leaves[3], options(COMBINATIONS[0], 4))
        held.append(torch.cuda.memory_allocated())
        out.backward(p.dy)
        peaks.append(torch.cuda.max_memory_allocated())
        del leaves, out
    assert max(peaks[1:]) <= peaks[0] + tape.MAX_SCRATCH
    assert max(held[1:]) <= held[0]


EVERYTHING = product(COMBINATIONS, ("h", "h_reused", "x"))
STEPS = list(EVERYTHING) if GPU else [(COMBINATIONS[0], "h_reused"), (COMBINATIONS[9], "x")]  # slow when interpreted


@pytest.mark.parametrize(("flags", "saved"), STEPS, ids=lambda v: v if isinstance(v, str) else flag_id(v))
def test_a_step_repeats_bit_for_bit(flags: dict[str, bool], saved: str) -> None:
    """Steps on fresh tensors: written out, recorded, then played on a GPU."""
    p = fused.problem(Shape(40, 5, 2, 64, 32), torch.float32)
    o = options(flags, 2, saved=saved)
    first, *others = [fused.run(p, o) for _ in range(5 if GPU else 3)]
    assert [differing(first, other) for other in others] == [[]] * len(others)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 256, 1024])
@pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
def test_a_block_repeats_bit_for_bit(flags: dict[str, bool], tokens: int) -> None:
    """The shipped kernels in bfloat16, warp-specialised where there are many rows: steps, and forwards without grad."""
    model = ResolvedModel(256, 128, 8, 2, True, "silu")
    weights = judge.unit_weights(model, torch.bfloat16)
    block = Qwen3MoeFusedGroupedGEMMBlock(model, *(weights[name].to(DEVICE) for name in judge.WEIGHTS), **flags)
    x, dy = (t.to(DEVICE) for t in judge.data(tokens, model, torch.bfloat16))
    steps = [judge.run_block(block, x.clone(), dy.clone()) for _ in range(5)]
    assert [differing(steps[0], other) for other in steps[1:]] == [[]] * 4
    with torch.no_grad():
        outs = [block(x.clone())[0] for _ in range(5)]
    assert all(torch.equal(out, steps[0]["hidden_states"].view_as(out)) for out in outs)
    names = {type(kept).__name__ for kept in replay._tapes.values()}
    assert names == {"Tape"}  # nothing that could not be recorded
