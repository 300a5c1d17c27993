"""zoo.generate and zoo.stream: text from a model, one prompt or a ragged batch of them.

Prompts are aligned left and read in pieces of bounded size; each row then grows by one token a
step until it ends, and a row gives the same text alone and in any batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, SupportsIndex

import torch

from flasheva.storage import storage_dtype
from layers import is_unhooked
from zoo.answers import answer_log_likelihoods, answer_room
from zoo.arguments import int_at_least, shown
from zoo.causal_lm import CausalLM
from zoo.compiled_blocks import compiled_blocks
from zoo.decoding import Decoder
from zoo.generation_rows import Row, aligned, make_rows, take_answers
from zoo.prefill import compiled_pieces, next_logits, piece_size, prefill
from zoo.prompts import plain, prompt_list
from zoo.sampling import Sampling
from zoo.speculative import NONE, SpeculativeDecoder

_STEPS_AT_ONCE = 8
_ROUND_CACHE = 512  # tokens
_DRAFT_TOKENS = 4
_PROBE = "It's 12:30, naïve, 世界!\n\n\tdef f(x):"  # tells tokenizers apart

Prompt = str | Iterable[SupportsIndex]  # text or token ids
Compile = bool | Literal["prefill"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One row's result.

    Attributes:
        prompt_ids: the tokens that the model read.
        ids: the tokens that it wrote, the ending one included.
        text: their text, without special tokens and up to the first stop string; "" for a model
            without a tokenizer.
        finish_reason: "stop" (an end token or a stop string) or "length".
        answer_log_likelihood: of the expected answer right behind the prompt, in nats; None where
            none was given.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    finish_reason: str
    answer_log_likelihood: float | None = None


def generate(
    model: CausalLM,
    prompts: Prompt | Iterable[Prompt],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    max_seq_len: int | None = None,
    compile: Compile = False,
    draft: CausalLM | None = None,
    draft_tokens: int | None = None,
    cache_dtype: str | torch.dtype | None = None,
    prefill_tokens: int | None = None,
    answers: Sequence[Sequence[int]] | None = None,
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
        compile: run through `torch.compile(fullgraph=True)`: "prefill", what reads prompts (one
            block of each kind: seconds), or True, also the steps as a whole (a minute or so for
            30 layers; worth it for long texts).
        draft: a smaller model with the same tokens, which drafts some for the model to check
            (speculative decoding). The text stays what it would be.
        draft_tokens: that `draft` writes at a time; None: 4.
        cache_dtype: what caches store keys, values and summaries in: torch.float8_e4m3fn, or its
            name, halves them (docs/decoding.md); None: the dtype of the weights.
        prefill_tokens: of all prompts together that are read at a time, but of each at least 64
            and at most 2,048, on a CPU 512; more take memory, and on a GPU less time. None: 8,192.
        answers: one list of token ids per prompt, whose log-likelihood behind the prompt is given
            as well, without reading the prompt again; they do not change the text.

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        ValueError: no prompt, an empty one, one that does not fit, something that is no token of
            the vocabulary, a number that is no int or out of range, text for a model without a
            tokenizer, answers of another number than prompts, another `compile`, or one for a
            model with hooks, a `draft` that does not fit the model, `draft_tokens` without one,
            a `cache_dtype` that cannot be had.
    """
    if prefill_tokens is not None:
        prefill_tokens = int_at_least(1, "prefill_tokens", prefill_tokens)
    rows = make_rows(model, prompt_list(prompts), stop, max_new_tokens, max_seq_len, follow=False)
    take_answers(model, rows, answers)
    _check_compile(model, compile)
    helper = _helper(model, rows, draft, draft_tokens, compile)
    _check_cache_dtype(model, draft, cache_dtype)
    sampling = sampling or Sampling()
    # Nobody watches: look at the tokens now and then, to see whether all rows have ended.
    settings = (compile, _STEPS_AT_ONCE, helper, cache_dtype, prefill_tokens)
    for _ in _run(model, rows, sampling, *settings):
        pass
    return [_result(row, model) for row in rows]


def stream(
    model: CausalLM,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    max_seq_len: int | None = None,
    compile: Compile = False,
    draft: CausalLM | None = None,
    draft_tokens: int | None = None,
    cache_dtype: str | torch.dtype | None = None,
) -> Iterator[str]:
    """Continues one prompt and yields its text in pieces as they come; see `generate`."""
    rows = make_rows(model, [plain(prompt)], stop, max_new_tokens, max_seq_len, follow=True)
    _check_compile(model, compile)
    helper = _helper(model, rows, draft, draft_tokens, compile)
    _check_cache_dtype(model, draft, cache_dtype)
    return _run(model, rows, sampling or Sampling(), compile, 1, helper, cache_dtype, None)


def _check_compile(model: CausalLM, compile: object) -> None:
    if not isinstance(compile, bool) and compile != "prefill":
        raise ValueError(f"compile must be False, True or 'prefill', not {shown(compile)}")
    if not compile:
        return
    # torch.compile does not look for them: blocks of a kind, of other models too, run what was
    # compiled first.
    for name, module in model.named_modules():
        if name and not is_unhooked(module):
            raise ValueError(f"compile does not go with hooks, which {name} has; leave it out")


