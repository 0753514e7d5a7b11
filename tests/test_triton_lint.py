"""What can be read off the source of the Triton backend: masks, precision, offsets, atomics, synchronisation, imports.

Each reader is tried on a planted fault first: a lint that finds nothing in anything would pass, too. Gluon kernels are
read as if they were Triton's: `gl.` is `tl.` to every reader.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import moefactory.triton

FOLDER = Path(moefactory.triton.__file__).parent
FILES = {path.name: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
STEP = {  # the host code that runs in every step; searching for kernel configs may wait for the GPU
    name: text
    for name, text in FILES.items()
    if name not in {"__init__.py", "cache.py", "probe.py", "search_space.py", "tuning.py"}
}
SYNCHRONISING = {
    "item", "tolist", "cpu", "numpy", "nonzero", "bincount", "unique", "repeat_interleave", "synchronize",
    "masked_select", "argwhere", "histc", "is_nonzero",
}  # fmt: skip
INDEX_WORDS = (
    "indices", "offsets", "counts", "starts", "tile_expert", "tile_row", "num_tiles", "selected", "index", "gather_ptr",
    "counters_ptr",
)  # fmt: skip
WIDTHS = {
    "N",
    "K",
    "H",
    "I",
    "E",
    "M",
    "P",
    "Q",
    "width",
    "out_width",
}  # row lengths: what a row, slot or expert number is multiplied by
INSIDE_ONE_MATRIX = {"n * K"}  # the offset of a row of one expert's weight: N * K elements, below 2^31 in any model


def parsed(text: str) -> ast.Module:
    """The source, Gluon's names as Triton's."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "gl":
            node.id = "tl"
    return tree


def kernels(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """The functions under @triton.jit and @gluon.jit."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names:
            yield node


def unmasked_other(text: str) -> list[str]:
    """Loads with a mask and no `other`: what masked lanes hold is undefined."""
    found = []
    for kernel in kernels(parsed(text)):
        for call in calls(kernel, "tl.load"):
            named = {keyword.arg for keyword in call.keywords}
            if ("mask" in named or len(call.args) > 1) and "other" not in named and len(call.args) < 3:
                found.append(f"{kernel.name}: {ast.unparse(call)}")
    return found


def atomics(text: str) -> list[str]:
    """Anything whose order is up to the hardware."""
    return [
        f"{kernel.name}: {ast.unparse(node)}"
        for kernel in kernels(parsed(text))
        for node in ast.walk(kernel)
        if isinstance(node, ast.Attribute) and "atomic" in node.attr
    ]


def low_precision(text: str) -> list[str]:
    """Arithmetic on a loaded value that was not widened: a load must be chained with .to(), or only moved or multiplied
    by tl.dot. Loads of indices are integers."""
    found = []
    for kernel in kernels(parsed(text)):
        narrow = set()
        for node in ast.walk(kernel):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and _plain_load(node.value):
                narrow.add(node.targets[0].id)
        widened = {
            node.targets[0].id
            for node in ast.walk(kernel)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and not _plain_load(node.value)
        }
        for node in ast.walk(kernel):
            operands = [node.left, node.right] if isinstance(node, ast.BinOp) else []
            operands += list(node.args) if isinstance(node, ast.Call) and ast.unparse(node.func) in REDUCTIONS else []
            for signed in operands:
                operand = signed.operand if isinstance(signed, ast.UnaryOp) else signed
                name = operand.id if isinstance(operand, ast.Name) else ""
                if name in narrow - widened or _plain_load(operand):
                    found.append(f"{kernel.name}: {ast.unparse(node)}")
    return found


REDUCTIONS = ("tl.sum", "tl.exp", "tl.max", "tl.sigmoid", "tl.maximum", "tl.cumsum", "swiglu", "dswiglu")


def _plain_load(node: ast.AST) -> bool:
    """A load of numbers that is not followed by .to(): tl.load, or the method of a descriptor or of shared memory."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"):
        return False
    return not (ast.unparse(node.func) == "tl.load" and any(w in ast.unparse(node.args[0]) for w in INDEX_WORDS))


