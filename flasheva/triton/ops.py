"""The kernels as ops of PyTorch: fake kernels for tracing, autograd, and their launches.

`flasheva::attention` is whole rows, summaries included, with a backward;
`flasheva::attention_onto_cache` is new queries over what a cache holds, without one.

Dims: B batch, H query heads, G key/value heads, R = H / G, D head dim, T tokens, N keys,
C chunks whose summary somebody sees.
"""

import functools
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flasheva.config import EvaConfig
from flasheva.summary import AffineMaps, PooledMaps, SummaryMaps
from flasheva.triton import attention_backward as backward_kernels
from flasheva.triton.attention_forward import attention_forward
from flasheva.triton.summary_backward import map_gradients, summary_backward
from flasheva.triton.summary_forward import summary_forward
from flasheva.triton.tiles import Kernel, SummaryTile, Tile, summary_tile_of, tile_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_SINK_TILE = 64  # sinks at a time
_SINK_ENTRIES = 64  # of the gradient of the sinks, summed by one program
_MAP_SHARES = 128  # programs among which the gradient of a map is split


def triton_attention(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: SummaryMaps | None,
    bias: Tensor | None,
    seq_start: Tensor | None,
    noise: Tensor | None,
) -> Tensor:
    """Attention over whole rows, summaries included; arguments as `flasheva.eva_attention`."""
    kind, tensors = _flatten(maps)
    _check_maps(kind, tensors, k.shape[1], k.shape[3])
    dtype, (q, k, v) = q.dtype, _alike(q, k, v)
    differentiable = [q, k, v, *tensors, *([] if bias is None else [bias])]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    out: Tensor = _attention(
        *(q, k, v, tensors, bias, seq_start, noise),
        *(config.window_size, config.chunk_size, config.sink_size, config.window, kind, save),
    )[0]
    return out.to(dtype)


def triton_attention_onto_cache(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    q_start: Tensor,
) -> Tensor:
    """Attention of T new queries per row over sinks, window and themselves; no backward.

    Args:
        config: window, chunk, sinks.
        q: [B, H, T, D].
        k, v: [B, G, N, D]: the sinks, then the tokens before the new ones in order, then the T
            new ones.
        k_rfa, v_rfa: [B, G, C, D].
        bias: [H] or None.
        q_start: int [B], position of the first query in its row.

    Returns:
        [B, H, T, D] in the dtype of q.
    """
    dtype, (q, k, v, k_rfa, v_rfa) = q.dtype, _alike(q, k, v, k_rfa, v_rfa)
    out: Tensor = _attention_onto_cache(
        *(q, k, v, k_rfa, v_rfa, bias, q_start),
        *(config.window_size, config.chunk_size, config.sink_size, config.window),
    )
    return out.to(dtype)


