"""The warp-specialised kernels without a GPU: their Gluon source, run as Python, on tensors, barriers and copies that
are made here. Triton's own interpreter does not know Gluon.

A program's partitions are threads, of which one runs at a time; who goes on after a wait is drawn. What is asynchronous
on a GPU is as late here as it may be, or as early, by the same draw: a copy to shared memory lands at any time before
its barrier's phase is over, a product reads its operands when it is waited for, a store its tile. So a stage that is
overwritten too early, a phase or a count that is wrong, a store that is not waited for and a wait without an end all
show, as wrong numbers or as an error. What is not seen: layouts and swizzles, proxies and their fences, threads of one
partition that run apart, the order of memory.
"""

from __future__ import annotations

import math
import random
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction

TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


class Stuck(RuntimeError):
    """Every partition waits, and nothing is under way."""


# --- who runs ---------------------------------------------------------------------------------------------------------


class Partition(threading.Thread):
    """One partition of one program, with what it has under way."""

    def __init__(self, grid: Grid, program: int, warps: int, body: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self.grid, self.program, self.warps, self.body = grid, program, warps, body
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.copies: list[Callable[[], None]] = []  # cp.async since the last arrival
        self.stores: list[Callable[[], None]] = []  # by TMA, not waited for

    def run(self) -> None:
        self.go.acquire()
        try:
            if not self.grid.failed:
                self.body()
                assert not self.copies, "copies that no barrier knows of"
                assert not self.stores, "stores under way at the end of a partition"
        except BaseException as error:
            self.grid.failed.append(error)
        self.grid.alive[self.program] -= 1
        self.grid.next()


class Grid:
    """The programs of a launch, all at once but for the last `held`, whose multiprocessors another kernel holds: they
    begin when the others have ended, or with `until` have asked for so many copies. `copies` counts each program's."""

    def __init__(
        self, programs: int, seed: int, held: int = 0, until: int = 0, copies: Counter[int] | None = None
    ) -> None:
        self.programs, self.draw, self.late = programs, random.Random(seed), seed % 2 == 1
        self.first_held, self.copies = programs - held, Counter[int]() if copies is None else copies
        self.until = self.copies.total() + until if until else 2**62
        self.alive = Counter[int]()  # partitions
        self.waiting: list[Partition] = []
        self.flying: list[Callable[[], None]] = []  # copies that may land at any time
        self.failed: list[BaseException] = []
        self.barriers: list[Barrier] = []
        self.over = threading.Semaphore(0)

    def let_in(self) -> bool:
        ended = not any(number for program, number in self.alive.items() if program < self.first_held)
        return ended or self.copies.total() >= self.until

    def start(self, partitions: list[Partition]) -> None:
        self.waiting += partitions
        self.alive.update(partition.program for partition in partitions)
        for partition in partitions:
            partition.start()

    def run(self) -> None:
        self.next()
        self.over.acquire()
        for error in self.failed:
            raise error
        assert not self.flying, "copies that nobody waited for"
        begun = [b for b in self.barriers if b.pending != b.count or b.bytes]
        assert not begun, "arrivals or copies of a phase that does not end"

    def pause(self, ready: Callable[[], bool]) -> None:
        """Let others go first, in any case until `ready`."""
        me = current()
        me.ready = ready
        self.waiting.append(me)
        self.next()
        me.go.acquire()
        if self.failed:
            raise RuntimeError("something else failed")

    def next(self) -> None:
        """Whatever may happen next, until a partition goes on."""
        while self.waiting:
            ready = self.waiting if self.failed else [one for one in self.waiting if one.ready()]
            landing = 0 if self.late and ready else len(self.flying)
            happens = self.draw.randrange(len(ready) + landing) if ready or landing else None
            if happens is None:
                self.failed.append(
                    Stuck(f"{len(self.waiting)} partitions wait for a barrier, and nothing is under way")
                )
            elif happens < len(ready):
                chosen = ready[happens]
                self.waiting.remove(chosen)
                chosen.go.release()
                return
            else:
                try:
                    self.flying.pop(happens - len(ready))()
                except Exception as error:  # of no partition in particular
                    self.failed.append(error)
        self.over.release()


def current() -> Partition:
    thread = threading.current_thread()
    assert isinstance(thread, Partition)
    return thread


# --- memory -----------------------------------------------------------------------------------------------------------


class Pointers:
    """Addresses of elements of one tensor."""

    def __init__(self, memory: Tensor, offsets: Any = 0) -> None:
        self.memory, self.offsets = memory, torch.as_tensor(offsets, dtype=torch.int64)
        self.dtype = types.SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> Pointers:
        return Pointers(self.memory, self.offsets + other)

    def load(self, mask: Any = None, other: Any = None) -> Tensor:
        offsets, mask = self._where(mask)
        given = torch.zeros((), dtype=self.memory.dtype) if other is None else torch.as_tensor(other)
        out = given.to(self.memory.dtype).expand(offsets.shape).clone()
        out[mask] = self.memory[offsets[mask]]
        return out

    def store(self, value: Any, mask: Any = None) -> None:
        offsets, mask = self._where(mask)
        self.memory[offsets[mask]] = torch.as_tensor(value).to(self.memory.dtype).expand(offsets.shape)[mask]

    def _where(self, mask: Any) -> tuple[Tensor, Tensor]:
        mask = torch.as_tensor(True if mask is None else mask)
        offsets, mask = torch.broadcast_tensors(self.offsets, mask)
        inside = (offsets >= 0) & (offsets < len(self.memory))
        assert bool((inside | ~mask).all()), "an address outside of its tensor"
        return offsets, mask


class Descriptor:
    """A TMA descriptor: boxes of a tensor, zeros and nothing outside of `shape`; addresses wrap around, as on a GPU."""

    def __init__(self, made: Any) -> None:
        self.memory, self.layout = made.base.detach().view(-1), made.layout
        self.shape, self.strides, self.box = made.shape, made.strides, list(made.block_shape)

    def _box(self, coordinates: list[Any]) -> tuple[Tensor, Tensor]:
        offsets, inside = torch.zeros(self.box, dtype=torch.int64), torch.ones(self.box, dtype=torch.bool)
        for d, (first, size, stride, sides) in enumerate(
            zip(coordinates, self.shape, self.strides, self.box, strict=True)
        ):
            at = int(first) + torch.arange(sides).view([-1 if i == d else 1 for i in range(len(self.box))])
            offsets, inside = offsets + at * stride, inside & (at >= 0) & (at < size)
        return offsets, inside

    def read(self, coordinates: list[Any]) -> Tensor:
        offsets, inside = self._box(coordinates)
        return Pointers(self.memory, offsets).load(inside)

    def write(self, coordinates: list[Any], value: Tensor) -> None:
        offsets, inside = self._box(coordinates)
        Pointers(self.memory, offsets).store(value, inside)


class Shared:
    """Shared memory. Tiles of more than 64 columns lie in blocks of 64, one behind the other, as TMA puts them."""

    def __init__(self, memory: Tensor, shape: list[int], layout: Any, turned: bool = False) -> None:
        self.memory, self.shape, self.layout, self.turned = memory, [int(s) for s in shape], layout, turned
        self.dtype = memory.dtype

    @property
    def _tile(self) -> int:
        """How many dimensions lie in blocks."""
        return getattr(self.layout, "rank", 1)

    def index(self, which: Any) -> Shared:
        size = math.prod(self.shape[1:])
        assert 0 <= int(which) < self.shape[0], "a stage that there is not"
        return Shared(self.memory[int(which) * size :][:size], self.shape[1:], self.layout)

    def permute(self, order: Any) -> Shared:
        assert tuple(order) == (1, 0) and len(self.shape) == 2
        return Shared(self.memory, self.shape, self.layout, not self.turned)

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        assert dtype == self.dtype and math.prod(map(int, shape)) == len(self.memory)
        return Shared(self.memory, shape, layout)

    def load(self, layout: Any = None) -> Tensor:
        lead, columns = self.shape[: len(self.shape) - self._tile], self.shape[-1]
        if self._tile == 1 or columns <= 64:
            out = self.memory.view(self.shape)
        else:
            out = self.memory.view(*lead, columns // 64, -1, 64).transpose(-3, -2).reshape(self.shape)
        return (out.t() if self.turned else out).clone()

    def store(self, value: Tensor) -> None:
        assert list(value.shape) == self.shape and not self.turned, (value.shape, self.shape)
        if self._tile > 1 and self.shape[-1] > 64:
            value = value.reshape(-1, self.shape[-1] // 64, 64).transpose(0, 1)
        self.memory.copy_(value.reshape(-1).to(self.dtype))


class Barrier:
    """An mbarrier: arrivals and bytes until its phase is over."""

    def __init__(self) -> None:
        self.count = self.pending = self.bytes = self.phases = 0

    def arrive(self, count: int) -> None:
        assert 0 < count <= self.pending, "more arrivals than the barrier counts"
        self.pending -= count
        self._over()

    def arrived_bytes(self, count: int) -> None:
        self.bytes += count
        self._over()

    def _over(self) -> None:
        if not self.pending and not self.bytes:
            self.phases, self.pending = self.phases + 1, self.count


class Barriers:
    def __init__(self, count: int) -> None:
        self.all, self.shape = [Barrier() for _ in range(count)], [count, 1]

    def index(self, which: Any) -> Barrier:
        return self.all[int(which)]


# --- Gluon's names ----------------------------------------------------------------------------------------------------


class Mbarrier:
    MBarrierLayout = staticmethod(lambda: "barriers")

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def wait(barrier: Barrier, phase: Any) -> None:
        current().grid.pause(lambda: barrier.phases % 2 != int(phase))

    @staticmethod
    def expect(barrier: Barrier, bytes_: int, pred: Any = True) -> None:
        if pred:
            barrier.bytes -= bytes_
            barrier.arrive(1)

    @staticmethod
    def arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if pred:
            barrier.arrive(count)


class Tma:
    @staticmethod
    def async_copy_global_to_shared(
        desc: Descriptor, at: list[Any], barrier: Barrier, box: Shared, pred: Any = True
    ) -> None:
        where = [int(one) for one in at]

        def land() -> None:
            box.store(desc.read(where))
            barrier.arrived_bytes(math.prod(desc.box) * box.dtype.itemsize)

        if pred:
            assert box.shape == desc.box
            current().grid.copies[current().program] += 1
            current().grid.flying.append(land)

    @staticmethod
    def async_copy_shared_to_global(desc: Descriptor, at: list[Any], box: Shared) -> None:
        assert box.shape == desc.box
        where = [int(one) for one in at]
        current().stores.append(lambda: desc.write(where, box.load()))

    @staticmethod
    def store_wait(pendings: int) -> None:
        stores = current().stores
        while len(stores) > pendings:
            stores.pop(0)()


class AsyncCopy:
    @staticmethod
    def async_copy_global_to_shared(stage: Shared, pointers: Pointers, mask: Any = None) -> None:
        current().grid.copies[current().program] += 1
        current().copies.append(lambda: stage.store(pointers.load(mask, 0)))

    @staticmethod
    def mbarrier_arrive(barrier: Barrier, increment_count: bool = True) -> None:
        assert not increment_count
        me = current()
        copies, me.copies = me.copies, []

        def land() -> None:
            for copy in copies:
                copy()
            barrier.arrive(32 * me.warps)

        me.grid.flying.append(land)


class Sum:
    """What the tensor cores add up, and the products that are not waited for."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.products = value, list[tuple[Shared, Shared, bool]]()

    def wait(self, pendings: int) -> Sum:
        while len(self.products) > pendings:
            a, b, add = self.products.pop(0)
            product = (a.load().double() @ b.load().double()).float()  # as `interpreter.create_dot` does
            self.value = self.value + product if add else product
        return self

    def to(self, dtype: torch.dtype) -> Tensor:
        assert not self.products, "a sum of which products are under way"
        return self.value.to(dtype)


def warpgroup_mma(a: Shared, b: Shared, acc: Any, use_acc: Any = True, is_async: bool = False) -> Sum:
    acc = acc if isinstance(acc, Sum) else Sum(acc)
    acc.products.append((a, b, bool(use_acc)))
    return acc if is_async else acc.wait(0)


def warpgroup_mma_wait(pendings: int, deps: tuple[Sum, ...]) -> Sum:
    (acc,) = deps
    return acc.wait(pendings)


def _atomic_add(pointers: Pointers, value: Any, mask: Any = None, sem: Any = None) -> Tensor:
    current().grid.pause(lambda: True)  # others may come first
    before = pointers.load(mask, 0)
    offsets, mask = pointers._where(mask)
    pointers.memory.index_add_(0, offsets[mask], torch.as_tensor(value).expand(offsets.shape)[mask].to(before.dtype))
    return before


def _load(pointers: Pointers, mask: Any = None, other: Any = None, volatile: bool = False) -> Tensor:
    if volatile:  # what others write meanwhile
        current().grid.pause(lambda: True)
    return pointers.load(mask, other)


def _allocate(dtype: Any, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        made = Barriers(shape[0])
        current().grid.barriers += made.all
        return made
    memory = torch.full((math.prod(shape),), -77 if dtype is torch.int32 else math.nan, dtype=dtype)
    return Shared(memory, shape, layout)


def _specialize(partitions: list[tuple[Any, tuple[Any, ...]]], warps: list[int], registers: list[int]) -> None:
    """The first partition is the default one, of as many warps as the kernel's."""
    grid, program = current().grid, current().program
    bodies = [(lambda function=function, args=args: function(*args)) for function, args in partitions]
    assert len(warps) == len(registers) == len(bodies) - 1
    made = [Partition(grid, program, w, body) for w, body in zip([4, *warps], bodies, strict=True)]
    grid.start(made)


def _binary(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _assembly(code: str, constraints: str, args: list[Any], **_: Any) -> Any:
    return {"ex2.approx.ftz.f32": torch.exp2, "rcp.approx.ftz.f32": torch.reciprocal}[code.split(maxsplit=1)[0]](*args)


def _cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


def _assert(condition: Any) -> None:
    assert condition


class NVMMASharedLayout:
    """The only layout that says something here: its rank."""

    @staticmethod
    def get_default_for(shape: list[int], dtype: Any) -> Any:
        return gl.NVMMASharedLayout.get_default_for([int(s) for s in shape], TYPES[dtype])


LANGUAGE = types.SimpleNamespace(
    constexpr=lambda value: value,
    arange=lambda first, end, layout=None: torch.arange(first, end, dtype=torch.int32),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    where=lambda condition, a, b: torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b)),
    minimum=_binary(torch.minimum),
    maximum=_binary(torch.maximum),
    cdiv=_cdiv,
    fma=lambda a, b, c: a * b + c,
    inline_asm_elementwise=_assembly,
    min=lambda value, axis: value.amin(axis),
    sum=lambda value, axis: value.sum(axis, dtype=value.dtype),
    split=lambda value: (value[..., 0], value[..., 1]),
    join=lambda a, b: torch.stack((a, b), dim=-1),
    reshape=torch.reshape,
    convert_layout=lambda value, layout, assert_trivial=False: value,
    cast=lambda value, dtype, bitcast=False: value.view(dtype) if bitcast else value.to(dtype),
    static_range=range,
    static_assert=_assert,
    num_warps=lambda: current().warps,
    program_id=lambda axis: torch.tensor(current().program, dtype=torch.int32),
    num_programs=lambda axis: current().grid.programs,
    load=_load,
    store=lambda pointers, value, mask=None, eviction_policy="": pointers.store(value, mask),
    atomic_add=_atomic_add,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    BlockedLayout=lambda *sides: "registers",
    SliceLayout=lambda dim, parent: "registers",
    NVMMADistributedLayout=lambda *sides: "registers",
    SwizzledSharedLayout=lambda *sides: "flat",
    NVMMASharedLayout=NVMMASharedLayout,
    bfloat16=torch.bfloat16,
    int16=torch.int16,
    int32=torch.int32,
    int64=torch.int64,
    float32=torch.float32,
    uint32=torch.int64,  # torch has no division of these
)
NAMES: dict[str, Any] = {
    "gl": LANGUAGE,
    "mbarrier": Mbarrier,
    "tma": Tma,
    "async_copy": AsyncCopy,
    "fence_async_shared": lambda: None,
    "warpgroup_mma": warpgroup_mma,
    "warpgroup_mma_wait": warpgroup_mma_wait,
}
# id -> (what it is of, what was made of it): kept, since the id of something gone may be given to another
_run: dict[int, tuple[GluonJITFunction[Any], Callable[..., Any]]] = {}
_globals: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}


def as_python(kernel: GluonJITFunction[Any]) -> Callable[..., Any]:
    """The function under `gluon.jit`, whose names are those above."""
    if id(kernel) not in _run:
        real = kernel.fn.__globals__
        if id(real) not in _globals:
            names = dict(real)
            _globals[id(real)] = real, names
            names |= {name: made for name, made in NAMES.items() if name in names}
            for name, value in real.items():
                if isinstance(value, GluonJITFunction):
                    names[name] = as_python(value)
                elif isinstance(value, gl.constexpr):
                    names[name] = value.value
        _, names = _globals[id(real)]
        _run[id(kernel)] = kernel, types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__)
    return _run[id(kernel)][1]


