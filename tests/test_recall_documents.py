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
from tools.corpus.recall.facts import KINDS, PEOPLE, Fact, draw_facts
from tools.corpus.recall.wordings import TEST, TEST_FRAMES, TRAIN, TRAIN_FRAMES, word
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


def test_nobody_is_in_a_story_and_in_a_fact() -> None:
    assert not set(PEOPLE) & set(words.NAMES)


def test_every_kind_has_values_that_no_guess_finds() -> None:
    for name, kind in KINDS.items():
        assert kind.values is None or len(set(kind.values)) == len(kind.values) >= 12, name
        # Whole words: where a value ends in a sentence is found by them.
        assert all(re.fullmatch(r"\w+( \w+)*", value) for value in kind.values or ())


def test_wordings_for_training_and_for_tests_are_many_and_different() -> None:
    assert set(TRAIN) == set(TEST) == set(KINDS)
    for kind in KINDS:
        train, test = TRAIN[kind], TEST[kind]
        assert len(set(train.tell)) * len(set(train.ask)) >= 8
        assert not set(train.tell) & set(test.tell)
        assert not {x.split("|")[0] for x in train.ask} & {x.split("|")[0] for x in test.ask}
    assert sum(len(x.tell) * len(x.ask) for x in TEST.values()) >= 4
    assert len(TRAIN_FRAMES) >= 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_wording_tells_the_fact_and_asks_without_the_answer(split: str) -> None:
    for name, kind in KINDS.items():
        for who, what in itertools.product(PEOPLE[:2], kind.whats[:2]):
            fact = Fact(name, who, what, "zebra")
            for choices in itertools.product(range(4), range(3), range(3)):
                worded = word(fact, split, choices)  # type: ignore[arg-type]
                assert worded.told[: worded.value_ends].endswith("zebra")
                assert who in worded.told
                assert who in worded.question
                assert what in worded.told
                assert what in worded.question
                assert "zebra" not in worded.question
                assert "{" not in worded.told + worded.question
                assert worded.answered == f"{worded.question} zebra."
    assert TEST_FRAMES[0] in TRAIN_FRAMES  # of which one is as in training


# Documents


def test_a_document_is_as_long_as_a_row_to_the_chunk(writer: RecallWriter) -> None:
    for index in range(8):
        document = writer.document(index)
        assert document.tokens == tokens(document.text) + 1  # the end
        assert SIZE - CHUNK < document.tokens <= SIZE


def test_every_answer_was_told_once_and_as_far_away_as_is_said(writer: RecallWriter) -> None:
    for index in range(8):
        document = writer.document(index)
        assert document.asked
        assert len(set(document.asked)) == len(document.asked)
        at = 0
        for fact, distance in zip(document.asked, document.distances, strict=True):
            found = answers(fact, document.text)
            assert len(found) == 1
            begins, ends = found[0]
            assert begins >= at  # questions stand in the order of `asked`
            at = begins
            told = told_before(fact, document.text[:begins])
            assert (
                tokens(document.text[:begins].rstrip()) - tokens(document.text[:told]) == distance
            )
            assert distance > 0
            assert document.text[begins:ends] == fact.value


def answers(fact: Fact, text: str) -> list[tuple[int, int]]:
    """Where the value stands behind one of the questions for it."""
    questions = {
        word(fact, "train", choices).question
        for choices in itertools.product((0,), range(3), range(3))
    }
    every = "|".join(map(re.escape, sorted(questions, key=len, reverse=True)))
    found = re.finditer(rf"(?<=\n\n)(?:{every}) ({re.escape(fact.value)})\.", text)
    return [match.span(1) for match in found]


def told_before(fact: Fact, text: str) -> int:
    """Where the one sentence that tells the fact has said the value."""
    ends = []
    for choice in range(4):
        worded = word(fact, "train", (choice, 0, 0))
        found = re.finditer(rf"(?<!\w){re.escape(worded.told)}", text)
        ends += [match.start() + worded.value_ends for match in found]
    assert len(set(ends)) == 1
    return ends[0]


def test_distances_reach_from_the_window_to_the_whole_document(writer: RecallWriter) -> None:
    found = [d for index in range(30) for d in writer.document(index).distances]
    parts = np.histogram(found, bins=4, range=(0, SIZE))[0] / len(found)
    assert parts.min() > 0.05
    assert max(found) > 0.85 * SIZE


def test_a_document_is_a_function_of_seed_and_index(writer: RecallWriter) -> None:
    same = RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=CHUNK)
    assert same.document(3) == writer.document(3)
    other = RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=CHUNK, seed=1)
    assert other.document(3) != writer.document(3) != writer.document(4)
    held_out = RecallWriter(stories(), TOKENIZER, size=SIZE, chunk_size=CHUNK, split="test")
    text = held_out.document(3).text
    told = [
        re.escape(x).replace(r"\{", "{").replace(r"\}", "}")
        for y in TRAIN.values()
        for x in y.tell
    ]
    some = r"[\w ]+?"
    patterns = [x.format(who=r"\w+", what=r"\w+", value=some) for x in told]
    assert not any(re.search(rf"(?:^|[.!?\n] ?){x}", text) for x in patterns)


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
