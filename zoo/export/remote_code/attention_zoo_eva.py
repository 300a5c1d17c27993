"""Attention between the projections of a layer: full, EVA, or a window without summaries.

FlashEVA (arXiv 2511.00576), in plain PyTorch with dense masks: to be read, not to be fast.
With W = window_size, P = chunk_size, S = sink_size, chunk c holding positions [cP, (c + 1)P) and

    start(n) = n // W * W                          (block window)
    start(n) = max(0, (n - W + 1) // P * P)        (sliding window)

the query at position n sees keys j <= n with j >= start(n) or j < S exactly, and the summary of
each chunk with cP >= S and (c + 1)P <= start(n). With qbar_c and kbar_c the means over a chunk
(qbar_c also over the query heads of a group), s = D^-1/2 and d_m = k_m - kbar_c:

    k_rfa_c = f_k(kbar_c)
    omega_c = f_q(qbar_c) + k_rfa_c
    v_rfa_c = sum_m softmax_m(s (omega_c - kbar_c) . d_m - s/2 |d_m|^2) v_m

The output is one softmax over the visible keys, with logits s q . k_j, and the visible summaries,
with logits s q . k_rfa_c + b_h.

Dims: B batch, H query heads, G key/value heads, D head dim, T queries, N keys, C chunks. The N
keys are those of all tokens, past ones included; the queries are the last T of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Eva = dict[str, int | float | str | bool]

_BLOCK = 512  # queries whose logits exist at a time


class Positions(NamedTuple):
    """Where tokens stand in their own text, int [B or 1, ...]; padding in front is not counted.

    Attributes:
        query: [., T], of padding 0.
        key: [., N], of padding negative.
    """

    query: Tensor
    key: Tensor


class FullAttention(nn.Module):
    """softmax(s q k^T) v over all earlier tokens."""

    needs_past_queries = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, at: Positions) -> Tensor:
        """As `WindowAttention.forward`."""
        del past
        key, query = at.key[:, None, None, :], at.query[:, None, :, None]
        repeats = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(key >= 0) & (key <= query))


class WindowAttention(nn.Module):
    """The exact keys alone: window and sinks."""

    needs_past_queries = False

    def __init__(self, eva: Eva) -> None:
        super().__init__()
        self.W, self.P, self.S = (
            int(eva[name]) for name in ("window_size", "chunk_size", "sink_size")
        )
        self.window = eva["window"]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, at: Positions) -> Tensor:
        """Attends.

        Args:
            q: [B, H, T, D].
            k, v: [B, G, N, D].
            past: [B, H, N, D], the queries of all tokens, which summaries are made of.
            at: where they stand.

        Returns:
            [B, H, T, D] in the dtype of q, computed in float32 at least.
        """
        wide = torch.promote_types(q.dtype, torch.float32)
        k_rfa, v_rfa = self.summaries(past, k, v, at)
        C, repeats = k_rfa.shape[2], q.shape[1] // k.shape[1]
        keys = torch.cat([k, k_rfa], 2).to(wide).repeat_interleave(repeats, dim=1)
        values = torch.cat([v, v_rfa], 2).to(wide).repeat_interleave(repeats, dim=1)
        outputs = []
        for q_part, query in zip(q.split(_BLOCK, 2), at.query.split(_BLOCK, 1), strict=True):
            logits = q_part.to(wide) * q.shape[3] ** -0.5 @ keys.transpose(2, 3)
            if (bias := self.bias()) is not None:
                logits[..., k.shape[2] :] += bias.to(wide)[:, None, None]
            seen = self.visible(query[:, :, None], at.key[:, None, :], C)
            outputs.append(logits.masked_fill(~seen[:, None], -torch.inf).softmax(3) @ values)
        return torch.cat(outputs, 2).to(q.dtype)

    def visible(self, query: Tensor, key: Tensor, C: int) -> Tensor:
        """The rule: query [., T, 1] and key [., 1, N] to bool [., T, N + C]."""
        W, P, S = self.W, self.P, self.S
        if self.window == "block":
            start = query // W * W
        else:
            start = ((query - W + 1) // P * P).clamp(min=0)
        keys = (key >= 0) & (key <= query) & ((key >= start) | (key < S))
        first = torch.arange(C, device=query.device) * P
        return torch.cat([keys, (first >= S) & (first + P <= start)], dim=2)

    def summaries(self, q: Tensor, k: Tensor, v: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
        """k_rfa, v_rfa [B, G, C, D]: none."""
        del q, at
        return k[:, :, :0], v[:, :, :0]

    def bias(self) -> Tensor | None:
        """b_h [H], or None."""
        return None


class EvaAttention(WindowAttention):
    """Window, sinks, and a summary for each chunk behind them.

    f_q and f_k are `q_map` and `k_map`, for `summary_map` "layernorm" followed by `q_norm` and
    `k_norm`. For "pooled" (EvaByte's), learned vectors mu and phi [G, D] take their places:
    k_rfa_c = sum_m softmax_m(s mu . k_m) k_m and omega_c = phi.
    """

    needs_past_queries = True

    def __init__(self, eva: Eva, H: int, G: int, D: int) -> None:
        super().__init__(eva)
        self.summary_map, self.training_noise = eva["summary_map"], eva["training_noise"]
        if self.summary_map == "pooled":
            self.mu, self.phi = nn.Parameter(torch.zeros(G, D)), nn.Parameter(torch.zeros(G, D))
        else:
            self.q_map, self.k_map = nn.Linear(D, D), nn.Linear(D, D)
        if self.summary_map == "layernorm":
            self.q_norm, self.k_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.summary_bias = nn.Parameter(torch.zeros(H)) if eva["summary_bias"] else None

    def bias(self) -> Tensor | None:
        """b_h [H], or None."""
        return self.summary_bias

    def summaries(self, q: Tensor, k: Tensor, v: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
        """k_rfa, v_rfa [B, G, C, D], of chunks that some query may see; others hold anything."""
        wide, scale = torch.promote_types(k.dtype, torch.float32), k.shape[3] ** -0.5
        P, N, G = self.P, k.shape[2], k.shape[1]
        # Chunks count from a row's first token of its own: padding goes to its end, where it only
        # enters chunks that nobody sees.
        order = (torch.arange(N, device=k.device) - at.key[:, :1]) % N
        order = order[:, None, : N // P * P, None]
        q, k, v = (
            x.take_along_dim(order, 2).unflatten(2, (N // P, P)).to(wide) for x in (q, k, v)
        )
        k_mean = k.mean(3)
        q_mean = q.unflatten(1, (G, -1)).mean((2, 4))
        centred = k - k_mean[:, :, :, None]  # d_m
        if self.summary_map == "pooled":
            mu, phi = self.mu.to(wide)[:, None, None], self.phi.to(wide)[:, None]
            pool = (scale * (centred * mu).sum(4)).softmax(3)
            k_rfa = k_mean + (pool[..., None] * centred).sum(3)
            omega = phi.expand_as(k_mean)
        else:
            k_rfa = self._map(self.k_map, "k_norm", k_mean)
            omega = self._map(self.q_map, "q_norm", q_mean) + k_rfa
            if self.training and self.training_noise:
                omega = omega + torch.randn_like(omega).clamp(-1, 1)
        projected = (centred * (omega - k_mean)[:, :, :, None]).sum(4)
        weights = (scale * (projected - 0.5 * centred.square().sum(4))).softmax(3)
        v_rfa = (weights[..., None] * v).sum(3)
        return k_rfa, v_rfa

    def _map(self, linear: nn.Linear, norm: str, x: Tensor) -> Tensor:
        # In float64: float32 products may be TF32 by a global setting.
        y = F.linear(x.double(), linear.weight.double(), linear.bias.double()).to(x.dtype)
        if self.summary_map == "linear":
            return y
        weight, bias = (p.to(y.dtype) for p in self.get_submodule(norm).parameters())
        return F.layer_norm(y, y.shape[-1:], weight, bias, 1e-5)


def build_attention(kind: str, eva: Eva, H: int, G: int, D: int) -> nn.Module:
    """The attention of a layer of this kind."""
    if kind == "full_attention":
        return FullAttention()
    if kind == "window_attention":
        return WindowAttention(eva)
    if kind == "eva_attention":
        return EvaAttention(eva, H, G, D)
    raise ValueError(f"attention_types has {kind!r}, which is none of full, eva, window_attention")
