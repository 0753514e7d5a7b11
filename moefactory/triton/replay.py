"""Calls that repeat: a call's launches and allocations, made again without the Python that decided on them.

What an operator of this package launches is a function of its flags, of its tensors' shapes, dtypes and alignment, and
of the chosen kernel configs; never of what the tensors hold. So the second call of a kind is recorded, and from the
third on its tape is played: memory is asked for as before (scratch of up to 32 MiB in one piece), torch's own operators
are called as before, and each launch is one C function with addresses filled in. A tape holds no tensors and no
addresses.

Before its first call of a kind an operator's code runs once with launches that only compile, on several of the host's
cores: one after the other, as each is met, a step's kernels take nearly twice as long. What else that run computes is
thrown away; nothing in it depends on what a kernel would have written. What it misses is compiled where it is launched.

The ordinary code stays what is read and what runs: at the first call of a kind, in the interpreter, under hooks of
Triton's, and wherever a recording meets something that it does not know.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..machine import interpreting
from .direct import Direct, hooked
from .launch import compile_ahead, on_device, watched
from .tape import Event, Made, Place, Slot, Tape, compose

MAX_TAPES = 2048  # some 10 KiB each
ALLOCATING = {"aten::empty.memory_format", "aten::empty_like", "aten::new_empty"}
_NEW, _SEEN, _NEVER = "new", "seen", "never"
_tapes: dict[tuple[Any, ...], Any] = {}
_met: set[tuple[Any, ...]] = set()


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, an operator's implementation, from its third call of a kind on without its Python."""
    if interpreting():
        return function

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = args[0].device
        tensors: list[Tensor] = []
        addresses: list[int] = []
        key: list[Any] = [function, device]
        bits, plain = 0, True
        for arg in args:
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                bits |= address
                plain = plain and arg.is_contiguous() and arg.device == device
                tensors.append(arg)
                addresses.append(address)
                key.append(arg.shape)
                key.append(arg.dtype)
            else:
                key.append(tuple(arg) if type(arg) is list else arg)
        if not plain or bits % 16:  # no tape is made for such, nor is one right
            return function(*args)
        kind = tuple(key)
        tape = _tapes.get(kind, _NEW)
        if type(tape) is Tape and not hooked():
            with on_device(device):
                return tape.play(tensors, addresses)
        if tape is _SEEN and not hooked():
            _tapes[kind] = _NEVER  # also where the call fails
            recorder = Recorder(tensors)
            with recorder, watched(recorder.launched):
                result = function(*args)
            _tapes[kind] = recorder.tape(result, device) or _NEVER
            return result
        if tape is _NEW:
            if len(_tapes) >= MAX_TAPES:
                forget()
            _tapes[kind] = _SEEN
            _prepare(kind, args)
        return function(*args)

    return run


def _prepare(kind: tuple[Any, ...], args: tuple[Any, ...]) -> None:
    """Compile what the first call of a kind (its function, its device, ...) launches, unless its like has been met.

    Not where a graph is captured, which would hold what torch computes here, nor under hooks, which hear of kernels.
    What fails here is left to the call itself: it does the same, and launches.
    """
    function, device, *_ = kind
    like = tuple(_like(part) for part in kind)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if like in _met or capturing or hooked():
        return
    _met.add(like)
    with suppress(Exception):
        compile_ahead(lambda: function(*args))


def _like(part: Any) -> Any:
    """What a part of a kind is to kernels: of a shape's rows the power of two above them, by which they are chosen, and
    the one that divides them, up to 16, for which they are compiled."""
    if not isinstance(part, torch.Size) or not part:
        return part
    rows, *rest = part
    return (rows - 1).bit_length(), min(rows & -rows, 16), *rest


def forget() -> None:
    """Record anew: other kernel configs may be chosen from now on."""
    _tapes.clear()
    _met.clear()


