"""Searching kernel configs: candidates, the probe that judges them, the search, and the lookup of a step."""

# mypy: allow-untyped-defs

from __future__ import annotations

import copy
import itertools
import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch
from interpreter import install_bfloat16_shim, install_launch_fixes

from moefactory import ConfigError, Qwen3MoeFusedGroupedGEMMBlock, ResolvedModel
from moefactory.config import DType
from moefactory.rules import SPECIALIZED_TILES
from moefactory.triton import cache, choice, lookup, pipeline, probe, search_space, tuning
from moefactory.triton.choice import Launch, shipped
from moefactory.triton.explain import launches
from moefactory.triton.launch import record_launches
from moefactory.triton.options import FusedOptions
from moefactory.triton.search_space import candidates
from moefactory.weights import init_random

LAUNCHES = list(itertools.product(("fwd", "bwd_dX", "bwd_dW"), ("up", "down")))
ALL_ON, ALL_OFF = (True,) * 4, (False,) * 4
TOKENS = 16
interpreted = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of its own; nothing is remembered from before."""
    monkeypatch.setenv("MOEFACTORY_CACHE", str(tmp_path / "cache"))
    lookup.forget()
    yield tmp_path / "cache"
    lookup.forget()


@pytest.fixture(autouse=True)
def _quiet(device):
    if device == "cpu":
        install_launch_fixes()


def launch_of(pass_name, gemm, flags=ALL_ON, dtype=DType.float32, hidden=64, width=32, experts=8, rows=16, top_k=2):
    n, k = (2 * width, hidden) if gemm == "up" else (hidden, width)
    return Launch(pass_name, gemm, experts, n, k, rows, dtype, FusedOptions(top_k, *flags))


def fused_block(device, **options):
    model = ResolvedModel(64, 32, 4, 2, norm_topk_prob=True, hidden_act="silu")
    return Qwen3MoeFusedGroupedGEMMBlock.from_weights(init_random(model, 0, torch.float32, device), **options)


def step(block):
    """Output and gradients of a step, from fixed data."""
    x = torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(1)).to(block.gate.device).requires_grad_()
    out, _ = block(x)
    return out.detach(), *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])


@pytest.fixture
def times(monkeypatch):
    """{(launch, config): ms}, 1.0 where nothing is said, and a timer that reads it; every candidate passes as right."""
    monkeypatch.setattr(tuning, "runner", lambda problem, config: (problem.launch, config))
    monkeypatch.setattr(tuning, "complaint", lambda problem, config, expected: None)

    class Times(dict):
        def timer(self, run):
            return self.get(run, 1.0)

    return Times()


@pytest.fixture
def judged(times, monkeypatch):
    """`times`, but candidates are judged as they are for users."""
    monkeypatch.setattr(tuning, "complaint", probe.complaint)
    return times


def forbidden(*args, **kwargs):
    raise AssertionError("nothing may be timed or judged here")


# --- candidates -------------------------------------------------------------------------------------------------------

FLAGS = [ALL_ON, ALL_OFF, (True, False, True, True), (False, True, False, True)]


@pytest.mark.parametrize("capability", [0, 75, 86, 90, 100])
@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float32])
def test_candidates_are_few_legal_and_the_same_each_time(capability, dtype):
    """At most 40, each once, the shipped choice first; no broken rule, within shared memory, no TMA before Hopper."""
    for (pass_name, gemm), flags, rows in itertools.product(LAUNCHES, FLAGS, (1, 64, 1024)):
        launch = launch_of(pass_name, gemm, flags, dtype, 2048, 768, 128, rows, 8)
        found = candidates(launch, capability)
        assert found[0] == shipped(launch, capability)
        assert (2 if capability == 0 else 20) <= len(found) == len(set(found)) <= search_space.MAX_CANDIDATES
        candidates.cache_clear()
        assert candidates(launch, capability) == found
        for config in found:
            assert search_space.refusals(launch, config) == []
            if capability:
                limit = choice._shared_limit(capability)
                assert search_space.shared_memory(pass_name, config, dtype) <= limit
            used = [name for name, value in asdict(config).items() if name.startswith("use_tma") and value]
            assert all(launch.may_use(name) or getattr(config, "gather_first", False) for name in used)
            assert capability >= 90 or not used


@pytest.mark.parametrize(("pass_name", "gemm"), LAUNCHES)
def test_the_search_space_varies_every_field_but_tma_stores(pass_name, gemm):
    """On Hopper each field takes two values or more; a store by TMA stays off, whatever is allowed."""
    found = [
        config
        for flags in (ALL_ON, ALL_OFF)
        for config in candidates(launch_of(pass_name, gemm, flags, DType.bfloat16, 2048, 768, 128, 64, 8), 90)
    ]
    values = {name: {getattr(config, name) for config in found} for name in asdict(found[0])}
    assert values.pop("use_tma_store") == {False}
    assert {name: seen for name, seen in values.items() if len(seen) < 2} == {}


@pytest.mark.parametrize("rows", [16, 64, 128, 1024])
@pytest.mark.parametrize(("pass_name", "gemm"), LAUNCHES)
def test_both_kinds_of_kernel_are_tried_on_hopper(pass_name, gemm, rows):
    """Whichever is shipped, all specialised configs are candidates, and 30 plain ones beside them, TMA included."""
    for flags in FLAGS:
        launch = launch_of(pass_name, gemm, flags, DType.bfloat16, 2048, 768, 128, rows, 8)
        found = candidates(launch, 90)
        special = [config for config in found if config.warp_specialize]
        assert found[0].warp_specialize == (rows >= choice.SPECIALIZED_FROM[pass_name, gemm])
        tiles = {(c.block_m, c.block_n, c.block_k, c.num_stages) for c in special}
        assert tiles == {(*tile, s) for tile in SPECIALIZED_TILES[pass_name] for s in (3, 4)}
        copies = {getattr(config, "gather_first", False) for config in special}
        indexed = flags[0] if gemm == "up" else flags[1]
        assert copies == ({False, True} if pass_name == "bwd_dW" and indexed else {False})
        plain = [config for config in found if not config.warp_specialize]
        assert len(plain) >= 30
        assert any(value for name, value in asdict(plain[0]).items() if name.startswith("use_tma_load"))
        assert len({config.num_warps for config in plain}) == 2


def test_plain_neighbours_of_a_specialised_choice_begin_at_the_plain_one(monkeypatch):
    """The plain candidates are those that would be tried if the specialised kernels did not exist."""
    launch = launch_of("bwd_dW", "up", ALL_ON, DType.bfloat16, 2048, 768, 128, 256, 8)
    found = [config for config in candidates(launch, 90) if not config.warp_specialize]
    monkeypatch.setattr(choice, "SPECIALIZED_TRITON", ())
    shipped.cache_clear()
    candidates.cache_clear()
    try:
        without = [config for config in candidates(launch, 90) if not config.warp_specialize]
    finally:
        shipped.cache_clear()
        candidates.cache_clear()
    assert not without[0].warp_specialize
    assert found == without[: len(found)]


@pytest.mark.parametrize("capability", [0, 80, 100, 120])
def test_specialised_kernels_are_tried_on_hopper_alone(capability):
    """Nor there in float32, nor where a weight's address or a row's length keeps TMA from it."""
    launch = launch_of("fwd", "up", ALL_ON, DType.bfloat16, 2048, 768, 128, 256, 8)
    float32, unaligned = replace(launch, dtype=DType.float32), replace(launch, aligned=False)
    odd = launch_of("fwd", "up", ALL_ON, DType.bfloat16, 2044, 768, 128, 256, 8)
    tried = [*candidates(launch, capability), *(c for one in (float32, unaligned, odd) for c in candidates(one, 90))]
    assert not any(config.warp_specialize for config in tried)


def test_a_candidate_that_a_rule_forbids_is_pruned():
    """The rules' own predicates prune: each of these is named by the id of the rule that it breaks."""
    up = launch_of("fwd", "up", ALL_ON, DType.bfloat16)
    config = candidates(up, 90)[0]
    broken = {
        "tile-size": replace(config, block_m=33),
        "swiglu-tile": replace(config, block_n=16),
        "permute_x-fwd-tma-load-x": replace(config, use_tma_load_x=True),
        "shared-memory": replace(config, block_m=256, block_n=256, num_stages=5),
        "num-warps": replace(config, num_warps=3),
    }
    assert {rule: search_space.refusals(up, bad) for rule, bad in broken.items()} == {r: [r] for r in broken}
    assert not any(search_space.possible(up, bad, 90) for bad in broken.values())
    odd = launch_of("fwd", "up", ALL_OFF, DType.bfloat16, hidden=50)
    assert search_space.refusals(odd, replace(config, use_tma_load_w=True)) == ["tma-alignment"]


