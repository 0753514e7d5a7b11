"""`moefactory check` and the numerics behind it: what is right passes, every planted fault is found and named.

Faults are planted by wrapping `factory.make_block`, the one place where a checked block is made.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM

from moefactory import factory, reference, routing
from moefactory.check import CheckReport, run_check
from moefactory.cli import main
from moefactory.config import (
    Backend,
    BackendConfig,
    ConfigError,
    DType,
    ModelConfig,
    MoeConfig,
    ResolvedModel,
    WeightsConfig,
    WeightsSource,
    resolve_model,
)
from moefactory.numerics import demo, run, theirs, unit
from moefactory.numerics.exact import exactly, judge_integers
from moefactory.numerics.integers import CODE, integer_problem, integer_sizes
from moefactory.numerics.oracle import float64_block
from moefactory.weights import hf_config, init_random, read_hf_block, to_hf_block, to_hf_state_dict

GRADIENTS = ("dX", "dgate", "dgate_up_proj", "ddown_proj")
TENSORS = ("router_logits", "output", *GRADIENTS)
Edit = Callable[[Any], None]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache folder for the session: the checkpoint is written once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is ever written to the home of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Edit], None]:
    """Let `edit(block)` change every block that is made for a check."""
    real = factory.make_block

    def install(edit: Edit) -> None:
        def changed(config: Any, weights: Any) -> Any:
            block = real(config, weights)
            with torch.no_grad():
                edit(block)
            return block

        monkeypatch.setattr(factory, "make_block", changed)

    return install


def failures(report: CheckReport) -> set[tuple[str, str]]:
    """(problem, tensor) of what failed."""
    return {(c.problem, c.tensor) for c in report.comparisons if not c.ok}


def wrap_experts(block: Any, change: Callable[..., Any]) -> None:
    """Let `change(call, x, routing_weights, plan, gate_up_proj, down_proj)` stand for the block's experts."""
    real = block._experts
    block._experts = lambda *tensors: change(real, *tensors)


# --- what is right passes ---------------------------------------------------------------------------------------------

CONFIGS = {
    "default": {},
    "float16": {"dtype": DType.float16},
    "bfloat16": {"dtype": DType.bfloat16},
    "float64": {"dtype": DType.float64},
    "trace": {"trace": True},
    "dX_only": {"dX_only": True},
    "dW_only": {"dW_only": True},
    "every expert selected": {"model": ModelConfig(num_experts=4, top_k=4)},
    "one expert": {"model": ModelConfig(num_experts=1, top_k=1)},
    "odd sizes": {"model": ModelConfig(47, 23, 5, 3, False)},
    "gelu": {"model": ModelConfig(hidden_act="gelu")},
    "random": {"weights": WeightsConfig(WeightsSource.random, seed=3)},
}


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("tokens", [64, 7])
def test_the_torch_backend_passes(cache: str, device: str, fields: dict[str, Any], tokens: int) -> None:
    report = run_check(MoeConfig(**fields, device=device), tokens=tokens, cache=cache)
    assert failures(report) == set()
    assert report.status == "ok"
    config = MoeConfig(**fields)
    wanted = {"router_logits", "output", *run.wanted_gradients(config)}
    for problem in ("unit", "integer"):
        assert {c.tensor for c in report.comparisons if c.problem == problem} - {"selected_experts"} == wanted


@pytest.mark.parametrize("flags", [{}, {"permute_x": False, "permute_y": False}], ids=["fused", "plain"])
def test_the_triton_backend_passes(cache: str, device: str, flags: dict[str, bool]) -> None:
    config = MoeConfig(backend=BackendConfig(Backend.triton), device=device, **flags)
    report = run_check(config, tokens=32, cache=cache)
    assert failures(report) == set()
    assert "backend triton" in report.ran


