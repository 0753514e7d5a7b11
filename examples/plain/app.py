"""A project that knows nothing of moefactory but the line `- moe: qwen3` in its defaults list."""

import hydra
import torch
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Build the block and run it forward and backward once."""
    block = hydra.utils.instantiate(cfg.moe)
    hidden_states = torch.randn(1, 16, block.model.hidden_size, dtype=block.gate.dtype, device=block.gate.device)
    out, router_logits = block(hidden_states)
    out.square().mean().backward()
    grads = [name for name, p in block.named_parameters() if p.grad is not None]
    print(f"{type(block).__name__}: {tuple(out.shape)}, router {tuple(router_logits.shape)}, gradients {grads}")


if __name__ == "__main__":
    main()
