"""How the torch block is called: strides, dimensions, autocast, checkpoints, copies, the public names, refusals."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import judge
import pytest
import torch
from judge import MODEL, WEIGHTS, Tensors, data, forced, make_block, run_block, unequal, weights_of
from torch import Tensor

from moefactory.block import Qwen3MoeGroupedGEMMBlock, model_sizes
from moefactory.config import ConfigError, DType, ModelConfig, MoeConfig, WeightsError
from moefactory.factory import build
from moefactory.reference import grouped_gemm
from moefactory.routing import make_plan

# --- how it is called -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transposed", "every second token", "expanded", "offset by one element"])
def test_strided_input(layout: str) -> None:
    """Inputs of any strides and storage offset, and a dY expanded from a scalar, give the bits of contiguous ones.

    The router alone multiplies x as it came, and a BLAS adds in another order where rows are columns or an address is
    odd. So x and the gate are eighths and sixty-fourths: their sums are exact in any order.
    """
    block = make_block(MODEL, torch.float32)
    x = (data(12, MODEL, torch.float32)[0] * 8).round() / 8
    with torch.no_grad():
        block.gate.copy_((block.gate * 64).round() / 64)
    strided = {
        "transposed": lambda: x.transpose(1, 2).contiguous().transpose(1, 2),
        "every second token": lambda: x.repeat_interleave(2, dim=1)[:, ::2],
        "expanded": lambda: x[:, :1].expand(3, 4, -1),
        "offset by one element": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }[layout]()
    one = torch.ones(()).expand(strided.shape)
    got = run_strided(block, strided, one)
    right = run_strided(block, strided.contiguous().clone(), one.contiguous())
    assert unequal(got, right) == []


def run_strided(block: Any, x: Tensor, dy: Tensor) -> Tensors:
    block.zero_grad()
    x = x.detach().requires_grad_()
    out = block(x)[0].hidden_states
    (dx,) = torch.autograd.grad(out, x, dy)
    return {"out": out, "dx": dx}


@pytest.mark.parametrize("lead", [(), (7,), (1, 7), (7, 1), (2, 3, 2), (0, 4)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    """Any leading dimensions: the output has the input's shape and the rows of the flat call."""
    block = make_block(MODEL, torch.float64, trace=False)
    count = math.prod(lead)
    x = judge.unit_tokens(count, MODEL, torch.float64)
    out, logits = block(x.view(*lead, MODEL.hidden_size))
    right, right_logits = block(x)
    assert out.shape == (*lead, MODEL.hidden_size)
    assert torch.equal(out.reshape(right.shape), right)
    assert torch.equal(logits, right_logits)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast(given: torch.dtype) -> None:
    """Under autocast: the bits of the block converted to bfloat16, gradients in the dtypes of the leaves."""
    block = make_block(MODEL, torch.float32)
    low = copy.deepcopy(block).bfloat16()
    x, dy = data(16, MODEL, torch.bfloat16)
    leaf = x.to(given).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, logits = block(leaf)
    right = run_block(low, x, dy)
    assert result.hidden_states.dtype == logits.dtype == torch.bfloat16
    assert given is torch.float16 or torch.equal(result.hidden_states, right["hidden_states"])
    result.hidden_states.backward(dy)
    for name, leaf_grad in {"dx": leaf.grad, **{n: getattr(block, n).grad for n in WEIGHTS}}.items():
        assert leaf_grad.dtype == (given if name == "dx" else torch.float32)
        if given is not torch.float16:
            assert torch.equal(leaf_grad.bfloat16(), right[name]), name