def _alike(*tensors: Tensor) -> list[Tensor]:
    """In one dtype that holds them all: autocast leaves q and k in float32 after RoPE."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
    return [x.to(dtype) for x in tensors]


def _flatten(maps: SummaryMaps | None) -> tuple[str, list[Tensor]]:
    """The kind of map, and [w_q, b_q, w_k, b_k(, g_q, s_q, g_k, s_k)], [phi, mu] or []."""
    if maps is None:
        return "none", []
    if isinstance(maps, PooledMaps):
        return "pooled", [maps.phi, maps.mu]
    assert isinstance(maps, AffineMaps)
    tensors = [maps.q.weight, maps.q.bias, maps.k.weight, maps.k.bias]
    norms = (maps.q.norm_weight, maps.q.norm_bias, maps.k.norm_weight, maps.k.norm_bias)
    if all(x is None for x in norms):
        return "linear", tensors
    return "layernorm", tensors + [x for x in norms if x is not None]


def _check_maps(kind: str, tensors: list[Tensor], G: int, D: int) -> None:
    """Kernels read parameters by pointer: nothing is broadcast."""
    shapes = [(D, D), (D,)] * 2 + [(D,)] * 4
    if kind == "pooled":
        shapes = [(G, D)] * 2
    expected = shapes[: {"none": 0, "linear": 4}.get(kind, len(shapes))]
    found = [tuple(x.shape) for x in tensors]
    if found != expected:
        raise ValueError(f"impl='triton' needs {kind} maps of shapes {expected}, not {found}")


class _Maps(NamedTuple):
    w_q: Tensor | None = None
    b_q: Tensor | None = None
    w_k: Tensor | None = None
    b_k: Tensor | None = None
    g_q: Tensor | None = None
    s_q: Tensor | None = None
    g_k: Tensor | None = None
    s_k: Tensor | None = None

    @staticmethod
    def of(kind: str, tensors: list[Tensor]) -> "_Maps":
        tensors = [x.contiguous() for x in tensors]
        if kind == "pooled":
            return _Maps(w_q=tensors[0], w_k=tensors[1])
        return _Maps(*tensors)


class _Call(NamedTuple):
    """What every kernel of one call is specialised for."""

    B: int
    H: int
    G: int
    T: int
    D: int
    W: int
    P: int
    S: int
    sliding: bool
    packed: bool
    dtype: torch.dtype
    capability: int

    @property
    def C(self) -> int:
        """Chunks whose summary some query may see; those of the last window are nobody's."""
        return _num_summaries(self.T, self.W, self.P, self.sliding, self.packed)

    @property
    def block_d(self) -> int:
        return max(16, _power_of_2(self.D))

    @property
    def scale(self) -> float:
        """Of logits, in units of log 2."""
        return float(self.D**-0.5 * math.log2(math.e))

    @property
    def precision(self) -> str:
        return "ieee" if self.dtype == torch.float32 else "tf32"

    @property
    def map_precision(self) -> str:
        """Of the products of the maps: errors of at most a quarter of a rounding of the inputs."""
        by_dtype = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "tf32"}
        return by_dtype[self.dtype]

    @property
    def rule(self) -> dict[str, Any]:
        return {"W": self.W, "P": self.P, "S": self.S, "SLIDING": self.sliding}

    def tile(self, kernel: Kernel) -> Tile:
        tile = tile_of(kernel, self.dtype, self.block_d, self.capability, self.C)
        if kernel in ("forward", "queries"):
            # The rule of sinks wants tiles of queries no larger than a window.
            most = 1 << (self.W.bit_length() - 1)
            tile = tile._replace(block_m=min(tile.block_m, most))
        return tile

    def summary_tile(self, kind: str) -> SummaryTile:
        tile = summary_tile_of(self.block_d, kind == "pooled")
        return tile._replace(tokens=min(tile.tokens, _power_of_2(self.P)))

    def chunks_of(self, tokens: int) -> int:
        """Chunks that a tile of tokens may touch, as the size of a matrix product."""
        whole = tokens % self.P == 0  # tiles begin at multiples of their size
        most = tokens // self.P if whole else _ceil_div(tokens - 1, self.P) + 1
        return max(16, _power_of_2(most))

    @property
    def sink_tile(self) -> int:
        most = _SINK_TILE if self.block_d <= 128 else 16
        return min(most, max(16, _power_of_2(self.S)))

    @property
    def map_part(self) -> int:
        """Rows of a map that a program takes at a time."""
        return self.block_d if self.block_d <= 128 else 32


def _num_summaries(T: int, W: int, P: int, sliding: bool, packed: bool) -> int:
    """C of rows of T tokens; the last query's window begins C * P tokens into its row."""
    if sliding:
        return torch.sym_max(T - W, 0) // P
    if packed:  # blocks are counted from where a document starts
        return T // P
    return (T - 1) // W * W // P


def _call(
    q: Tensor, k: Tensor, seq_start: Tensor | None, W: int, P: int, S: int, window: str
) -> _Call:
    B, H, T, D = q.shape
    sliding, packed = window == "sliding", seq_start is not None
    static = (sliding, packed, q.dtype, _capability(q.device))
    return _Call(B, H, k.shape[1], T, D, W, P, S, *static)


