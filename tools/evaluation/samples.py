"""Sample: one prompt of a task that is scored by what a model writes; `grade` scores it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Match = Literal["contains", "whole", "all", "exact"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt and what counts as right.

    Attributes:
        task: such as "passkey".
        cell: what is reported apart, such as {"context": 2048, "depth": 0.375}.
        item: unique within task and cell, and the same for every model.
        prompt_ids: the tokens that the model reads.
        answer_ids: the tokens of the expected answer, as the text goes on after the prompt.
        answers: texts that are right; with "all", every one of them is wanted.
        max_new_tokens: how many the model may write, the same for every sample of a task.
        match: how the text is checked, see `grade`.
    """

    task: str
    cell: Mapping[str, object]
    item: str
    prompt_ids: list[int]
    answer_ids: list[int]
    answers: tuple[str, ...]
    max_new_tokens: int
    match: Match


def grade(text: str, answers: Sequence[str], match: Match) -> float:
    """How right a written text is, from 0 to 1; upper and lower case are one.

    Args:
        text: what the model wrote.
        answers: that are right, or with "all" wanted.
        match: "contains": 1 if an answer is somewhere in the text (Based: SQuAD, FDA, SWDE).
            "whole": the same, but no letter or digit may touch the answer: "12345" does not hold
            "1234". "all": the part of the answers that are in the text as a whole (RULER's
            string_match_all, which does not ask for whole ones). "exact": 1 if the first line is
            an answer, but for blanks, quotes and a full stop round it.
    """
    text = text.casefold()
    wanted = [answer.casefold() for answer in answers]
    match match:
        case "contains":
            return float(any(answer in text for answer in wanted))
        case "whole":
            return float(any(_holds_whole(text, answer) for answer in wanted))
        case "all":
            return sum(_holds_whole(text, answer) for answer in wanted) / len(wanted)
        case "exact":
            first, *_ = [*text.strip().splitlines(), ""]
            return float(first.strip(" .\"'") in wanted)


def _holds_whole(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
