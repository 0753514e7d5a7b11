"""What one call of the fused experts needs to know besides its tensors, in a form that a custom op can carry."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from ..config import GEMMS, PASSES, KernelConfig


@dataclass(frozen=True)
class FusedOptions:
    """Flags and stated kernel configs of a block; travels through the custom ops as the string `text`.

    Attributes:
        top_k: K.
        permute_x, permute_y, fuse_swiglu, fuse_combine, autotune: as in `MoeConfig`.
        saved: what a forward keeps, the value of a `config.Saved`.
        sm_margin: as in `MoeConfig`.
        kernels: (pass, gemm, config) of every stated kernel config.
        text: all of them as JSON.
    """

    top_k: int
    permute_x: bool = True
    permute_y: bool = True
    fuse_swiglu: bool = True
    fuse_combine: bool = True
    autotune: bool = True
    saved: str = "h"
    sm_margin: int = 0
    kernels: tuple[tuple[str, str, KernelConfig], ...] = field(default=())
    text: str = field(init=False, repr=False, compare=False)

    def stated(self, pass_name: str, gemm: str) -> KernelConfig | None:
        """The stated config of a launch, if any."""
        return next((c for p, g, c in self.kernels if (p, g) == (pass_name, gemm)), None)

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {k: v for k, v in self.__dict__.items() if k not in {"kernels", "text"}}
        text = json.dumps({**plain, "kernels": [[p, g, asdict(c)] for p, g, c in self.kernels]}, sort_keys=True)
        object.__setattr__(self, "text", text)  # frozen; made now, since Dynamo cannot trace a cached_property's lock


@lru_cache(maxsize=256)
def parse(text: str) -> FusedOptions:
    """The options that `FusedOptions.text` wrote."""
    plain = json.loads(text)
    kernels = tuple((p, g, PASSES[p](**c)) for p, g, c in plain.pop("kernels") if g in GEMMS)
    return FusedOptions(**plain, kernels=kernels)
