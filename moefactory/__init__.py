"""A declarative, config-driven factory of Mixture-of-Experts blocks. Start reading at `moefactory.block`.

The names below are loaded on first use, in data-flow order: importing the package loads neither torch nor triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

_EXPORTS = {
    "config": (
        "Backend", "BackendConfig", "ConfigError", "DType", "KernelConfigBackward_dW", "KernelConfigBackward_dX",
        "KernelConfigForward", "KernelsConfig", "ModelConfig", "MoeConfig", "ResolvedModel", "WeightsConfig", "WeightsError",
        "WeightsSource",
    ),
    "routing": ("RoutingPlan", "combine", "make_plan", "permute", "route", "unpermute"),
    "reference": ("grouped_gemm",),
    "weights": ("read_checkpoint_layer", "read_hf_block", "to_hf_block", "to_hf_state_dict"),
    "block": ("GroupedGEMMResult", "Qwen3MoeFusedGroupedGEMMBlock", "Qwen3MoeGroupedGEMMBlock"),
    "factory": ("build",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]  # noqa: PLE0604

if TYPE_CHECKING:
    from .block import GroupedGEMMResult, Qwen3MoeFusedGroupedGEMMBlock, Qwen3MoeGroupedGEMMBlock
    from .config import (
        Backend,
        BackendConfig,
        ConfigError,
        DType,
        KernelConfigBackward_dW,
        KernelConfigBackward_dX,
        KernelConfigForward,
        KernelsConfig,
        ModelConfig,
        MoeConfig,
        ResolvedModel,
        WeightsConfig,
        WeightsError,
        WeightsSource,
    )
    from .factory import build
    from .reference import grouped_gemm
    from .routing import RoutingPlan, combine, make_plan, permute, route, unpermute
    from .weights import read_checkpoint_layer, read_hf_block, to_hf_block, to_hf_state_dict


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moefactory' has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