@functools.cache
def _capability(device: torch.device) -> int:
    """The major compute capability; 0 in the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


# Triton's own cdiv and next_power_of_2 cost ten microseconds a call.
def _ceil_div(x: int, y: int) -> int:
    return -(-x // y)


def _power_of_2(x: int) -> int:
    """The least power of 2 that is not below x."""
    return 1 << max(x - 1, 0).bit_length()


def _strides(x: Tensor) -> tuple[int, int, int]:
    assert x.stride(3) == 1
    return x.stride(0), x.stride(1), x.stride(2)


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    B, heads, T, D = x.shape
    return B, heads, T, D


def _rows_apart(x: Tensor) -> Tensor:
    """x with the D entries of a row side by side; a copy only if they are not."""
    # Not contiguous(): where a dim has one entry, that may keep the stride.
    return x if x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def _like_projection(B: int, heads: int, T: int, D: int, like: Tensor) -> Tensor:
    """[B, heads, T, D], in memory [B, T, heads, D]: the output projection needs no copy."""
    return torch.empty((B, T, heads, D), dtype=like.dtype, device=like.device).transpose(1, 2)


def _saved_shapes(k: Tensor, C: int, kind: str, save: bool) -> list[tuple[int, ...]]:
    """Of q_mean, k_mean and omega."""
    if not save or kind == "none":
        return [(0,)] * 3
    B, G, _, D = k.shape
    shape = (B, G, C, D)
    # Pooled maps have no use for the means of queries.
    return [(0,) if kind == "pooled" else shape, shape, shape]


def _launch(kernel: Any, grid: tuple[int, ...], *args: object, **options: object) -> None:
    if 0 not in grid:
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device
            kernel[grid](*args, **options)


def _summaries(
    c: _Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kind: str,
    maps: _Maps,
    noise: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """k_rfa, v_rfa, and for the backward float32 q_mean, k_mean, omega."""
    C = c.C
    k_rfa, v_rfa = (k.new_empty((c.B, c.G, C, c.D)) for _ in range(2))
    # A map in parts reads the means back from memory.
    in_parts = c.map_part < c.block_d
    saved = [
        k.new_empty(shape, dtype=torch.float32)
        for shape in _saved_shapes(k, C, kind, save or in_parts)
    ]
    if noise is not None:
        noise = noise[:, :, :C].contiguous()
    tile = c.summary_tile(kind)
    num_blocks = _ceil_div(C, tile.block_c)
    _launch(
        summary_forward,
        (num_blocks * c.B * c.G,),
        *(q, k, v, noise, *maps, k_rfa, v_rfa, *saved),
        *(*_strides(q), *_strides(k), *_strides(v)),
        *(C, num_blocks, c.D**-0.5),
        G=c.G,
        R=c.H // c.G,
        D=c.D,
        P=c.P,
        MAP=kind,
        NOISE=noise is not None,
        SAVE=save,
        PRECISION=c.map_precision,
        BLOCK_D=c.block_d,
        BLOCK_K=c.map_part,
        BLOCK_P=_power_of_2(c.P),
        SLICE=tile.tokens,
        BLOCK_C=tile.block_c,
        num_warps=tile.num_warps,
    )
    if not save:
        saved = [k.new_empty(0, dtype=torch.float32) for _ in saved]
    return k_rfa, v_rfa, saved[0], saved[1], saved[2]


def _attend(
    c: _Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    seq_start: Tensor | None,
    q_start: Tensor | None,
    key_offset: int,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp [B, H, T] in units of log 2 ([0] unless `save`)."""
    out = _like_projection(c.B, c.H, c.T, c.D, q)
    lse = q.new_empty((c.B, c.H, c.T) if save else (0,), dtype=torch.float32)
    bias = None if bias is None else bias.contiguous()
    q_start = None if q_start is None else q_start.contiguous()
    tile = c.tile("forward")
    num_tiles = _ceil_div(c.T, tile.block_m)
    _launch(
        attention_forward,
        (num_tiles * c.B * c.H,),
        *(q, k, v, k_rfa, v_rfa, bias, seq_start, q_start, out, lse),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(k_rfa), *_strides(out)),
        *(c.T, k_rfa.shape[2], c.H, num_tiles, key_offset, c.scale),
        R=c.H // c.G,
        D=c.D,
        **c.rule,
        SUMMARIES=k_rfa.shape[2] > 0,
        BIAS=bias is not None,
        PACKED=c.packed,
        CACHED=q_start is not None,
        SAVE_LSE=save,
        PRECISION=c.precision,
        BLOCK_D=c.block_d,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )
    return out, lse


