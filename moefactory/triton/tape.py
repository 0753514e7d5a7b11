"""A call's allocations, operators and launches as a list of steps over numbered tensors; see `replay`.

slots    the call's own tensors first, then what it makes, in order
values   by index: the slots' addresses, then what launches need: constants, shifted addresses, tensor maps
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .direct import Direct, current_stream, tensor_map
from .launch import _recorders

MAX_SCRATCH = 32 << 20  # bytes in one piece, freed at the end of the call; what is larger, after its last use
ALIGNED = 256
BUILT_IN = {torch.ops.aten.mm.default: torch.mm, torch.ops.aten.t.default: torch.t}  # the same, called 1 us faster

Step = Callable[[list[Any], list[Any], int], None]  # of tensors by slot, values by index, and the stream


class Made(NamedTuple):
    """Where a tensor lay and what it looked like; `base` is the slot whose memory it is."""

    address: int
    size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    base: int

    @classmethod
    def of(cls, tensor: Tensor, base: int) -> Made:
        """Of a tensor."""
        return cls(tensor.data_ptr(), tensor.nbytes, tuple(tensor.shape), tensor.stride(), tensor.dtype, base)

    def overlaps(self, other: Made) -> bool:
        """Whether they share memory, both being contiguous."""
        return self.address < other.address + other.size and other.address < self.address + self.size

    def contains(self, other: Made) -> bool:
        """Whether the other lies in this one's memory, both being contiguous."""
        return self.address <= other.address and other.address + other.size <= self.address + self.size


class Slot(NamedTuple):
    """A tensor among an operator's arguments."""

    number: int


class Place(NamedTuple):
    """An address among a launch's arguments: bytes into a slot's memory. With `like`, a descriptor of what is there."""

    slot: int
    offset: int
    like: Any = None  # a descriptor without its tensor