# --- the probe --------------------------------------------------------------------------------------------------------


def judge(launch, device, config=None):
    place = torch.device(device)
    config = config or candidates(launch, choice._capability(place))[0]
    problem = probe.integer_problem(launch, config.block_m, place)
    return probe.complaint(problem, config, probe.truth(problem))


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "".join("ny"[f] for f in flags))
@pytest.mark.parametrize(("pass_name", "gemm"), LAUNCHES)
def test_right_kernels_pass(pass_name, gemm, flags, device):
    """The shipped choice agrees bit for bit with float64 torch, ragged sizes included."""
    assert judge(launch_of(pass_name, gemm, flags, hidden=52, width=20), device) is None


@pytest.mark.parametrize("dtype", [DType.float16, DType.bfloat16])
@pytest.mark.parametrize(("pass_name", "gemm"), LAUNCHES)
def test_right_kernels_pass_in_16_bits(pass_name, gemm, dtype, device):
    """The results are exact there too: each is a float32 integer, rounded once."""
    if device == "cpu":
        install_bfloat16_shim()
    assert judge(launch_of(pass_name, gemm, dtype=dtype), device) is None


@pytest.mark.parametrize("experts", [1, 2, 64])
def test_the_probe_has_few_experts_and_every_kind_of_load(experts, device):
    """One row more and less than a block, one row, none, and dropped rows; as many experts as there are at most."""
    plan = probe.integer_problem(launch_of("fwd", "up", experts=experts, top_k=1), 32, torch.device(device)).plan
    counts = plan.token_counts_by_expert.tolist()
    assert len(counts) == min(experts, 16)
    assert set(counts) >= {1: {33}, 2: {33, 0}, 64: {0, 1, 31, 32, 33}}[experts]
    assert sum(counts) < plan.gather_indices.shape[0]