def launch(seed: int, *neighbour: Any) -> Callable[..., None]:
    """What stands in for the package's `launch`: the whole grid, here; `neighbour`: see `Grid`."""

    def run(name: str, kernel: GluonJITFunction[Any], size: tuple[int, ...], *args: Any, **meta: Any) -> None:
        def argument(value: Any) -> Any:
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                return Pointers(value.detach().view(-1))
            return Descriptor(value) if hasattr(value, "block_shape") else value

        given = dict(zip(kernel.arg_names, map(argument, args), strict=False))
        given |= {name: value for name, value in meta.items() if name in kernel.arg_names}
        grid = Grid(size[0], seed, *neighbour)
        body = as_python(kernel)
        programs = [Partition(grid, program, 4, lambda: body(**given)) for program in range(size[0])]
        for program in programs[grid.first_held :]:
            program.ready = grid.let_in
        grid.start(programs)
        grid.run()

    return run


@contextmanager
def interpreted(
    monkeypatch: Any, programs: int = 3, seed: int = 0, held: int = 0, until: int = 0
) -> Iterator[Counter[int]]:
    """The warp-specialised kernels run here, in so many programs. `seed` draws who goes on and what lands when; with an
    odd one nothing lands before somebody has to wait for it. `held` and `until`: see `Grid`. Gives the copies of each
    program."""
    from moefactory.triton import specialized_dswiglu, specialized_dW, specialized_rows

    copies = Counter[int]()
    with monkeypatch.context() as patch:
        for module in (specialized_rows, specialized_dswiglu, specialized_dW):
            patch.setattr(module, "launch", launch(seed, held, until, copies))
            patch.setattr(module, "num_programs", lambda device, sm_margin: programs - sm_margin)
        yield copies
