"""Own Triton kernels of the attention; api.py imports them when a call first takes this path.

`ops.py` and `cache_ops.py` register them with PyTorch; `rule.py` is the rule of visibility in
kernels; `summary_*.py` and `attention_*.py` hold the kernels; `tiles.py` their tile sizes.
"""