RESULTS = {  # kernel -> which of its results the launch is judged by
    ("fwd", "up"): ("forward_gemm", [0, 1]),
    ("fwd", "down"): ("forward_gemm", [None]),
    ("bwd_dX", "up"): ("dX_gemm", [None]),
    ("bwd_dX", "down"): ("dX_gemm_dswiglu", [0, 1, 2]),
    ("bwd_dW", "up"): ("dW_gemm", [None]),
    ("bwd_dW", "down"): ("dW_gemm", [None]),
}
PLANTED = [(launch, place) for launch, (_, places) in RESULTS.items() for place in places]


def plant(monkeypatch, name, damage, bad=None, since=0):
    """Let a kernel `damage` its results under config `bad` (any, if None), from its call number `since` on.

    With `bad` only the launch with SwiGLU in its epilogue is damaged: two launches may have a config in common.
    """
    right, calls = getattr(pipeline, name), itertools.count()

    def planted(*args, **kwargs):
        found = right(*args, **kwargs)
        config = next(a for a in args if hasattr(a, "block_m"))
        if (bad is None or (bad == config and kwargs.get("swiglu"))) and next(calls) >= since:
            damage(found)
        return found

    monkeypatch.setattr(pipeline, name, planted)


def last_element(place, value=None):
    def damage(found):
        tensor = (found[0] if isinstance(found, tuple) else found) if place is None else found[place]
        tensor.view(-1)[20] += 1 if value is None else value

    return damage


