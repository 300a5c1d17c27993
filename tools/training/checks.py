"""Checks: what is measured of a model while it trains, on text that it is not trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tools.scoring.passkey import measure_passkey
from tools.scoring.passkey_prompts import WORDINGS, PasskeyPrompts, Prompt
from tools.scoring.perplexity import cut_windows, measure_perplexity
from tools.text_files import read_text
from zoo import CausalLM, Tokenizer

_SEED = 0  # the same prompts at every check, and in every run


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is measured.

    Attributes:
        text: whose perplexity; None: no perplexity.
        windows: how many windows of it, from its beginning.
        context: tokens of a window and of a passkey prompt.
        hay: prose to hide numbers in; None: no passkey.
        prompts: how many, over all wordings.
        batch_size: rows at a time.
    """

    text: Path | None = None
    windows: int = 8
    context: int = 2048
    hay: Path | None = None
    prompts: int = 32
    batch_size: int = 4


class Checks:
    """A function of a model, for `trainer.Hooks`; texts are tokenised once.

    Raises:
        OSError: a text cannot be read.
        ValueError: it is too short, or a context longer than the model's.
    """

    def __init__(self, options: CheckOptions, tokenizer: Tokenizer, longest: int) -> None:
        if options.context > longest:
            raise ValueError(
                f"checks read {options.context} tokens, more than the model's context of {longest}"
            )
        self._batch_size = options.batch_size
        self._windows: Tensor | None = None
        if options.text is not None:
            ids = tokenizer.encode(read_text(options.text), add_bos=False)
            self._windows = cut_windows(ids, options.context, options.windows)
        self._prompts: list[list[Prompt]] = []
        if options.hay is not None:
            prompts = PasskeyPrompts(tokenizer, read_text(options.hay), options.context)
            share = max(options.prompts // len(WORDINGS), 1)
            self._prompts = [prompts.draw(w, share, _SEED) for w in WORDINGS.values()]

    def __call__(self, model: CausalLM) -> Mapping[str, float]:
        """`perplexity`, and `passkey`, the share of numbers found, over all wordings."""
        found: dict[str, float] = {}
        if self._windows is not None:
            result = measure_perplexity(model, self._windows, batch_size=self._batch_size)
            found["perplexity"] = result.all.value
        if self._prompts:
            results = [
                measure_passkey(model, prompts, batch_size=self._batch_size)
                for prompts in self._prompts
            ]
            found["passkey"] = torch.tensor([r.accuracy for r in results]).mean().item()
        return found
