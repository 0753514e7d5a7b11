"""What a training forward keeps (`saved`): the same bits whatever is kept, and what each choice costs and forbids."""

from __future__ import annotations

from collections.abc import Iterator

import fused
import pytest
import torch
from fused import COMBINATIONS, DEVICE, Shape, differing, flag_id, options
from torch import Tensor

from moefactory import Qwen3MoeFusedGroupedGEMMBlock, build
from moefactory.config import ConfigError, ResolvedModel, Saved
from moefactory.triton.launch import record_launches
from moefactory.triton.ops import experts_backward, experts_forward
from moefactory.triton.options import FusedOptions, parse

SHAPE = Shape(75, 7, 3, 96, 40, "dropped")
SAVED = [one.value for one in Saved]
by_flags = pytest.mark.parametrize("flags", COMBINATIONS, ids=flag_id)
MODEL = ResolvedModel(64, 32, 8, 2, True, "silu")


@pytest.fixture(autouse=True)
def _surroundings() -> Iterator[None]:
    with fused.surroundings():
        yield


def saving(flags: dict[str, bool], saved: str) -> FusedOptions:
    o = options(flags, SHAPE.top_k)
    fields = {name: getattr(o, name) for name in (*flags, "top_k", "autotune", "kernels")}
    return FusedOptions(**{**fields, "saved": saved})


def block(saved: str | Saved = "h", **more: bool) -> Qwen3MoeFusedGroupedGEMMBlock:
    torch.manual_seed(1)
    weights = (torch.randn(s) * 0.1 for s in ((8, 64), (8, 64, 64), (8, 64, 32)))
    return Qwen3MoeFusedGroupedGEMMBlock(MODEL, *(w.to(DEVICE) for w in weights), saved=saved, **more)


def step(one: Qwen3MoeFusedGroupedGEMMBlock, tokens: int = 20) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(1, tokens, 64, device=DEVICE).requires_grad_()
    return x, one(x)[0].sum()


@by_flags
def test_the_same_bits(flags: dict[str, bool]) -> None:
    """Output and every gradient, on ragged experts with dropped slots, are those of the default to the last bit.

    So what is computed again is what the forward had, and what is written over is read before.
    """
    p = fused.problem(SHAPE, torch.float32)
    expected = fused.run(p, saving(flags, "h"))
    for saved in ("h_reused", "x"):
        assert differing(fused.run(p, saving(flags, saved)), expected) == [], saved


def test_what_is_held() -> None:
    """The bytes that autograd keeps: with x the pre-activation [T*K, 2I] is not among them."""
    kept = {}
    for saved in SAVED:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        one = block(saved)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            step(one)
        kept[saved] = sum(sizes.values())
    h = 20 * 2 * 64 * 4  # rows * 2I * bytes
    assert kept["h"] == kept["h_reused"]
    assert kept["h"] - kept["x"] == h


@by_flags
def test_dh_takes_the_memory_of_h(flags: dict[str, bool]) -> None:
    """With h_reused the backward leaves dH where H was, and only then is H written to."""
    p = fused.problem(SHAPE, torch.float32).to(DEVICE)
    indices = fused.indices(p.plan)
    tensors = (p.x, p.routing_weights, p.gate_up_proj, p.down_proj)
    dout = p.dy if flags["fuse_combine"] else p.dy.repeat_interleave(SHAPE.top_k, 0)
    before = experts_forward(*tensors, *indices, saving(flags, "h").text, True, False)[1]
    for saved in ("h", "h_reused"):
        h = before.clone()
        experts_backward(dout, *tensors, h, *indices, saving(flags, saved).text, [True] * 4)
        assert torch.equal(h, before) == (saved == "h")


def test_x_runs_the_up_gemm_again() -> None:
    names = {}
    for saved in SAVED:
        _, loss = step(block(saved))
        with record_launches() as ran:
            loss.backward()
        names[saved] = ran
    assert names["h"] == names["h_reused"]
    again = [name for name in names["x"] if name not in names["h"]]
    assert again == ["forward"]


@pytest.mark.parametrize("saved", SAVED)
def test_a_second_backward(saved: str) -> None:
    """Through the same graph: the same gradients again, or, where H is gone, a refusal and no wrong number."""
    x, loss = step(block(saved))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    if saved == "h_reused":
        with pytest.raises(RuntimeError, match=r"second backward, but saved=h_reused .* set saved=h"):
            torch.autograd.grad(loss, x)
    else:
        assert torch.equal(torch.autograd.grad(loss, x)[0], first)


def test_h_reused_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled graph may run twice and would not know that H is gone."""
    p = fused.problem(SHAPE, torch.float32)
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match="saved=h_reused cannot be compiled"):
            fused.run(p, saving(COMBINATIONS[0], "h_reused"))


def test_without_gradients_nothing_is_kept() -> None:
    for saved in SAVED:
        with torch.no_grad():
            assert not block(saved)(torch.randn(1, 4, 64, device=DEVICE))[0].requires_grad


@pytest.mark.parametrize(
    ("nodes", "complaint"),
    [
        ({"saved": "x"}, "saved: saved=x with backend torch; set saved=h"),
        ({"saved": "h_reused", "trace": True, "backend": {"name": "triton"}}, "saved: saved=h_reused writes over H"),
        ({"saved": "y"}, "saved: got 'y'; allowed: h, h_reused, x"),
    ],
)
def test_refusals(nodes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(nodes)
    assert str(caught.value).startswith(complaint)


def test_by_name_or_as_enum() -> None:
    assert block("x").fused.saved == block(Saved.x).fused.saved == "x"
    with pytest.raises(ConfigError, match=r"saved: got 'everything'; allowed: h, h_reused, x"):
        block("everything")


def test_options_carry_it() -> None:
    assert parse(saving(COMBINATIONS[0], "x").text).saved == "x"