class Recorder(TorchDispatchMode):
    """Notes what a call allocates, which of torch's operators it calls and what it launches.

    It keeps no tensor alive, so that recording needs no more memory than the call. An address may thus have had several
    owners; of those, the one made last is meant: what else lived there was dead before it was made.

    Args:
        tensors: the call's own.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.given = len(tensors)
        self.slots = [Made.of(tensor, slot) for slot, tensor in enumerate(tensors)]
        self.events: list[tuple[str, Event]] = []
        self.understood = not any(a.overlaps(b) for i, a in enumerate(self.slots) for b in self.slots[:i])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        more = kwargs or {}
        out = func(*args, **more)
        name = func._schema.name + (f".{func._overloadname}" if func._overloadname != "default" else "")
        if not isinstance(out, Tensor) or any(isinstance(value, Tensor) for value in more.values()):
            self.understood &= name == "aten::promote_types"  # a function of dtypes: nothing to do again
        elif name in ALLOCATING:
            self.understood &= out.is_contiguous()
            self.events.append(("", Event("empty", self._add(out))))
        elif name != "aten::detach":  # torch.empty hands out a detached one
            named = tuple(self._named(arg) for arg in args)
            given = [arg for arg in args if isinstance(arg, Tensor)]
            shared = [arg for arg in given if arg.untyped_storage()._cdata == out.untyped_storage()._cdata]
            if any(arg is out for arg in given):
                kind, made = "operator", self._slot(out)
            elif shared and (owner := self._slot(shared[0])) is not None:
                kind, made = "view", self._add(out, self.slots[owner].base)
            else:
                kind, made = "operator", self._add(out)
            self.events.append(("", Event(kind, made, func, named, tuple(more.items()))))
        return out

    def launched(self, name: str, direct: Direct | None, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """A launch; `direct` is None where it went another way."""
        self.understood &= direct is not None
        places = tuple(self._place(arg) for arg in args)
        self.events.append((name, Event("launch", None, direct, places, (), (*grid, 1, 1)[:3])))

    def tape(self, result: Any, device: torch.device) -> Tape | None:
        """The tape of the call that gave `result`; None where something was not understood."""
        returned = result if isinstance(result, tuple) else (result,)
        slots = tuple(None if one is None else self._result(one) for one in returned)
        known = all(one is None or slot is not None for slot, one in zip(slots, returned, strict=True))
        if not self.understood or not known:
            return None
        return compose(self.events, self.slots, self.given, slots if isinstance(result, tuple) else slots[0], device)

    def _result(self, tensor: Tensor) -> int | None:
        if tensor.numel():
            return self._slot(tensor)
        self.events.append(("", Event("empty", self._add(tensor))))  # nothing tells empty ones apart: each is made anew
        return len(self.slots) - 1

    def _add(self, tensor: Tensor, base: int | None = None) -> int:
        slot = len(self.slots)
        self.slots.append(Made.of(tensor, slot if base is None else base))
        return slot

    def _slot(self, tensor: Tensor) -> int | None:
        """The last that lies where this one does, and looks the same."""
        sought = Made.of(tensor, 0)[:-1]
        return next((slot for slot in reversed(range(len(self.slots))) if self.slots[slot][:-1] == sought), None)

    def _named(self, arg: Any) -> Any:
        """The argument of an operator: a tensor by its slot."""
        if isinstance(arg, (list, tuple)) and any(isinstance(one, Tensor) for one in arg):
            self.understood = False
        if not isinstance(arg, Tensor):
            return arg
        slot = self._slot(arg)
        self.understood &= slot is not None
        return Slot(slot or 0)

    def _place(self, arg: Any) -> Place | int:
        """The argument of a kernel: a tensor, or a descriptor of one, by its memory."""
        if isinstance(arg, int):
            return arg
        tensor: Tensor = arg if isinstance(arg, Tensor) else arg.base
        if not tensor.numel():
            return 0  # the address of no memory
        sought = Made.of(tensor, 0)
        for slot in reversed(range(len(self.slots))):
            owner = self.slots[slot]
            if owner.base == slot and owner.contains(sought):
                offset = sought.address - owner.address
                return Place(slot, offset) if tensor is arg else Place(slot, offset, _without_tensor(arg))
        self.understood = False
        return 0


def _without_tensor(descriptor: Any) -> Any:
    like = copy.copy(descriptor)
    like.base = None  # a tape keeps no memory
    return like


__all__ = ["Recorder", "forget", "replayed"]
