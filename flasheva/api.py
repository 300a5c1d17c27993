"""eva_attention: one entry for every path, whole rows or onto a cache; full attention likewise.

Which implementation runs is decided in choice.py, once.

Under autocast q, k and v are cast to its dtype, as `scaled_dot_product_attention` does: RoPE
leaves q and k in float32. Everything behind that has a precision of its own and runs outside.
"""

import torch
from torch import Tensor

from flasheva.cache import EvaCache
from flasheva.choice import Impl, resolve_impl, why_not_triton
from flasheva.config import EvaConfig
from flasheva.flex import flex
from flasheva.reference import reference_attention
from flasheva.summary import PooledMaps, SummaryMaps, chunk_summaries
from flasheva.visibility import Positions


def eva_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: EvaConfig,
    maps: SummaryMaps | None,
    *,
    bias: Tensor | None = None,
    seq_start: Tensor | None = None,
    noise: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """FlashEVA attention over whole rows (training, or one pass over a prompt).

    Each query attends, in one softmax, to the exact keys of its window and of the sinks and to one
    summary per older chunk (FlashEVA, arXiv 2511.00576, section 3).

    Args:
        q: [B, H, T, D], after RoPE with positions counted from the row's own document.
        k, v: [B, G, T, D] with H a multiple of G; query head h reads head h // (H / G).
        config: window, chunk, sinks.
        maps: parameters of the summary maps; None for window and sinks only, no summaries.
        bias: [H], added to the logits of summaries.
        seq_start: int [B, T], index in the row where each token's document begins, a multiple of
            `chunk_size`; None: every row is one document.
        noise: [B, G, T // P, D], added to omega (training only); gets no gradient.
        impl: "auto", "triton", "flex" or "reference".

    Returns:
        [B, H, T, D] in the dtype of q, or of autocast.

    Raises:
        ValueError: shapes that do not fit, or an `impl` that cannot run these inputs.
        RuntimeError: a document that starts off the grid of chunks (on a GPU, at the next sync).
    """
    if _in_autocast(q):
        q, k, v = _autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return eva_attention(
                q, k, v, config, maps, bias=bias, seq_start=seq_start, noise=noise, impl=impl
            )
    _check_shapes(q, k, v, bias, seq_start)
    if noise is not None:
        if maps is None or isinstance(maps, PooledMaps):
            raise ValueError("noise is for affine maps; pass None")
        expected = (*k.shape[:2], k.shape[2] // config.chunk_size, k.shape[3])
        if noise.shape != expected:
            raise ValueError(f"noise must be {list(expected)}, not {list(noise.shape)}")
        noise = noise.detach()
    if seq_start is not None:
        torch._assert_async(
            (seq_start % config.chunk_size == 0).all(),
            "documents must start on a multiple of chunk_size",
        )
    needs_grad = _needs_grad(q, k, v, bias, *_parameters(maps))
    chosen = resolve_impl(q, config, impl, needs_grad=needs_grad)
    if chosen == "triton":
        from flasheva.triton.ops import triton_attention

        return triton_attention(config, q, k, v, maps, bias, seq_start, noise)
    if maps is None:
        k_rfa = v_rfa = k[:, :, :0]
    else:
        k_rfa, v_rfa = chunk_summaries(config, q, k, v, maps, noise=noise)
    attend = flex if chosen == "flex" else reference_attention
    return attend(config, q, k, v, k_rfa, v_rfa, bias, Positions(seq_start=seq_start))


def eva_attention_with_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps | None,
    cache: EvaCache,
    *,
    length: Tensor,
    count: Tensor,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The same attention for T new tokens per row onto a cache, which it updates.

    Any split of a prompt into such pieces gives the numbers of one pass, but for the rounding of
    what a float8 cache stores.

    Args:
        q, k, v, maps, bias, impl: as `eva_attention`; the tokens stand at positions
            `length[b] .. length[b] + T - 1` of their rows.
        cache: the layer's cache; its config is used.
        length: int [B], tokens of each row that the cache holds already.
        count: int [B], how many of the T tokens are real; the padding behind them enters
            neither window nor sums, and its outputs mean nothing.

    Returns:
        [B, H, T, D] in the dtype of q, or of autocast.
    """
    if _in_autocast(q):
        q, k, v = _autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return eva_attention_with_cache(
                q, k, v, maps, cache, length=length, count=count, bias=bias, impl=impl
            )
    _check_shapes(q, k, v, bias, None)
    config = cache.config
    needs_grad = _needs_grad(q, k, v, bias, *_parameters(maps))
    chosen = resolve_impl(q, config, impl, needs_grad=needs_grad, cached=True)
    if chosen == "triton":
        from flasheva.triton.cache_ops import triton_decode, triton_piece

        new = (config, q, k, v, maps, bias, length, count)
        sinks, ring = (cache.sink_k, cache.sink_v), (cache.window_k, cache.window_v)
        summaries = None if maps is None else (cache.k_rfa, cache.v_rfa, cache.q_sum)
        if q.shape[2] > 1:
            return triton_piece(*new, sinks=sinks, ring=ring, summaries=summaries)
        return triton_decode(
            *new, sinks=sinks, ring=ring, summaries=summaries, arrived=cache.arrived
        )
    if maps is not None:
        cache.write_summaries(q, k, v, maps, length, count)
    keys, values, k_rfa, v_rfa, positions = cache.readable(k, v, length)
    attend = flex if chosen == "flex" else reference_attention
    out = attend(config, q, keys, values, k_rfa, v_rfa, bias, positions)
    cache.write_window(k, v, length, count, after=out)
    return out


# Fewer queries than this to all keys of a row would keep few programs busy, for long.
_MIN_FULL_PIECE = 16
# Full attention as a window that no row leaves. Queries are counted in int32.
_EVERYTHING = EvaConfig(window_size=2**30, window="block", sink_size=0)


def full_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    length: Tensor,
    count: Tensor,
    arrived: Tensor,
    impl: Impl = "auto",
) -> Tensor | None:
    """A step of one token per row with exact attention to all earlier ones, if a kernel can run.

    Args:
        q: [B, H, 1, D]; k, v: [B, G, 1, D].
        keys, values: [B, G, N, D], the tokens so far in order; the new one is written behind them.
        length: int [B], how many there are.
        count: int [B], 1, or 0 for a row that takes no token: its output means nothing.
        arrived: int32 [B * G], zeros; scratch of the kernel, which leaves zeros.
        impl: "auto" and "triton" ask for the kernel.

    Returns:
        [B, H, 1, D] in the dtype of q, or None with nothing written: use PyTorch's own attention.

    Raises:
        ValueError: `impl` is "triton" and the kernel cannot run; the message says why.
    """
    if q.shape[2] != 1 or not _has_kernel(q, k, v, impl):
        return None
    from flasheva.triton.cache_ops import triton_decode

    return triton_decode(
        *(_EVERYTHING, q, k, v, None, None, length, count),
        sinks=None,
        ring=(keys, values),
        summaries=None,
        arrived=arrived,
    )


def full_attention_piece(
    q: Tensor, keys: Tensor, values: Tensor, *, length: Tensor, impl: Impl = "auto"
) -> Tensor | None:
    """Exact attention of T new tokens per row to themselves and all earlier ones, by a kernel.

    Args:
        q: [B, H, T, D].
        keys, values: [B, G, N, D], of the token at each position, the new ones too; what lies
            behind them is finite.
        length: int [B], position of the first new token of each row.
        impl: "auto" and "triton" ask for the kernel.

    Returns:
        [B, H, T, D] in the dtype of q, or None if no kernel can run, or "auto" has fewer than 16
        queries: use PyTorch's own attention.

    Raises:
        ValueError: `impl` is "triton" and the kernel cannot run; the message says why.
    """
    if not _has_kernel(q, keys, values, impl):
        return None
    if impl == "auto" and q.shape[2] < _MIN_FULL_PIECE:  # asked last: a graph depends on it
        return None
    from flasheva.triton.cache_ops import triton_full_piece

    return triton_full_piece(q, keys, values, length)


def full_attention_packed(
    q: Tensor, k: Tensor, v: Tensor, *, seq_start: Tensor, impl: Impl = "auto"
) -> Tensor | None:
    """Exact attention of whole rows, each token to its own document, by a kernel.

    PyTorch's own attention would need a mask of T x T for every row, and with grouped queries and
    a mask it makes all logits.

    Args:
        q: [B, H, T, D]; k, v: [B, G, T, D].
        seq_start: int [B, T], where each token's document begins.
        impl: "auto" and "triton" ask for the kernel.

    Returns:
        [B, H, T, D] in the dtype of q, or of autocast; None if no kernel can run.

    Raises:
        ValueError: `impl` is "triton" and the kernel cannot run; the message says why.
    """
    if _in_autocast(q):
        q, k, v = _autocast(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return full_attention_packed(q, k, v, seq_start=seq_start, impl=impl)
    if not _has_kernel(q, k, v, impl, cached=False):
        return None
    from flasheva.triton.ops import triton_attention

    return triton_attention(_EVERYTHING, q, k, v, None, None, seq_start, None)


def _has_kernel(q: Tensor, k: Tensor, v: Tensor, impl: Impl, *, cached: bool = True) -> bool:
    """Whether full attention runs in a kernel of ours."""
    if impl not in ("auto", "triton") or _in_autocast(q):
        return False
    if impl == "auto" and q.device.type != "cuda":
        return False
    needs_grad = _needs_grad(q, k, v)
    why = why_not_triton(q, _EVERYTHING, needs_grad=needs_grad, cached=cached)
    if why is not None and impl == "triton":
        raise ValueError(f"impl='triton' {why}")
    return why is None


def _in_autocast(x: Tensor) -> bool:
    # "meta" has no autocast. To ask which devices have one breaks the graph before torch 2.12.
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of autocast, but for float64, which it leaves alone."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [x if x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _parameters(maps: SummaryMaps | None) -> tuple[Tensor | None, ...]:
    if maps is None:
        return ()
    return tuple(maps) if isinstance(maps, PooledMaps) else (*maps.q, *maps.k)


def _needs_grad(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seq_start: Tensor | None
) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be [B, H, T, D] and k, v [B, G, T, D], not "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    B, H, T, D = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (B, T, D) or H % k.shape[1]:
        raise ValueError(
            f"k, v must share B, T, D with q {tuple(q.shape)} and have a number of heads that "
            f"divides {H}, not {tuple(k.shape)}"
        )
    if bias is not None and bias.shape != (H,):
        raise ValueError(f"bias must be [{H}], one per query head, not {list(bias.shape)}")
    if seq_start is not None and seq_start.shape != (B, T):
        raise ValueError(f"seq_start must be [{B}, {T}], not {list(seq_start.shape)}")
    if seq_start is not None and seq_start.is_floating_point():
        raise ValueError(f"seq_start must hold integers, not {seq_start.dtype}")