def test_autocast_switched_off_is_no_autocast() -> None:
    block = make_block(MODEL, torch.float32, trace=False)
    x, _ = data(4, MODEL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        out, _ = block(x)
    assert torch.equal(out, block(x)[0])


def test_autocast_leaves_float64_alone() -> None:
    """As torch.autocast does for every operation, and Hugging Face's block with it."""
    block = make_block(MODEL, torch.float64, trace=False)
    x, _ = data(4, MODEL, torch.float64)
    right = block(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block(x)[0], right)


@pytest.mark.parametrize("given", [torch.int64, torch.bool])
def test_autocast_takes_floats_only(given: torch.dtype) -> None:
    block = make_block(MODEL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=f"hidden_states: got {given}"):
        block(torch.ones(1, 4, 64, dtype=given))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    """Recomputed in the backward: the same bits."""
    block = make_block(MODEL, torch.float32, trace=False)
    x, dy = data(16, MODEL, torch.float32)
    right = run_block(block, x, dy)
    block.zero_grad()
    leaf = x.clone().requires_grad_()
    out, _ = torch.utils.checkpoint.checkpoint(block, leaf, use_reentrant=reentrant)
    out.backward(dy)
    got = {"hidden_states": out, "dx": leaf.grad, **{name: getattr(block, name).grad for name in WEIGHTS}}
    assert unequal(got, {name: right[name] for name in got}) == []


def test_no_saved_shape_depends_on_the_routing() -> None:
    """Two routings of equally many tokens save tensors of the same total size for the backward, rows apart."""

    def saved(push: dict[int, float]) -> Counter[Any]:
        block, x = forced(replace(MODEL, top_k=1), torch.float32, push)
        sizes: Counter[Any] = Counter()

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.shape[1:]] += tensor.shape[0] if tensor.ndim else 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(x.requires_grad_())
        return sizes

    assert saved({1: 60}) == saved({6: 60, 2: 30})


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_round_trip(way: str) -> None:
    """A copy holds the same names, bits and flags, computes the same, and shares no memory."""
    block = make_block(MODEL, torch.bfloat16, dX_only=True, trace=False)
    block.gate.requires_grad_(False)
    if way == "deepcopy":
        twin = copy.deepcopy(block)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(block))
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(block, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        twin = build(MoeConfig(dtype=DType.bfloat16, dX_only=True, model=ModelConfig(**vars(MODEL))))
        assert twin.load_state_dict(block.state_dict()) == ([], [])
        twin.gate.requires_grad_(False)
    assert list(twin.state_dict()) == list(WEIGHTS)
    assert unequal(weights_of(twin), weights_of(block)) == []
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(twin.parameters(), block.parameters(), strict=True))
    assert [p.requires_grad for p in twin.parameters()] == [False, True, True]
    assert (twin.dX_only, twin.dW_only, twin.trace, twin.model) == (True, False, False, MODEL)
    x, _ = data(5, MODEL, torch.bfloat16)
    assert torch.equal(twin(x)[0], block(x)[0])


def test_moves_and_casts() -> None:
    """`to` another dtype gives the block that computes there; `meta` allocates nothing."""
    block = make_block(MODEL, torch.float32, trace=False)
    x, _ = data(5, MODEL, torch.float64)
    assert block.double()(x)[0].dtype == torch.float64
    assert {p.device.type for p in block.to("meta").parameters()} == {"meta"}


def test_inference_mode() -> None:
    block = make_block(MODEL, torch.float32, trace=False)
    x, _ = data(5, MODEL, torch.float32)
    with torch.inference_mode():
        assert torch.equal(block(x)[0], block(x)[0])


# --- the reference API's names ----------------------------------------------------------------------------------------


def test_from_hf_shares_and_agrees() -> None:
    """The very Parameters of transformers 5; train flag and gradients go through; `check_weights` finds one element."""
    theirs = judge.hf_block(MODEL, judge.unit_weights(MODEL, torch.float32)).eval()
    ours = Qwen3MoeGroupedGEMMBlock.from_hf(theirs)
    assert not ours.training
    ours.check_weights(theirs)
    x, _ = data(16, MODEL, torch.float32)
    out = theirs(x)
    torch.testing.assert_close(ours(x)[0].hidden_states, out[0] if isinstance(out, tuple) else out)
    extracted = Qwen3MoeGroupedGEMMBlock.extract_hf_weights(theirs)
    assert all(torch.equal(a, b) for a, b in zip(extracted, ours.parameters(), strict=True))
    other = copy.deepcopy(ours)
    with torch.no_grad():
        other.down_proj[3, 2, 1] += 1
    with pytest.raises(WeightsError, match="down_proj: 1 of 16384 elements differ"):
        other.check_weights(theirs)
    with pytest.raises(WeightsError, match=r"gate: this block has \(8, 64\) torch.float64"):
        copy.deepcopy(ours).double().check_weights(theirs)


def test_check_weights_compares_bits() -> None:
    weights = judge.unit_weights(MODEL, torch.float32)
    weights["gate"][0, 0], weights["gate"][0, 1] = math.nan, 0.0
    block = Qwen3MoeGroupedGEMMBlock(MODEL, *(weights[name] for name in WEIGHTS))
    block.check_weights(judge.hf_block(MODEL, weights))
    weights["gate"] = weights["gate"].clone()
    weights["gate"][0, 1] = -0.0
    with pytest.raises(WeightsError, match="gate: 1 of 512 elements differ"):
        block.check_weights(judge.hf_block(MODEL, weights))


def test_small_methods() -> None:
    """act_and_mul, run_router and get_token_counts_and_gather_indices against their definitions; explain, repr."""
    block = make_block(MODEL, torch.float64)
    x = judge.unit_tokens(6, MODEL, torch.float64)[0]
    assert torch.equal(block.act_and_mul(x), torch.nn.functional.silu(x[:, :32]) * x[:, 32:])
    logits, scores, selected = block.run_router(x)
    assert torch.equal(logits, x @ block.gate.T)
    torch.testing.assert_close(scores, logits.gather(1, selected).softmax(-1))
    counts, gather = block.get_token_counts_and_gather_indices(selected)
    assert counts.tolist() == [int((selected == e).sum()) for e in range(8)]
    assert sorted(gather.tolist()) == list(range(18))
    assert "8 experts" in block.explain(6)
    assert "18 rows" in block.explain(6)
    assert "hidden_size=64" in repr(block)


