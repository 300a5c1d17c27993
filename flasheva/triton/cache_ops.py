"""The ops over what a cache holds: fake kernels for tracing, and none has a backward.

`flasheva::piece` is new tokens over a cache, which it also writes into the cache,
`flasheva::decode` the same for one token per row, and `flasheva::full_piece` new queries of a
layer with full attention.

Dims: as in ops.py.
"""

import torch
from torch import Tensor

from flasheva.config import EvaConfig
from flasheva.summary import SummaryMaps
from flasheva.triton import decode, forward, piece
from flasheva.triton.arguments import alike, read_maps, rows_apart, sizes
from flasheva.triton.call import Maps, call_of, like_projection


def triton_full_piece(q: Tensor, k: Tensor, v: Tensor, q_start: Tensor) -> Tensor:
    """Exact attention of T new queries per row to all tokens before them; no backward.

    Args:
        q: [B, H, T, D].
        k, v: [B, G, N, D], the token at each position of the row, the new ones too, and behind
            them anything finite.
        q_start: int [B], position of the first query in its row.

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    out: Tensor = _full_piece(q, k, v, q_start)
    return out.to(dtype)


def triton_piece(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps | None,
    bias: Tensor | None,
    length: Tensor,
    count: Tensor,
    *,
    sinks: tuple[Tensor, Tensor],
    ring: tuple[Tensor, Tensor],
    summaries: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """T new tokens per row: attention over the cache and themselves, and their place in there.

    Args:
        q: [B, H, T, D]; k, v: [B, G, T, D].
        count: int [B], how many of the new tokens are real: others are not stored, and their
            outputs mean nothing.
        The rest: as `triton_decode`.

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    kind, tensors = read_maps(maps, k)
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    out: Tensor = _piece(
        *(q, k, v, length, count, bias, *sinks, *ring, *(summaries or (None, None, None))),
        *(tensors, kind),
        *(config.window_size, config.chunk_size, config.sink_size, config.window),
    )
    return out.to(dtype)


def triton_decode(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps | None,
    bias: Tensor | None,
    length: Tensor,
    count: Tensor,
    *,
    sinks: tuple[Tensor, Tensor] | None,
    ring: tuple[Tensor, Tensor],
    summaries: tuple[Tensor, Tensor, Tensor] | None,
    arrived: Tensor,
) -> Tensor:
    """A step of one token per row: attention over the cache and itself, and its place in there.

    Args:
        config: window, chunk, sinks.
        q: [B, H, 1, D]; k, v: [B, G, 1, D].
        maps: of summaries; None for a layer without.
        bias: [H] or None.
        length: int [B], tokens of each row that the cache holds.
        count: int [B], 1, or 0 for a row that takes no token: its output means nothing.
        sinks: keys, values [B, G, S, D], or None.
        ring: keys, values [B, G, slots, D]; a token at p lies in p % slots.
        summaries: k_rfa, v_rfa [B, G, C, D] and q_sum float32 [B, G, K + 1, D], or None.
        arrived: int32 [B * G], zeros; scratch of the kernel, which leaves zeros.

    Returns:
        [B, H, 1, D] in the dtype of q.
    """
    kind, tensors = read_maps(maps, k)
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    out: Tensor = _decode(
        *(q, k, v, length, count, bias, *(sinks or (None, None)), *ring),
        *(summaries or (None, None, None)),
        *(arrived, tensors, kind),
        *(config.window_size, config.chunk_size, config.sink_size, config.window),
    )
    return out.to(dtype)


@torch.library.custom_op("flasheva::full_piece", mutates_args=())
def _full_piece(q: Tensor, k: Tensor, v: Tensor, q_start: Tensor) -> Tensor:
    q, k, v = (rows_apart(x) for x in (q, k, v))
    nothing = k[:, :, :0]
    # Full attention as a window that no row leaves. Queries are counted in int32.
    c = call_of(q, k, None, 2**30, 16, 0, "block")
    out, _ = forward.attend(
        *(c, q, k, v, nothing, nothing, None, None, None, q_start, k.shape[2]),
        save=False,
        in_place=True,
    )
    return out


@torch.library.custom_op(
    "flasheva::piece",
    mutates_args=("sink_k", "sink_v", "window_k", "window_v", "k_rfa", "v_rfa", "q_sum"),
)
def _piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    count: Tensor,
    bias: Tensor | None,
    sink_k: Tensor,
    sink_v: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    k_rfa: Tensor | None,
    v_rfa: Tensor | None,
    q_sum: Tensor | None,
    maps: list[Tensor],
    kind: str,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
) -> Tensor:
    q, k, v = (rows_apart(x) for x in (q, k, v))
    summaries = None
    if k_rfa is not None and v_rfa is not None and q_sum is not None:
        summaries = (k_rfa, v_rfa, q_sum)
    c = call_of(q, k, None, window_size, chunk_size, sink_size, window)
    return piece.piece(
        *(c, q, k, v, length, count, bias, (sink_k, sink_v), (window_k, window_v), summaries),
        *(kind, Maps.of(kind, maps)),
    )


@torch.library.custom_op(
    "flasheva::decode",
    mutates_args=(
        *("sink_k", "sink_v", "window_k", "window_v", "k_rfa", "v_rfa", "q_sum", "arrived"),
    ),
)
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor,
    count: Tensor,
    bias: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    window_k: Tensor,
    window_v: Tensor,
    k_rfa: Tensor | None,
    v_rfa: Tensor | None,
    q_sum: Tensor | None,
    arrived: Tensor,
    maps: list[Tensor],
    kind: str,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
) -> Tensor:
    q, k, v = (rows_apart(x) for x in (q, k, v))
    sinks = None if sink_k is None or sink_v is None else (sink_k, sink_v)
    summaries = None
    if k_rfa is not None and v_rfa is not None and q_sum is not None:
        summaries = (k_rfa, v_rfa, q_sum)
    c = call_of(q, k, None, window_size, chunk_size, sink_size, window)
    return decode.decode(
        *(c, q, k, v, length, count, bias, sinks, (window_k, window_v), summaries, arrived),
        *(kind, Maps.of(kind, maps)),
    )


def _like_q(q: Tensor, *others: object) -> Tensor:
    return like_projection(*sizes(q), q)


for _op in (_full_piece, _piece, _decode):
    _op.register_fake(_like_q)