def test_every_tensor_is_judged_as_a_whole_and_by_expert_or_token(cache: str) -> None:
    """Eight experts: nine verdicts for each weight's gradient; whole and nearest token for the others."""
    report = run_check(MoeConfig(), cache=cache)
    parts: dict[tuple[str, str], list[str]] = {}
    for c in report.comparisons:
        parts.setdefault((c.problem, c.tensor), []).append(c.part)
    experts = [f"expert {e}" for e in range(8)]
    for name in ("dgate", "dgate_up_proj", "ddown_proj"):
        assert parts["unit", name] == ["all", *experts]
    for name in ("dgate_up_proj", "ddown_proj"):
        assert parts["integer", name] == experts
    for name in ("router_logits", "output", "dX"):
        assert parts["unit", name][0] == "all"
        assert parts["unit", name][1].startswith("token ")
    assert parts["unit", "selected_experts"] == ["all"]
    assert parts["weights", "weights"] == ["all"]


def test_one_expert_gets_no_token(cache: str) -> None:
    """Its gradients must be exactly zero: the bound is a multiple of what is least above zero."""
    report = run_check(MoeConfig(), cache=cache)
    empty = report.routing["expert_without_tokens"]
    assert report.expert_load[empty] == 0
    assert sum(report.expert_load) == 64 * 2
    for c in report.comparisons:
        if c.problem == "unit" and c.part == f"expert {empty}" and c.tensor in {"dgate_up_proj", "ddown_proj"}:
            assert c.error == 0
            assert c.bound < 1e-40


