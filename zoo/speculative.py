"""SpeculativeDecoder: a small model drafts tokens, the large one reads them all at once.

Lossless: what it writes has the distribution of the large model's own text (Leviathan et al.,
arXiv 2211.17192), and is that text if decoding is greedy, up to rounding: a piece of several
tokens may add up in another order than steps do. What is rejected is rolled back in both caches.

Dims: B rows, V vocabulary of the large model, K tokens drafted a round.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from layers import ModelCache
from zoo.causal_lm import CausalLM
from zoo.prefill import next_logits
from zoo.sampling import Sampling, draw, probabilities

NONE = -1  # in the place of a token that a row did not get in a round


class SpeculativeDecoder:
    """Decodes a batch whose prompts both caches hold; the interface is that of `Decoder`.

    Args:
        model, cache: the large model's; the cache can roll back `drafted` tokens, and has room for
            as many more than the text.
        draft, draft_cache: likewise of the small model, which shares the tokens' meanings.
        drafted: K.
        sampling: how tokens are chosen; the small model drafts in the same way.
        seen: bool [B, V], tokens of the prompts; changed in place.
    """

    def __init__(
        self,
        model: CausalLM,
        cache: ModelCache,
        draft: CausalLM,
        draft_cache: ModelCache,
        *,
        drafted: int,
        sampling: Sampling,
        seen: Tensor,
    ) -> None:
        self._model, self._cache = model, cache
        self._draft, self._draft_cache = draft, draft_cache
        self._drafted, self._sampling, self._seen = drafted, sampling, seen
        self._generator = sampling.generator(cache.length.device)
        self._going = torch.ones_like(cache.length)
        self._tokens = torch.zeros_like(cache.length)
        self._first: list[list[int]] | None = None
        self.rounds = 0  # of all rows together
        self.accepted = 0  # drafted tokens that were kept

    def start(self, logits: Tensor) -> None:
        """Chooses the first token of each row from the logits [B, V] behind its prompt."""
        self._tokens = draw(probabilities(logits, self._seen, self._sampling), self._generator)
        self._seen.scatter_(1, self._tokens[:, None], True)
        self._first = [self._tokens.tolist()]

    def take(self) -> list[list[int]]:
        """The tokens of the next round, [K + 1][B], NONE behind those that a row got.

        Those of a row that has ended mean nothing.
        """
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return self._round().tolist()

    def stop(self, row: int) -> None:
        """Ends a row."""
        self._going[row] = 0

    def _round(self) -> Tensor:
        K, going = self._drafted, self._going
        seen = [self._seen]
        tokens, offers = [self._tokens], []
        for _ in range(K):
            logits = self._drafted_logits(tokens[-1])
            offers.append(probabilities(logits, seen[-1], self._sampling))
            tokens.append(draw(offers[-1], self._generator))
            seen.append(seen[-1].scatter(1, tokens[-1][:, None], True))
        # The small model reads the last one too: it may be kept.
        self._drafted_logits(tokens[-1])
        piece = torch.stack(tokens, 1)
        logits = self._model(piece, self._cache, lengths=going * (K + 1))

        kept = torch.zeros_like(going)
        result = torch.full((K + 1, len(going)), NONE, device=piece.device)
        still = going > 0
        chance = torch.rand((K, len(going)), generator=self._generator, device=piece.device)
        for i in range(K + 1):
            wanted = probabilities(logits[:, i], seen[i], self._sampling)
            if i == K:
                result[i] = torch.where(still, draw(wanted, self._generator), result[i])
                break
            index = tokens[i + 1][:, None]
            offered, asked = (x.gather(1, index)[:, 0] for x in (offers[i], wanted))
            accept = still & (chance[i] * offered < asked)
            other = draw((wanted - offers[i]).clamp(min=0), self._generator)
            result[i] = torch.where(accept, tokens[i + 1], torch.where(still, other, result[i]))
            kept += accept
            still = accept
        undo = (K - kept) * going
        self._cache.rollback(undo)
        self._draft_cache.rollback(undo)
        last = result.gather(0, kept[None])[0]
        self._tokens = torch.where(going > 0, last, self._tokens)
        for chosen in result:
            new = torch.where(chosen == NONE, self._tokens, chosen)
            self._seen.scatter_(1, new[:, None], True)
        self.rounds += int(going.sum())
        self.accepted += int(kept.sum())
        return result

    def _drafted_logits(self, tokens: Tensor) -> Tensor:
        """The small model's [B, V] behind tokens [B].

        Families pad their vocabularies to different sizes: it may not know a token, or not all.
        """
        known = self._draft.config.vocab_size
        read = tokens.clamp(max=known - 1)[:, None]
        logits = next_logits(self._draft, read, self._draft_cache, self._going)
        return F.pad(logits, (0, self._seen.shape[1] - known), value=float("-inf"))
