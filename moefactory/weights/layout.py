"""What the weights of one block are: three tensors, their sizes, and their Hugging Face names in both layouts.

Every source of weights ends in `assemble`: it knows which names and shapes belong to a block and refuses the rest.

    layout        names, after the block's prefix                               shapes
    fused         gate.weight, experts.gate_up_proj, experts.down_proj          [E, H], [E, 2I, H], [E, H, I]
    per_expert    gate.weight, experts.N.{gate_proj,up_proj,down_proj}.weight   [E, H], [I, H], [I, H], [H, I]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import ResolvedModel, WeightsError

Layout = Literal["fused", "per_expert"]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# model_type -> whether its router renormalises the top-k weights; None: as its config's norm_topk_prob says.
# Other families store the same tensors under the same names and route differently (flint: sigmoid), so shapes alone
# cannot tell that a block computes Qwen3's function. Qwen3-VL's router renormalises whatever its config says.
FAMILIES: Mapping[str, bool | None] = {"qwen3_moe": None, "qwen3_vl_moe_text": True}

CONFIG_KEYS = ("model_type", "hidden_size", "moe_intermediate_size", "num_experts", "num_local_experts",
               "num_experts_per_tok", "norm_topk_prob", "hidden_act")  # fmt: skip

# Why a tensor that is none of the block's own is there: the first pattern that its name matches.
_STRANGERS = (
    (r"lora_|base_layer|modules_to_save|adapter", "it belongs to a PEFT adapter: merge it first (merge_and_unload)"),
    (r"shared_expert", "blocks with a shared expert are not supported"),
    (r"scale|qweight|qzeros|g_idx|packed|absmax|quant|SCB|zero_point", "quantised experts are not supported"),
    (r"e_score_correction", "its router is not Qwen3's softmax followed by top-k"),
    (r"bias", "biases are not supported"),
    (r"parametrizations", "parametrised weights are not supported: remove the parametrisation first"),
)
_PER_EXPERT = re.compile(r"experts\.(0|[1-9][0-9]{0,8})\.(?:gate_proj|up_proj|down_proj)\.weight")
FUSED = ("experts.gate_up_proj", "experts.down_proj")


@dataclass(frozen=True, eq=False)
class BlockWeights:
    """The weights of one block. Parameters are shared as they are; plain tensors are the reader's own, fresh ones.

    Attributes:
        model: sizes and routing.
        gate: router, [E, H].
        gate_up_proj: [E, 2I, H], an expert's gate rows, then its up rows.
        down_proj: [E, H, I].

    Raises:
        WeightsError: a shape that is not the model's, or tensors of more than one dtype or device.
    """

    model: ResolvedModel
    gate: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor

    def __post_init__(self) -> None:
        named = {"gate.weight": self.gate, FUSED[0]: self.gate_up_proj, FUSED[1]: self.down_proj}
        for name, shape in shapes(self.model, "fused"):
            check_shape(name, named[name].shape, shape, "BlockWeights")
        one_of("dtype", {name: t.dtype for name, t in named.items()}, "BlockWeights")
        one_of("device", {name: t.device for name, t in named.items()}, "BlockWeights")


def show(value: object, limit: int = 80) -> str:
    """A value that may be hostile, for a one-line message: escaped and cut."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def resolve_sizes(stated: Mapping[str, Any], where: str) -> ResolvedModel:
    """The block's sizes and routing from what a Hugging Face config states (the keys of `CONFIG_KEYS`).

    Raises:
        WeightsError: a key is missing, has the wrong type, or names a family that does not route like Qwen3.
    """
    family = stated.get("model_type")
    if family is not None and (not isinstance(family, str) or family not in FAMILIES):
        known = ", ".join(FAMILIES)
        raise WeightsError(f"{where}: model_type={show(family)} is not known to route like Qwen3; known: {known}")

    def of(key: str, kind: type, needed: str) -> Any:
        value = stated.get(key)
        if type(value) is not kind:  # a bool is an int to isinstance
            raise WeightsError(f"{where}: {key}={show(value)}; needed: {needed}")
        return value

    def size(key: str) -> int:
        value: int = of(key, int, "an integer of 1 or more")
        if value < 1:
            raise WeightsError(f"{where}: {key}={show(value)}; needed: an integer of 1 or more")
        return value

    # transformers 5 writes num_local_experts where the hub's files and transformers 4 have num_experts.
    keys = [key for key in ("num_experts", "num_local_experts") if key in stated] or ["num_experts"]
    experts = size(keys[0])
    if size(keys[-1]) != experts:
        raise WeightsError(f"{where}: num_experts={experts} and num_local_experts={stated[keys[-1]]} disagree")
    renormalises = FAMILIES.get(family) if family else None
    model = ResolvedModel(
        hidden_size=size("hidden_size"),
        moe_intermediate_size=size("moe_intermediate_size"),
        num_experts=experts,
        top_k=size("num_experts_per_tok"),
        norm_topk_prob=of("norm_topk_prob", bool, "true or false") if renormalises is None else renormalises,
        hidden_act=of("hidden_act", str, "the name of an activation"),
    )
    if model.top_k > experts:
        raise WeightsError(f"{where}: num_experts_per_tok={model.top_k}; allowed: 1 to num_experts={experts}")
    return model


