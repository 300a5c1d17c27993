"""The sampled corpus: prompts, filters, a file that survives a kill, batches of their own seed."""

import collections
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import zoo
from tests.command_line import TEMPLATE, assert_mistake, run
from tests.tiny import hf_config, make_model, make_tokenizer
from tools.corpus import sampling, words
from tools.corpus.examples import EXAMPLES, speaks_of_example
from tools.corpus.filters import REASONS, Filters, repeated_part, sentences, tidy
from tools.corpus.prompts import Draw, draw_prompt
from tools.corpus.recall.facts import PEOPLE
from tools.corpus.sampling import SamplingPlan, batch_seed, sample
from tools.corpus.store import CorpusFile, Counts, open_new
from tools.training.data.readers import read_documents

GOOD = """Mia saw a small boat on the lake. It was red, and nobody sat in it. She called Tom, her
brother, who was picking apples under a tree. They waited until the wind pushed the boat to the
shore. Inside they found a basket with a sleeping kitten."""
PLAN = SamplingPlan(
    seed=3, batch_size=4, max_new_tokens=40, sampling=zoo.Sampling(temperature=1.0)
)


# Prompts


def test_a_prompt_is_a_function_of_seed_and_index() -> None:
    assert draw_prompt(0, 5) == draw_prompt(0, 5)
    assert draw_prompt(0, 5) != draw_prompt(1, 5)


def test_prompts_ask_for_different_things_in_all_forms() -> None:
    prompts = [draw_prompt(0, index) for index in range(2000)]
    forms = collections.Counter(prompt.form for prompt in prompts)
    assert set(forms) == set(EXAMPLES)
    assert min(forms.values()) > 100 < forms["story"]
    stories = [(p.request, p.opening) for p in prompts if p.form == "story"]
    assert len(set(stories)) > 0.98 * len(stories)
    assert {prompt.example for prompt in prompts} == {x for y in EXAMPLES.values() for x in y}


def test_the_messages_show_an_example_and_ask_for_another_text() -> None:
    prompt = draw_prompt(0, 1)
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.messages[1]["content"] == prompt.example.text
    assert prompt.messages[2]["content"] == prompt.request


def test_examples_pass_the_filters() -> None:
    filters = Filters()
    for example in (x for examples in EXAMPLES.values() for x in examples):
        assert tidy(example.text) == example.text
        assert filters.reject(example.text) is None


def test_nobody_of_an_example_is_asked_for_or_kept(
    model: zoo.CausalLM, author: "Author", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {*words.NAMES, *PEOPLE}
    told = " ".join(x.text for form in ("story", "dialogue") for x in EXAMPLES[form])
    assert speaks_of_example(told)
    assert not speaks_of_example(" ".join(names))
    # Words that begin with a capital letter inside a sentence are names.
    inside = set(re.findall(r"(?<=[a-z,] )([A-Z][a-z]+)", told)) - {"Sunday"}
    assert inside
    assert all(map(speaks_of_example, inside - {"I"}))
    monkeypatch.setattr(author, "text", lambda seed, row: f", said Ida. {GOOD}")
    with pytest.raises(RuntimeError):
        sample(model, "toy", tmp_path / "c.jsonl", PLAN, tokens=1)
    run_file = json.loads((tmp_path / "c.jsonl.run").read_text())
    assert run_file["counts"]["dropped"] == {"example": 3 * 20, "short": 20}


def test_nothing_is_listed_twice() -> None:
    for name, entries in vars(words).items():
        if name.isupper():
            assert len(set(entries)) == len(entries)
            assert all(entry == entry.strip() != "" for entry in entries)


# Filters


def test_tidy_makes_plain_text_of_whole_sentences() -> None:
    written = "  \u201cLook,\u201d  said\tMia.\n \n\n\nIt\u2019s a boat \u2026 yes!\nAnd then she"
    assert tidy(written) == '"Look," said Mia.\n\nIt\'s a boat ... yes!'
    assert tidy("no sentence ends here") == ""


def test_sentences_are_all_of_the_text() -> None:
    text = 'He ran. "Stop!" she said.\n\nIt was 3.5 miles... Far away'
    assert sentences(text) == [
        "He ran.",
        '"Stop!"',
        "she said.",
        "It was 3.5 miles...",
        "Far away",
    ]


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("short", "Mia saw a boat. It was red."),
        ("not_ascii", GOOD.replace("Mia", "Mi\u00e1")),
        ("markup", f"**The boat**\n\n{GOOD}"),
        ("markup", f"{GOOD}\n\n1. Find a boat."),
        ("meta", f"As an AI, I do not see boats. {GOOD}"),
        ("meta", f"Sure! {GOOD}"),
        ("meta", f"Here is a short story for you. {GOOD}"),
        ("hard_words", GOOD.replace("small", "extraordinarily unprecedented international")),
        ("repetition", f"{GOOD} She ran and ran and she ran. She ran and ran and she ran."),
        ("repetition", "The cat and the dog and the hen " * 10 + "went home."),
    ],
)
def test_a_text_is_dropped_for_its_reason(reason: str, text: str) -> None:
    assert reason in REASONS
    assert Filters().reject(text) == reason
    assert Filters().reject(GOOD) is None


