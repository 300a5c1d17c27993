"""IMPLEMENTATIONS: the attention kernels that are measured, ours and their peers, by name.

Each is prepared for given tensors: whatever is not part of the computation itself (compiling,
gates that a model would have computed) happens there and is not timed.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flasheva import EvaConfig, Impl, SummaryMaps, chunk_summaries, eva_attention
from flasheva.flex_blocks import make_block_mask
from flasheva.visibility import Positions, sees_key, sees_summary
from tools.benchmarks.inputs import Inputs
from tools.benchmarks.names import KernelName


class Call(NamedTuple):
    """A prepared attention call.

    Attributes:
        run: computes the output [B, H, T, D].
        differentiable: the tensors that get a gradient, by name.
    """

    run: Callable[[], Tensor]
    differentiable: Mapping[str, Tensor]


class Implementation(NamedTuple):
    """How to prepare a call, and what its queries see.

    Attributes:
        sees: "eva", what the rule of visibility says; "causal", every earlier key; "gated", a
            recurrent state, so that there is no softmax to compare with.
        prepare: may raise ImportError where a peer is not installed. A "causal" or "gated" one
            ignores the config.
    """

    sees: Literal["eva", "causal", "gated"]
    prepare: Callable[[EvaConfig, Inputs], Call]


def _eager(impl: str) -> Callable[[EvaConfig, Inputs], Call]:
    def prepare(config: EvaConfig, x: Inputs) -> Call:
        def run() -> Tensor:
            return eva_attention(
                *(x.q, x.k, x.v, config, x.maps), bias=x.bias, impl=cast("Impl", impl)
            )

        return Call(run, x.differentiable())

    return prepare


def _flex(config: EvaConfig, x: Inputs) -> Call:
    """Summaries, concatenation and FlexAttention in one compiled graph, as a model has them.

    Every call makes its block mask.
    """
    # torch counts recompiles per code object, which all calls share, and gives up above 8.
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, maps: SummaryMaps, bias: Tensor | None) -> Tensor:
        return eva_attention(q, k, v, config, maps, bias=bias, impl="flex")

    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    return Call(lambda: compiled(x.q, x.k, x.v, x.maps, x.bias), x.differentiable())


def _flex_prebuilt(config: EvaConfig, x: Inputs) -> Call:
    """The strongest rival: the same, with a block mask that was made beforehand.

    A training loop could make it once and use it in every layer and step. Its time with a bias
    says little: its backward adds the gradient of the bias with atomics on H addresses.
    """
    torch.compiler.reset()
    T, C = x.k.shape[2], x.k.shape[2] // config.chunk_size

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(j < T, sees_key(config, i, j), sees_summary(config, i, j - T))

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        maps: SummaryMaps,
        bias: Tensor | None,
        block_mask: BlockMask,
    ) -> Tensor:
        def add_bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            assert bias is not None
            return torch.where(j < T, score, score + bias[h])

        score_mod = None if bias is None else add_bias
        k_rfa, v_rfa = chunk_summaries(config, q, k, v, maps)
        keys, values = torch.cat([k, k_rfa], 2), torch.cat([v, v_rfa], 2)
        grouped = q.shape[1] != k.shape[1]
        out = flex_attention(q, keys, values, score_mod, block_mask, enable_gqa=grouped)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(attend, fullgraph=True, dynamic=False)
    block_mask = make_block_mask(config, Positions(), T, T, C, x.q.device, mask_mod)
    return Call(lambda: compiled(x.q, x.k, x.v, x.maps, x.bias, block_mask), x.differentiable())


def _sdpa(backend: SDPBackend) -> Callable[[EvaConfig, Inputs], Call]:
    def prepare(config: EvaConfig, x: Inputs) -> Call:
        del config
        grouped = x.q.shape[1] != x.k.shape[1]

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    x.q, x.k, x.v, is_causal=True, enable_gqa=grouped
                )

        return Call(run, {"q": x.q, "k": x.k, "v": x.v})

    return prepare


def _fla_chunk_gla(config: EvaConfig, x: Inputs) -> Call:
    """Gated linear attention; gates as its layer makes them, log sigmoid / 16."""
    del config
    chunk_gla = _peer("fla.ops.gla", "chunk_gla")
    _refuse_groups(x)
    gates = _leaf(F.logsigmoid(_randn_like(x.q)) / 16, x)

    def run() -> Tensor:
        # Views: flash-linear-attention wants [B, T, H, D].
        q, k, v, g = (tensor.transpose(1, 2) for tensor in (x.q, x.k, x.v, gates))
        return chunk_gla(q, k, v, g)[0].transpose(1, 2)

    return Call(run, {"q": x.q, "k": x.k, "v": x.v, "g": gates})


def _fla_gated_delta_rule(config: EvaConfig, x: Inputs) -> Call:
    """The gated delta rule, on keys that were normalised beforehand (which favours it)."""
    del config
    rule = _peer("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
    _refuse_groups(x)
    keys = _leaf(F.normalize(x.k.detach().float(), dim=-1).to(x.k.dtype), x)
    # One decay and one write strength per head and token, [B, H, T]; decays are float32 in fla.
    decays = _leaf(F.logsigmoid(_randn_like(x.q[..., 0]).float()), x)
    strengths = _leaf(_randn_like(x.q[..., 0]).sigmoid(), x)

    def run() -> Tensor:
        q, k, v, g, beta = (
            tensor.transpose(1, 2) for tensor in (x.q, keys, x.v, decays, strengths)
        )
        return rule(q, k, v, g, beta)[0].transpose(1, 2)

    return Call(run, {"q": x.q, "k": keys, "v": x.v, "g": decays, "beta": strengths})


# A peer is no requirement of this package, so it is imported by name and only when it is measured.
def _peer(module: str, name: str) -> Callable[..., tuple[Tensor, ...]]:
    function = getattr(importlib.import_module(module), name)
    return cast("Callable[..., tuple[Tensor, ...]]", function)


def _refuse_groups(x: Inputs) -> None:
    if x.q.shape[1] != x.k.shape[1]:
        raise ValueError(
            f"needs as many key heads as query heads, not {x.k.shape[1]} and {x.q.shape[1]}"
        )


def _randn_like(x: Tensor) -> Tensor:
    """Seeded, and laid out [B, T, H, ...] in memory as q is."""
    rng = torch.Generator(x.device).manual_seed(1)
    B, H, T, *rest = x.shape
    size = (B, T, H, *rest)
    return torch.randn(size, generator=rng, dtype=x.dtype, device=x.device).transpose(1, 2)


def _leaf(x: Tensor, inputs: Inputs) -> Tensor:
    return x.detach().requires_grad_(inputs.q.requires_grad)


IMPLEMENTATIONS: dict[KernelName, Implementation] = {
    # The rivals first: the gradients of ours are compared with theirs.
    "flex": Implementation("eva", _flex),
    "flex_prebuilt": Implementation("eva", _flex_prebuilt),
    "triton": Implementation("eva", _eager("triton")),
    "reference": Implementation("eva", _eager("reference")),
    "sdpa_cudnn": Implementation("causal", _sdpa(SDPBackend.CUDNN_ATTENTION)),
    "sdpa_flash": Implementation("causal", _sdpa(SDPBackend.FLASH_ATTENTION)),
    "fla_chunk_gla": Implementation("gated", _fla_chunk_gla),
    "fla_gated_delta_rule": Implementation("gated", _fla_gated_delta_rule),
}

# What is measured when nobody chooses. The reference is dense: 65,536 tokens need 275 GB.
DEFAULTS: dict[str, tuple[KernelName, ...]] = {
    "cuda": tuple(name for name in IMPLEMENTATIONS if name != "reference"),
    "cpu": ("flex", "reference"),
}