@pytest.mark.parametrize("value", [None, float("nan")], ids=["one more", "nan"])
@pytest.mark.parametrize(("where", "place"), PLANTED, ids=lambda value: str(value).replace("'", ""))
def test_one_wrong_element_is_found(where, place, value, monkeypatch, device):
    """A3: one element of any result, off by one or never written, and the complaint tells where."""
    plant(monkeypatch, RESULTS[where][0], last_element(place, value))
    found = judge(launch_of(*where), device)
    assert found is not None
    assert "elements differ, at [" in found


def test_an_error_that_moves_is_found(monkeypatch, device):
    """A3: right at the first run, wrong at the second."""
    plant(monkeypatch, "forward_gemm", last_element(None), since=1)
    assert str(judge(launch_of("fwd", "down"), device)).endswith("in a second run")


def test_the_probe_leaves_no_trace(device, monkeypatch):
    """Neither torch's deterministic mode, nor its fill, nor the global random state."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    before = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    state = torch.get_rng_state()
    judge(launch_of("bwd_dW", "up"), device)
    assert (torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory) == before
    assert torch.equal(torch.get_rng_state(), state)


# --- the search -------------------------------------------------------------------------------------------------------


@interpreted
def test_candidates_are_compiled_before_they_are_judged(times, monkeypatch):
    """Some at a time, here three of four and then one, each on what it is judged by and on what it is timed by; one
    that cannot run stops none."""
    block, happened = fused_block("cpu"), []

    def together(run):
        happened.append("together")
        run()

    def runner(problem, config):  # what is no function cannot run
        happened.append(("runner", config))
        return problem.launch, config

    monkeypatch.setattr(tuning, "TOGETHER", 3)
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    monkeypatch.setattr(tuning, "compile_ahead", together)
    monkeypatch.setattr(tuning, "runner", runner)
    report = block.tune(TOKENS, passes=["bwd_dX"], timer=times.timer, progress=lambda event: happened.append(event.row))
    for one in dict.fromkeys(row.launch for row in report.rows):
        configs = [row.config for row in report.rows if row.launch == one]
        assert len(configs) == 4
        for some in (configs[:3], configs[3:]):
            expected = ["together", *(("runner", config) for config in some for _ in range(2))]
            assert happened[: len(expected)] == expected
            del happened[: len(expected)]
            for config in some:
                assert happened.pop(0) == ("runner", config)
                assert happened.pop(0).config == config
        while happened and happened[0] != "together":
            del happened[0]  # the finalists, once more
    assert happened == []


@interpreted
def test_tune_finds_keeps_and_uses_the_fastest(times):
    """Winners are what the timer liked; a later process (memory dropped) uses them and searches nothing again."""
    block = fused_block("cpu")
    before = step(block)
    wanted = {one: candidates(one, 0)[-1] for one in launches(block, TOKENS)}
    times.update(dict.fromkeys(wanted.items(), 0.25))
    report = block.tune(TOKENS, timer=times.timer)
    assert {row.launch: row.config for row in report.winners} == wanted
    assert len(wanted) == 6
    assert all(row.status == "ok" for row in report.rows)
    assert str(report).count("4.00x the shipped choice's speed") == sum(
        config != candidates(one, 0)[0] for one, config in wanted.items()
    )
    assert json.loads(json.dumps(report.as_dict()))["num_tokens"] == TOKENS
    assert block.explain(TOKENS).count("(tuned)") == 6
    lookup.forget()
    assert block.explain(TOKENS).count("(tuned)") == 6
    assert block.explain(64 * TOKENS).count("(shipped)") == 6  # another bucket of rows
    for mine, shipped_ones in zip(step(block), before, strict=True):
        torch.testing.assert_close(mine, shipped_ones, rtol=1e-4, atol=1e-4)
    again = block.tune(TOKENS, timer=forbidden)
    assert [row.config for row in again.winners] == [row.config for row in report.winners]
    assert {row.status for row in again.rows} == {"cached"}
    assert "4.00x the shipped choice's speed; from the cache" in str(again)
    times.clear()
    redone = block.tune(TOKENS, timer=times.timer, redo=True)
    assert all(row.shipped for row in redone.winners)


@interpreted
def test_a_wrong_candidate_cannot_win(judged, monkeypatch):
    """A3: the fastest candidate computes one wrong element: it is struck out with a warning, never timed."""
    block = fused_block("cpu")
    up = launches(block, TOKENS)[0]
    bad, good = candidates(up, 0)[-1], candidates(up, 0)[-2]
    plant(monkeypatch, "forward_gemm", last_element(0), bad)
    judged.update({(up, bad): 0.1, (up, good): 0.5})
    with pytest.warns(RuntimeWarning, match="fwd up: 1 of 4 candidates computed a wrong result"):
        report = block.tune(TOKENS, passes=["fwd"], timer=judged.timer)
    struck = [row for row in report.rows if row.status == "wrong"]
    assert [(row.launch, row.config, row.ms) for row in struck] == [(up, bad, None)]
    assert "elements differ" in struck[0].reason
    assert report.winners[0].config == good
    assert bad not in [row.config for row in report.rows if row.launch == up and row.ms]
    assert choice.choose(up, block.gate.device) == (good, "tuned")


@interpreted
def test_a_candidate_that_fails_is_struck_out_with_its_reason(judged, monkeypatch):
    """What a compiler raises is kept as the reason; the others go on."""
    block = fused_block("cpu")
    up = launches(block, TOKENS)[0]
    bad = candidates(up, 0)[1]

    def fail(found):
        raise RuntimeError("out of resource: shared memory\nand a long dump")

    plant(monkeypatch, "forward_gemm", fail, bad)
    report = block.tune(TOKENS, passes=["fwd"], timer=judged.timer)
    failed = [row for row in report.rows if row.status == "failed"]
    assert [(row.config, row.reason) for row in failed] == [(bad, "RuntimeError: out of resource: shared memory")]
    assert len(report.winners) == 2


@interpreted
def test_where_nothing_is_right_the_shipped_choice_stays(judged, monkeypatch, folder):
    """Every candidate wrong: a warning says so, nothing is written, steps go on with the shipped choice."""
    block = fused_block("cpu")
    plant(monkeypatch, "dW_gemm", last_element(None))
    with pytest.warns(RuntimeWarning, match="4 of 4 candidates .* the shipped choice stays in use") as caught:
        report = block.tune(TOKENS, passes=["bwd_dW"], timer=judged.timer)
    assert len(caught) == 2
    assert report.winners == []
    assert not folder.exists()
    assert block.explain(TOKENS).count("(shipped)") == 6


@interpreted
def test_our_own_memory_need_is_no_candidates_fault(folder):
    """Out of memory is raised: no candidate is struck out for it, and nothing is written."""

    def full(run):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        fused_block("cpu").tune(TOKENS, timer=full)
    assert not folder.exists()


@interpreted
def test_ties_go_to_the_shipped_choice(times):
    """Half a percent is noise: among equals the candidate nearest to the shipped choice wins."""
    block = fused_block("cpu")
    for one in launches(block, TOKENS):
        times[one, candidates(one, 0)[-1]] = 0.995
    assert all(row.shipped for row in block.tune(TOKENS, timer=times.timer).winners)


@interpreted
def test_the_decision_is_between_times_taken_side_by_side(times):
    """The first round's fastest loses where the final round, minutes later, says otherwise."""
    block = fused_block("cpu")
    one = launches(block, TOKENS)[1]
    early, steady = [(one, config) for config in candidates(one, 0)[-2:]]
    seen = []

    def drifting(run):
        seen.append(run)
        return {early: 0.1 if seen.count(early) == 1 else 0.9, steady: 0.5}.get(run, 1.0)

    found = [row for row in block.tune(TOKENS, passes=["fwd"], timer=drifting).winners if row.launch == one]
    assert [((row.launch, row.config), row.ms) for row in found] == [(steady, 0.5)]