def test_repetition_is_the_part_of_four_words_that_came_before() -> None:
    assert repeated_part(["a", "b", "c", "d", "e", "f", "g"]) == 0
    assert repeated_part(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert repeated_part(["a", "b"]) == 0


def test_copies_of_kept_texts_are_dropped() -> None:
    filters = Filters()
    assert filters.reject(GOOD) is None
    start, end = GOOD[:120], GOOD[120:]
    others = tidy(EXAMPLES["description"][0].text)
    assert filters.reject(f"{start} and then it was gone. {others}") == "same_start"
    assert filters.reject(f"One day a strange thing happened there. {GOOD}") == "near_copy"
    assert filters.reject(f"It was late. {others} {end[-30:]}") is None


def test_what_is_dropped_is_not_remembered() -> None:
    filters = Filters()
    assert filters.reject(f"# Title\n\n{GOOD}") == "markup"
    assert filters.reject(GOOD) is None


# The file


def counts(kept: int) -> Counts:
    return Counts(kept=kept, tokens=10 * kept, dropped={}, written=0, seconds=0.0)


def open_file(path: Path, **made_with: object) -> CorpusFile:
    return CorpusFile.open(path, {"seed": 0, **made_with}, {"device": "here"})


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.zst"])
def test_a_file_grows_by_batches_and_loses_what_a_kill_left(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    file = open_file(path)
    file.append([{"text": "one"}, {"text": "two"}], counts(2))
    file.append([], counts(2))
    file.append([{"text": "three"}], counts(3))
    whole = path.read_bytes()
    with path.open("ab") as half:
        half.write(whole[: len(whole) // 3])
    again = open_file(path)
    assert path.read_bytes() == whole
    assert [*again.texts()] == ["one", "two", "three"]
    assert (again.state["batches"], again.state["counts"]["kept"]) == (3, 3)
    assert [*read_documents(str(path))] == ["one", "two", "three"]
    again.append([{"text": "four"}], counts(4))
    assert [*open_file(path).texts()] == ["one", "two", "three", "four"]
    assert [x["batch"] for x in again.state["runs"]] == [0, 3]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    open_file(path).append([{"text": "one"}], counts(1))
    with pytest.raises(ValueError, match=r"made with seed 0, not 1; give the same or name a new"):
        open_file(path, seed=1)
    with pytest.raises(ValueError, match=r"made with top_p None, not 0\.5"):
        open_file(path, top_p=0.5)
    (tmp_path / "c.jsonl.run").unlink()
    with pytest.raises(ValueError, match=r"c\.jsonl is there, without c\.jsonl\.run"):
        open_file(path)
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.jsonl\.zst, not c\.txt"):
        open_file(tmp_path / "c.txt")


def test_a_file_that_is_written_at_once_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.zst"
    with open_new(path) as write:
        for number in range(2500):
            write(f'{{"text": "{number}"}}\n')
        assert not path.exists()
    assert [*read_documents(str(path))] == [str(number) for number in range(2500)]
    before = path.read_bytes()

    def fail() -> None:
        with open_new(path) as write:
            write('{"text": "x"}\n')
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_bytes() == before
    assert [x.name for x in tmp_path.iterdir()] == ["d.jsonl.zst"]


# Sampling


@pytest.fixture(scope="module")
def model() -> zoo.CausalLM:
    """A tiny model that can chat; it writes nothing that anyone would keep."""
    made = make_model(hf_config("llama", max_position_embeddings=4096))
    made.tokenizer = make_tokenizer()
    made.tokenizer.chat_template = TEMPLATE
    return made


class Author:
    """In the place of `zoo.generate`: different texts, which the seed of the batch gives."""

    def __init__(self) -> None:
        self.seeds: list[int | None] = []

    def __call__(
        self,
        model: zoo.CausalLM,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: zoo.Sampling,
        **others: object,
    ) -> list[zoo.Generation]:
        self.seeds.append(sampling.seed)
        if len(self.seeds) > 20:
            raise RuntimeError
        return [
            zoo.Generation(
                prompt_ids=[*ids],
                ids=[1] * 50,
                text="" if row == 1 else self.text(sampling.seed or 0, row),
                finish_reason="stop",
            )
            for row, ids in enumerate(prompts)
        ]

    def text(self, seed: int, row: int) -> str:
        draw = Draw("author", seed, row)
        made = ["".join(draw.several("abcdefghijkl", 4)) for _ in range(80)]
        return f" {' '.join(made)}. And so it was."


@pytest.fixture
def author(monkeypatch: pytest.MonkeyPatch) -> Author:
    """Every second text of a batch is empty."""
    made = Author()
    monkeypatch.setattr("tools.corpus.sampling.zoo.generate", made)
    return made


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sampling_goes_on_with_what_it_would_have_written(
    model: zoo.CausalLM, author: Author, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    told: list[int] = []
    done = sample(model, "toy", whole, PLAN, tokens=6000, advance=told.append)
    assert len(author.seeds) > 2
    assert author.seeds == [batch_seed(3, batch) for batch in range(len(author.seeds))]
    assert sum(told) == done["tokens"] >= 6000
    few = sample(model, "toy", parts, PLAN, tokens=1)
    assert 0 < few["tokens"] < 6000
    again = sample(model, "toy", parts, PLAN, tokens=6000)
    assert parts.read_bytes() == whole.read_bytes()
    ignored = {"seconds": 0}
    assert {**again, **ignored} == {**done, **ignored}
    assert sample(model, "toy", parts, PLAN, tokens=6000) == again


def test_documents_say_what_they_were_made_of(
    model: zoo.CausalLM, author: Author, tmp_path: Path
) -> None:
    path = tmp_path / "c.jsonl"
    done = sample(model, "toy", path, PLAN, tokens=1)
    documents = rows(path)
    assert done["kept"] == len(documents)
    assert sum(done["dropped"].values()) == 4 - len(documents)
    assert done["dropped"]["short"] == 1
    assert done["written"] == 4 * 50
    for document in documents:
        index = int(document["id"].removeprefix("3-"))
        prompt = draw_prompt(3, index)
        assert document["prompt"] == prompt.request
        assert document["form"] == prompt.form
        assert document["text"].startswith(prompt.opening)
    assert model.tokenizer is not None
    sizes = [len(model.tokenizer.encode(x["text"], add_bos=False)) for x in documents]
    assert done["tokens"] == sum(sizes)


def test_a_model_that_writes_nothing_good_is_given_up(
    model: zoo.CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_PATIENCE", 8)
    with pytest.raises(ValueError, match=r"^none of 8 texts was kept, most because of '\w+'; "):
        sample(model, "toy", tmp_path / "c.jsonl", PLAN, tokens=1)


def test_a_batch_draws_from_its_own_random_numbers(model: zoo.CausalLM) -> None:
    assert len({batch_seed(seed, batch) for seed in range(10) for batch in range(10)}) == 100
    assert model.tokenizer is not None
    prompts = [sampling.prompt_ids(model.tokenizer, draw_prompt(0, i)) for i in range(2)]

    def written(batch: int) -> list[list[int]]:
        how = zoo.Sampling(temperature=1.0, seed=batch_seed(0, batch))
        return [x.ids for x in zoo.generate(model, prompts, max_new_tokens=12, sampling=how)]

    assert written(1) == written(1) != written(2)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    plain = make_model(hf_config("llama"))
    with pytest.raises(ValueError, match=r"^toy has no chat template"):
        sample(plain, "toy", tmp_path / "c.jsonl", PLAN, tokens=1)


def test_a_file_that_cannot_be_used_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = {"model": "toy", "prompts": sampling.fingerprint(), "seed": 1}
    CorpusFile.open(tmp_path / "other.jsonl", begun, {}).append([{"text": "one"}], counts(1))
    (tmp_path / "lonely.jsonl").write_text("{}\n")
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setattr("tools.sample_corpus.load_model", None)
    before = sorted(tmp_path.rglob("*"))
    for name, what in {
        "c.txt": "must end in .jsonl or .jsonl.zst, not c.txt",
        "c.jsonl.zst": "pip install zstandard",
        "lonely.jsonl": "lonely.jsonl is there, without lonely.jsonl.run",
        "folder.jsonl": "which is a folder",
        "nowhere/c.jsonl": "there is no folder",
        "other.jsonl": "other.jsonl was made with seed 1, not 0",
    }.items():
        words = ("sample-corpus", "toy", "--out", tmp_path / name, "--tokens", 10)
        assert_mistake(run(*words), what)
    assert sorted(tmp_path.rglob("*")) == before


def test_mistakes_of_the_command_are_one_line(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "c.jsonl")
    assert_mistake(run("sample-corpus", *out, "--tokens", 0), "tokens must be at least 1, not 0")
    tokens = ("--tokens", 10)
    assert_mistake(run("sample-corpus", *out, *tokens, "--seed", -1), "seed must be at least 0")
    assert_mistake(run("sample-corpus", *out, *tokens, "--top-p", 2), "top_p must be above 0")
    assert_mistake(run("sample-corpus", *out, *tokens, "--batch-size", 0), "batch_size must be")