@torch.library.custom_op("flasheva::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    noise: Tensor | None,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, then what the backward needs: lse, k_rfa, v_rfa, q_mean, k_mean, omega.

    What only the backward needs is [0] unless `save`.
    """
    q, k, v = (_rows_apart(x) for x in (q, k, v))
    seq_start = _int32(seq_start)
    c = _call(q, k, seq_start, window_size, chunk_size, sink_size, window)
    if summary_map == "none":
        k_rfa, v_rfa = (k.new_empty((c.B, c.G, 0, c.D)) for _ in range(2))
        q_mean, k_mean, omega = (k.new_empty(0, dtype=torch.float32) for _ in range(3))
    else:
        k_rfa, v_rfa, q_mean, k_mean, omega = _summaries(
            c, q, k, v, summary_map, _Maps.of(summary_map, maps), noise, save
        )
    out, lse = _attend(c, q, k, v, k_rfa, v_rfa, bias, seq_start, None, 0, save)
    return out, lse, k_rfa, v_rfa, q_mean, k_mean, omega


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    noise: Tensor | None,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, H, T, D = q.shape
    C = 0
    if summary_map != "none":
        packed = seq_start is not None
        C = _num_summaries(T, window_size, chunk_size, window == "sliding", packed)
    lse = q.new_empty((B, H, T) if save else (0,), dtype=torch.float32)
    k_rfa, v_rfa = (k.new_empty((B, k.shape[1], C, D)) for _ in range(2))
    q_mean, k_mean, omega = (
        k.new_empty(shape, dtype=torch.float32) for shape in _saved_shapes(k, C, summary_map, save)
    )
    return _like_projection(B, H, T, D, q), lse, k_rfa, v_rfa, q_mean, k_mean, omega


@torch.library.custom_op("flasheva::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    q_mean: Tensor,
    k_mean: Tensor,
    omega: Tensor,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
) -> list[Tensor]:
    """Gradients of q, k, v, then of the bias if there is one, then those of `_split_maps`."""
    do, q, k, v = (_rows_apart(x) for x in (do, q, k, v))
    bias = None if bias is None else bias.contiguous()
    seq_start = _int32(seq_start)
    c = _call(q, k, seq_start, window_size, chunk_size, sink_size, window)
    B, H, G, T, D, P = c.B, c.H, c.G, c.T, c.D, c.P
    C, R = k_rfa.shape[2], H // G
    common = {"R": R, "D": D, "PACKED": c.packed, "BLOCK_D": c.block_d, **c.rule}

    delta = torch.empty_like(lse)
    block = 64
    num_tiles = _ceil_div(T, block)
    _launch(
        backward_kernels.output_dot,
        (num_tiles * B * H,),
        *(out, do, delta, *_strides(out), *_strides(do), T, H, num_tiles),
        D=D,
        BLOCK_D=c.block_d,
        BLOCK_M=block,
    )

    token = k.new_empty((4, B, G, C * P), dtype=torch.float32)
    chunk = k.new_empty((6, B, G, C, D), dtype=torch.float32)
    weights, logit_grads, pool, pool_grads = token
    dk_rfa, dv_rfa, q_mean_grad, k_mean_grad, dz_q, dz_k = chunk
    parameters = _Maps.of(summary_map, maps)
    map_grads: list[Tensor] = []
    if C > 0:
        tile = c.tile("summaries")
        _launch(
            backward_kernels.summary_gradients,
            (_ceil_div(C, tile.block_n) * B * G,),
            *(q, k_rfa, v_rfa, bias, seq_start, do, lse, delta, dk_rfa, dv_rfa),
            *(*_strides(q), *_strides(k_rfa), *_strides(do), T, C, H, B * G, c.scale),
            **common,
            BIAS=bias is not None,
            PRECISION=c.precision,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **tile.options,
        )
        blocks = c.summary_tile(summary_map)
        num_blocks = _ceil_div(C, blocks.block_c)
        vector_shares = k.new_empty((B, G, num_blocks, 4, D), dtype=torch.float32)
        m = parameters
        _launch(
            summary_backward,
            (num_blocks * B * G,),
            *(k, v, m.w_q, m.b_q, m.w_k, m.b_k, m.g_q, m.g_k, q_mean, k_mean, omega),
            *(dk_rfa, dv_rfa, weights, logit_grads, pool, pool_grads),
            *(q_mean_grad, k_mean_grad, dz_q, dz_k, vector_shares),
            *(*_strides(k), *_strides(v), C, num_blocks, D**-0.5),
            G=G,
            R=R,
            D=D,
            P=P,
            MAP=summary_map,
            PRECISION=c.map_precision,
            BLOCK_D=c.block_d,
            BLOCK_K=c.map_part,
            BLOCK_P=_power_of_2(P),
            SLICE=blocks.tokens,
            BLOCK_C=blocks.block_c,
            num_warps=blocks.num_warps,
        )
        map_grads = _map_gradients(c, summary_map, dz_q, q_mean, dz_k, k_mean, vector_shares)
    else:
        shapes = _map_grad_shapes(summary_map, G, D)
        map_grads = [k.new_zeros(shape, dtype=torch.float32) for shape in shapes]
    pooled = summary_map == "pooled"

    dk, dv = (_like_projection(B, G, T, D, k) for _ in range(2))
    tile = c.tile("keys")
    num_tiles = _ceil_div(T, tile.block_n)
    _launch(
        backward_kernels.key_gradients,
        (num_tiles * B * G,),
        *(q, k, v, seq_start, do, lse, delta, omega, dv_rfa),
        *(dk_rfa if pooled else k_mean_grad, weights, logit_grads, pool, pool_grads),
        *(parameters.w_k, dk, dv),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(do), *_strides(dk)),
        *(T, C, H, num_tiles, c.scale),
        **common,
        SUMMARIES=C > 0,
        POOLED=pooled,
        PRECISION=c.precision,
        CHUNKS=c.chunks_of(tile.block_n),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )

    dq = _like_projection(B, H, T, D, q)
    tile = c.tile("queries")
    num_tiles = _ceil_div(T, tile.block_m)
    bias_shares = q.new_empty((B, H, num_tiles), dtype=torch.float32)
    sink_shares = q.new_empty((B, H, num_tiles, 2, c.S, D))
    _launch(
        backward_kernels.query_gradients,
        (num_tiles * B * H,),
        *(q, k, v, k_rfa, v_rfa, bias, seq_start, do, lse, delta, q_mean_grad),
        *(dq, bias_shares, sink_shares),
        *(*_strides(q), *_strides(k), *_strides(v), *_strides(k_rfa), *_strides(do)),
        *(*_strides(dq), T, C, H, num_tiles, c.scale),
        **common,
        SUMMARIES=C > 0,
        QUERY_MEANS=C > 0 and not pooled,
        BIAS=bias is not None,
        PRECISION=c.precision,
        CHUNKS=c.chunks_of(tile.block_m),
        BLOCK_S=c.sink_tile,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        **tile.options,
    )
    if c.S > 0:
        documents = num_tiles if c.packed else 1
        _launch(
            backward_kernels.add_sink_gradients,
            (_ceil_div(c.S * D, _SINK_ENTRIES) * documents * B * G, 2),
            *(sink_shares, seq_start, dk, dv, *_strides(dk), T, H, num_tiles),
            **common | {"BLOCK_D": _SINK_ENTRIES},
            BLOCK_M=tile.block_m,
            BLOCK_T=32,
            num_warps=1,
        )
    grads = [dq, dk, dv]
    if bias is not None:
        grads.append(bias_shares.sum((0, 2)) if C > 0 else torch.zeros_like(bias).float())
    return grads + map_grads


def _map_gradients(
    c: _Call,
    kind: str,
    dz_q: Tensor,
    q_mean: Tensor,
    dz_k: Tensor,
    k_mean: Tensor,
    vector_shares: Tensor,
) -> list[Tensor]:
    """Float32, of the shapes that `_map_grad_shapes` gives."""
    if kind == "pooled":
        return [vector_shares[:, :, :, :2].sum((0, 2))]
    rows = q_mean.numel() // c.D
    block = 64 if c.block_d <= 64 else 32
    columns = c.block_d if c.block_d <= 128 else 64
    num_shares = min(_MAP_SHARES, _ceil_div(rows, block))
    shares = q_mean.new_empty((num_shares, 2, c.D + 1, c.D))
    _launch(
        map_gradients,
        (num_shares, 2, _ceil_div(c.D, columns)),
        *(dz_q, q_mean, dz_k, k_mean, shares, rows, num_shares),
        D=c.D,
        PRECISION="ieee" if c.dtype == torch.float32 else "tf32x3",
        BLOCK_D=c.block_d,
        BLOCK_R=block,
        COLUMNS=columns,
        num_warps=8 if c.block_d > 64 else 4,
    )
    grads = [shares.sum(0)]
    if kind == "layernorm":
        grads.append(vector_shares.sum((0, 1, 2)))
    return grads


def _map_grad_shapes(kind: str, G: int, D: int) -> list[tuple[int, ...]]:
    """Of few tensors, because each reduction and each cast is a launch: `_split_maps` splits them.

    Both maps' weights with their biases as a last row; LayerNorm's four vectors; or phi and mu.
    """
    if kind == "pooled":
        return [(G, 2, D)]
    shapes: list[tuple[int, ...]] = [(2, D + 1, D), (4, D)]
    return shapes[: {"none": 0, "linear": 1, "layernorm": 2}[kind]]


def _split_maps(grads: list[Tensor], num_maps: int) -> list[Tensor]:
    """Views of what `_map_grad_shapes` describes, in the order of `_flatten`."""
    if num_maps == 2:
        return list(grads[0].unbind(1))
    if num_maps == 0:
        return []
    products = [part for grad in grads[0] for part in (grad[:-1], grad[-1])]
    return products + [vector for grad in grads[1:] for vector in grad]


@_attention_backward.register_fake
def _(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: list[Tensor],
    bias: Tensor | None,
    seq_start: Tensor | None,
    out: Tensor,
    lse: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    q_mean: Tensor,
    k_mean: Tensor,
    omega: Tensor,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
    summary_map: str,
) -> list[Tensor]:
    grads = [_like_projection(*_sizes(x), x) for x in (q, k, v)]
    if bias is not None:
        grads.append(torch.empty_like(bias, dtype=torch.float32))
    shapes = _map_grad_shapes(summary_map, k.shape[1], k.shape[3])
    return grads + [k.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, maps, bias, seq_start, _noise, *static, _save = inputs
    ctx.static = static
    ctx.num_maps = len(maps)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(q, k, v, *maps, bias, seq_start, *output)


def _backward(ctx: Any, do: Tensor, *_: Any) -> tuple[Any, ...]:
    q, k, v, *rest = ctx.saved_tensors
    maps, (bias, seq_start, *saved) = rest[: ctx.num_maps], rest[ctx.num_maps :]
    dq, dk, dv, *others = _attention_backward(
        *(do, q, k, v, maps, bias, seq_start, *saved, *ctx.static)
    )
    dbias = None if bias is None else others.pop(0).to(bias.dtype)
    if maps:
        others = [grad.to(maps[0].dtype) for grad in others]
    dmaps = [
        grad.to(x.dtype) for grad, x in zip(_split_maps(others, len(maps)), maps, strict=True)
    ]
    return (dq, dk, dv, dmaps, dbias, *([None] * (3 + len(ctx.static))))


_attention.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("flasheva::attention_onto_cache", mutates_args=())
def _attention_onto_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    q_start: Tensor,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
) -> Tensor:
    q, k, v = (_rows_apart(x) for x in (q, k, v))
    if k_rfa.stride() != v_rfa.stride() or k_rfa.stride(3) != 1:
        k_rfa, v_rfa = k_rfa.contiguous(), v_rfa.contiguous()
    c = _call(q, k, None, window_size, chunk_size, sink_size, window)
    offset = k.shape[2] - q.shape[2]
    return _attend(c, q, k, v, k_rfa, v_rfa, bias, None, q_start, offset, save=False)[0]


@_attention_onto_cache.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    q_start: Tensor,
    window_size: int,
    chunk_size: int,
    sink_size: int,
    window: str,
) -> Tensor:
    return _like_projection(*_sizes(q), q)


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()
