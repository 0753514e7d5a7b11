"""Weights in and out: live Hugging Face blocks, one layer of a checkpoint, state dicts, random.

layout.py      the three tensors of a block, their names and shapes, and what is refused; random weights
state_dict.py  Hugging Face names in and out
live.py        a transformers block in (both layouts) and back out
checkpoint.py  one layer of a folder that nobody vouches for
shard.py       one safetensors file
"""

from .checkpoint import read_checkpoint_layer
from .layout import BlockWeights, init_random
from .live import hf_config, read_hf_block, to_hf_block
from .state_dict import from_hf_state_dict, to_hf_state_dict

__all__ = [
    "BlockWeights",
    "from_hf_state_dict",
    "hf_config",
    "init_random",
    "read_checkpoint_layer",
    "read_hf_block",
    "to_hf_block",
    "to_hf_state_dict",
]