def narrow_offsets(text: str) -> list[str]:
    """Products of a row, slot or expert number with a row length in which the number is not int64."""
    found = []
    for kernel in kernels(parsed(text)):
        wide = {"token"} if "token = tl.program_id(0).to(tl.int64)" in ast.unparse(kernel) else set[str]()
        assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(kernel):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned.setdefault(node.targets[0].id, []).append(node.value)
        for _ in range(4):  # names that are only ever made of wide ones are wide
            wide |= {name for name, values in assigned.items() if all(_is_wide(value, wide) for value in values)}
        for node in ast.walk(kernel):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and _is_width(node.right):
                row = node.left
                if not _is_wide(row, wide) and not _is_size(row) and ast.unparse(node) not in INSIDE_ONE_MATRIX:
                    found.append(f"{kernel.name}: {ast.unparse(node)}")
    return found


def _is_width(node: ast.AST) -> bool:
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return bool(names & WIDTHS) and names <= WIDTHS


def _is_size(node: ast.AST) -> bool:
    """2 * I, num_n and the like: no number of a row. A program or lane that picks a column half is none, either."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names <= WIDTHS | {"lane_n", "OUT_N"}


def _is_wide(node: ast.AST, wide: set[str]) -> bool:
    """Whether the value's integers are int64: cast to it, or made from a wide one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        return any("int64" in ast.unparse(argument) for argument in node.args)
    if isinstance(node, ast.Name):
        return node.id in wide
    if isinstance(node, ast.Subscript):
        return _is_wide(node.value, wide)
    if isinstance(node, ast.BinOp):
        return _is_wide(node.left, wide) or _is_wide(node.right, wide)
    return False


def waits(text: str) -> list[str]:
    """Calls of host code that wait for the device, kernels left out."""
    tree = ast.parse(text)
    inside = {id(node) for kernel in kernels(tree) for node in ast.walk(kernel)}
    found = []
    for node in ast.walk(tree):
        if id(node) in inside or not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        device = any("cpu" in ast.unparse(argument) for argument in node.args) and name == "to"
        if name in SYNCHRONISING or device:
            found.append(ast.unparse(node))
    return found


def at_import(text: str) -> list[str]:
    """Questions to a GPU or the environment, handlers and allocators, outside of functions."""
    found = []
    for statement in ast.parse(text).body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)):
            continue
        for node in ast.walk(statement):
            words = ("cuda", "environ", "getenv", "set_allocator", "getLogger", "driver")
            if isinstance(node, (ast.Attribute, ast.Name)) and any(word in ast.unparse(node) for word in words):
                found.append(ast.unparse(statement))
    return found


