"""Hugging Face's block as `from_pretrained` loads it, and transformers kept quiet meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import WeightsError
from ..weights import read_checkpoint_layer, to_hf_block


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and errors only; as it was afterwards."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_hf_block(path: str, layer: int, dtype: torch.dtype, device: str) -> tuple[nn.Module, str]:
    """(the block of one layer, how it was loaded). The experts are computed eagerly, weights are its own.

    `from_pretrained` runs on the whole folder, with the model's other layers left out, so that one layer of a model
    that does not fit into memory can be checked. Read the layer with our reader first: it refuses folders that are not
    safe to load.
    """
    family = json.loads((Path(path) / "config.json").read_text()).get("model_type")
    if family != "qwen3_moe":
        block = to_hf_block(read_checkpoint_layer(path, layer, dtype=dtype, device=device))
        return block, f"model_type {family}: Hugging Face's Qwen3 block around the tensors that our reader read"
    with quiet_transformers():
        model, found = _only(layer).from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True)
    if found["missing_keys"]:
        raise WeightsError(f"{path}: from_pretrained misses {sorted(found['missing_keys'])[0]}")
    block = model.model.layers[layer].mlp
    return block.to(device).train(), "from_pretrained"


def _only(layer: int) -> Any:
    """Qwen3MoeForCausalLM without the decoder layers that are not asked for."""
    from transformers import Qwen3MoeForCausalLM

    class OneLayer(Qwen3MoeForCausalLM):
        """What is not there is not loaded."""

        def __init__(self, config: Any) -> None:
            config._experts_implementation = "eager"
            super().__init__(config)
            for n in range(len(self.model.layers)):
                if n != layer:
                    self.model.layers[n] = nn.Identity()

    return OneLayer