def test_json_has_status_and_comparisons(capsys: pytest.CaptureFixture[str], cache: str) -> None:
    assert main(["check", f"cache={cache}", "format=json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert found["status"] == "ok"
    keys = {"problem", "tensor", "part", "ok", "error", "hf_error", "bound", "note"}
    assert all(keys <= set(c) for c in found["comparisons"])
    assert {c["tensor"] for c in found["comparisons"]} >= set(TENSORS)
    assert {"routing", "expert_load", "times_ms", "config", "model"} <= set(found)
    assert found["provenance"]["packages"]["torch"] == torch.__version__  # evidence names what it is of
    assert set(found["provenance"]) >= {"moefactory", "commit", "gpu", "python"}


def test_the_table_shows_each_tensor_the_load_and_the_time(capsys: pytest.CaptureFixture[str], cache: str) -> None:
    assert main(["check", f"cache={cache}"]) == 0
    out = capsys.readouterr().out
    for text in (*TENSORS, "HF eager", "bound", "tokens per expert", "backward", "ok: "):
        assert text in out


# --- planted faults ---------------------------------------------------------------------------------------------------


def _swap_gate_and_up(block: Any) -> None:
    half = block.gate_up_proj.shape[1] // 2
    block.gate_up_proj.copy_(block.gate_up_proj.roll(half, 1))


def _one_weight(block: Any) -> None:
    block.down_proj[3, 5, 7] += 1


def _last_bit_of_a_weight(block: Any) -> None:
    block.gate_up_proj[0, 0, 0] *= 1 + 2**-20


EDITS = {"one weight": _one_weight, "last bit": _last_bit_of_a_weight, "gate and up swapped": _swap_gate_and_up}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_changed_weight_exits_1(
    capsys: pytest.CaptureFixture[str], plant: Callable[[Edit], None], cache: str, edit: Edit
) -> None:
    plant(edit)
    assert main(["check", f"cache={cache}", "format=json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["status"] == "mismatch"
    assert "weights" in {c["tensor"] for c in found["comparisons"] if not c["ok"]}
    assert main(["check", f"cache={cache}"]) == 1
    assert "mismatch: weights" in capsys.readouterr().out


@pytest.mark.parametrize("edit", [_one_weight, _swap_gate_and_up])
def test_a_changed_weight_shows_in_the_numbers_too(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[Edit], None], cache: str, edit: Edit
) -> None:
    """Without the comparison of the weights themselves."""
    plant(edit)
    monkeypatch.setattr(factory.Qwen3MoeGroupedGEMMBlock, "check_weights", lambda *_: None)
    report = run_check(MoeConfig(), cache=cache)
    assert {("unit", "output"), ("integer", "output")} <= failures(report)


def _zero_output(call: Any, *tensors: Any) -> Any:
    out, steps = call(*tensors)
    return out * 0, steps


def _rows_swapped(call: Any, *tensors: Any) -> Any:
    out, steps = call(*tensors)
    order = torch.arange(len(out))
    order[:2] = torch.tensor([1, 0])
    return out[order], steps


def _weights_reversed(call: Any, x: Tensor, routing_weights: Tensor, *rest: Any) -> Any:
    return call(x, routing_weights.flip(1), *rest)


def _weights_detached(call: Any, x: Tensor, routing_weights: Tensor, *rest: Any) -> Any:
    return call(x, routing_weights.detach(), *rest)


def _token_doubled(call: Any, *tensors: Any) -> Any:
    out, steps = call(*tensors)
    factor = torch.ones(len(out), 1, dtype=out.dtype)
    factor[-1] = 2
    return out * factor, steps


def _expert_zero(call: Any, x: Tensor, routing_weights: Tensor, plan: Any, up: Tensor, down: Tensor) -> Any:
    keep = torch.ones(len(down), 1, 1, dtype=down.dtype)
    keep[1] = 0
    return call(x, routing_weights, plan, up, down * keep)


def _last_columns_dropped(call: Any, x: Tensor, routing_weights: Tensor, plan: Any, up: Tensor, down: Tensor) -> Any:
    keep = torch.ones_like(up)
    keep[1, :, -16:] = 0
    return call(x, routing_weights, plan, up * keep, down)


def _neighbours_weights(call: Any, x: Tensor, routing_weights: Tensor, plan: Any, up: Tensor, down: Tensor) -> Any:
    """The last row of an expert is computed by the next expert."""
    counts = plan.token_counts_by_expert.clone()
    expert = int(counts.argmax())
    other = expert + 1 if expert + 1 < len(counts) else expert - 1
    counts[expert] -= 1
    counts[other] += 1
    return call(x, routing_weights, replace(plan, token_counts_by_expert=counts), up, down)


def _one_gradient_only(name: str) -> Callable[..., Any]:
    """One expert's gradient of one tensor is lost, its forward is right."""

    def change(call: Any, x: Tensor, routing_weights: Tensor, plan: Any, up: Tensor, down: Tensor) -> Any:
        tensor = {"up": up, "down": down}[name]
        cut = torch.cat([tensor[:1].detach(), tensor[1:]])
        return call(x, routing_weights, plan, *((cut, down) if name == "up" else (up, cut)))

    return change


def _not_a_number(call: Any, *tensors: Any) -> Any:
    out, steps = call(*tensors)
    mask = torch.zeros_like(out)
    mask[0, 0] = float("nan")
    return out + mask, steps


# fault -> what must fail in the unit-scale problem
FAULTS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "zero output": (_zero_output, {"output", *GRADIENTS}),
    "two rows swapped": (_rows_swapped, {"output"}),
    "top-k weights reversed": (_weights_reversed, {"output"}),
    "router without gradient": (_weights_detached, {"dX", "dgate"}),
    "a token doubled": (_token_doubled, {"output", "dX"}),
    "an expert zero": (_expert_zero, {"output", "dX", "dgate_up_proj"}),
    "last columns of an expert dropped": (_last_columns_dropped, {"output", "dX"}),
    "a row by its neighbour's weights": (_neighbours_weights, {"output", "dX", "dgate_up_proj", "ddown_proj"}),
    "up gradient of one expert lost": (_one_gradient_only("up"), {"dgate_up_proj"}),
    "down gradient of one expert lost": (_one_gradient_only("down"), {"ddown_proj"}),
    "one nan": (_not_a_number, {"output"}),
}


@pytest.mark.parametrize(("change", "tensors"), FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16], ids=lambda d: d.name)
def test_a_planted_fault_is_found(
    plant: Callable[[Edit], None], cache: str, change: Callable[..., Any], tensors: set[str], dtype: DType
) -> None:
    plant(lambda block: wrap_experts(block, change))
    report = run_check(MoeConfig(dtype=dtype), cache=cache)
    assert report.status == "mismatch"
    assert {("unit", name) for name in tensors} <= failures(report)


def test_one_wrong_expert_is_named(plant: Callable[[Edit], None], cache: str) -> None:
    plant(lambda block: wrap_experts(block, _one_gradient_only("down")))
    report = run_check(MoeConfig(), cache=cache)
    parts = {c.part for c in report.comparisons if not c.ok and c.problem == "unit"}
    assert parts == {"all", "expert 0"}


def test_a_small_fault_in_one_token_shows_only_in_that_token(plant: Callable[[Edit], None], cache: str) -> None:
    """The row of the token with the least output is off by a hundredth of its size: less than the whole's bound."""

    def change(call: Any, *tensors: Any) -> Any:
        out, steps = call(*tensors)
        least = int(out.detach().abs().amax(1).argmin())
        factor = torch.ones(len(out), 1, dtype=out.dtype)
        factor[least] = 1 + 2**-4
        return out * factor, steps

    plant(lambda block: wrap_experts(block, change))
    report = run_check(MoeConfig(dtype=DType.bfloat16), tokens=64, cache=cache)
    verdicts = {c.part: c.ok for c in report.comparisons if (c.problem, c.tensor) == ("unit", "output")}
    assert verdicts.pop("all") is True
    assert list(verdicts.values()) == [False]


@pytest.mark.parametrize("flag", ["dX_only", "dW_only"])
def test_a_gradient_that_was_not_asked_for_is_a_mismatch(plant: Callable[[Edit], None], cache: str, flag: str) -> None:
    plant(lambda block: setattr(block, flag, False))
    report = run_check(MoeConfig(**{flag: True}), cache=cache)
    extra = {"dX"} if flag == "dW_only" else set(GRADIENTS) - {"dX"}
    assert {name for problem, name in failures(report) if problem == "unit"} == extra


@pytest.mark.parametrize("flag", ["dX_only", "dW_only"])
def test_a_gradient_that_is_missing_is_a_mismatch(plant: Callable[[Edit], None], cache: str, flag: str) -> None:
    plant(lambda block: setattr(block, flag, True))
    report = run_check(MoeConfig(), cache=cache)
    missing = {"dX"} if flag == "dW_only" else set(GRADIENTS) - {"dX"}
    assert failures(report) == {(problem, name) for problem in ("unit", "integer") for name in missing}


def test_a_reference_that_is_wrong_excuses_nothing(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """Were Hugging Face's block far from float64, twice its error would let anything pass: that is a mismatch too."""
    real = unit.read_hf_block

    def misread(block: nn.Module) -> Any:
        weights = real(block)
        half = weights.gate_up_proj.shape[1] // 2
        return replace(weights, gate_up_proj=weights.gate_up_proj.detach().roll(half, 1))

    monkeypatch.setattr(unit, "read_hf_block", misread)
    report = run_check(MoeConfig(dtype=DType.bfloat16), cache=cache)
    notes = {c.tensor: c.note for c in report.comparisons if c.problem == "unit" and c.part == "all"}
    assert "disagree" in notes["output"]
    assert "disagree" in notes["dgate_up_proj"]


# --- routing ----------------------------------------------------------------------------------------------------------


def _tied(dtype: torch.dtype) -> tuple[Any, nn.Module]:
    """Our block and Hugging Face's with two experts that always tie: their router rows are the same."""
    model = ResolvedModel(32, 16, 6, 2, True, "silu")

    def weights() -> Any:
        drawn = init_random(model, 0, dtype)
        drawn.gate[1] = drawn.gate[0]
        return drawn

    return factory.make_block(MoeConfig(), weights()), to_hf_block(weights())


def _route_other_way(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The router with the other way to break the tie between experts 0 and 1."""
    logits, weights, selected = routing.route(*arguments)
    alone = (selected == 0).any(1, keepdim=True) ^ (selected == 1).any(1, keepdim=True)
    return logits, weights, torch.where(alone & (selected < 2), 1 - selected, selected)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_tokens_are_independent_of_weights_with_the_same_seed(seed: int) -> None:
    """Router logits of unit-scale weights and tokens are N(0,1): 40 where x repeats the numbers of the gate."""
    weights = init_random(replace(TINY, hidden_size=1024), seed)
    x, _ = run.draw_tokens(weights, 64, seed)
    assert float((x @ weights.gate.T).abs().max()) < 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_on_the_border_is_counted_and_left_out(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Both choices are right; the tokens' rows differ, the weights' gradients must not be compared with them in."""
    block, hf = _tied(dtype)
    monkeypatch.setattr("moefactory.block.route", _route_other_way)
    result = unit.unit_problem(block, hf, MoeConfig(), 64, 0)
    assert [c for c in result.comparisons if not c.ok] == []
    assert 0 < result.routing["differ_from_hf"] < 64


def test_the_same_with_free_rows_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above: nothing left out, the verdicts fail."""
    block, hf = _tied(torch.float32)
    monkeypatch.setattr("moefactory.block.route", _route_other_way)
    monkeypatch.setattr(run, "flipped", lambda one, _: torch.zeros(len(one), dtype=torch.bool))
    monkeypatch.setattr(unit, "flipped", run.flipped)
    result = unit.unit_problem(block, hf, MoeConfig(), 64, 0)
    assert {"output", "dgate_up_proj"} <= {c.tensor for c in result.comparisons if not c.ok}


def test_a_wrong_choice_of_experts_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float64 is held to our selection, so it agrees: only the selection's own verdict tells."""

    def second_best(x: Tensor, gate: Tensor, top_k: int, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        wide = routing.route(x, gate, top_k + 1, norm)[2][:, 1:]
        return routing.route(x, gate, top_k, norm, wide)

    block, hf = _tied(torch.float32)
    monkeypatch.setattr("moefactory.block.route", second_best)
    result = unit.unit_problem(block, hf, MoeConfig(), 64, 0)
    assert "selected_experts" in {c.tensor for c in result.comparisons if not c.ok}


def test_held_float64_equals_autograd_through_the_block() -> None:
    """The oracle against torch's autograd on our block in float64, 1e-12: two derivations of the same gradients."""
    model = ResolvedModel(24, 12, 5, 2, True, "silu")
    weights = init_random(model, 1, torch.float64)
    block = factory.make_block(MoeConfig(), weights)
    x = torch.randn(9, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(9, 24, dtype=torch.float64)
    out, logits = block(x)
    out.backward(grad)
    up, down = torch.empty_like(weights.gate_up_proj), torch.empty_like(weights.down_proj)

    def keep(e: int, dgate_up_proj: Tensor, ddown_proj: Tensor) -> None:
        up[e], down[e] = dgate_up_proj, ddown_proj

    oracle = float64_block(weights, x, block.run_router(x)[2], grad, keep)
    expected = [out, logits, x.grad, block.gate.grad, block.gate_up_proj.grad, block.down_proj.grad]
    found = [oracle.output, oracle.router_logits, oracle.dX, oracle.dgate, up, down]
    for mine, true in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


# --- the integer problem ----------------------------------------------------------------------------------------------

SIZES = [
    ResolvedModel(64, 48, 8, 2, True, "silu"),
    ResolvedModel(97, 47, 5, 3, False, "silu"),
    ResolvedModel(16, 8, 2, 1, False, "silu"),
    ResolvedModel(160, 96, 32, 8, True, "silu"),
]
_size_id = "{0.hidden_size}x{0.moe_intermediate_size}-E{0.num_experts}-K{0.top_k}".format


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("model", SIZES, ids=_size_id)
def test_the_integer_problem_is_exact_in_every_dtype(model: ResolvedModel, dtype: torch.dtype) -> None:
    """Every true value fits the dtype, every routing weight is 1/K, and the torch backend has every bit right."""
    problem = integer_problem(integer_sizes(model), dtype, "cpu")
    block = factory.make_block(MoeConfig(), problem.weights)
    _, weights, selected = block.run_router(problem.hidden_states)
    assert torch.equal(selected.sort(1).values, problem.selected_experts)
    assert torch.equal(weights, torch.full_like(weights, 1 / problem.weights.model.top_k))
    found = judge_integers(block, problem, GRADIENTS)
    assert {c.tensor for c in found} == set(TENSORS)
    assert [c for c in found if not c.ok or c.note] == []


def test_partial_sums_pass_256_and_final_sums_do_not() -> None:
    """The up GEMM of the first tokens: running sums along H, and what they end in (gate 64 or 128, up 1 or 2)."""
    problem = integer_problem(SIZES[0], torch.bfloat16, "cpu")
    x, expert = problem.hidden_states[0].double(), int(problem.selected_experts[0, 0])
    running = (x * problem.weights.gate_up_proj[expert].double()).cumsum(1)
    assert bool((running.abs().amax(1) > 256).all())
    half = SIZES[0].moe_intermediate_size
    assert set(running[:half, -1].tolist()) <= {64.0, 128.0}
    assert set(running[half:, -1].tolist()) <= {1.0, 2.0}


def test_the_integer_problem_has_an_expert_without_tokens() -> None:
    """Wherever there are more than two groups of K experts; its logits are CODE behind or more."""
    problem = integer_problem(SIZES[0], torch.float32, "cpu")
    assert set(problem.selected_experts.flatten().tolist()) == set(range(6))
    logits = problem.hidden_states @ problem.weights.gate.T
    margin = logits.gather(1, problem.selected_experts).amin(1) - logits[:, 6:].amax(1)
    assert float(margin.min()) >= 2 * CODE


class _LowLinear(torch.autograd.Function):
    """x w^T, and its gradients, with one of the three products accumulated in bfloat16, 16 terms at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, low: str) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.low = low
        return _accumulate(x, w.T, low == "fwd")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return _accumulate(grads[0], w, ctx.low == "dX"), _accumulate(grads[0].T, x, ctx.low == "dW"), None


def _accumulate(a: Tensor, b: Tensor, low: bool) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], 16):
        total = total + a[:, k : k + 16].float() @ b[k : k + 16].float()
        total = total.to(a.dtype).float() if low else total
    return total.to(a.dtype)


@pytest.fixture
def low_gemm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Let one product of one GEMM of the torch backend accumulate in low precision."""

    def install(gemm: str, product: str) -> None:
        def linear(x: Tensor, w: Tensor) -> Tensor:
            which = "down" if w.shape[0] == 64 else "up"  # of the demonstration model made 48 wide inside: H=64, 2I=96
            return _LowLinear.apply(x, w, product if which == gemm else "none")

        monkeypatch.setattr(reference.F, "linear", linear)

    real = reference.F.linear
    yield install
    reference.F.linear = real


@pytest.mark.parametrize("product", ["fwd", "dX", "dW"])
@pytest.mark.parametrize("gemm", ["up", "down"])
def test_accumulation_in_bfloat16_is_found_in_each_product_of_each_gemm(
    low_gemm: Callable[[str, str], None], gemm: str, product: str
) -> None:
    problem = integer_problem(SIZES[0], torch.bfloat16, "cpu")
    block = factory.make_block(MoeConfig(), problem.weights)
    low_gemm("none", product)
    assert all(c.ok for c in judge_integers(block, problem, GRADIENTS))
    block.zero_grad()
    low_gemm(gemm, product)
    failed = {c.tensor for c in judge_integers(block, problem, GRADIENTS) if not c.ok}
    assert {"fwd": "output", "dX": "dX", "dW": {"up": "dgate_up_proj", "down": "ddown_proj"}[gemm]}[product] in failed


def test_one_wrong_element_is_a_mismatch_and_an_inexact_truth_is_not_judged() -> None:
    true = torch.arange(6, dtype=torch.float64)
    assert exactly("t", "all", true.bfloat16(), true).ok
    wrong = exactly("t", "all", (true + (true == 3)).bfloat16(), true)
    assert (wrong.ok, wrong.error) == (False, 1.0)
    unfit = exactly("t", "all", true.bfloat16(), true + 2**-20)
    assert unfit.ok
    assert "not judged" in unfit.note


# --- the demonstration checkpoint -------------------------------------------------------------------------------------

TINY = resolve_model(ModelConfig())


def written(folder: Path, model: ResolvedModel = TINY) -> demo.Demo:
    with ExitStack() as stack:
        return demo.demo_checkpoint(model, 0, str(folder), stack)


def test_the_checkpoint_has_a_dense_layer_and_spreads_the_checked_one_over_three_shards(tmp_path: Path) -> None:
    found = written(tmp_path)
    config = json.loads((Path(found.path) / "config.json").read_text())
    assert config["num_hidden_layers"] == 3
    assert config["mlp_only_layers"] == [1]
    index = json.loads((Path(found.path) / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in index.items() if f"layers.{found.layer}.mlp." in name}) >= 3
    assert f"model.layers.{found.layer}.mlp.experts.7.down_proj.weight" in index


def test_the_checkpoints_weights_have_unit_scale(tmp_path: Path) -> None:
    """Standard deviation 1/sqrt(fan_in), to a tenth: small or uninitialised weights would hide faults."""
    found = written(tmp_path)
    index = json.loads((Path(found.path) / "model.safetensors.index.json").read_text())["weight_map"]
    for name, file in index.items():
        if f"layers.{found.layer}.mlp." in name:
            with safe_open(Path(found.path) / file, "pt") as shard:
                weight = shard.get_tensor(name)
            assert abs(float(weight.std()) * weight.shape[-1] ** 0.5 - 1) < 0.1


def test_a_checkpoint_that_is_there_is_kept_and_a_damaged_one_written_anew(tmp_path: Path) -> None:
    found = Path(written(tmp_path).path)
    shard = next(found.glob("*.safetensors"))
    before = shard.stat().st_mtime_ns
    written(tmp_path)
    assert shard.stat().st_mtime_ns == before
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    written(tmp_path)
    assert shard.read_bytes() == content
    assert [p.name for p in found.parent.iterdir()] == [found.name]


def test_other_sizes_and_other_versions_get_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {written(tmp_path).path, written(tmp_path, replace(TINY, num_experts=4)).path}
    monkeypatch.setattr(demo, "__version__", "999")
    names.add(written(tmp_path).path)
    assert len(names) == 3


def test_an_unfinished_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(Qwen3MoeForCausalLM, "save_pretrained", fail)
    with ExitStack() as stack, pytest.raises(RuntimeError, match="killed"):
        demo._written(tmp_path / "demo" / "key", TINY, 0)
        stack.close()
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_home_that_cannot_be_written_falls_back_to_a_temporary_folder_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")  # a folder below a file cannot be made, whoever tries
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["check", "format=json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any("temporary folder" in note for note in found["notes"])
    assert not Path(found["config"]["weights"]["path"]).exists()
    assert main(["check", f"cache={tmp_path / 'file'}"]) == 2
    assert capsys.readouterr().err.startswith("moefactory: cache:")


def test_hugging_faces_block_is_what_from_pretrained_loads(tmp_path: Path) -> None:
    """One layer alone, bit for bit the block of the whole model, with memory of its own, computing eagerly."""
    found = written(tmp_path)
    with theirs.quiet_transformers():
        whole = Qwen3MoeForCausalLM.from_pretrained(found.path, dtype=torch.bfloat16)
    for layer in (0, found.layer):
        block, how = theirs.load_hf_block(found.path, layer, torch.bfloat16, "cpu")
        ours, true = read_hf_block(block), read_hf_block(whole.model.layers[layer].mlp)
        assert how == "from_pretrained"
        for name in run.WEIGHTS:
            assert torch.equal(getattr(ours, name), getattr(true, name))
            assert getattr(ours, name).dtype == torch.bfloat16
        experts: Any = block.experts
        assert getattr(experts, "config", None) is None or experts.config._experts_implementation == "eager"


def test_a_users_checkpoint_is_checked_in_its_own_dtype(tmp_path: Path) -> None:
    found = written(tmp_path)
    mine = tmp_path / "mine"
    shutil.copytree(found.path, mine)
    report = run_check(MoeConfig(weights=WeightsConfig(WeightsSource.checkpoint, path=str(mine), layer=0)))
    assert report.status == "ok"
    assert report.config["dtype"] == "float32"
    assert "from_pretrained" in report.source


def test_a_checkpoint_of_another_family_is_checked_with_hugging_faces_qwen3_block(tmp_path: Path) -> None:
    """Qwen3-VL-MoE nests its sizes, and its tensors lie under model.language_model."""
    weights = init_random(replace(TINY, num_experts=4), 0)
    state = to_hf_state_dict(weights, "model.language_model.layers.0.mlp.", layout="per_expert")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    text = {**hf_config(weights.model).to_dict(), "model_type": "qwen3_vl_moe_text", "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe", "text_config": text}))
    report = run_check(MoeConfig(weights=WeightsConfig(WeightsSource.checkpoint, path=str(tmp_path), layer=0)))
    assert report.status == "ok"
    assert "model_type qwen3_vl_moe" in report.source


def test_a_model_that_is_too_large_for_a_demonstration_is_refused(tmp_path: Path) -> None:
    large = replace(TINY, hidden_size=4096, moe_intermediate_size=1536, num_experts=128)
    with pytest.raises(ConfigError, match="moe/weights=random"):
        written(tmp_path, large)
    assert list(tmp_path.iterdir()) == []