class _Helper(NamedTuple):
    """A model that drafts, and how many tokens at a time."""

    model: CausalLM
    tokens: int


def _helper(
    model: CausalLM,
    rows: list[Row],
    draft: CausalLM | None,
    tokens: int | None,
    compile: Compile,
) -> _Helper | None:
    if draft is None:
        if tokens is not None:
            raise ValueError(
                f"draft_tokens {shown(tokens)} needs a draft model; give draft as well"
            )
        return None
    tokens = _DRAFT_TOKENS if tokens is None else int_at_least(1, "draft_tokens", tokens)
    if compile:
        raise ValueError("compile does not go with a draft model; leave one of them out")
    longest = max(len(row.prompt_ids) + row.room for row in rows)
    if draft.config.max_position_embeddings < longest:
        raise ValueError(
            f"the draft model's context of {draft.config.max_position_embeddings} is too short "
            f"for {longest} tokens"
        )
    if draft.device != model.device:
        raise ValueError(f"the draft model is on {draft.device}, the model on {model.device}")
    if draft.config.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the draft model has {draft.config.vocab_size} tokens, more than the model's "
            f"{model.config.vocab_size}"
        )
    known = [None if x.tokenizer is None else x.tokenizer.encode(_PROBE) for x in (model, draft)]
    if known[0] != known[1]:
        raise ValueError("the draft model has another tokenizer than the model")
    return _Helper(draft, tokens)


def _check_cache_dtype(
    model: CausalLM, draft: CausalLM | None, cache_dtype: str | torch.dtype | None
) -> None:
    """As the caches themselves would, which are made once prompts are read."""
    for each in (model,) if draft is None else (model, draft):
        storage_dtype(cache_dtype, each.embed_tokens.weight.dtype, each.device)


@torch.inference_mode()
def _run(
    model: CausalLM,
    rows: list[Row],
    sampling: Sampling,
    compile: Compile,
    steps_at_once: int,
    helper: _Helper | None,
    cache_dtype: str | torch.dtype | None,
    prefill_tokens: int | None,
) -> Iterator[str]:
    """Fills `rows`; yields the text of the first one as it comes."""
    device = model.device
    ids, lengths = (tensor.to(device) for tensor in aligned(rows))
    seen = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool, device=device)
    real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    seen.scatter_(1, torch.where(real, ids, ids[:, :1]), True)
    read = compiled_pieces(model) if compile else next_logits
    # Compiled graphs are shared by caches of a size, which holds a padded piece.
    step_size = piece_size(len(rows), device, prefill_tokens)
    unit = max(_ROUND_CACHE, step_size) if compile else _ROUND_CACHE
    drafted = 0 if helper is None else helper.tokens
    back = max(drafted, answer_room([row.answer for row in rows]))
    size = max(len(row.prompt_ids) + max(row.room + drafted, len(row.answer)) for row in rows)
    size = -(-size // unit) * unit
    cache = model.new_cache(len(rows), size, max_rollback=back, cache_dtype=cache_dtype)
    logits = prefill(model, ids, lengths, cache, read, pad=bool(compile), tokens=prefill_tokens)
    if rows[0].answer:
        blocks = compiled_blocks(model) if compile else None
        expected = [row.answer for row in rows]
        found = answer_log_likelihoods(model, cache, logits, expected, blocks)
        for row, value in zip(rows, found, strict=True):
            row.answer_log_likelihood = value
    decoder: Decoder | SpeculativeDecoder
    if helper is None:
        decoder = Decoder(
            model,
            cache,
            compile=compile is True,
            sampling=sampling,
            seen=seen,
            room=[row.room for row in rows],
            eos_ids=rows[0].eos_ids,
            steps_at_once=steps_at_once,
        )
    else:
        draft_cache = helper.model.new_cache(
            len(rows), size, max_rollback=drafted, cache_dtype=cache_dtype
        )
        known = ids.clamp(max=helper.model.config.vocab_size - 1)
        prefill(helper.model, known, lengths, draft_cache, tokens=prefill_tokens)
        models = (model, cache, helper.model, draft_cache)
        decoder = SpeculativeDecoder(*models, drafted=drafted, sampling=sampling, seen=seen)
    decoder.start(logits)
    while any(row.finish_reason is None for row in rows):
        for tokens in decoder.take():
            for number, (row, token) in enumerate(zip(rows, tokens, strict=True)):
                if row.finish_reason is not None or token == NONE:
                    continue
                piece = row.take(token)
                if row.finish_reason is not None:
                    decoder.stop(number)
                if number == 0 and piece:
                    yield piece


def _result(row: Row, model: CausalLM) -> Generation:
    assert row.finish_reason is not None
    return Generation(
        prompt_ids=row.prompt_ids,
        ids=row.ids,
        text=row.whole_text(model.tokenizer),
        finish_reason=row.finish_reason,
        answer_log_likelihood=row.answer_log_likelihood,
    )
