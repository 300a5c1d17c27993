"""zoo.generate and zoo.stream: text from a model, one prompt or a ragged batch of them.

Prompts are aligned left and read in pieces of bounded size; each row then grows by one token a
step until it ends, and a row gives the same text alone and in any batch.
"""

import operator
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import FunctionType
from typing import SupportsIndex
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from layers import ModelCache
from zoo.causal_lm import CausalLM
from zoo.sampling import Sampling, next_tokens
from zoo.text.stopping import TextUntilStop

_PREFILL_PIECE = 512  # tokens a row and piece: bounds the memory of a long prompt
_ROUND_CACHE = 512  # compiled graphs are shared by caches of a size; holds a padded piece

Prompt = str | Iterable[SupportsIndex]  # text or token ids


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One row's result.

    Attributes:
        prompt_ids: the tokens that the model read.
        ids: the tokens that it wrote, the ending one included.
        text: their text, without special tokens and up to the first stop string; "" for a model
            without a tokenizer.
        finish_reason: "stop" (an end token or a stop string) or "length".
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str


def generate(
    model: CausalLM,
    prompts: Prompt | Iterable[Prompt],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    max_seq_len: int | None = None,
    compile: bool = False,
) -> list[Generation]:
    """Continues one prompt, or each of a list of prompts in one batch.

    Args:
        model: from `zoo.load`.
        prompts: a text, a list of token ids, or a list of these; arrays and iterators count as
            lists.
        max_new_tokens: at most so many per row; fewer where a row would outgrow `max_seq_len`.
        sampling: None: greedy.
        stop: strings that end a row; the text ends before them.
        max_seq_len: of prompt and text together; None, and at most: the model's context.
        compile: run through `torch.compile(fullgraph=True)`; worth it for long texts.

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        ValueError: no prompt, an empty one, one that does not fit, something that is no token of
            the vocabulary, or text for a model without a tokenizer.
    """
    rows = _rows(model, _one_or_more(prompts), stop, max_new_tokens, max_seq_len)
    for _ in _run(model, rows, sampling or Sampling(), compile):
        pass
    return [row.result() for row in rows]


def stream(
    model: CausalLM,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    max_seq_len: int | None = None,
    compile: bool = False,
) -> Iterator[str]:
    """Continues one prompt and yields its text in pieces as they come; see `generate`."""
    rows = _rows(model, [_plain(prompt)], stop, max_new_tokens, max_seq_len)
    return _run(model, rows, sampling or Sampling(), compile)


@dataclass
class _Row:
    prompt_ids: list[int]
    room: int  # for new tokens
    text: TextUntilStop | None
    eos_ids: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def take(self, token: int) -> str:
        """Adds a token; the text that is certain now."""
        self.ids.append(token)
        piece = self.text.step(token) if self.text is not None else ""
        if token in self.eos_ids or (self.text is not None and self.text.stopped):
            self.finish_reason = "stop"
        elif len(self.ids) == self.room:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.text is not None:
            piece += self.text.flush()
        return piece

    def result(self) -> Generation:
        assert self.finish_reason is not None
        text = self.text.text if self.text is not None else ""
        return Generation(
            prompt_ids=self.prompt_ids, ids=self.ids, text=text, finish_reason=self.finish_reason
        )


def _one_or_more(prompts: object) -> list[object]:
    """The prompts, of which a text or a list of single tokens is one."""
    listed = _plain(prompts)
    if isinstance(listed, str):
        return [listed]
    if not isinstance(listed, list):
        raise ValueError(
            "prompts must be a text, a list of token ids or a list of these, not "
            f"{_shown(prompts)}"
        )
    listed = [_plain(item) for item in listed]
    single = listed and not any(isinstance(item, str | list) for item in listed)
    return [listed] if single else listed


def _plain(value: object) -> object:
    """Arrays, ranges, iterators and such as lists; anything else as it is."""
    if isinstance(value, Tensor) or hasattr(value, "tolist"):  # also NumPy's, without importing it
        return value.tolist()
    if isinstance(value, str | bytes | Mapping | Set) or not isinstance(value, Iterable):
        return value
    return list(value)


def _shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())  # an array's has several lines


