"""The numerics judge behind ``moefactory check``.

theirs.py    Hugging Face's block, as `from_pretrained` loads it
demo.py      a small real checkpoint to check on, kept in a cache folder
oracle.py    the block in float64, with the routing held
judge.py     the rule: our error beside Hugging Face's, both against float64
run.py       both blocks on the same tokens, forward and backward
unit.py      the unit-scale problem: the rule for each tensor, each expert, each token
integers.py  the integer problem: exact sums, so that low-precision accumulation shows
exact.py     its verdict, bit for bit
"""
