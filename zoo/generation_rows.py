"""Row: one prompt of a batch, and what the model has written behind it so far.

`make_rows` makes the rows from what the caller gives, `take_answers` adds the answers that they
are scored for, and `aligned` makes one tensor of their prompts. generation.py fills them.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zoo.arguments import int_at_least, shown
from zoo.causal_lm import CausalLM
from zoo.prompts import check_tokens
from zoo.text.stopping import TextUntilStop
from zoo.text.tokenizer import Tokenizer


@dataclass
class Row:
    """A text that grows token by token until it ends.

    Attributes:
        prompt_ids: tokens that the model reads.
        room: for so many new tokens.
        text: follows the new tokens' text; None where it is decoded at the end only.
        eos_ids: tokens that end the row.
        ids: new tokens so far, the ending one included.
        finish_reason: "stop" or "length"; None while the row goes on.
        answer: expected tokens behind the prompt, perhaps none.
        answer_log_likelihood: of the answer, in nats, once it is known.
    """

    prompt_ids: list[int]
    room: int
    text: TextUntilStop | None
    eos_ids: tuple[int, ...]
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    answer: list[int] = field(default_factory=list)
    answer_log_likelihood: float | None = None

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

    def whole_text(self, tokenizer: Tokenizer | None) -> str:
        """The text of a row that has ended; "" without a tokenizer."""
        if self.text is not None:
            return self.text.text
        return "" if tokenizer is None else tokenizer.decode(self.ids)


def make_rows(
    model: CausalLM,
    prompts: list[object],
    stop: Sequence[str],
    max_new_tokens: int,
    max_seq_len: int | None,
    *,
    follow: bool,
) -> list[Row]:
    """One row per prompt; with `follow` or stop strings its text is decoded as it grows.

    Raises:
        ValueError: no prompt, one that is wrong, empty or too long, or another argument of
            `zoo.generate` out of range.
    """
    longest = model.config.max_position_embeddings
    context = longest if max_seq_len is None else int_at_least(1, "max_seq_len", max_seq_len)
    if context > longest:
        raise ValueError(f"max_seq_len {context} is above the model's context of {longest}")
    max_new_tokens = int_at_least(1, "max_new_tokens", max_new_tokens)
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
        ids = _tokens(model, prompt, "" if len(prompts) == 1 else f" {number}", context)
        room = min(max_new_tokens, context - len(ids))
        text = None
        if tokenizer is not None and (follow or stop):
            text = TextUntilStop(tokenizer.stream(), stop)
        rows.append(Row(ids, room, text, () if tokenizer is None else tokenizer.eos_ids))
    return rows


def _tokens(model: CausalLM, prompt: object, where: str, context: int) -> list[int]:
    """The token ids of one prompt, 1 to `context` - 1 of them; `where` is for errors."""
    if isinstance(prompt, list):
        ids = check_tokens(prompt, where, model.config.vocab_size)
    elif not isinstance(prompt, str):
        raise ValueError(
            f"prompt{where} must be a text or a list of token ids, not {shown(prompt)}"
        )
    elif model.tokenizer is None:
        raise ValueError("this model has no tokenizer; give prompts as lists of token ids")
    else:
        ids = check_tokens([*model.tokenizer.encode(prompt)], where, model.config.vocab_size)
    if not ids:
        raise ValueError(f"prompt{where} is empty; give at least one token")
    if len(ids) >= context:
        raise ValueError(
            f"prompt{where} has {len(ids)} tokens and leaves no room in a context of "
            f"{context}; shorten it"
        )
    return ids


def take_answers(
    model: CausalLM, rows: list[Row], answers: Sequence[Sequence[int]] | None
) -> None:
    """Gives each row its expected answer, if there are any.

    Raises:
        ValueError: answers of another number than rows, or one that is wrong, empty or too long.
    """
    if answers is None:
        return
    if len(answers) != len(rows):
        raise ValueError(
            f"there are {len(answers)} answers for {len(rows)} prompts; give one for each"
        )
    context = model.config.max_position_embeddings
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        row.answer = check_tokens([*answer], f" {number}'s answer", model.config.vocab_size)
        if not row.answer:
            raise ValueError(f"the answer of prompt {number} is empty; give at least one token")
        if len(row.prompt_ids) + len(row.answer) > context:
            raise ValueError(
                f"prompt {number} and its answer have {len(row.prompt_ids) + len(row.answer)} "
                f"tokens, more than the model's context of {context}"
            )


def aligned(rows: list[Row]) -> tuple[Tensor, Tensor]:
    """The prompts from the left, int64 [B, T] with zeros behind them, and their lengths [B]."""
    lengths = torch.tensor([len(row.prompt_ids) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for number, row in enumerate(rows):
        # A list of a few hundred thousand numbers takes torch.tensor ten times as long.
        known = torch.frombuffer(array("q", row.prompt_ids), dtype=torch.int64)
        ids[number, : len(known)] = known
    return ids, lengths