class Event(NamedTuple):
    """What a call did: `kind` is empty, view, operator or launch.

    `made` is the slot of the result. `what` is called with `args`: an operator with `Slot`s, a kernel (`grid` is its)
    with integers and `Place`s.
    """

    kind: str
    made: int | None = None
    what: Any = None
    args: tuple[Any, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()  # an operator's keyword arguments, without tensors
    grid: tuple[int, ...] = ()

    @property
    def slots(self) -> list[int]:
        """Those that are read or written."""
        used = [a.number if isinstance(a, Slot) else a.slot for a in self.args if isinstance(a, (Slot, Place))]
        return used if self.made is None else [*used, self.made]


class Tape:
    """What a call does, for any tensors of its kind.

    Args:
        names: of the kernels, in order.
        slots: how many there are.
        values: those behind the slots' addresses.
        steps: what to do.
        outputs: the slots of the result, None where it holds None; no tuple where it is one tensor.
    """

    def __init__(
        self,
        names: list[str],
        slots: int,
        values: list[Any],
        steps: list[Step],
        outputs: tuple[int | None, ...] | int | None,
    ) -> None:
        self.names, self.slots, self.values, self.steps, self.outputs = names, slots, values, steps, outputs

    def play(self, given: list[Tensor], addresses: list[int]) -> Any:
        """The call's result for these tensors, which start at these addresses."""
        for names in _recorders:
            names.extend(self.names)
        made: list[Any] = [None] * (self.slots - len(given))
        tensors, values = given + made, addresses + made + self.values
        stream = current_stream(torch.cuda.current_device())
        with torch._C._AutoDispatchBelowAutograd():  # nothing in here is differentiated: torch need not look at it
            for step in self.steps:
                step(tensors, values, stream)
        if isinstance(self.outputs, tuple):
            return tuple([None if slot is None else tensors[slot] for slot in self.outputs])
        return None if self.outputs is None else tensors[self.outputs]


def compose(
    events: list[tuple[str, Event]],
    made: list[Made],
    given: int,
    outputs: tuple[int | None, ...] | int | None,
    device: torch.device,
) -> Tape:
    """The tape of what a call did.

    Args:
        events: (a kernel's name, what happened), in order.
        made: what was where, by slot.
        given: how many of the slots are the call's own tensors.
        outputs: the slots of its result.
        device: of all of it.
    """
    returned = {slot for slot in (outputs if isinstance(outputs, tuple) else (outputs,)) if slot is not None}
    kept = _needed([event for _, event in events], returned)
    last = {made[slot].base: i for i, event in enumerate(kept) for slot in event.slots}
    asked_for = {made[s].base for event in kept if event.kind in {"view", "operator"} for s in event.slots}
    lasting = asked_for | {made[slot].base for slot in returned}
    scratch: dict[int, int] = {}  # slot -> its offset; only kernels see these, so that they need not be tensors
    total = 0
    for event in kept:
        size = made[event.made].size if event.kind == "empty" and event.made is not None else MAX_SCRATCH
        if event.made not in lasting and total + size < MAX_SCRATCH:
            scratch[event.made], total = total, total + -(-size // ALIGNED) * ALIGNED  # type: ignore[index]
    slots = len(made) + 1  # the last one is the scratch
    values: list[Any] = []
    shifted: dict[tuple[int, int], int] = {}
    steps = [_scratch(slots - 1, total, device, list(scratch.items()))] if scratch else []
    for i, event in enumerate(kept):
        if event.kind == "launch":
            steps += _launch(event, slots, values, shifted)
        elif event.kind != "empty":
            steps.append(_operator(event))
        elif event.made not in scratch:
            steps.append(_empty(event.made, made[event.made], device))  # type: ignore[arg-type,index]
        ended = [s for s in {made[s].base for s in event.slots} if last[s] == i and s >= given and s not in scratch]
        steps += [_free(s) for s in ended if s not in {made[slot].base for slot in returned}]
    return Tape([name for name, event in events if event.kind == "launch"], slots, values, steps, outputs)


def _needed(events: list[Event], returned: set[int]) -> list[Event]:
    """Without the views and the memory that nothing looks at: kernels are given addresses."""
    needed, kept = set(returned), []
    for event in reversed(events):
        if event.kind in {"view", "empty"} and event.made not in needed:
            continue
        needed.update(event.slots)
        kept.append(event)
    return kept[::-1]


def _scratch(slot: int, size: int, device: torch.device, parts: list[tuple[int, int]]) -> Step:
    def step(tensors: list[Any], values: list[Any], stream: int) -> None:
        memory = tensors[slot] = torch.empty(size, dtype=torch.uint8, device=device)
        start = _address(memory)
        for part, offset in parts:
            values[part] = start + offset

    return step


def _empty(slot: int, like: Made, device: torch.device) -> Step:
    shape, dtype = like.shape, like.dtype

    def step(tensors: list[Any], values: list[Any], stream: int) -> None:
        memory = tensors[slot] = torch.empty(*shape, dtype=dtype, device=device)  # from a torch.Size: 1 us more
        values[slot] = _address(memory)

    return step


def _address(memory: Tensor) -> int:
    """Of fresh memory. The kernels of a tape were compiled for multiples of 16, as torch's allocators give."""
    address = memory.data_ptr()
    if address % 16:
        raise RuntimeError(f"allocator: got memory at {address:#x}; needed: a multiple of 16 bytes")
    return address


def _free(slot: int) -> Step:
    def step(tensors: list[Any], values: list[Any], stream: int) -> None:
        tensors[slot] = None

    return step


def _operator(event: Event) -> Step:
    made, given, more = event.made, list(event.args), dict(event.more)
    function = BUILT_IN.get(event.what, event.what)
    places = [(i, arg.number) for i, arg in enumerate(given) if isinstance(arg, Slot)]

    def step(tensors: list[Any], values: list[Any], stream: int) -> None:
        args = given.copy()
        for i, slot in places:
            args[i] = tensors[slot]
        out = tensors[made] = function(*args, **more)  # type: ignore[index]
        values[made] = out.data_ptr()  # type: ignore[index]

    return step


def _launch(event: Event, slots: int, values: list[Any], shifted: dict[tuple[int, int], int]) -> list[Step]:
    """The launch, and before it what its arguments need. `shifted`: (slot, offset) -> the value that is their sum."""

    def index_of(value: Any) -> int:
        values.append(value)
        return slots + len(values) - 1

    steps: list[Step] = []
    direct: Direct = event.what
    metadata = dict(direct.descriptors)
    indices: list[int] = []
    for place, arg in enumerate(event.args):
        if not isinstance(arg, Place):
            indices.append(index_of(arg))
            continue
        address = arg.slot
        if arg.offset:
            if (known := shifted.get((arg.slot, arg.offset))) is None:
                known = shifted[arg.slot, arg.offset] = index_of(None)
                steps.append(_shift(known, arg.slot, arg.offset))
            address = known
        if arg.like is not None:
            shape, strides = tuple(arg.like.shape), tuple(arg.like.strides)
            found = index_of(None)
            steps.append(_map(found, address, arg.like, shape, strides, metadata[place]))
            indices += [found, *map(index_of, shape), *map(index_of, strides)]
        else:
            indices.append(address)
    arguments = itemgetter(*indices, *map(index_of, direct.constants))
    grid, call = event.grid, direct.call

    def step(tensors: list[Any], values: list[Any], stream: int) -> None:
        call(grid, stream, arguments(values))

    return [*steps, step]


def _shift(index: int, slot: int, offset: int) -> Step:
    def step(tensors: list[Any], values: list[Any], stream: int) -> None:
        values[index] = values[slot] + offset

    return step


def _map(index: int, address: int, like: Any, shape: tuple[int, ...], strides: tuple[int, ...], metadata: Any) -> Step:
    def step(tensors: list[Any], values: list[Any], stream: int) -> None:
        values[index] = tensor_map(like, values[address], shape, strides, metadata)

    return step


__all__ = ["Event", "Made", "Place", "Slot", "Tape", "compose"]