def test_sizes_from_a_config() -> None:
    """A Hugging Face config, ours, and one that lacks a field."""
    theirs = judge.hf_block(MODEL, judge.unit_weights(MODEL, torch.float32)).experts
    config = theirs.config if hasattr(theirs, "config") else theirs[0].config
    assert model_sizes(config) == MODEL
    assert model_sizes(ModelConfig(**vars(MODEL))) == MODEL
    with pytest.raises(ConfigError, match="config: got a ModelConfig without top_k"):
        model_sizes(replace(ModelConfig(**vars(MODEL)), top_k=None))
    with pytest.raises(ConfigError, match="config: got a SimpleNamespace without num_experts, num_experts_per_tok"):
        model_sizes(SimpleNamespace(hidden_size=1, moe_intermediate_size=1, norm_topk_prob=True, hidden_act="silu"))


# --- refusals ---------------------------------------------------------------------------------------------------------

_GOOD = judge.unit_weights(MODEL, torch.float32)


def construct(**changes: Any) -> Any:
    given = {"config": MODEL, **_GOOD, **changes}
    return Qwen3MoeGroupedGEMMBlock(**given)


def call(x: Tensor) -> Any:
    return construct()(x)


def multiply(x: Tensor, experts: int, **options: Any) -> Any:
    plan = make_plan(torch.zeros(2, 2, dtype=torch.int64), experts)
    return grouped_gemm(x, _GOOD["gate_up_proj"], plan, **options)


def sized(**changes: Any) -> Any:
    return construct(config=replace(MODEL, **changes))


REFUSED: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "both gradients": (
        ConfigError, "dW_only-dX_only: .*set at most one", lambda: construct(dW_only=True, dX_only=True)
    ),
    "activation": (ConfigError, "hidden_act: got 'silly'.*'silu'", lambda: sized(hidden_act="silly")),
    "top_k 0": (ConfigError, "top_k=0 with model.num_experts=8", lambda: sized(top_k=0)),
    "top_k 9": (ConfigError, "top_k=9 with model.num_experts=8", lambda: sized(top_k=9)),
    "gate": (WeightsError, r"gate: got shape \(7, 64\).*\(8, 64\)", lambda: construct(gate=_GOOD["gate"][:7])),
    "gate_up_proj": (
        WeightsError, r"gate_up_proj: got shape \(8, 32, 64\).*\(8, 64, 64\)",
        lambda: construct(gate_up_proj=_GOOD["gate_up_proj"][:, :32]),
    ),
    "down_proj": (
        WeightsError, r"down_proj: got shape \(8, 32, 64\).*\(8, 64, 32\)",
        lambda: construct(down_proj=_GOOD["down_proj"].transpose(1, 2)),
    ),
    "dtype": (
        WeightsError, "down_proj: got torch.float16 on cpu; the gate is torch.float32",
        lambda: construct(down_proj=_GOOD["down_proj"].half()),
    ),
    "device": (
        WeightsError, "gate_up_proj: got torch.float32 on meta; the gate is torch.float32 on cpu",
        lambda: construct(gate_up_proj=_GOOD["gate_up_proj"].to("meta")),
    ),
    "integers": (
        WeightsError, "gate: got torch.int32", lambda: construct(**{name: t.int() for name, t in _GOOD.items()})
    ),
    "input width": (
        ValueError, r"hidden_states: got shape \(1, 4, 63\); needed: \[\.\.\., 64\]", lambda: call(torch.ones(1, 4, 63))
    ),
    "scalar input": (ValueError, r"hidden_states: got shape \(\)", lambda: call(torch.ones(()))),
    "input dtype": (
        ValueError, "hidden_states: got torch.float16; needed: the weights' dtype torch.float32",
        lambda: call(torch.ones(1, 4, 64, dtype=torch.float16)),
    ),
    "integer input": (
        ValueError, "hidden_states: got torch.int64", lambda: call(torch.ones(1, 4, 64, dtype=torch.int64))
    ),
    "input device": (
        ValueError, "hidden_states: got device meta; the weights are on cpu",
        lambda: call(torch.ones(1, 4, 64, device="meta")),
    ),
    "gemm width": (
        ValueError, r"grouped_gemm: got x \(4, 63\), weight \(8, 64, 64\); needed: x \[4, K\]",
        lambda: multiply(torch.ones(4, 63), 8),
    ),
    "gemm rows": (
        ValueError, r"grouped_gemm: got x \(4, 64\).*needed: x \[2, K\]",
        lambda: multiply(torch.ones(4, 64), 8, permute_x=True),
    ),
    "gemm experts": (
        ValueError, "grouped_gemm: weight has 8 experts, the plan 7", lambda: multiply(torch.ones(4, 64), 7)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    """One line that names the argument, what came and what is needed."""
    kind, text, call = REFUSED[name]
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
