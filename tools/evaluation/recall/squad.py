"""SQuAD: questions about a paragraph, alone and among other paragraphs."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from tools.evaluation.recall.files import find_file, item_suffix, read_records
from tools.evaluation.recall.request import Place, Request
from tools.evaluation.samples import Sample
from tools.scoring.rows import start_ids

FILE = "squad_v1_dev"
_NEW_TOKENS = 48  # as lm-evaluation-harness lets SQuAD of Based write


@dataclass(frozen=True)
class _Question:
    item: str
    title: str
    paragraph: str
    text: str
    answers: tuple[str, ...]


def squad(request: Request) -> Iterator[Sample]:
    """Questions of SQuAD 1.1's dev set, as completion (Based, arXiv 2402.18668): "contains".

    The cell "published" is the question's own paragraph and the question. The others hide that
    paragraph at a depth among paragraphs of other articles that hold none of the answers, exactly
    `context` tokens in all. Based rewrote the questions as sentences to complete; that file is
    not at hand everywhere, so here a question is followed by "Answer:", and numbers compare only
    with those of this protocol.
    """
    questions = _read(request)
    drawn = random.Random(repr((request.seed, "squad"))).sample(
        questions, min(request.n, len(questions))
    )
    encode = request.tokenizer.encode
    start = start_ids(request.tokenizer)
    for question in drawn:
        ids = [*start, *encode(question.paragraph, add_bos=False), *_ask(request, question)[0]]
        yield _sample(request, question, {"context": "published"}, ids)
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
            asked, answer = _ask(request, question)
            own = tokens[question.paragraph]
            room = context - len(start) - len(own) - len(asked) - len(answer)
            if room < 0:
                raise ValueError(
                    f"a prompt of {context} tokens cannot hold paragraph and question, which "
                    f"have {context - room}; choose a greater context for squad"
                )
            others = others_of[question]
            before, after = _around(place, others, int(place.depth * room), room)
            ids = [*start, *before, *own, *after, *asked]
            yield _sample(request, question, {"context": context, "depth": place.bin}, ids)


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


def _ask(request: Request, question: _Question) -> tuple[list[int], list[int]]:
    """Tokens of the question and of the first answer."""
    encode = request.tokenizer.encode
    text = f"\n\nQuestion: {question.text}\nAnswer:"
    return (
        encode(text, add_bos=False),
        encode(f" {question.answers[0]}", add_bos=False),
    )


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
    request: Request, question: _Question, cell: dict[str, object], ids: list[int]
) -> Sample:
    return Sample(
        task="squad",
        cell=cell,
        item=question.item,
        prompt_ids=ids,
        answer_ids=_ask(request, question)[1],
        answers=question.answers,
        max_new_tokens=_NEW_TOKENS,
        match="contains",
    )
