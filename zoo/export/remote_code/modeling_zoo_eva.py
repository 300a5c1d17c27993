"""Llama, GPT-NeoX and Phi with EVA, window or full attention, layer by layer, for transformers.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Parameters have their published names; those of EVA are in `attend` beside the projections. The
attention is the readable definition (attention_zoo_eva.py). `generate` works with and without
`use_cache`; the cache is a DynamicCache that keeps the keys, values and (for EVA) queries of all
tokens, from which each step makes its summaries anew: right, but without EVA's small memory.
Batches may be padded on either side; padding in front needs an `attention_mask`.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_zoo_eva import Positions
from .blocks_zoo_eva import Call, GPTNeoXBlock, LlamaBlock, PhiBlock, rotary
from .configuration_zoo_eva import (
    ZooEvaConfig,
    ZooEvaGPTNeoXConfig,
    ZooEvaLlamaConfig,
    ZooEvaPhiConfig,
)

# Its name in outputs: transformers 5 renamed it on the way.
_CACHE = next(
    field.name
    for field in dataclasses.fields(CausalLMOutputWithPast)
    if field.name in ("cache", "past_key_values")
)


class Family(NamedTuple):
    """Names and modules in which families differ; `eps` is the field of the config."""

    block: type[nn.Module]
    norm: type[nn.Module]
    eps: str
    names: tuple[str, str, str, str]  # of the backbone, the embedding, the last norm, the head
    head_bias: bool = False


class ZooEvaForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # Any to mypy
    """Embedding, blocks, norm, head."""

    base_model_prefix = ""  # published names have one of the family's
    family: Family

    def __init__(self, config: ZooEvaConfig) -> None:
        super().__init__(config)
        block, norm, eps, names, head_bias = self.family
        V, E = config.vocab_size, config.hidden_size
        backbone = nn.ModuleDict(
            {
                names[1]: nn.Embedding(V, E),
                "layers": nn.ModuleList(block(config, i) for i in range(config.num_hidden_layers)),
                names[2]: norm(E, eps=getattr(config, eps)),
            }
        )
        self.add_module(names[0], backbone)
        self.add_module(names[3], nn.Linear(E, V, bias=head_bias))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, under whatever name."""
        return self.get_submodule(".".join(self.family.names[:2]))

    def get_output_embeddings(self) -> nn.Module:
        """The head, under whatever name."""
        return self.get_submodule(self.family.names[3])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        cache: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, vocabulary] of input_ids [B, T], or of the last `logits_to_keep` tokens.

        Positions follow from the `attention_mask` [B, N], ones with zeros before or behind them:
        other `position_ids` are refused. `past_key_values` and `cache` are the old and the new
        name of one thing; with `use_cache` there is a cache in the output.
        """
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        if not isinstance(cache, DynamicCache | None):
            raise ValueError(f"this model needs a DynamicCache, not a {type(cache).__name__}")
        at = positions(input_ids, attention_mask, position_ids, cache)
        backbone = self.get_submodule(self.family.names[0])
        embedding, blocks, norm = backbone.children()
        x = embedding(input_ids)
        call = Call(*rotary(self.config, at.query, x.dtype), at, cache)
        for block in blocks:
            x = block(x, call)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(norm(x[:, kept]))
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(*shifted, ignore_index=-100)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})
        return output.to_tuple() if return_dict is False else output


class ZooEvaLlamaForCausalLM(ZooEvaForCausalLM):
    """Llama."""

    config_class = ZooEvaLlamaConfig
    family = Family(
        LlamaBlock, nn.RMSNorm, "rms_norm_eps", ("model", "embed_tokens", "norm", "lm_head")
    )
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012


class ZooEvaGPTNeoXForCausalLM(ZooEvaForCausalLM):
    """GPT-NeoX."""

    config_class = ZooEvaGPTNeoXConfig
    family = Family(
        *(GPTNeoXBlock, nn.LayerNorm, "layer_norm_eps"),
        ("gpt_neox", "embed_in", "final_layer_norm", "embed_out"),
    )
    _tied_weights_keys = {"embed_out.weight": "gpt_neox.embed_in.weight"}  # noqa: RUF012


class ZooEvaPhiForCausalLM(ZooEvaForCausalLM):
    """Phi."""

    config_class = ZooEvaPhiConfig
    family = Family(
        *(PhiBlock, nn.LayerNorm, "layer_norm_eps"),
        ("model", "embed_tokens", "final_layernorm", "lm_head"),
        head_bias=True,
    )
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012


def positions(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: DynamicCache | None,
) -> Positions:
    """Where the tokens of a call and those of the cache stand.

    Raises:
        ValueError: a mask of another shape, or with zeros between ones; other `position_ids` than
            those that the mask leads to.
    """
    B, T = input_ids.shape
    N = T + (0 if cache is None else cache.get_seq_length())
    key = torch.arange(N, device=input_ids.device)[None]
    real = torch.ones_like(key, dtype=torch.bool)
    if attention_mask is not None:
        if attention_mask.shape != (B, N):
            raise ValueError(
                f"attention_mask must be [{B}, {N}], past tokens included, "
                f"not {list(attention_mask.shape)}"
            )
        real = attention_mask.to(key.device).bool()
        before = F.pad(real[:, :-1], (1, 0))
        if ((real & ~before).sum(1) > 1).any():
            raise ValueError("attention_mask has zeros between ones; pad in front or behind")
        key = key - real.int().argmax(1, keepdim=True)
    query = key[:, -T:]
    if position_ids is not None and ((position_ids != query) & real[:, -T:]).any():
        raise ValueError("position_ids must count from the first token that is not masked")
    return Positions(query.clamp(min=0), key)