@interpreted
@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timer_that_gives_no_time_strikes_out(times, ms):
    """Not a number, not positive: no winner by accident."""
    block = fused_block("cpu")
    one = launches(block, TOKENS)[0]
    times[one, candidates(one, 0)[1]] = ms
    report = block.tune(TOKENS, passes=["fwd"], timer=times.timer)
    assert [row.config for row in report.rows if row.status == "failed" and row.launch == one] == [
        candidates(one, 0)[1]
    ]


@interpreted
def test_an_interrupted_search_goes_on_where_it_was(times):
    """What is done is on disk at once: after an interrupt in the third launch two are cached, the rest is searched."""
    block = fused_block("cpu")
    order = launches(block, TOKENS)

    def interrupt(event):
        if event.row.launch == order[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block.tune(TOKENS, timer=times.timer, progress=interrupt)
    lookup.forget()
    rows = block.tune(TOKENS, timer=times.timer).rows
    assert {row.launch for row in rows if row.status == "cached"} == set(order[:2])
    assert {row.launch for row in rows if row.status == "ok"} == set(order[2:])


@interpreted
def test_progress_counts_every_candidate_once(times):
    """done grows by one to total; a cached launch counts as a whole."""
    block = fused_block("cpu")
    total = sum(len(candidates(one, 0)) for one in launches(block, TOKENS))
    seen = []
    block.tune(TOKENS, timer=times.timer, progress=seen.append)
    assert [(event.done, event.total) for event in seen] == [(n + 1, total) for n in range(total)]
    cached = []
    block.tune(TOKENS, timer=forbidden, progress=cached.append)
    assert len(cached) == 6
    assert cached[-1].done == total


@interpreted
def test_only_launches_that_the_block_runs(times):
    """dX_only has no dW, dW_only no dX of the up GEMM, and `passes` chooses."""

    def searched(block, **options):
        return {(r.launch.pass_name, r.launch.gemm) for r in block.tune(TOKENS, timer=times.timer, **options).winners}

    assert searched(fused_block("cpu", dX_only=True)) == {one for one in LAUNCHES if one[0] != "bwd_dW"}
    assert searched(fused_block("cpu", dW_only=True)) == set(LAUNCHES) - {("bwd_dX", "up")}
    assert searched(fused_block("cpu"), passes=["bwd_dX"]) == {("bwd_dX", "up"), ("bwd_dX", "down")}


@interpreted
def test_what_tune_refuses():
    """In one line: a block that would not use the results, no tokens, an unknown pass."""
    with pytest.raises(ConfigError, match="autotune: got false"):
        fused_block("cpu", autotune=False).tune(TOKENS)
    with pytest.raises(ValueError, match="num_tokens: got 0; needed: 1 or more"):
        fused_block("cpu").tune(0)
    with pytest.raises(ValueError, match="passes: got 'forward'; allowed: fwd, bwd_dX, bwd_dW"):
        fused_block("cpu").tune(TOKENS, passes=["forward"])


@interpreted
def test_under_autocast_its_dtype_is_tuned(times):
    """A step under autocast runs in another dtype: so does what is tuned for it."""
    install_bfloat16_shim()
    with torch.autocast("cpu", torch.bfloat16):
        report = fused_block("cpu").tune(TOKENS, passes=["fwd"], timer=times.timer)
    assert {row.launch.dtype for row in report.winners} == {DType.bfloat16}


@interpreted
def test_nothing_of_the_callers_is_changed(times):
    """A6: candidates, options and weights are the same before and after, no gradient appears, nor a random draw."""
    block = fused_block("cpu")
    todo = launches(block, TOKENS)
    lists = {one: candidates(one, 0) for one in todo}
    before = copy.deepcopy((lists, block.fused, block.moe_config, dict(block.state_dict())))
    state = torch.get_rng_state()
    block.tune(TOKENS, timer=times.timer)
    after = ({one: candidates(one, 0) for one in todo}, block.fused, block.moe_config, dict(block.state_dict()))
    assert after[:3] == before[:3]
    assert all(torch.equal(after[3][name], before[3][name]) for name in before[3])
    assert all(p.grad is None for p in block.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(AttributeError):
        lists[todo[0]][0].block_m = 1


@interpreted
def test_the_host_clock_serves_where_there_is_no_gpu():
    """Without a timer the search runs through; the launch itself is what is timed."""
    with record_launches() as names:
        report = fused_block("cpu").tune(TOKENS, passes=["fwd"])
    assert len(report.winners) == 2
    assert report.device == "interpreter"
    assert {"forward_up", "forward"} <= set(names)


@pytest.mark.gpu
def test_tune_on_a_gpu(monkeypatch, folder):
    """The GPU's own clock, a few candidates: all are right, winners are used, nothing is searched twice."""
    monkeypatch.setattr(search_space, "MAX_CANDIDATES", 10)  # on Hopper 8 may be specialised: plain ones, too
    candidates.cache_clear()
    model = ResolvedModel(256, 128, 16, 4, norm_topk_prob=True, hidden_act="silu")
    weights = init_random(model, 0, torch.bfloat16, "cuda")
    block = Qwen3MoeFusedGroupedGEMMBlock.from_weights(weights)
    report = block.tune(1024)
    candidates.cache_clear()
    assert [row.reason for row in report.rows if row.status != "ok"] == []
    assert len(report.winners) == 6
    assert report.device == torch.cuda.get_device_name()
    assert all(0 < row.ms < 10 for row in report.rows if row.ms)


# --- the lookup of a step ---------------------------------------------------------------------------------------------


@interpreted
def test_no_step_ever_searches(monkeypatch):
    """A5: autotune=True without a cache runs the very kernels of autotune=False, and times nothing."""
    for name in ("tune", "_search", "_judged", "_gpu_milliseconds", "_host_milliseconds", "complaint"):
        monkeypatch.setattr(tuning, name, forbidden)
    monkeypatch.setattr("triton.testing.do_bench", forbidden)
    ran = {}
    for autotune in (True, False):
        block = fused_block("cpu", autotune=autotune)
        with record_launches() as names:
            results = step(block)
        ran[autotune] = (list(names), results)
    assert ran[True][0] == ran[False][0] != []
    assert all(torch.equal(a, b) for a, b in zip(ran[True][1], ran[False][1], strict=True))


@interpreted
@pytest.mark.parametrize("tuned_before", [True, False])
def test_the_disk_is_asked_once_for_each_launch(times, monkeypatch, tuned_before):
    """Hit or miss, the second step opens no file, and neither does the third."""
    block = fused_block("cpu")
    block.tune(TOKENS if tuned_before else 64 * TOKENS, timer=times.timer)
    lookup.forget()
    asked = []
    load = cache.load
    monkeypatch.setattr(cache, "load", lambda *args: asked.append(args) or load(*args))
    for _ in range(3):
        step(block)
    assert len(asked) == 6
    assert block.explain(TOKENS).count("(tuned)") == (6 if tuned_before else 0)


@interpreted
def test_tuning_forgets_what_was_looked_up(times):
    """A miss that a step remembered is no obstacle to the result of a later search."""
    block = fused_block("cpu")
    step(block)
    block.tune(TOKENS, timer=times.timer)
    assert block.explain(TOKENS).count("(tuned)") == 6


def test_without_autotune_nothing_is_looked_up(monkeypatch, device):
    monkeypatch.setattr(lookup, "tuned", forbidden)
    assert fused_block(device, autotune=False).explain(TOKENS).count("(shipped)") == 6


CHANGES = {
    "pass_name": "bwd_dX",
    "gemm": "down",
    "experts": 4,
    "n": 128,
    "k": 128,
    "rows_per_expert": 32,
    "dtype": DType.float16,
    "aligned": False,
    "top_k": 4,
    "permute_x": False,
    "permute_y": False,
    "fuse_swiglu": False,
    "fuse_combine": False,
    "saved": "x",
    "sm_margin": 16,
}


@interpreted
@pytest.mark.parametrize("field", CHANGES)
def test_another_launch_misses(field):
    """A4: a result for one launch is not found for a launch that differs in any one field or flag."""
    here = torch.device("cpu")
    one = launch_of("fwd", "up")
    lookup.keep(one, here, lookup.Result(candidates(one, 0)[-1], 0.5, 1.0))
    if hasattr(one, field):
        other = replace(one, **{field: CHANGES[field]})
    else:
        other = replace(one, options=replace(one.options, **{field: CHANGES[field]}))
    assert other != one
    assert lookup.tuned(other, here) is None
    assert lookup.tuned(one, here) == candidates(one, 0)[-1]
    lookup.forget()
    assert lookup.tuned(other, here) is None
    assert lookup.tuned(one, here) == candidates(one, 0)[-1]


@interpreted
def test_every_field_of_a_launch_is_in_the_key():
    """A4: a field that is added to Launch or to FusedOptions is added here, and is in the key by itself."""
    key = lookup.key_of(launch_of("fwd", "up"), ())
    assert set(key) == {*CHANGES, "candidates"}
    assert "device" in cache.environment(torch.device("cpu"))
    assert cache.environment(torch.device("cpu"))["device"] == "interpreter"


@interpreted
def test_another_candidate_list_misses(monkeypatch):
    """A4: results chosen from a longer list do not stand for a shorter one."""
    here = torch.device("cpu")
    one = launch_of("fwd", "up")
    lookup.keep(one, here, lookup.Result(candidates(one, 0)[0], 0.5, 1.0))
    monkeypatch.setattr(lookup, "candidates", lambda launch, capability: candidates(launch, capability)[:-1])
    lookup.forget()
    assert lookup.tuned(one, here) is None


def rewritten(folder, change):
    """Every file of the cache with its value changed."""
    for path in folder.rglob("*.json"):
        entry = json.loads(path.read_text())
        change(entry["value"])
        path.write_text(json.dumps(entry))
    lookup.forget()


FOREIGN = {
    "a legal config that is not on the list": lambda value: value["winner"].update(block_m=128, block_n=128),
    "a config of 4096 rows": lambda value: value["winner"].update(block_m=4096),
    "an unknown field": lambda value: value["winner"].update(extra=1),
    "a number for a flag": lambda value: value["winner"].update(use_tma_store=0),
    "a fraction for a number": lambda value: value["winner"].update(num_warps=4.0),
    "no config": lambda value: value.update(winner=None),
    "no time": lambda value: value.update(ms="fast"),
    "a field less": lambda value: value.pop("shipped_ms"),
}


@interpreted
@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_config_is_not_obeyed(case, folder):
    """A1: what this run would not have tried is not launched: a miss, and one warning."""
    here = torch.device("cpu")
    one = launch_of("fwd", "up")
    lookup.keep(one, here, lookup.Result(candidates(one, 0)[0], 0.5, 1.0))
    rewritten(folder, FOREIGN[case])
    with pytest.warns(RuntimeWarning, match="tuning cache: ") as caught:
        assert lookup.tuned(one, here) is None
    assert len(caught) == 1


@interpreted
def test_a_damaged_cache_changes_no_result(times, folder):
    """A1: all six files broken after a search: the step's bits are those of the shipped choice, six warnings once."""
    block = fused_block("cpu")
    before = step(block)
    for one in launches(block, TOKENS):
        times[one, candidates(one, 0)[-1]] = 0.25
    block.tune(TOKENS, timer=times.timer)
    for path in folder.rglob("*.json"):
        path.write_bytes(path.read_bytes()[:50])
    lookup.forget()
    with pytest.warns(RuntimeWarning, match="JSONDecodeError") as caught:
        after = step(block)
    assert len(caught) == 6
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(block)


@interpreted
def test_an_unwritable_folder_is_no_obstacle(times, tmp_path, monkeypatch):
    """A1: the search runs through with one warning, and this process uses what it found."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOEFACTORY_CACHE", str(tmp_path / "file" / "cache"))
    block = fused_block("cpu")
    with pytest.warns(RuntimeWarning, match="results last as long as this process") as caught:
        block.tune(TOKENS, timer=times.timer)
    assert len(caught) == 1
    assert block.explain(TOKENS).count("(tuned)") == 6