def shapes(model: ResolvedModel, layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each tensor of a block, lazily: a hostile num_experts costs nothing before it is found out."""
    e, h, i = model.num_experts, model.hidden_size, model.moe_intermediate_size
    yield "gate.weight", (e, h)
    if layout == "fused":
        yield FUSED[0], (e, 2 * i, h)
        yield FUSED[1], (e, h, i)
        return
    for n in range(e):
        yield f"experts.{n}.gate_proj.weight", (i, h)
        yield f"experts.{n}.up_proj.weight", (i, h)
        yield f"experts.{n}.down_proj.weight", (h, i)


def check_names(names: Iterable[str], model: ResolvedModel, where: str) -> Layout:
    """The layout of a block's tensor names. WeightsError: one is missing, or one is not part of a Qwen3 block."""
    found = set(names)
    layout: Layout = "fused" if found.intersection(FUSED) else "per_expert"
    for name in sorted(found - {"gate.weight"}):
        match = _PER_EXPERT.fullmatch(name)
        own = name in FUSED if layout == "fused" else match and int(match[1]) < model.num_experts
        if not own:
            # An expert's weight is a stranger by its number or by the layout, whatever its name reminds of.
            why = () if match else (reason for pattern, reason in _STRANGERS if re.search(pattern, name))
            what = next(iter(why), f"not one of the {model.num_experts} experts' tensors in the {layout} layout")
            raise WeightsError(f"{where}: unexpected tensor {show(name)}: {what}")
    missing = next((name for name, _ in shapes(model, layout) if name not in found), None)
    if missing is not None:
        raise WeightsError(f"{where}: tensor {missing} is missing (num_experts={model.num_experts}, {layout} layout)")
    return layout


def check_shape(name: str, got: Iterable[int], needed: tuple[int, ...], where: str) -> None:
    """WeightsError unless a tensor has the shape that the config gives it."""
    came = tuple(got)
    if came != needed:
        swapped = len(came) == 3 and came == (needed[0], needed[2], needed[1])
        hint = "; the transposed layout [E, in, out] is not supported" if swapped else ""
        raise WeightsError(f"{where}: {show(name)} has shape {show(list(came))}, the config gives {list(needed)}{hint}")


def one_of(what: str, values: Mapping[str, Any], where: str) -> Any:
    """The one value that all the named tensors have. WeightsError, naming two tensors, where they differ."""
    first, value = next(iter(values.items()))
    for name, other in values.items():
        if other != value:
            raise WeightsError(f"{where}: {first} has {what} {value}, {name} has {other}; needed: one {what}")
    return value


def assemble(tensors: Mapping[str, Tensor], model: ResolvedModel, where: str) -> BlockWeights:
    """The weights of a block from its named tensors: fused ones are shared, per-expert ones copied once, never written.

    Raises:
        WeightsError: names, shapes, dtypes, devices or kinds of tensor that are not a Qwen3 block's.
    """
    layout = check_names(tensors, model, where)
    for name, shape in shapes(model, layout):
        _check_tensor(name, tensors[name], where)
        check_shape(name, tensors[name].shape, shape, where)
    one_of("dtype", {name: t.dtype for name, t in tensors.items()}, where)
    one_of("device", {name: t.device for name, t in tensors.items()}, where)
    gate = tensors["gate.weight"]
    if layout == "fused":
        return BlockWeights(model, gate, tensors[FUSED[0]], tensors[FUSED[1]])
    gate_up = _fuse(tensors, model, ("gate_proj", "up_proj"), where)
    return BlockWeights(model, gate, gate_up, _fuse(tensors, model, ("down_proj",), where))


def _check_tensor(name: str, tensor: Tensor, where: str) -> None:
    """WeightsError unless a tensor is an ordinary dense one of a floating-point type we compute in."""
    # Quantised, distributed and lazy parameters are subclasses that report an innocent dtype and shape.
    if type(tensor) not in {Tensor, nn.Parameter} or tensor.layout is not torch.strided:
        kind = f"{type(tensor).__name__} ({getattr(tensor, 'layout', 'no tensor')})"
        raise WeightsError(f"{where}: {name} is a {kind}; needed: a plain dense tensor")
    if tensor.is_meta:
        raise WeightsError(f"{where}: {name} is on the meta device and has no values: load or un-offload it first")
    if tensor.dtype not in FLOATS:
        what = f"{where}: {name} has dtype {tensor.dtype}, quantised experts are not supported"
        raise WeightsError(f"{what}; allowed: {', '.join(map(str, FLOATS))}")


def _fuse(tensors: Mapping[str, Tensor], model: ResolvedModel, parts: tuple[str, ...], where: str) -> Tensor:
    """Stack the experts' matrices: one allocation, filled expert by expert, so the peak is what comes out."""
    names = [[f"experts.{e}.{part}.weight" for part in parts] for e in range(model.num_experts)]
    # A stacked tensor is trained as a whole or not at all.
    trained = one_of("requires_grad", {n: tensors[n].requires_grad for expert in names for n in expert}, where)
    first = tensors[names[0][0]]
    rows = first.shape[0]
    fused = torch.empty(model.num_experts, rows * len(parts), first.shape[1], dtype=first.dtype, device=first.device)
    with torch.no_grad():
        for e, expert in enumerate(names):
            for n, name in enumerate(expert):
                fused[e, n * rows : (n + 1) * rows].copy_(tensors[name])
    return nn.Parameter(fused, requires_grad=trained) if isinstance(first, nn.Parameter) else fused


def init_random(
    model: ResolvedModel, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> BlockWeights:
    """Fresh weights, normal with standard deviation 1/sqrt(fan_in): unit-scale inputs give unit-scale activations.

    The same seed gives the same numbers for every dtype and device: they are drawn on the CPU in float32, expert by
    expert (the float32 copy is never larger than one expert), and then cast. The global generator is left alone.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    made = {}
    for name, shape in shapes(model, "fused"):
        tensor = made[name] = torch.empty(shape, dtype=dtype, device=device)
        for part in tensor if tensor.dim() == 3 else [tensor]:
            part.copy_(torch.randn(part.shape, **drawn).mul_(shape[-1] ** -0.5))
    return BlockWeights(model, made["gate.weight"], made[FUSED[0]], made[FUSED[1]])
