"""SQuAD: questions about a paragraph, alone and among other paragraphs."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tools.evaluation.recall.files import find_file, item_suffix, read_records
from tools.evaluation.recall.request import Place, Request
from tools.evaluation.samples import Sample
from tools.scoring.rows import start_ids

if TYPE_CHECKING:
    from zoo import Tokenizer

FILE = "squad_v1_dev"
_NEW_TOKENS = 48  # as lm-evaluation-harness lets SQuAD of Based write
_TASK = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words."
)
_HOLE = "[[documents]]"  # where they stand in a chat, until both sides of it are tokens
_CHAT = f"{_TASK}\n\nThe following are given documents.\n\n{_HOLE}\n\n{_TASK}\n\nQuestion: "


@dataclass(frozen=True)
class _Question:
    item: str
    title: str
    paragraph: str
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """Tokens round the paragraphs: what stands before and behind them, and the first answer."""

    before: list[int]
    behind: list[int]
    answer: list[int]


def squad(request: Request) -> Iterator[Sample]:
    """Questions of SQuAD 1.1's dev set: "contains", as Based has it (arXiv 2402.18668).

    The cell "published" is the question's own paragraph and the question. The others hide that
    paragraph at a depth among paragraphs of other articles that hold none of the answers, exactly
    `context` tokens in all.

    A model with a chat template is asked in it, in the words in which RULER asks SQuAD among
    paragraphs (arXiv 2404.06654), without its "Answer:" and the numbers of documents; the name of
    the item says so. Any other model reads on behind "Question: ..." and a line "Answer:". Based
    rewrote the questions as sentences to complete; that file is not at hand everywhere, so
    numbers compare only with those of this protocol and of the same form.

    Raises:
        ValueError: the file is missing or broken, a context is too short, or the chat template
            refuses a question or drops its text.
    """
    questions = _read(request)
    drawn = random.Random(repr((request.seed, "squad"))).sample(
        questions, min(request.n, len(questions))
    )
    encode = request.tokenizer.encode
    for question in drawn:
        asked = _ask(request.tokenizer, question)
        own = encode(question.paragraph, add_bos=False)
        yield _sample(request, question, {"context": "published"}, asked, own)
    paragraphs = {q.paragraph: q.title for q in questions}
    encoded = request.tokenizer.encode_batch([f"{x}\n\n" for x in paragraphs], add_bos=False)
    tokens = dict(zip(paragraphs, encoded, strict=True))
    folded = {text: text.casefold() for text in paragraphs}
    others_of = {
        question: [
            tokens[text]
            for text, title in paragraphs.items()
            if title != question.title
            and not any(answer.casefold() in folded[text] for answer in question.answers)
        ]
        for question in drawn
    }
    for context in request.contexts:
        places = replace(request, n=len(drawn)).places("squad", context)
        for question, place in zip(drawn, places, strict=True):
            asked = _ask(request.tokenizer, question)
            own = tokens[question.paragraph]
            around = len(asked.before) + len(asked.behind) + len(asked.answer)
            room = context - len(own) - around
            if room < 0:
                raise ValueError(
                    f"a prompt of {context} tokens cannot hold paragraph and question, which "
                    f"have {context - room}; choose a greater context for squad"
                )
            others = others_of[question]
            before, after = _around(place, others, int(place.depth * room), room)
            cell = {"context": context, "depth": place.bin}
            yield _sample(request, question, cell, asked, [*before, *own, *after])


def _read(request: Request) -> list[_Question]:
    path = find_file(request.data, FILE, "squad")
    paragraphs = read_records(path, ("title", "context", "qas"), partial(_questions, path))
    return [question for paragraph in paragraphs for question in paragraph]


def _questions(path: Path, record: Mapping[str, object]) -> list[_Question]:
    questions = []
    suffix = item_suffix(path)
    for qa in cast("list[dict[str, object]]", record["qas"]):
        answers = dict.fromkeys(cast("list[str]", qa["answers"]))
        # Every text contains an empty answer.
        if not answers or not all(answer.strip() for answer in answers):
            raise ValueError(f"question {qa['id']!r} has no answer, or an empty one")
        texts = (str(record["title"]), str(record["context"]), str(qa["question"]).strip())
        questions.append(_Question(f"{qa['id']}{suffix}", *texts, tuple(answers)))
    return questions


def _ask(tokenizer: "Tokenizer", question: _Question) -> _Asked:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_bos=False)

    answer = question.answers[0]
    if tokenizer.chat_template is None:
        behind = encode(f"\n\nQuestion: {question.text}\nAnswer:")
        return _Asked(start_ids(tokenizer), behind, encode(f" {answer}"))
    message = {"role": "user", "content": f"{_CHAT}{question.text}"}
    # The template spells out its own bos.
    rendered = tokenizer.render_chat([message], add_generation_prompt=True)
    before, hole, after = rendered.partition(_HOLE)
    if not hole:
        raise ValueError("the chat template drops the text of a message; squad cannot ask in it")
    return _Asked(encode(before), encode(after), encode(answer))


def _around(
    place: Place, others: Sequence[list[int]], before: int, room: int
) -> tuple[list[int], list[int]]:
    """Other paragraphs: `before` tokens that end with one, and the rest, which begin with one."""
    order = place.source.sample(range(len(others)), len(others))
    stream: list[int] = []
    while len(stream) < before:
        stream = [*others[order.pop()], *stream]
    behind: list[int] = []
    while len(behind) < room - before:
        behind += others[order.pop()]
    return stream[len(stream) - before :], behind[: room - before]


def _sample(
    request: Request,
    question: _Question,
    cell: Mapping[str, object],
    asked: _Asked,
    paragraphs: Sequence[int],
) -> Sample:
    # Outcomes of the two forms must never pair, nor one be taken for the other in a file.
    form = "" if request.tokenizer.chat_template is None else "-chat"
    return Sample(
        task="squad",
        cell=cell,
        item=f"{question.item}{form}",
        prompt_ids=[*asked.before, *paragraphs, *asked.behind],
        answer_ids=asked.answer,
        answers=question.answers,
        max_new_tokens=_NEW_TOKENS,
        match="contains",
    )