PLANTED: list[tuple[Callable[[str], list[str]], str]] = [
    (unmasked_other, "@triton.jit\ndef k(p, m):\n    x = tl.load(p, mask=m)"),
    (unmasked_other, "@triton.jit\ndef k(p, m):\n    x = tl.load(p, m)"),
    (atomics, "@triton.jit\ndef k(p, v):\n    tl.atomic_add(p, v)"),
    (low_precision, "@triton.jit\ndef k(p, q):\n    x = tl.load(p)\n    tl.store(q, x * 2)"),
    (low_precision, "@triton.jit\ndef k(p, q):\n    tl.store(q, tl.load(p) + 1)"),
    (low_precision, "@triton.jit\ndef k(p, q):\n    x = tl.load(p, mask=q, other=0.0)\n    tl.store(q, tl.sum(x))"),
    (narrow_offsets, "@triton.jit\ndef k(p, K):\n    row = tl.arange(0, 16)\n    tl.store(p + row[:, None] * K, 0)"),
    (narrow_offsets, "@triton.jit\ndef k(p, e, N, K):\n    tl.store(p + e * N * K, 0)"),
    (unmasked_other, "@gluon.jit\ndef k(p, m):\n    x = gl.load(p, mask=m)"),
    (atomics, "@gluon.jit\ndef k(p, v):\n    gl.atomic_add(p, v)"),
    (low_precision, "@gluon.jit\ndef k(p, q):\n    x = gl.load(p)\n    gl.store(q, x * 2)"),
    (low_precision, "@gluon.jit\ndef k(s, q, layout):\n    x = s.index(0).load(layout)\n    gl.store(q, gl.exp(-x))"),
    (low_precision, "@gluon.jit\ndef k(s, q, layout):\n    gl.store(q, gl.sum(s.load(layout), axis=1))"),
    (narrow_offsets, "@gluon.jit\ndef k(p, slot, width):\n    gl.store(p + slot[:, None] * width, 0)"),
    (narrow_offsets, "@gluon.jit\ndef k(p, slots, D, Q):\n    row = slots // D\n    gl.store(p + row[:, None] * Q, 0)"),
    (waits, "def f(x):\n    return x.sum().item()"),
    (waits, "def f(x):\n    return x.to('cpu')"),
    (waits, "def f(x):\n    return torch.bincount(x)"),
    (at_import, "SM = torch.cuda.get_device_properties(0).multi_processor_count"),
    (at_import, "import os\nTMA = os.environ.get('X')"),
]
FINE = (
    "@triton.jit\ndef k(x_ptr, gather_indices_ptr, y_ptr, K, ACC):\n"
    "    slot = tl.load(gather_indices_ptr + row, mask=m, other=0)\n"
    "    x = tl.load(x_ptr + slot.to(tl.int64)[:, None] * K, mask=m, other=0.0).to(ACC)\n"
    "    w_tile = tl.load(x_ptr)\n"
    "    acc = tl.dot(w_tile, tl.trans(w_tile), acc)\n"
    "    tl.store(y_ptr + (slot // 2).to(tl.int64) * K, x * 2 + slot + 1)\n"
)
FINE_GLUON = (
    "@gluon.jit\ndef k(x_ptr, gather_ptr, y_ptr, stage, width, K, layout):\n"
    "    slot = gl.load(gather_ptr + row, mask=m, other=0)\n"
    "    x_ptrs = x_ptr + (slot // 2).to(gl.int64)[:, None] * K\n"
    "    gate = stage.index(0).load(layout).to(gl.float32)\n"
    "    gl.store(y_ptr + slot.to(gl.int64)[:, None] * width, stage.load(layout), mask=m)\n"
    "    gl.store(y_ptr, gl.sum(gate * gate, axis=1))\n"
    "    row.item()\n"
)


@pytest.mark.parametrize(("lint", "text"), PLANTED, ids=[f"{lint.__name__}-{i}" for i, (lint, _) in enumerate(PLANTED)])
def test_a_planted_fault_is_found(lint: Callable[[str], list[str]], text: str) -> None:
    assert lint(text)


@pytest.mark.parametrize("text", [FINE, FINE_GLUON], ids=["triton", "gluon"])
@pytest.mark.parametrize("lint", [unmasked_other, atomics, low_precision, narrow_offsets, waits, at_import])
def test_a_good_kernel_is_let_through(lint: Callable[[str], list[str]], text: str) -> None:
    assert lint(text) == []


@pytest.mark.parametrize("lint", [unmasked_other, atomics, low_precision, narrow_offsets, at_import])
@pytest.mark.parametrize("name", FILES)
def test_kernels(lint: Callable[[str], list[str]], name: str) -> None:
    """Two exceptions: which program computes a tile is up to the hardware, and so is who is waited for last; what is
    computed is not."""
    counters = {"turns.py": ["ask: tl.atomic_add"], "decode.py": ["_experts: tl.atomic_add"] * 2}
    assert lint(FILES[name]) == (counters.get(name, []) if lint is atomics else [])


@pytest.mark.parametrize("name", STEP)
def test_no_step_waits_for_the_device(name: str) -> None:
    assert waits(STEP[name]) == []


def test_the_lints_see_every_kernel() -> None:
    """Each file that launches holds a kernel, and the readers above found it; Gluon's are among them."""
    found = {name: list(kernels(parsed(text))) for name, text in FILES.items()}
    launching = {name for name, text in FILES.items() if "\n    launch(" in text or " launch(" in text}
    assert launching - {name for name, inside in found.items() if inside} <= {"launch.py"}
    assert sum(map(len, found.values())) >= 12
    gluon = [name for name in FILES if name.startswith("specialized")]
    assert {name: len(found[name]) for name in gluon} == {name: FILES[name].count("@gluon.jit") for name in gluon}
    assert len(gluon) == 4
