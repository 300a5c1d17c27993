"""The definition: EVA attention with dense masks, in plain PyTorch; other paths answer to it.

The output of a query is one softmax over the exact keys that it sees, with logits `s * q . k_j`,
and the chunk summaries that it sees, with logits `s * q . k_rfa_c + b_h` (FlashEVA, section 3).

Dims: B batch, H query heads, G key/value heads, R = H / G, D head dim, T queries, N keys,
C chunk summaries. A leading dim of positions may be 1 instead of B.
"""

import torch
from torch import Tensor

from flasheva.config import EvaConfig
from flasheva.summary import summary_dtype
from flasheva.visibility import Positions, visible


def reference_attention(
    config: EvaConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_rfa: Tensor,
    v_rfa: Tensor,
    bias: Tensor | None,
    positions: Positions,
) -> Tensor:
    """Attends to exact keys and summaries.

    Args:
        config: the visibility rule's numbers.
        q: [B, H, T, D].
        k, v: [B, G, N, D].
        k_rfa, v_rfa: [B, G, C, D]; C may be 0.
        bias: [H], added to the logits of summaries, or None.
        positions: where queries and keys stand.

    Returns:
        [B, H, T, D] in the dtype of q, computed in float32 (float64 for float64 inputs).
    """
    dtype = summary_dtype(q.dtype)
    B, H, T, D = q.shape
    G, C = k.shape[1], k_rfa.shape[2]
    keys = torch.cat([k, k_rfa], dim=2).to(dtype)
    values = torch.cat([v, v_rfa], dim=2).to(dtype)
    # One product per group: [B, G, R * T, D] x [B, G, D, N + C], keys are not repeated.
    q_BGMD = q.to(dtype).reshape(B, G, -1, D) * D**-0.5
    logits = (q_BGMD @ keys.transpose(-1, -2)).view(B, H, T, -1)
    if bias is not None:
        per_key = torch.cat(
            [logits.new_zeros(H, k.shape[2]), bias.to(dtype).unsqueeze(-1).expand(H, C)], dim=-1
        )
        logits = logits + per_key.unsqueeze(1)
    mask = visible(config, positions, T, k.shape[2], C, q.device).unsqueeze(1)
    weights = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    out = weights.view(B, G, -1, weights.shape[-1]) @ values
    return out.view(B, H, T, D).to(q.dtype)
