"""FlexAttention over `[k ; k_rfa]`: the visibility rule as a `mask_mod`, skipped blocks included.

Traps of FlexAttention that this file answers: above 8 recompiles of one handle it falls back to
dense attention, so eager callers get one `fullgraph` handle per static configuration, for which
torch raises instead; it has no backward on a CPU (the api refuses that with a clear message); and
a block mask that is traced into the graph gave wrong results, so it comes from an op that
Inductor does not look into (flex_blocks.py).

Dims: B batch, H query heads, G key/value heads, D head dim, T queries, N keys, C summaries.
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import FlexKernelOptions, flex_attention

from flasheva.config import EvaConfig
from flasheva.flex_blocks import BLOCK, MaskMod, make_block_mask
from flasheva.visibility import Positions, sees_key, sees_summary


def flex(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    positions: Positions,
) -> Tensor:
    """Attends to exact keys and summaries; arguments and result as `reference_attention`.

    Inside `torch.compile` the call becomes part of the caller's graph; an eager caller gets a
    compiled handle, made at the first call of each static configuration.
    """
    args = (q, k, v, k_rfa, v_rfa, bias, positions)
    if torch.compiler.is_compiling():
        return _flex(config, *args)
    # The CPU template (torch 2.13) does not compile with dynamic sizes at all. The GPU's (2.11)
    # asks whether T < 128 and T <= 128: it finds that T is 128 and cannot name a size it found.
    fixed = q.device.type == "cpu" or q.shape[2] == BLOCK
    static = _Static(
        config=config,
        device=str(q.device),
        dtype=q.dtype,
        heads=(q.shape[1], k.shape[1], q.shape[3]),
        dynamic=not fixed,
        # torch specialises a dim of size 0 or 1: such a call is a configuration of its own.
        sizes=tuple(
            size if fixed else min(size, 2)
            for size in (q.shape[0], q.shape[2], k.shape[2], k_rfa.shape[2])
        ),
        present=(bias is not None, *(field is not None for field in positions)),
        grad=torch.is_grad_enabled()
        and any(x is not None and x.requires_grad for x in (q, k, v, k_rfa, v_rfa, bias)),
    )
    return _compiled(static)(config, *args)


class _Static(NamedTuple):
    config: EvaConfig
    device: str
    dtype: torch.dtype
    heads: tuple[int, int, int]
    dynamic: bool
    sizes: tuple[int, ...]
    present: tuple[bool, ...]
    grad: bool


_numbers = itertools.count()


@functools.cache
def _compiled(static: _Static) -> Callable[..., Tensor]:
    def handle(*args: object) -> Tensor:
        return _flex(*args)  # type: ignore[arg-type]

    # torch counts recompiles per code object, so that every handle needs one of its own.
    handle.__code__ = handle.__code__.replace(co_name=f"eva_flex_{next(_numbers)}")
    return torch.compile(handle, fullgraph=True, dynamic=static.dynamic)


def _flex(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    positions: Positions,
) -> Tensor:
    num_keys, num_summaries = k.shape[2], k_rfa.shape[2]
    mask_mod = _mask_mod(config, positions, num_keys)
    block_mask = make_block_mask(
        config, positions, q.shape[2], num_keys, num_summaries, q.device, mask_mod
    )
    out = flex_attention(
        q,
        torch.cat([k, k_rfa], dim=2),
        torch.cat([v, v_rfa], dim=2),
        score_mod=None if bias is None else _score_mod(bias, num_keys),
        block_mask=block_mask,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=_kernel_options(q),
    )
    assert isinstance(out, Tensor)
    return out


def _kernel_options(q: Tensor) -> FlexKernelOptions | None:
    # Below 128 queries torch takes its decode kernel, one tile for all queries of a key head: in
    # float32, whose products are unrolled, that tile does not compile within minutes (torch 2.11).
    return {"BACKEND": "TRITON"} if q.is_cuda and q.dtype == torch.float32 else None


def _mask_mod(config: EvaConfig, positions: Positions, num_keys: int) -> MaskMod:
    query, key, seq_start = positions

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        start = 0 if seq_start is None else seq_start[b, i]
        local = (i if query is None else query[b, i]) - start
        is_key = j < num_keys
        key_index = j if key is None else key[b, torch.where(is_key, j, 0)]
        chunk = j - num_keys - start // config.chunk_size
        exact = sees_key(config, local, key_index - start)
        return torch.where(is_key, exact, sees_summary(config, local, chunk))

    return mask_mod


def _score_mod(bias: Tensor, num_keys: int) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j < num_keys, score, score + bias[h])

    return score_mod
