"""Calls that repeat: a call's launches and allocations, made again without the Python that decided on them.

What an operator of this package launches is a function of its flags, of its tensors' shapes, dtypes and alignment, and
of the chosen kernel configs; never of what the tensors hold. So the second call of a kind is recorded, and from the
third on its tape is played: memory is asked for as before (small scratch in one piece), torch's own operators are
called as before, and each launch is one C function with addresses filled in. A tape holds no tensors and no addresses.

The ordinary code stays what is read and what runs: at the first call of a kind, in the interpreter, under hooks of
Triton's, and wherever a recording meets something that it does not know.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..machine import interpreting
from .direct import Direct, hooked
from .launch import on_device, watched
from .tape import Event, Place, Slot, Tape, compose

MAX_TAPES = 512
ALLOCATING = {"aten::empty.memory_format", "aten::empty_like", "aten::new_empty"}
_NEW, _SEEN, _NEVER = "new", "seen", "never"
_tapes: dict[tuple[Any, ...], Any] = {}


def replayed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, an operator's implementation, from its third call of a kind on without its Python."""
    if interpreting():
        return function

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        key: list[Any] = [function]
        tensors: list[Tensor] = []
        addresses: list[int] = []
        for arg in args:
            if isinstance(arg, Tensor):
                address = arg.data_ptr()
                tensors.append(arg)
                addresses.append(address)
                key += (arg.shape, arg.dtype, address % 16 == 0 and arg.is_contiguous())
            else:
                key.append(tuple(arg) if type(arg) is list else arg)
        device = tensors[0].device
        key.append(device)
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
            _tapes[kind] = recorder.tape(result) or _NEVER
            return result
        if tape is _NEW:
            if len(_tapes) >= MAX_TAPES:
                _tapes.clear()
            _tapes[kind] = _SEEN
        return function(*args)

    return run


def forget() -> None:
    """Record anew: other kernel configs may be chosen from now on."""
    _tapes.clear()


class Recorder(TorchDispatchMode):
    """Notes what a call allocates, which of torch's operators it calls and what it launches.

    Args:
        tensors: the call's own.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.given = len(tensors)
        self.tensors = list(tensors)  # by slot; alive, so that an address has one meaning
        self.also: list[tuple[Tensor, int | None]] = []  # other objects for a slot's tensor
        self.base = list(range(self.given))  # slot -> the slot whose memory it is
        self.events: list[tuple[str, Event]] = []
        plain = all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
        self.understood = plain and not any(_overlap(a, b) for i, a in enumerate(tensors) for b in tensors[:i])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        more = kwargs or {}
        if not isinstance(out, Tensor) or any(isinstance(value, Tensor) for value in more.values()):
            self.understood &= func._schema.name == "aten::promote_types"  # a function of dtypes: nothing to do again
            return out
        name = func._schema.name + (f".{func._overloadname}" if func._overloadname != "default" else "")
        if name in ALLOCATING:
            self.understood &= out.is_contiguous()
            self.events.append(("", Event("empty", self._add(out))))
            return out
        if name == "aten::detach":  # torch.empty hands out a detached one
            self.also.append((out, self._slot(args[0])))
            return out
        named = tuple(self._named(arg) for arg in args)
        made, kind = self._slot(out), "operator"  # in place, where the result has a slot already
        if made is None:
            owners = [s for arg in args if isinstance(arg, Tensor) and (s := self._slot(arg)) is not None]
            shared = [s for s in owners if _storage(self.tensors[s]) == _storage(out)]
            made, kind = (self._add(out, self.base[shared[0]]), "view") if shared else (self._add(out), "operator")
        self.events.append(("", Event(kind, made, func, named, tuple(more.items()))))
        return out

    def launched(self, name: str, direct: Direct | None, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """A launch; `direct` is None where it went another way."""
        self.understood &= direct is not None
        places = tuple(self._place(arg) for arg in args)
        self.events.append((name, Event("launch", None, direct, places, (), (*grid, 1, 1)[:3])))

    def tape(self, result: Any) -> Tape | None:
        """The tape of the call that gave `result`; None where something was not understood."""
        returned = result if isinstance(result, tuple) else (result,)
        slots = [None if one is None else self._slot(one) for one in returned]
        if not self.understood or any(
            slot is None and one is not None for slot, one in zip(slots, returned, strict=True)
        ):
            return None
        outputs = tuple(slots) if isinstance(result, tuple) else slots[0]
        return compose(self.events, self.tensors, self.base, self.given, outputs)

    def _add(self, tensor: Tensor, base: int | None = None) -> int:
        self.tensors.append(tensor)
        self.base.append(len(self.tensors) - 1 if base is None else base)
        return len(self.tensors) - 1

    def _slot(self, tensor: Tensor) -> int | None:
        known = [*((t, slot) for slot, t in enumerate(self.tensors)), *self.also]
        return next((slot for one, slot in known if one is tensor), None)

    def _named(self, arg: Any) -> Any:
        """The argument of an operator: a tensor by its slot."""
        if isinstance(arg, (list, tuple)) and any(isinstance(one, Tensor) for one in arg):
            self.understood = False
        if not isinstance(arg, Tensor):
            return arg
        slot = self._slot(arg)
        if slot is None:
            self.understood = False
            return arg
        return Slot(slot)

    def _place(self, arg: Any) -> Place | int:
        """The argument of a kernel: a tensor, or a descriptor of one, by its memory."""
        if isinstance(arg, int):
            return arg
        tensor: Tensor = arg if isinstance(arg, Tensor) else arg.base
        if not tensor.numel():
            return 0  # the address of no memory
        owners = [s for s, known in enumerate(self.tensors) if self.base[s] == s and _within(tensor, known)]
        if len(owners) != 1:
            self.understood = False
            return Place(0, 0)
        offset = tensor.data_ptr() - self.tensors[owners[0]].data_ptr()
        if tensor is arg:
            return Place(owners[0], offset)
        like = copy.copy(arg)
        like.base = None  # a tape holds no tensors
        return Place(owners[0], offset, like)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _within(tensor: Tensor, other: Tensor) -> bool:
    start, first = tensor.data_ptr(), other.data_ptr()
    return tensor.numel() > 0 and first <= start and start + tensor.nbytes <= first + other.nbytes


def _overlap(one: Tensor, other: Tensor) -> bool:
    start, first = one.data_ptr(), other.data_ptr()
    return one.numel() > 0 and other.numel() > 0 and start < first + other.nbytes and first < start + one.nbytes


__all__ = ["Recorder", "forget", "replayed"]
