"""The tokenizer of a corpus, and the way from a corpus to shards that training reads."""

import json
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from tests.command_line import assert_mistake, run
from tests.test_recall_documents import stories
from tools.corpus.tokenizer import train_tokenizer
from tools.training.data.batches import Batches
from tools.training.data.shards import open_shards
from zoo import Tokenizer

SIZE = 400
TEXTS = [
    "",
    'Mia was 12 years old.\n\n"Look," she said.',
    "The fox\nran 3.5 miles, didn't it?",
    "na\u00efve caf\u00e9 \U0001f642",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer") / "new"
    train_tokenizer(stories(), SIZE, made)
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    found = Tokenizer.from_folder(folder)
    assert found is not None
    return found


def test_ids_are_those_of_sentencepiece_and_of_transformers(
    folder: Path, tokenizer: Tokenizer
) -> None:
    theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    auto = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == theirs.GetPieceSize() == SIZE
    for text in (*TEXTS, *stories(5)):
        assert tokenizer.encode(text, add_bos=False) == theirs.EncodeAsIds(text)
        assert tokenizer.encode(text) == [1, *theirs.EncodeAsIds(text)] == auto(text).input_ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3)
    assert tokenizer.eos_ids == (2,)


def test_digits_and_newlines_stand_alone(folder: Path, tokenizer: Tokenizer) -> None:
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    listed = pieces.IdToPiece(list(range(SIZE)))
    plain = [p for p in listed if not (p.startswith("<") and p.endswith(">"))]
    assert [p for p in plain if len(p) > 1 and (any(map(str.isdigit, p)) or "\n" in p)] == []
    assert {*"0123456789", "\n"} <= set(plain)
    # A blank, and one token for each digit.
    assert len(tokenizer.encode("407", add_bos=False)) == 4


def test_the_same_texts_make_the_same_files(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(stories(), SIZE, tmp_path / "other")
    assert {p.name for p in folder.iterdir()} == {p.name for p in (tmp_path / "other").iterdir()}
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


def test_an_earlier_tokenizer_is_replaced_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "here"
    train_tokenizer(stories(), SIZE, target)
    assert train_tokenizer(stories(), SIZE + 20, target).vocab_size == SIZE + 20
    (target / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"will not replace .*here, which holds mine\.txt"):
        train_tokenizer(stories(), SIZE, target)


def test_a_vocabulary_that_does_not_fit_the_texts_is_a_mistake(tmp_path: Path) -> None:
    for size, what in ((256, "must be more than 256"), (280, "cannot train 280 pieces")):
        with pytest.raises(ValueError, match=what) as caught:
            train_tokenizer(stories(), size, tmp_path / "t")
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot train 4096 pieces on these texts: "):
        train_tokenizer(["One short text."], 4096, tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_from_a_corpus_to_rows_of_which_a_quarter_are_recall(tmp_path: Path) -> None:
    corpus, planted = tmp_path / "stories.jsonl", tmp_path / "recall.jsonl.zst"
    corpus.write_text("".join(json.dumps({"text": x}) + "\n" for x in stories(120)))
    made = run("train-tokenizer", corpus, "--vocab-size", SIZE, "--out", tmp_path / "tokenizer")
    assert made.code == 0, made.err
    assert f"a tokenizer of {SIZE} pieces" in made.out
    done = run(
        *("plant-recall", corpus, "--tokenizer", tmp_path / "tokenizer", "--out", planted),
        *("--documents", 12, "--size", 1024, "--chunk-size", 8),
    )
    assert done.code == 0, done.err
    assert "12 documents" in done.out
    tokens = tmp_path / "tokens"
    done = run(
        *("tokenize", corpus, planted, "--tokenizer", tmp_path / "tokenizer"),
        *("--out", tokens, "--jobs", 1),
    )
    assert done.code == 0, done.err
    shards = open_shards(tokens)
    sizes = {source.name: source.lengths for source in shards.sources}
    assert set(sizes) == {"stories", "recall"}
    assert all(1024 - 8 < size <= 1024 for size in sizes["recall"])
    batches = Batches(
        shards,
        row_size=1024,
        chunk_size=8,
        batch_size=8,
        weights={"stories": 0.75, "recall": 0.25},
    )
    assert batches.passes["recall"].rows == 12  # a document each
    whole = 0
    for step in range(4):
        ids, labels, seq_start = batches.batch(step)
        assert ids.max() < SIZE
        for row in range(8):
            whole += int((seq_start[row] == 0).all() and (labels[row] >= 0).sum() > 1000)
    assert whole >= 0.2 * 4 * 8


def test_mistakes_of_the_command_are_one_line(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "t")
    assert_mistake(run("train-tokenizer", tmp_path / "no.txt", *out), "no.txt")
    (tmp_path / "a.txt").write_text("A text.")
    assert_mistake(run("train-tokenizer", tmp_path / "a.txt", *out), "cannot train 4096 pieces")
