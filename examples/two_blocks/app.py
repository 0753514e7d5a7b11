"""Two blocks in one model: the same preset at two places of the config, each with its own choices."""

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor, nn


class TwoBlocks(nn.Module):
    """Block a, then block b, each with its residual."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x: Tensor) -> Tensor:
        """[B,S,H] -> [B,S,H]."""
        x = x + self.a(x)[0]
        return x + self.b(x)[0]


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    """Build both, run them, say what each is and which of its weights got gradients."""
    model = TwoBlocks(hydra.utils.instantiate(cfg.ffn.a), hydra.utils.instantiate(cfg.ffn.b))
    out = model(torch.randn(1, 16, model.a.model.hidden_size))
    out.square().mean().backward()
    for name, block in model.named_children():
        grads = [key for key, p in block.named_parameters() if p.grad is not None]
        experts = f"{block.model.top_k} of {block.model.num_experts} experts"
        print(f"{name}: {type(block).__name__}, {experts}, gradients {grads}")


if __name__ == "__main__":
    main()
