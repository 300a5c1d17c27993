"""Recall documents: facts in stories, asked for far behind; a row holds exactly one."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.command_line import assert_mistake, run
from tests.tiny import make_tokenizer
from tools.corpus import words
from tools.corpus.prompts import Draw, draw_prompt
from tools.corpus.recall.documents import RecallWriter
from tools.corpus.recall.facts import (
    KINDS,
    MORE_KINDS,
    NOTES,
    PEOPLE,
    Fact,
    draw_facts,
    invent_names,
)
from tools.corpus.recall.judging_phrases import TEST, TEST_FRAMES
from tools.corpus.recall.training_phrases import FRAMES, LEADS, STATEMENTS, TAILS, TRAIN
from tools.corpus.recall.wordings import Choices, word
from tools.training.data.packing import Layout

TOKENIZER = make_tokenizer()
SIZE, CHUNK = 1536, 8  # of a tokenizer whose tokens are hardly more than letters


def stories(number: int = 60) -> list[str]:
    """Texts of simple sentences, and some short ones of all lengths."""
    texts = []
    for index in range(number):
        requests = [draw_prompt(9, 7 * index + i).request for i in range(6)]
        texts.append(
            f"{' '.join(requests[:3])}\n\n{' '.join(requests[3:])} {'So ' * index}it was."
        )
    return texts


@pytest.fixture(scope="module")
def writer() -> RecallWriter:
    return RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=CHUNK)


def tokens(text: str) -> int:
    return len(TOKENIZER.encode(text))


# Facts and wordings


def test_facts_of_a_document_do_not_contradict_each_other() -> None:
    for index in range(200):
        facts = draw_facts(Draw(index), 9)
        assert len({(fact.kind, fact.who, fact.what) for fact in facts}) == 9
        assert len({(fact.kind, fact.value) for fact in facts}) == 9
        assert len({fact.kind for fact in facts}) <= 3  # so the kind alone is no answer
        assert all(fact.kind in KINDS and fact.who in PEOPLE for fact in facts)


def test_many_facts_have_as_many_kinds_as_they_need() -> None:
    for index in range(100):
        for count in (24, 96):
            facts = draw_facts(Draw(index), count, kinds={**KINDS, **MORE_KINDS})
            assert len({(fact.kind, fact.value) for fact in facts}) == count
        for name, kind in NOTES.items():
            notes = draw_facts(Draw(index), 28, kinds={name: kind})
            assert len({note.who for note in notes}) == 28  # a note has nothing else to tell it by


def test_invented_names_are_nobody_elses() -> None:
    names = invent_names(Draw(0), 500)
    assert len(set(names)) == 500
    assert not {*names} & {*PEOPLE, *words.NAMES}
    values = {value for kind in KINDS.values() for value in kind.values or ()}
    assert not {*names} & values
    assert len({name for seed in range(20) for name in invent_names(Draw(seed), 20)}) > 300


def test_nobody_is_in_a_story_and_in_a_fact() -> None:
    assert not set(PEOPLE) & set(words.NAMES)


def test_every_kind_has_values_that_no_guess_finds() -> None:
    for name, kind in KINDS.items():
        assert kind.values is None or len(set(kind.values)) == len(kind.values) >= 12, name
        # Whole words: where a value ends in a sentence is found by them.
        assert all(re.fullmatch(r"\w+( \w+)*", value) for value in kind.values or ())


def test_wordings_for_training_and_for_tests_are_many_and_different() -> None:
    assert set(TEST) == set(KINDS)
    assert set(TRAIN) == {*KINDS, *MORE_KINDS, *NOTES}
    told = {text for wording in TRAIN.values() for text in wording.tell}
    asked = {part for wording in TRAIN.values() for ask in wording.ask for part in ask.split("|")}
    for kind in KINDS:
        train, test = TRAIN[kind], TEST[kind]
        assert len(set(train.tell)) * len(set(train.ask)) >= 50
        assert not told & set(test.tell)
        assert not asked & {ask.split("|")[0] for ask in test.ask}
    assert len({*FRAMES, *STATEMENTS}) >= 10
    assert TEST_FRAMES[0] in FRAMES  # of which one is as in training
    assert TEST_FRAMES[1] not in FRAMES


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_wording_tells_the_fact_and_asks_without_the_answer(split: str) -> None:
    kinds = {**KINDS, **MORE_KINDS, **NOTES} if split == "train" else KINDS
    for name, kind in kinds.items():
        for who, what in itertools.product(PEOPLE[:2], kind.whats[:2]):
            fact = Fact(name, who, what, "zebra")
            for number in range(12):
                for frame in range(12):
                    choices = Choices(number, number, frame, lead=frame, tail=number)
                    worded = word(fact, split, choices)  # type: ignore[arg-type]
                    assert worded.told[: worded.value_ends].endswith("zebra")
                    assert who in worded.told[: worded.value_ends]  # so the value can be bound
                    assert who in worded.question
                    assert what in worded.told
                    assert what in worded.question
                    assert "zebra" not in worded.question
                    assert "{" not in worded.told + worded.question
                    assert worded.told.endswith(".")
                    assert worded.answered == f"{worded.question} zebra."


def test_training_has_leads_and_tails_and_tests_have_none() -> None:
    fact = Fact("number", "Clara", "", "123")
    told = {
        word(fact, "train", Choices(0, 0, 0, lead=i, tail=j)).told
        for i in range(len(LEADS))
        for j in range(len(TAILS))
    }
    assert len(told) == len({*LEADS}) * len({*TAILS}) > 20
    assert "Clara's secret number is 123." in told
    plain = word(fact, "test", Choices(0, 0, 0)).told
    assert word(fact, "test", Choices(0, 0, 0, lead=4, tail=4)).told == plain


# Documents


def test_a_document_is_as_long_as_a_row_to_the_chunk(writer: RecallWriter) -> None:
    for index in range(8):
        document = writer.document(index)
        assert document.tokens == tokens(document.text) + 1  # the end
        assert SIZE - CHUNK < document.tokens <= SIZE


def test_every_answer_was_said_before_and_as_far_away_as_is_told(writer: RecallWriter) -> None:
    for index in range(8):
        document = writer.document(index)
        expected = []
        for fact in set(document.asked):
            first, *more = said(fact, document.text)
            for before, here in itertools.pairwise((first, *more)):
                due = here - len(f" {fact.value}")
                apart = tokens(document.text[:due]) - tokens(document.text[:before])
                assert apart > 0
                expected.append((due, fact, apart))
        expected.sort(key=lambda found: found[0])  # the order of the questions
        assert tuple(fact for _, fact, _ in expected) == document.asked
        assert tuple(apart for *_, apart in expected) == document.distances


def said(fact: Fact, text: str) -> list[int]:
    """Where the value of the fact ends each time that the text tells it or answers with it."""
    forms = set()
    for number, frame in itertools.product(range(20), range(20)):
        worded = word(fact, "train", Choices(number, number, frame))
        forms |= {worded.told[: worded.value_ends], f"{worded.question} {fact.value}"}
    found = (re.finditer(rf"(?<!\w){re.escape(form)}(?!\w)", text) for form in forms)
    return sorted({match.end() for matches in found for match in matches})


def test_most_facts_are_asked_for_several_times(writer: RecallWriter) -> None:
    documents = [writer.document(index) for index in range(30)]
    answers = sum(len(document.asked) for document in documents)
    assert answers > 1.5 * sum(len(set(document.asked)) for document in documents)


def test_distances_reach_from_the_window_to_half_of_a_document(
    writer: RecallWriter,
) -> None:
    found = np.array([d for index in range(60) for d in writer.document(index).distances])
    assert max(found) > SIZE / 2
    # Behind a window of 64 that moves in steps of 8; of this tokenizer a sentence has as many.
    assert np.mean(found > 72) > 0.3
    assert np.mean(found < 72) > 0.1


def test_a_document_is_a_function_of_seed_and_index(writer: RecallWriter) -> None:
    same = RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=CHUNK)
    assert same.document(3) == writer.document(3)
    other = RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=CHUNK, seed=1)
    assert other.document(3) != writer.document(3) != writer.document(4)
    held_out = RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=CHUNK, split="test")
    document = held_out.document(3)
    for fact in document.asked:
        assert word(fact, "test", Choices(0, 0, 0)).told in document.text


def test_no_way_to_tell_in_tests_is_one_of_training() -> None:
    for kind, wording in TEST.items():
        values = KINDS[kind].values or ("471",)
        for tell, what in itertools.product(wording.tell, KINDS[kind].whats):
            told = tell.format(who="Kevin", what=what, value=values[0])
            assert not any(re.fullmatch(pattern(x, kind), told) for x in TRAIN[kind].tell)
    kite = "Kevin painted the kite green."
    assert re.fullmatch(pattern("{who} painted the {what} {value}.", "color"), kite)


def pattern(told: str, kind: str) -> str:
    """What finds a way to tell a fact, whosever it is."""
    parts = {"who": "|".join(PEOPLE), "what": "|".join(KINDS[kind].whats)}
    parts["value"] = "|".join(KINDS[kind].values or (r"\d{3}",))
    escaped = re.escape(told).replace(r"\{", "{").replace(r"\}", "}")
    return escaped.format(**{name: f"(?:{part})" for name, part in parts.items()})


def test_a_packed_row_holds_one_document_with_all_its_answers(writer: RecallWriter) -> None:
    lengths = np.array([writer.document(index).tokens for index in range(6)])
    layout = Layout(lengths, row_size=SIZE, chunk_size=CHUNK)
    assert layout.rows == 6
    for row in range(6):
        (piece,) = layout.pieces(row)
        assert (piece.at, piece.document, piece.start) == (0, row, 0)
        assert piece.stop == lengths[row]


def test_too_little_text_and_impossible_sizes_are_mistakes() -> None:
    with pytest.raises(ValueError, match="fewer tokens than one document of 1536"):
        RecallWriter(["A short text. And more."], TOKENIZER, size=SIZE)
    with pytest.raises(ValueError, match="no sentence in the stories"):
        RecallWriter([" "], TOKENIZER, size=SIZE)
    with pytest.raises(ValueError, match="at least 256 tokens, not 100"):
        RecallWriter(stories(), TOKENIZER, size=100)
    with pytest.raises(ValueError, match="chunk_size must be 1 to 1535, not 1536"):
        RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=SIZE)
    alike = RecallWriter(
        [f"{'x' * 99}{chr(97 + i)}{chr(97 + j)}." for i in range(9) for j in range(9)],
        TOKENIZER,
        size=SIZE,
    )
    with pytest.raises(ValueError, match="give more stories, or a greater chunk_size"):
        alike.document(0)


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus and a tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    lines = [json.dumps({"text": story}) for story in stories()]
    (folder / "stories.jsonl").write_text("\n".join(lines))
    TOKENIZER.save(folder / "tokenizer")
    return folder


def plant(files: Path, out: Path, *more: object) -> dict[str, object]:
    options = ("--tokenizer", files / "tokenizer", "--out", out, "--size", SIZE, *more)
    done = run("plant-recall", files / "stories.jsonl", *options, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_the_command_writes_documents_and_says_how_far_answers_are(
    files: Path, tmp_path: Path
) -> None:
    out = tmp_path / "recall.jsonl"
    found = plant(files, out, "--documents", 5)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert found["documents"] == len(rows) == 5
    assert len({row["id"] for row in rows}) == 5
    assert found["tokens"] == sum(tokens(row["text"]) + 1 for row in rows)
    distances = [x["distance"] for row in rows for x in row["asked"]]
    assert found["answers"] == len(distances)
    assert isinstance(found["distances"], list)
    for part in found["distances"]:
        inside = [part["least"] <= distance < part["below"] for distance in distances]
        assert part["answers"] == sum(inside)
    assert sum(part["answers"] for part in found["distances"]) == len(distances)
    plant(files, tmp_path / "again.jsonl", "--documents", 5)
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


def test_mistakes_are_one_line_and_leave_nothing(files: Path, tmp_path: Path) -> None:
    options = ("--tokenizer", files / "tokenizer", "--out", tmp_path / "r.jsonl")
    stories_file = files / "stories.jsonl"
    assert_mistake(
        run("plant-recall", stories_file, *options, "--documents", 0),
        "documents must be at least 1, not 0",
    )
    assert_mistake(
        run("plant-recall", stories_file, *options, "--documents", 1, "--size", 9),
        "at least 256 tokens",
    )
    assert_mistake(
        run("plant-recall", tmp_path / "no.jsonl", *options, "--documents", 1), "no.jsonl"
    )
    assert not list(tmp_path.iterdir())