def _token(value: object, where: str, vocab_size: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        token = operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # floating-point and boolean arrays have an __index__ that raises it
        raise ValueError(
            f"prompt{where} has {_shown(value)} where a token id, an integer, should be"
        ) from None
    if not 0 <= token < vocab_size:
        raise ValueError(
            f"prompt{where} has token {token}, outside the vocabulary of {vocab_size}"
        )
    return token


def _rows(
    model: CausalLM,
    prompts: list[object],
    stop: Sequence[str],
    max_new_tokens: int,
    max_seq_len: int | None,
) -> list[_Row]:
    longest = model.config.max_position_embeddings
    context = longest if max_seq_len is None else max_seq_len
    if context > longest:
        raise ValueError(f"max_seq_len {context} is above the model's context of {longest}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not prompts:
        raise ValueError("there is no prompt; give at least one")
    tokenizer = model.tokenizer
    stop = [stop] if isinstance(stop, str) else stop
    if "" in stop:
        raise ValueError("a stop string must not be empty")
    if stop and tokenizer is None:
        raise ValueError("stop strings need a tokenizer, which this model does not have")
    rows = []
    for number, prompt in enumerate(prompts):
        where = "" if len(prompts) == 1 else f" {number}"
        if isinstance(prompt, list):
            ids = [_token(token, where, model.config.vocab_size) for token in prompt]
        elif not isinstance(prompt, str):
            raise ValueError(
                f"prompt{where} must be a text or a list of token ids, not {_shown(prompt)}"
            )
        elif tokenizer is None:
            raise ValueError("this model has no tokenizer; give prompts as lists of token ids")
        else:
            ids = [_token(i, where, model.config.vocab_size) for i in tokenizer.encode(prompt)]
        if not ids:
            raise ValueError(f"prompt{where} is empty; give at least one token")
        if len(ids) >= context:
            raise ValueError(
                f"prompt{where} has {len(ids)} tokens and leaves no room in a context of "
                f"{context}; shorten it"
            )
        room = min(max_new_tokens, context - len(ids))
        text = None if tokenizer is None else TextUntilStop(tokenizer.stream(), stop)
        rows.append(_Row(ids, room, text, () if tokenizer is None else tokenizer.eos_ids))
    return rows


@torch.inference_mode()
def _run(
    model: CausalLM,
    rows: list[_Row],
    sampling: Sampling,
    compile: bool,
) -> Iterator[str]:
    """Fills `rows`; yields the text of the first one as it comes."""
    size = max(len(row.prompt_ids) + row.room for row in rows)
    step = _compiled(model) if compile else _next_logits
    device = model.device
    cache = model.new_cache(len(rows), -(-size // _ROUND_CACHE) * _ROUND_CACHE)
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
    for number, row in enumerate(rows):
        seen[number, row.prompt_ids] = True
    generator = sampling.generator(device)
    logits = _prefill(model, [row.prompt_ids for row in rows], cache, step, pad=compile)
    while True:
        tokens = next_tokens(logits, seen, sampling, generator)
        for number, token in enumerate(tokens.tolist()):
            row = rows[number]
            if row.finish_reason is None:
                piece = row.take(token)
                if number == 0 and piece:
                    yield piece
        going = [row.finish_reason is None for row in rows]
        if not any(going):
            return
        seen.scatter_(1, tokens[:, None], True)
        # A row that has ended takes no more tokens, so it cannot outgrow its cache.
        lengths = torch.tensor(going, device=device).long()
        logits = step(model, tokens[:, None], cache, lengths)


def _prefill(
    model: CausalLM,
    prompts: list[list[int]],
    cache: ModelCache,
    step: Callable[[CausalLM, Tensor, ModelCache, Tensor], Tensor],
    *,
    pad: bool,
) -> Tensor:
    """Reads all prompts, a piece of every row at a time; logits [B, V] behind each last token."""
    lengths = torch.tensor([len(ids) for ids in prompts])
    longest = int(lengths.max())
    width = -(-longest // _PREFILL_PIECE) * _PREFILL_PIECE if pad else longest
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for number, prompt in enumerate(prompts):
        ids[number, : len(prompt)] = torch.tensor(prompt)
    ids, lengths = ids.to(model.device), lengths.to(model.device)
    logits: Tensor | None = None
    for start in range(0, width, _PREFILL_PIECE):
        piece = ids[:, start : start + _PREFILL_PIECE]
        count = (lengths - start).clamp(0, piece.shape[1])
        new = step(model, piece, cache, count)
        # A row's logits are those of the piece that holds its last token.
        logits = new if logits is None else torch.where((count > 0)[:, None], new, logits)
    assert logits is not None
    return logits


def _next_logits(model: CausalLM, ids: Tensor, cache: ModelCache, lengths: Tensor) -> Tensor:
    """Reads `lengths` [B] of the tokens [B, T]; logits [B, V] behind the last one of each row."""
    hidden = model.hidden_states(ids, cache, lengths=lengths)
    last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[2])
    return model.lm_head(hidden.gather(1, last).squeeze(1))


_Step = Callable[[CausalLM, Tensor, ModelCache, Tensor], Tensor]
_steps: WeakKeyDictionary[CausalLM, _Step] = WeakKeyDictionary()


def _compiled(model: CausalLM) -> _Step:
    """One handle per model.

    torch.compile refuses after 8 graphs of one code object, and a model needs up to 7: a piece or
    a step, one row or several, caches of the first size or of any.
    """
    if model not in _steps:
        own = FunctionType(_next_logits.__code__.replace(), _next_logits.__globals__)
        _steps[model] = torch.compile(own, fullgraph=True)
    return _steps[model]
