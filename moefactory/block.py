"""START HERE: the two Mixture-of-Experts blocks. `forward` reads as the data flow does.

    hidden_states [B,S,H] -> router -> RoutingPlan -> experts (up GEMM, activation, down GEMM, combine) -> [B,S,H]

Both blocks hold the same parameters and route alike; they differ in the function that computes the experts. The fused
block has one operator for all of it (`_at_once`), and the steps one by one where they are traced or left to torch. What
the numbers must be is `moefactory.reference`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from .config import (
    GEMMS,
    PASSES,
    Backend,
    BackendConfig,
    ConfigError,
    DType,
    KernelsConfig,
    MachineError,
    ModelConfig,
    MoeConfig,
    ResolvedModel,
    Saved,
    WeightsError,
    resolve_kernels,
)
from .machine import why_not_here
from .reference import ExpertOptions, ExpertSteps, act_and_mul, activation, compute_experts
from .routing import RoutingPlan, make_plan, route
from .rules import check_rules, make_case
from .weights import BlockWeights, read_hf_block

if TYPE_CHECKING:
    from .triton.tuning import TuneProgress, TuneReport


@dataclass(frozen=True)
class GroupedGEMMResult:
    """Every intermediate of one forward; rows M = T*K, in expert order unless said otherwise."""

    token_counts_by_expert: Tensor  # [E] int32
    gather_indices: Tensor  # [T*K] int32, expert-order row -> flat (token, slot)
    topk_weights: Tensor  # [T,K]
    first_gemm: Tensor  # [T*K, 2I]
    intermediate: Tensor  # [T*K, I]
    second_gemm: Tensor  # [T*K, H]
    hidden_states_unpermute: Tensor  # [T*K, H], token order
    hidden_states: Tensor  # [B,S,H]


class Qwen3MoeGroupedGEMMBlock(nn.Module):
    """A Qwen3 Mixture-of-Experts block in plain torch.

    Args:
        config: a Hugging Face config, or sizes as `ModelConfig` or `ResolvedModel`.
        gate: [E,H], the router's weight.
        gate_up_proj: [E,2I,H], each expert's gate rows, then its up rows.
        down_proj: [E,H,I].
        dW_only: compute the gradients of the weights only.
        dX_only: compute the gradient of the input only.
        trace: return every intermediate (`GroupedGEMMResult`) in place of the hidden states alone.

    Parameters given as `nn.Parameter` are shared, tensors become parameters.

    Raises:
        ConfigError: dW_only with dX_only; an activation that transformers does not know.
        WeightsError: shapes, dtypes or devices that do not fit.
    """

    def __init__(
        self,
        config: Any,
        gate: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        dW_only: bool = False,
        dX_only: bool = False,
        trace: bool = True,
    ) -> None:
        super().__init__()
        self.model = model_sizes(config)
        if dW_only and dX_only:
            raise ConfigError(
                "dW_only-dX_only: dW_only=true and dX_only=true leave nothing to compute; set at most one"
            )
        _check_tensors(self.model, gate, gate_up_proj, down_proj)
        self._check_activation()
        self.gate = _parameter(gate)
        self.gate_up_proj = _parameter(gate_up_proj)
        self.down_proj = _parameter(down_proj)
        self.dW_only, self.dX_only, self.trace = dW_only, dX_only, trace
        self.options = ExpertOptions(hidden_act=self.model.hidden_act)

    def forward(self, hidden_states: Tensor) -> tuple[Any, Tensor]:
        """Run the block.

        Args:
            hidden_states: [B,S,H] (any leading dimensions), in the weights' dtype; under autocast any floating dtype,
                and everything but the router's softmax is then computed in autocast's dtype.

        Returns:
            (GroupedGEMMResult with `trace`, else hidden states shaped as the input; router_logits [T,E]).

        Raises:
            ValueError: a last dimension other than H, or a dtype or device other than the weights'.
            TypeError: no tensor.
        """
        x, gate, gate_up_proj, down_proj = self._inputs(hidden_states)
        if (whole := self._at_once(x, gate, gate_up_proj, down_proj)) is not None:
            return whole[0].view(hidden_states.shape), whole[1]
        router_logits, routing_weights, plan = self._routed(x, gate, gate_up_proj)
        out, steps = self._experts(x, routing_weights, plan, gate_up_proj, down_proj)
        out = out.view(hidden_states.shape)
        if steps is None:
            return out, router_logits
        return _result(plan, routing_weights, steps, out), router_logits

    def _at_once(
        self, x: Tensor, gate: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """(hidden states [T,H], router_logits [T,E]) where one operator computes both; None elsewhere."""
        return None

    def _routed(self, x: Tensor, gate: Tensor, gate_up_proj: Tensor) -> tuple[Tensor, Tensor, RoutingPlan]:
        """router -> plan: (router_logits [T,E], routing_weights [T,K], plan). `gate_up_proj`: what reads the plan."""
        router_logits, routing_weights, selected_experts = self._route(x, gate)
        return router_logits, routing_weights, self._plan(selected_experts)

    def _route(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return route(x, gate, self.model.top_k, self.model.norm_topk_prob)

    def _plan(self, selected_experts: Tensor) -> RoutingPlan:
        return make_plan(selected_experts, self.model.num_experts)

    def _experts(
        self, x: Tensor, routing_weights: Tensor, plan: RoutingPlan, gate_up_proj: Tensor, down_proj: Tensor
    ) -> tuple[Tensor, ExpertSteps | None]:
        """([T,H], the intermediates if they are to be traced)."""
        out, steps = compute_experts(x, routing_weights, plan, gate_up_proj, down_proj, self.options)
        return out, steps if self.trace else None

    def _inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [T,H] and the three weights, cut off from the graph where no gradient is asked for."""
        width, gate = self.model.hidden_size, self.gate  # a module looks its parameters up in 0.5 us
        if not isinstance(hidden_states, Tensor):
            raise TypeError(f"hidden_states: got {type(hidden_states).__name__}; needed: a tensor [..., {width}]")
        if hidden_states.ndim < 1 or hidden_states.shape[-1] != width:
            raise ValueError(f"hidden_states: got shape {tuple(hidden_states.shape)}; needed: [..., {width}]")
        device = hidden_states.device
        if device != gate.device:
            raise ValueError(f"hidden_states: got device {device}; the weights are on {gate.device}")
        x = hidden_states.reshape(-1, width)
        weights: list[Tensor] = [gate, self.gate_up_proj, self.down_proj]
        # as torch's autocast does: float64 and integers are left alone
        lowered = torch.is_autocast_enabled(device.type) and torch.float64 not in {x.dtype, gate.dtype}
        if lowered and x.is_floating_point():
            dtype = torch.get_autocast_dtype(device.type)
            x, *weights = (t.to(dtype) for t in (x, *weights))
        elif x.dtype != gate.dtype:
            raise ValueError(f"hidden_states: got {x.dtype}; needed: the weights' dtype {gate.dtype}")
        if self.dW_only:
            x = x.detach()
        if self.dX_only:
            weights = [w.detach() for w in weights]
        return x, weights[0], weights[1], weights[2]

    def _check_activation(self) -> None:
        activation(self.model.hidden_act)

    def act_and_mul(self, x: Tensor) -> Tensor:
        """``act(gate) * up``: x [..., 2I] -> [..., I]."""
        return act_and_mul(x, self.model.hidden_act)

    def run_router(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [T,H] -> router_logits [T,E], routing_weights [T,K] in its dtype, selected_experts [T,K]."""
        return self._route(hidden_states, self.gate)

    def get_token_counts_and_gather_indices(self, selected_experts: Tensor) -> tuple[Tensor, Tensor]:
        """selected_experts [T,K] -> token_counts_by_expert [E], gather_indices [T*K], integers, stable per expert."""
        plan = self._plan(selected_experts)
        return plan.token_counts_by_expert, plan.gather_indices

    @staticmethod
    def extract_hf_weights(moe_block: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """(gate [E,H], gate_up_proj [E,2I,H], down_proj [E,H,I]) of a Hugging Face block of either layout."""
        weights = read_hf_block(moe_block)
        return weights.gate, weights.gate_up_proj, weights.down_proj

    @classmethod
    def from_hf(cls, moe_block: nn.Module, **options: Any) -> Self:
        """A block with the weights of a Hugging Face block: shared where its layout is ours, else copied.

        Args:
            moe_block: a sparse Qwen3 block of transformers 4.57 to 5.
            options: keyword arguments of the constructor.
        """
        return cls.from_weights(read_hf_block(moe_block), **options).train(moe_block.training)

    @classmethod
    def from_weights(cls, weights: BlockWeights, **options: Any) -> Self:
        """A block that holds these weights."""
        return cls(weights.model, weights.gate, weights.gate_up_proj, weights.down_proj, **options)

    def check_weights(self, moe_block: nn.Module) -> None:
        """Raise WeightsError naming the first tensor that differs from the Hugging Face block's, bit for bit."""
        theirs = read_hf_block(moe_block)
        for name in ("gate", "gate_up_proj", "down_proj"):
            own, other = getattr(self, name).detach(), getattr(theirs, name).detach()
            if own.shape != other.shape or own.dtype != other.dtype:
                mine = f"{tuple(own.shape)} {own.dtype}"
                raise WeightsError(f"{name}: this block has {mine}, the other {tuple(other.shape)} {other.dtype}")
            bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[own.element_size()]
            differ = own.contiguous().view(bits) != other.to(own.device).contiguous().view(bits)
            if count := int(differ.sum()):
                raise WeightsError(f"{name}: {count} of {own.numel()} elements differ")

    def explain(self, num_tokens: int) -> str:
        """Which code computes the experts for this many tokens, and why."""
        return f"backend torch: a loop over {self.model.num_experts} experts, {num_tokens * self.model.top_k} rows"

    def extra_repr(self) -> str:
        """Sizes and flags, for print."""
        sizes = ", ".join(f"{f.name}={getattr(self.model, f.name)}" for f in fields(self.model))
        return f"{sizes}, dW_only={self.dW_only}, dX_only={self.dX_only}, trace={self.trace}"


class Qwen3MoeFusedGroupedGEMMBlock(Qwen3MoeGroupedGEMMBlock):
    """The same block with its experts in fused Triton kernels (`moefactory.triton`).

    Args:
        config, gate, gate_up_proj, down_proj, dW_only, dX_only: as in `Qwen3MoeGroupedGEMMBlock`.
        permute_x: the up GEMM gathers token rows itself; off, it reads a permuted copy (which TMA can load).
        permute_y: the down GEMM scatters to token order itself; off, combine reads expert order through the index.
        autotune: use tuned kernel configs where the cache has them (`tune`), the shipped choice elsewhere.
        kernel_config_fwd: a `KernelConfigForward`, a pair of them (up, down), or None for the shipped choice.
        kernel_config_bwd_dW, kernel_config_bwd_dX: likewise; stated configs need autotune=False.
        fuse_swiglu: the activation (and its derivative) is a GEMM epilogue; off, a kernel of its own.
        fuse_combine: one kernel unpermutes and sums; off, the sum is torch's.
        saved: what a training forward keeps besides x, routing weights and plan, by name or as `config.Saved`: "h", the
            pre-activation [T*K,2I]; "h_reused", the same, written over by the backward, which can run once; "x",
            nothing, the backward computes it again.
        sm_margin: multiprocessors of the GPU that the GEMMs leave to what runs beside them, such as a collective: their
            programs stay for a whole launch, so that what comes meanwhile waits for its end.
        trace: return every intermediate (`GroupedGEMMResult`).

    Raises:
        ConfigError: a broken rule, by its id, or a machine that cannot run these weights' device or flags.
        WeightsError: shapes, dtypes, devices or strides that do not fit.
    """

    def __init__(
        self,
        config: Any,
        gate: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        permute_x: bool = True,
        permute_y: bool = True,
        autotune: bool = True,
        kernel_config_fwd: Any = None,
        kernel_config_bwd_dW: Any = None,
        kernel_config_bwd_dX: Any = None,
        dW_only: bool = False,
        dX_only: bool = False,
        *,
        fuse_swiglu: bool = True,
        fuse_combine: bool = True,
        saved: Saved | str = Saved.h,
        sm_margin: int = 0,
        trace: bool = False,
    ) -> None:
        super().__init__(config, gate, gate_up_proj, down_proj, dW_only=dW_only, dX_only=dX_only, trace=trace)
        kernels = KernelsConfig(fwd=kernel_config_fwd, bwd_dX=kernel_config_bwd_dX, bwd_dW=kernel_config_bwd_dW)
        self.moe_config = MoeConfig(
            backend=BackendConfig(Backend.triton), kernels=kernels, permute_x=permute_x, permute_y=permute_y,
            fuse_swiglu=fuse_swiglu, fuse_combine=fuse_combine, dW_only=dW_only, dX_only=dX_only,
            autotune=autotune, saved=_saved(saved), sm_margin=_whole_number(sm_margin, "sm_margin"), trace=trace,
        )  # fmt: skip
        check_rules(make_case(self.moe_config, self.model, _dtype_of(gate)))
        for name in ("gate_up_proj", "down_proj"):
            if not getattr(self, name).is_contiguous():
                strides = tuple(getattr(self, name).stride())
                raise WeightsError(f"{name}: got strides {strides}; the kernels need a contiguous tensor")
        self._check_placement(gate)
        self._bind()

    def _bind(self) -> None:
        """Settle the options that travel with each call; importing triton only now leaves torch blocks free of it."""
        from .triton.options import FusedOptions

        config = self.moe_config
        choice = resolve_kernels(config.kernels)
        stated = ((p, g, choice.get(p, g)) for p in PASSES for g in GEMMS)
        self.fused = FusedOptions(
            top_k=self.model.top_k, permute_x=config.permute_x, permute_y=config.permute_y,
            fuse_swiglu=config.fuse_swiglu, fuse_combine=config.fuse_combine, autotune=config.autotune,
            saved=config.saved.value, sm_margin=config.sm_margin,
            kernels=tuple((p, g, c) for p, g, c in stated if c is not None),
        )  # fmt: skip

    def _check_placement(self, weight: Tensor) -> None:
        """ConfigError where such a weight's device cannot run these kernels. Meta is judged when it is left."""
        if weight.device.type == "meta":
            return
        placed = replace(self.moe_config, device=str(weight.device), dtype=_dtype_of(weight))
        if reason := why_not_here(placed):
            raise MachineError(reason)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Module.to, .cuda, .half, ...: what the new place or dtype cannot run is refused, and nothing is moved."""
        moved = fn(torch.empty(0, dtype=self.gate.dtype, device=self.gate.device))
        check_rules(make_case(self.moe_config, self.model, _dtype_of(moved)))
        self._check_placement(moved)
        return super()._apply(fn, recurse)

    def _experts(
        self, x: Tensor, routing_weights: Tensor, plan: RoutingPlan, gate_up_proj: Tensor, down_proj: Tensor
    ) -> tuple[Tensor, ExpertSteps | None]:
        from moefactory.triton import ops  # not an attribute: modules cannot be pickled

        fused = self.fused
        out, traced = ops.compute_experts(x, routing_weights, plan, gate_up_proj, down_proj, fused, trace=self.trace)
        if traced is None:
            return out, None
        h, a, y = traced
        token_order = fused.permute_y or not fused.fuse_combine
        expert_order, unpermuted = (y[plan.gather_indices], y) if token_order else (y, y[plan.scatter_indices])
        return out, ExpertSteps(h, a, expert_order, unpermuted)

    def _at_once(
        self, x: Tensor, gate: Tensor, gate_up_proj: Tensor, down_proj: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        from moefactory.triton import decode, whole  # absolute: a relative import takes 1 us at each call

        model, fused, tensors = self.model, self.fused, (x, gate, gate_up_proj, down_proj)
        if self.trace or not fused.fuse_combine:
            return None
        grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if not grad and decode.suits(x, model.num_experts, model.top_k, fused):
            return decode.decode(tensors, model.top_k, model.norm_topk_prob, fused.sm_margin)
        return whole.compute_block(tensors, model.norm_topk_prob, fused)

    def _routed(self, x: Tensor, gate: Tensor, gate_up_proj: Tensor) -> tuple[Tensor, Tensor, RoutingPlan]:
        from moefactory.triton import few_tokens, pipeline
        from moefactory.triton.gate import router_logits

        model, tokens = self.model, x.shape[0]
        if not few_tokens.few(tokens, model.num_experts):
            return super()._routed(x, gate, gate_up_proj)
        logits = router_logits(x, gate)
        block_m = pipeline.first_block_m(gate_up_proj, tokens * model.top_k, self.fused)
        return logits, *few_tokens.route(logits, model.top_k, model.norm_topk_prob, block_m)

    def _route(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from moefactory.triton import router
        from moefactory.triton.gate import router_logits

        logits = router_logits(x, gate)
        return logits, *router.select(logits, self.model.top_k, self.model.norm_topk_prob)

    def _plan(self, selected_experts: Tensor) -> RoutingPlan:
        from moefactory.triton import plan

        return plan.make_plan(selected_experts, self.model.num_experts)

    def _check_activation(self) -> None:
        """The rule triton-activation speaks for itself."""

    def explain(self, num_tokens: int) -> str:
        """Which kernels run for this many tokens, with which configs, and where each config is from."""
        from .triton.explain import explain

        return explain(self, num_tokens)

    def tune(
        self,
        num_tokens: int,
        *,
        passes: Sequence[str] = tuple(PASSES),
        progress: Callable[[TuneProgress], None] | None = None,
        timer: Callable[[Callable[[], Any]], float] | None = None,
        redo: bool = False,
    ) -> TuneReport:
        """Search the fastest right kernel configs for steps of this many tokens; later steps use them.

        Nothing else in this package searches. The results are kept in a cache on disk (`moefactory.triton.cache`), each
        launch's as soon as it is done, so that an interrupted search goes on where it was.

        Args:
            num_tokens: T; the results hold for every T of the same power-of-two bucket of rows per expert.
            passes: which of fwd, bwd_dX and bwd_dW.
            progress: called after each candidate (`done`, `total`, `row`).
            timer: milliseconds of a function; by default the GPU's clock.
            redo: search again what the cache has.

        Raises:
            ConfigError: this block has autotune=False and would not use the results.
            ValueError: `num_tokens` below 1, an unknown pass.
        """
        from .triton.tuning import tune

        return tune(self, num_tokens, passes=passes, progress=progress, timer=timer, redo=redo)


def _dtype_of(tensor: Tensor) -> DType:
    name, names = str(tensor.dtype).removeprefix("torch."), [one.value for one in DType]
    if name not in names:
        raise ConfigError(f"dtype: got {tensor.dtype}; allowed: {', '.join(names)}")
    return DType(name)


def _result(plan: RoutingPlan, routing_weights: Tensor, steps: ExpertSteps, out: Tensor) -> GroupedGEMMResult:
    return GroupedGEMMResult(
        token_counts_by_expert=plan.token_counts_by_expert,
        gather_indices=plan.gather_indices,
        topk_weights=routing_weights,
        hidden_states=out,
        **{f.name: getattr(steps, f.name) for f in fields(steps)},
    )


def model_sizes(config: Any) -> ResolvedModel:
    """The sizes of a Hugging Face config or of our own. ConfigError names what is missing."""
    if isinstance(config, ResolvedModel):
        return config
    names = {f.name: f.name for f in fields(ResolvedModel)}
    if not isinstance(config, ModelConfig):
        names["top_k"] = "num_experts_per_tok"
    values: dict[str, Any] = {ours: getattr(config, theirs, None) for ours, theirs in names.items()}
    if missing := [names[ours] for ours, value in values.items() if value is None]:
        raise ConfigError(f"config: got a {type(config).__name__} without {', '.join(missing)}")
    return ResolvedModel(**values)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


def _check_tensors(model: ResolvedModel, gate: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> None:
    """Shapes against the sizes, dtypes and devices against each other."""
    e, h, i = model.num_experts, model.hidden_size, model.moe_intermediate_size
    wanted = {
        "gate": (gate, (e, h)),
        "gate_up_proj": (gate_up_proj, (e, 2 * i, h)),
        "down_proj": (down_proj, (e, h, i)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise WeightsError(f"{name}: got shape {tuple(tensor.shape)}; the config's sizes need {shape}")
        if tensor.dtype != gate.dtype or tensor.device != gate.device or not tensor.is_floating_point():
            raise WeightsError(
                f"{name}: got {tensor.dtype} on {tensor.device}; the gate is {gate.dtype} on {gate.device}"
            )
    if not 1 <= model.top_k <= e:
        raise ConfigError(f"top-k: model.top_k={model.top_k} with model.num_experts={e}; top_k is 1 to num_experts")


def _saved(value: Saved | str) -> Saved:
    """ConfigError for what is no name of a `Saved`."""
    names = [one.value for one in Saved]
    if not isinstance(value, Saved) and value not in names:
        raise ConfigError(f"saved: got {value!r}; allowed: {', '.join(names)}")
    return Saved(value)


def _whole_number(value: int, name: str) -> int:
    """ConfigError for what is no integer."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ConfigError(f"{name}: got {value!r}; allowed: an integer")
