"""CausalLM: what all families share round their blocks. A family's file defines the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from layers import Context, ModelCache, RotaryAngles, rotary_angles
from zoo.arguments import int_at_least
from zoo.config import ModelConfig
from zoo.text.tokenizer import Tokenizer

Block = Callable[[Tensor, RotaryAngles, Context], Tensor]


class CausalLM(nn.Module):
    """Embedding, blocks, norm, head: a language model from ids to logits.

    A family's `__init__` sets `config` and the modules; its blocks take `(x, rope, context)` with
    x [B, T, E] and hold `attention.attend`, the attention of their layer.

    Attributes:
        config: sizes, layer types and EVA options.
        tokenizer: the model's own, or None; set by `zoo.load`.
        weights_source: where the weights came from, one phrase; set by `zoo.load`.
        hf_config: the config.json that the model was made from; set by `zoo.load`.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None = None
    weights_source: str = "none: not loaded"
    hf_config: Mapping[str, object] = {}
    # Ends of names in published checkpoints that hold no parameters: buffers of old versions.
    ignored_suffixes: ClassVar[tuple[str, ...]] = ()

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    lm_head: nn.Linear

    def hidden_states(
        self,
        ids: Tensor,
        cache: ModelCache | None = None,
        seq_start: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        blocks: Sequence[Block] | None = None,
    ) -> Tensor:
        """What `lm_head` takes: [B, T, E]. Arguments as `forward`.

        `blocks` are what runs in the place of the model's own, compiled ones for example.
        """
        context = Context.of(ids, cache, seq_start, lengths)
        x = self.embed(ids)
        ropes = self.rotary(context, x.dtype)
        run = cast("Sequence[Block]", self.layers) if blocks is None else blocks
        for layer, (block, rope) in enumerate(zip(run, ropes, strict=True)):
            x = block(x, rope, context.of_layer(layer))
        context.finish()
        return self.norm(x)

    def embed(self, ids: Tensor) -> Tensor:
        """What the first block takes: [B, T, E]."""
        return self.embed_tokens(ids)

    def rotary(self, context: Context, dtype: torch.dtype) -> list[RotaryAngles]:
        """The rotary angles that each block takes."""
        config = self.config
        angles = rotary_angles(config.rope, context.positions, config.head_dim, dtype)
        return [angles] * len(self.layers)

    def forward(
        self,
        ids: Tensor,
        cache: ModelCache | None = None,
        seq_start: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits of every token.

        Args:
            ids: int [B, T]; with a cache, the next T tokens of each row.
            cache: from `new_cache`; updated in place.
            seq_start: int [B, T], where each token's document begins in a packed row; documents
                start on a multiple of the chunk size.
            lengths: int [B], with a cache: how many of the T tokens of each row are real.

        Returns:
            [B, T, vocab_size] in the dtype of the weights.
        """
        return self.lm_head(self.hidden_states(ids, cache, seq_start, lengths))

    def new_cache(
        self,
        batch_size: int,
        max_seq_len: int,
        *,
        max_rollback: int = 0,
        cache_dtype: str | torch.dtype | None = None,
    ) -> ModelCache:
        """An empty cache for `batch_size` rows of up to `max_seq_len` tokens.

        `max_rollback` is how many tokens `ModelCache.rollback` can take back. `cache_dtype` is
        what keys, values and summaries are stored in: torch.float8_e4m3fn (or its name) for a
        cache of half the size, or None, the dtype of the weights. Caches are written in place
        and serve inference: use them under `torch.no_grad` or `torch.inference_mode`.

        Raises:
            ValueError: a number that is no int or below 1 (`max_rollback`: 0), or a `cache_dtype`
                that cannot be had.
        """
        weight = self.embed_tokens.weight
        return ModelCache.build(
            [block.attention.attend for block in self.layers],  # type: ignore[union-attr, misc]
            batch_size=int_at_least(1, "batch_size", batch_size),
            max_seq_len=int_at_least(1, "max_seq_len", max_seq_len),
            max_rollback=int_at_least(0, "max_rollback", max_rollback),
            dtype=weight.dtype,
            cache_dtype=cache_dtype,
            device=weight.device,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @staticmethod
    def hf_name(name: str) -> str:
        """The name in published checkpoints of our parameter `name`."""
        raise NotImplementedError
