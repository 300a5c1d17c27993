"""The recall suite: what its prompts hold, and that it tells a reader from one who cannot read."""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import zoo
from tests.tiny import make_model, make_tokenizer, mixed
from tools.corpus.recall.facts import KINDS, PEOPLE, Fact
from tools.corpus.recall.wordings import Choices, word
from tools.corpus.recall.wordings import Split as FactSplit
from tools.evaluation.batches import BatchLimits
from tools.evaluation.generating import ModelWriter, Written, run_samples
from tools.evaluation.recall import GENERATED, RECALL
from tools.evaluation.recall.facts import distances
from tools.evaluation.recall.fillers import Filler, Split, prose_fillers, repeated_fillers
from tools.evaluation.recall.request import DEPTH_BINS, Request
from tools.evaluation.recall.wordings import wordings
from tools.evaluation.record import key_of
from tools.evaluation.samples import Match, Sample, grade

CONTEXT = 2000  # tokens of nearly one byte each
COUNTRIES = [f"{a}{b}" for a in ("Ar", "Bel", "Cor", "Dun", "Es") for b in ("via", "ton", "land")]
TOKENIZER = make_tokenizer()
SPLITS: tuple[FactSplit, ...] = ("train", "test")
SEARCH_AND_JUDGE: tuple[Split, ...] = ("search", "judge")
_MOST = 15  # ways to tell a fact, to ask for it, or frames of a question


class Reader:
    """Answers by reading the prompt: an oracle, which has the text and nothing else."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def write(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        answers: Sequence[list[int]] | None = None,
    ) -> list[Written]:
        texts = [TOKENIZER.decode(prompt) for prompt in prompts]
        self.read += texts
        values: list[float | None] = [-float(len(x)) for x in answers or ()]
        values = values or [None] * len(texts)
        return [
            Written(f" {self.say(text)}", value) for text, value in zip(texts, values, strict=True)
        ]

    def say(self, text: str) -> str:
        return answer_of(text)


class Blind(Reader):
    """Sees the question only, and says what could be an answer to any."""

    def say(self, text: str) -> str:
        return "00000, the name is ABCDE; ugly\n"


def answer_of(text: str) -> str:
    """What a prompt asks for, by the last line or two of it."""
    for wording in wordings("all").values():
        if text.endswith(wording.question):
            pattern = re.escape(wording.needle).replace(r"\{number\}", r"(\d{5})", 1)
            return found(pattern.replace(r"\{number\}", r"\1"), text)
    if asked := re.search(r"magic numbers? for (\S+) mentioned in the text \w+:$", text):
        told = rf"One of the special magic numbers for {asked[1]} is: (\d+)\."
        return ", ".join(re.findall(told, text))
    if asked := re.search(r"assigned the value (\d+), they are:$", text):
        names = [found(rf"VAR (\w+) = {asked[1]}", text)]
        while more := re.search(rf"VAR (\w+) = VAR {names[-1]}\b", text):
            names.append(more[1])
        return ", ".join(names)
    for pattern in told_facts(text):
        if fact := re.search(pattern, text):
            return fact[1]
    for question, pattern in (
        (r"\n(\w+) ->$", r"\n{} -> (\w+)\n"),
        (r"\n([A-Z]\w+ [A-Z]\w+):$", r"\n{}: (\d+-\d+)\n"),
        (r'\{"([\w-]+)": "$', r'"{}": "([\w-]+)"'),
        (r"What is the capital of (\w+)\?\nAnswer:$", r"The capital of {} is (\w+)"),
        (r"\n(Model|Price):$", r"{}: (\S+)"),
    ):
        if asked := re.search(question, text):
            return found(pattern.replace("{}", re.escape(asked[1])), text)
    raise AssertionError(text[-200:])


def told_facts(text: str) -> Iterator[str]:
    """How the fact that the end of a text asks for may have been told."""
    *_, end = text.rpartition("\n\n")
    for name, kind in KINDS.items():
        people, whats = ([x for x in names if x in end] for names in (PEOPLE, kind.whats))
        for who, what, split in itertools.product(people, whats, SPLITS):
            fact = Fact(name, who, what, "VALUE")
            asked = itertools.product(range(_MOST), range(_MOST))
            if any(word(fact, split, Choices(0, *choice)).question == end for choice in asked):
                for tell in range(_MOST):
                    told = word(fact, split, Choices(tell, 0, 0)).told
                    yield re.escape(told).replace("VALUE", r"(\w[\w ]*)")


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, pattern
    return match[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files such as a user has, with facts that a reader finds."""
    folder = tmp_path_factory.mktemp("data")
    records: list[dict[str, object]] = [
        {
            "title": name,
            "context": f"{name} is a small country with many lakes. The capital of {name} is "
            f"{name[::-1].title()}. People there {'sing and dance and sing ' * 6}every day.",
            "qas": [
                {
                    "id": f"q{name}",
                    "question": f"What is the capital of {name}?",
                    "answers": [name[::-1].title(), f"the city of {name[::-1].title()}"],
                }
            ],
        }
        for name in COUNTRIES
    ]
    write(folder / "squad_v1_dev.jsonl", records)
    write(
        folder / "fda.jsonl",
        [{"text": "Model: K-12\nA report.\nModel: ", "key": "Model", "value": "K-12"}] * 3,
    )
    write(
        folder / "swde.jsonl",
        [{"text": "Shop. Price: 7.50\nMore.\nPrice:", "key": "Price", "value": "7.50"}] * 3,
    )
    pairs = [[f"{i:08x}-{i * 7919:04x}", f"{i * i:08x}-{i * 104729:04x}"] for i in range(1, 76)]
    write(
        folder / "kv_retrieval_75.jsonl",
        [{"key": pairs[9][0], "value": pairs[9][1], "records": pairs}] * 8,
    )
    return folder


def write(path: Path, records: Sequence[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def draw(
    task: str,
    data: Path | None = None,
    *,
    n: int = 4,
    seed: int = 0,
    split: Split = "judge",
    contexts: tuple[int, ...] = (CONTEXT,),
    text: Filler | None = None,
) -> list[Sample]:
    request = Request(
        tokenizer=TOKENIZER,
        contexts=contexts,
        n=n,
        seed=seed,
        split=split,
        repeated=repeated_fillers(split),
        prose=tuple(replace(x, text=x.text[:15_000]) for x in prose_fillers(split, text, text)),
        data=data,
    )
    return list(RECALL[task].draw(request))


@pytest.mark.parametrize("task", RECALL)
def test_one_who_reads_is_right_and_one_who_cannot_is_wrong(task: str, data: Path) -> None:
    samples = draw(task, data)
    assert samples
    reading = list(
        run_samples(Reader(), samples, limits=BatchLimits(rows=3), log_likelihood=False)
    )
    assert [outcome.value for outcome in reading] == [1.0] * len(samples)
    blind = list(run_samples(Blind(), samples, limits=BatchLimits(rows=3), log_likelihood=False))
    assert [outcome.value for outcome in blind] == [0.0] * len(samples)


@pytest.mark.parametrize("task", RECALL)
def test_a_prompt_with_its_answer_has_exactly_the_tokens_of_its_context(
    task: str, data: Path
) -> None:
    for sample in draw(task, data, contexts=(CONTEXT, CONTEXT + 77)):
        context = sample.cell["context"]
        if context != "published":
            assert len(sample.prompt_ids) + len(sample.answer_ids) == context
        text = TOKENIZER.decode([*sample.prompt_ids, *sample.answer_ids])
        last = sample.answers[-1 if sample.match == "all" else 0]
        assert text.endswith(last)
        assert len(sample.answer_ids) <= sample.max_new_tokens


@pytest.mark.parametrize("task", [*GENERATED, "kv_uuid", "squad"])
def test_the_answer_stands_at_the_depth_of_the_cell(task: str, data: Path) -> None:
    for sample in draw(task, data, n=8):
        if "depth" not in sample.cell:
            continue
        text = TOKENIZER.decode(sample.prompt_ids)
        text = text[: text.rindex(QUESTIONS[task])]
        text = text[text.index(".\n\n") :] if task == "variables" else text
        # Of several values of a key only the generator knows which one has the depth.
        answers = sample.answers if task == "multivalue" else sample.answers[:1]
        depths = [depth_in(task, text, answer) for answer in answers]
        middle = float(str(sample.cell["depth"]))
        assert min(abs(depth - middle) for depth in depths) <= 1 / 2 / DEPTH_BINS + 0.02


HIDDEN = {
    "multikey": r"\n\nOne of the special magic numbers for \S+ is: \d+\.\n\n",
    "multivalue": r"\n\nOne of the special magic numbers for \S+ is: \d+\.\n\n",
    "variables": r"\n\nVAR \w+ = [\w ]+\n\n",
}
QUESTIONS = {
    "passkey": "\n\n",
    "needle": "\n\n",
    "multikey": "\n\nWhat is",
    "multivalue": "\n\nWhat are",
    "variables": "\n\nQuestion",
    "mqar": "\n\n",
    "phonebook": "\n\nFrom the",
    "kv": "\n\nKey",
    "kv_uuid": "\n\nKey",
    "squad": "\n\nQuestion",
}


def depth_in(task: str, text: str, answer: str) -> float:
    """The part of the hay before what tells the answer; the other pairs of a list are hay."""
    at, pattern = text.index(answer), HIDDEN.get(task, "(?!)")
    if task in ("passkey", "needle"):
        needles = [
            re.escape(wording.needle.format(number=answer)) for wording in wordings("all").values()
        ]
        pattern = rf"\n\n(?:{'|'.join(needles)})\n\n"
    if task == "squad":
        pattern = rf"{answer[::-1].title()} is a small country.*{answer}.*\n\n"
    hidden = [match for match in re.finditer(pattern, text) if match.start() <= at < match.end()]
    begins = hidden[0].start() if hidden else at
    assert bool(hidden) == (task not in ("mqar", "phonebook", "kv", "kv_uuid"))
    before = re.sub(pattern, "", text[:begins])
    return tokens(before) / tokens(re.sub(pattern, "", text))


def tokens(text: str) -> int:
    return len(TOKENIZER.encode(text, add_bos=False))


@pytest.mark.parametrize("task", GENERATED)
def test_a_seed_draws_the_same_samples_and_another_one_others(task: str) -> None:
    assert draw(task) == draw(task)
    ids = [{tuple(sample.prompt_ids) for sample in draw(task, seed=seed)} for seed in (0, 1)]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("task", GENERATED)
def test_the_first_samples_of_a_cell_do_not_depend_on_how_many_are_drawn(task: str) -> None:
    few = {(str(s.cell), s.item): s.prompt_ids for s in draw(task, n=4)}
    many = {(str(s.cell), s.item): s.prompt_ids for s in draw(task, n=6)}
    assert len(many) == len(few) // 4 * 6
    assert few.items() <= many.items()


@pytest.mark.parametrize("task", RECALL)
def test_items_are_unique_and_every_depth_has_as_many(task: str, data: Path) -> None:
    samples = draw(task, data, n=8)
    assert len({(str(s.cell), s.item) for s in samples}) == len(samples)
    depths = [s.cell["depth"] for s in samples if "depth" in s.cell]
    assert len({depths.count(depth) for depth in depths}) <= 1
    assert set(depths) in (set(), {0.125, 0.375, 0.625, 0.875})
    assert len({s.max_new_tokens for s in samples if s.cell.get("size") == 4}) <= 1


def test_searching_and_judging_share_no_wording_and_no_filler() -> None:
    assert not set(wordings("search").values()) & set(wordings("judge").values())
    assert len(wordings("search")) >= 4 <= len(wordings("judge"))
    assert wordings("all") == wordings("search") | wordings("judge")
    both = [(*repeated_fillers(s), *prose_fillers(s)) for s in ("search", "judge")]
    names = [{filler.name for filler in fillers} for fillers in both]
    texts = [{filler.text for filler in fillers} for fillers in both]
    assert not names[0] & names[1]
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) >= 3
    for task in ("passkey", "needle"):
        seen = [{s.cell["wording"] for s in draw(task, split=s)} for s in ("search", "judge")]
        assert seen == [set(wordings("search")), set(wordings("judge"))]


def test_every_wording_reads_as_a_sentence_that_the_question_begins() -> None:
    for wording in wordings("all").values():
        assert wording.needle.count("{number}") >= 1
        assert "{number}" not in wording.question


def test_a_fact_is_told_as_far_from_its_answer_as_the_cell_says() -> None:
    edges = distances(CONTEXT)
    for sample in draw("facts", n=12):
        text, value = TOKENIZER.decode(sample.prompt_ids), sample.answers[0]
        places = [told for p in told_facts(text) for told in re.finditer(p, text)]
        assert len({told.span() for told in places}) == 1
        behind = tokens(text[places[0].end(1) :])
        least = int(str(sample.cell["distance"]))
        below = edges[edges.index(least) + 1]
        assert places[0][1] == value
        # A sentence and the question more, of a tokenizer of letters.
        assert least <= behind < below + 200


def test_halves_that_share_a_text_share_no_outcome() -> None:
    """Or a run of one half, with the samples of the other, would take those for its own."""
    text = Filler(name="mine.txt", text="A text of my own. " * 2000)
    halves = [
        {(str(s.cell), s.item) for s in draw("facts", n=4, split=split, text=text)}
        for split in SEARCH_AND_JUDGE
    ]
    assert [len(half) for half in halves] == [4, 4]
    assert not set.intersection(*halves)


def test_a_context_without_room_for_the_least_distance_is_a_mistake() -> None:
    assert distances(1024)[0] >= 64 + 8  # beyond the embedded model's window
    assert distances(1024)[-1] == 896
    with pytest.raises(ValueError, match="choose a context of at least 183 tokens, not 182"):
        draw("facts", contexts=(182,))
    endless = Filler(name="endless.txt", text="a text without an end " * 500)
    with pytest.raises(ValueError, match="sentences of a text are too long"):
        draw("facts", text=endless)


def test_a_text_of_the_user_takes_the_place_of_the_generated_one() -> None:
    own = Filler(name="mine.txt", text="A text of my own. " * 2000)
    assert prose_fillers("judge", None, own) == (own,)
    assert prose_fillers("search", None, own) != (own,)
    assert prose_fillers("all", own, None)[0] == own


def test_distractors_of_squad_hold_no_answer(data: Path) -> None:
    for sample in draw("squad", data, n=5):
        text = TOKENIZER.decode(sample.prompt_ids)
        assert text.count(sample.answers[0]) == 1
        if sample.cell["context"] == "published":
            assert text.count("lakes") == 1
        else:
            assert text.count("lakes") > 3


def asks_in_a_chat(template: str) -> Request:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Request(
        tokenizer=tokenizer,
        contexts=(CONTEXT,),
        n=8,
        seed=0,
        split="judge",
        repeated=(),
        prose=(),
    )


CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
ASKED_IN_A_CHAT = """<user> Answer the question based on the given documents. \
Only give me the answer and do not output any other words.

The following are given documents.

{documents}

Answer the question based on the given documents. \
Only give me the answer and do not output any other words.

Question: What is the capital of {name}?
<assistant>
"""


def test_squad_asks_in_the_chat_template_where_there_is_one(data: Path) -> None:
    samples = list(RECALL["squad"].draw(replace(asks_in_a_chat(CHAT), data=data)))
    assert len(samples) == 16
    for sample in samples:
        text = TOKENIZER.decode(sample.prompt_ids)
        name = found(r"Question: What is the capital of (\w+)\?\n<assistant>\n$", text)
        own = found(rf"({name} is a small country.*every day\.)", text)
        before, behind = ASKED_IN_A_CHAT.replace("{name}", name).split("{documents}")
        assert text.startswith(before)
        assert text.endswith(behind)
        assert sample.item.endswith("-chat")
        assert TOKENIZER.decode(sample.answer_ids) == sample.answers[0]
        if sample.cell["context"] == "published":
            assert text == f"{before}{own}{behind}"
        else:
            assert len(sample.prompt_ids) + len(sample.answer_ids) == CONTEXT
            answer = sample.answers[0]
            depth = depth_in("squad", text[len(before) : -len(behind)] + "\n\n", answer)
            assert abs(depth - float(str(sample.cell["depth"]))) <= 1 / 2 / DEPTH_BINS + 0.02


def test_squad_asks_a_model_without_a_chat_template_plainly(data: Path) -> None:
    for sample in draw("squad", data):
        text = TOKENIZER.decode(sample.prompt_ids)
        name = found(r"\n\nQuestion: What is the capital of (\w+)\?\nAnswer:$", text)
        own = found(rf"({name} is a small country.*every day\.)", text)
        assert not sample.item.endswith("-chat")
        assert TOKENIZER.decode(sample.answer_ids) == f" {sample.answers[0]}"
        if sample.cell["context"] == "published":
            assert text == f"{own}\n\nQuestion: What is the capital of {name}?\nAnswer:"


def test_a_chat_template_that_drops_the_message_is_a_mistake(data: Path) -> None:
    with pytest.raises(ValueError, match="drops the text of a message"):
        list(RECALL["squad"].draw(replace(asks_in_a_chat("{{ 'hello' }}"), data=data)))


def test_a_long_document_loses_its_beginning(tmp_path: Path) -> None:
    text = f"{'far away ' * 400}Model: K-12\nModel:"
    write(tmp_path / "fda.jsonl", [{"text": text, "key": "Model", "value": "K-12"}])
    (sample,) = draw("fda", tmp_path, contexts=(500,))
    assert len(sample.prompt_ids) == 500 - sample.max_new_tokens
    assert TOKENIZER.decode(sample.prompt_ids).endswith("Model: K-12\nModel:")
    # Where another part is left, it is another item.
    items = {draw("fda", tmp_path, contexts=(size,))[0].item for size in (500, 600, 6000, 7000)}
    assert len(items) == 3
    with pytest.raises(ValueError, match="choose a greater context for fda"):
        draw("fda", tmp_path, contexts=(48,))


def test_a_missing_file_and_a_record_without_a_field_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"fda needs fda\.jsonl"):
        draw("fda", tmp_path)
    with pytest.raises(ValueError, match="--data"):
        draw("fda")
    write(tmp_path / "fda.jsonl", [{"text": "a", "key": "b"}])
    with pytest.raises(ValueError, match=r"fda\.jsonl, line 1: expected an object with 'value'"):
        draw("fda", tmp_path)


@pytest.mark.parametrize(
    ("task", "record", "what"),
    [
        ("squad", {"qas": [{"id": "1", "question": "?", "answers": []}]}, "question '1' has no"),
        ("squad", {"qas": [{"id": "1", "question": "?", "answers": ["a", " "]}]}, "empty one"),
        ("squad", {"qas": [{"id": "1", "question": "?"}]}, "KeyError: 'answers'"),
        ("kv_uuid", {"records": []}, "no pairs"),
        ("kv_uuid", {"records": [["a", ""]]}, "no pairs, or an empty one"),
        ("kv_uuid", {"records": [1]}, "TypeError"),
    ],
)
def test_a_record_that_cannot_be_asked_about_is_a_mistake(
    task: str, record: dict[str, object], what: str, tmp_path: Path
) -> None:
    name = RECALL[task].file
    write(tmp_path / f"{name}.jsonl", [{"title": "a", "context": "b"} | record])
    with pytest.raises(ValueError, match=rf"{name}\.jsonl, line 1: no such record \(.*{what}"):
        draw(task, tmp_path)


def test_an_empty_value_which_every_text_contains_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = ("K-12", " ", "K-13")
    write(tmp_path / "fda.jsonl", [{"text": "a", "key": "b", "value": x} for x in values])
    assert [sample.answers for sample in draw("fda", tmp_path)] == [("K-12",), ("K-13",)]
    assert "record 1 has an empty value" in caplog.text


def test_a_prompt_too_short_for_what_it_must_hold_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="choose a greater length"):
        draw("phonebook", contexts=(300,))


@pytest.mark.parametrize(
    ("text", "answers", "match", "value"),
    [
        (" 12345.", ("12345",), "whole", 1),
        (" 12345", ("1234",), "whole", 0),
        (" 51234", ("1234",), "whole", 0),
        (" 1234", ("12345",), "whole", 0),
        (" 555-0123\n", ("555-0123",), "whole", 1),
        (" 1555-0123\n", ("555-0123",), "whole", 0),
        (" in PARIS, of course", ("paris", "Rome"), "contains", 1),
        (" in Paris", ("Rome",), "contains", 0),
        ("12, 34 and 567", ("12", "34", "56", "78"), "all", 0.5),
        (" red\nblue", ("red",), "exact", 1),
        (' "Red".\n', ("red",), "exact", 1),
        (" red wine", ("red",), "exact", 0),
        (" redder", ("red",), "exact", 0),
        ("", ("red",), "exact", 0),
    ],
)
def test_only_a_right_answer_counts(
    text: str, answers: tuple[str, ...], match: Match, value: float
) -> None:
    assert grade(text, answers, match) == value


def with_context(tokens: int) -> zoo.CausalLM:
    model = make_model(mixed("llama", max_position_embeddings=tokens))
    model.tokenizer = make_tokenizer()
    return model


def test_batches_of_1_and_of_32_give_the_same_text_and_numbers() -> None:
    writer = ModelWriter(with_context(500))
    samples = draw("needle", contexts=(400, 440), n=1)[::3]  # of both lengths
    alone, together = (
        list(run_samples(writer, samples, limits=BatchLimits(rows=b))) for b in (1, 32)
    )
    assert [x.metric for x in alone] == ["accuracy", "log_likelihood"] * len(samples)
    for one, other in zip(alone, together, strict=True):
        assert (one.task, one.cell, one.item, one.metric) == (
            other.task,
            other.cell,
            other.item,
            other.metric,
        )
        assert one.value == pytest.approx(other.value, rel=1e-5)
    prompts = [sample.prompt_ids for sample in samples]
    texts = [row.text for row in writer.write(prompts, 12)]
    assert texts == [writer.write([prompt], 12)[0].text for prompt in prompts]
    assert len(set(texts)) > 1


def test_a_log_likelihood_is_that_of_the_answer_behind_its_prompt() -> None:
    model = with_context(64)
    writer = ModelWriter(model)
    prompts, answers = [[5, 6, 7, 8], [9, 10]], [[11, 12], [13, 14, 15]]
    expected = []
    for prompt, answer in zip(prompts, answers, strict=True):
        row = torch.tensor([[*prompt, *answer]])
        logits = model(row)[0].detach().double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        expected.append(sum(logits[i, row[0, i + 1]].item() for i in places))
    written = writer.write(prompts, 3, answers)
    assert [row.log_likelihood for row in written] == pytest.approx(expected, rel=1e-5)
    assert written[0].text == writer.write(prompts, 3)[0].text


def test_items_of_another_file_have_other_names(data: Path, tmp_path: Path) -> None:
    for task, name in (("squad", "squad_v1_dev"), ("kv_uuid", "kv_retrieval_75")):
        text = (data / f"{name}.jsonl").read_text(encoding="utf-8")
        (tmp_path / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")
        ours, others = (
            {(s.item, tuple(s.prompt_ids)) for s in draw(task, x)} for x in (data, tmp_path)
        )
        assert {ids for _, ids in ours} == {ids for _, ids in others}
        assert not {name for name, _ in ours} & {name for name, _ in others}


def test_a_row_writes_no_more_tokens_beside_one_that_may_write_many() -> None:
    asked: list[tuple[int, int]] = []

    class Counting(Reader):
        def write(
            self,
            prompts: Sequence[list[int]],
            max_new_tokens: int,
            answers: Sequence[list[int]] | None = None,
        ) -> list[Written]:
            asked.append((len(prompts), max_new_tokens))
            return super().write(prompts, max_new_tokens, answers)

    samples = [*draw("multivalue", n=3)]
    list(run_samples(Counting(), samples, limits=BatchLimits(rows=4)))
    limits = {s.max_new_tokens for s in samples}
    assert len(limits) == 2
    assert {limit for _, limit in asked} == limits
    assert sum(count for count, _ in asked) == len(samples)


def test_what_is_done_is_not_asked_again() -> None:
    samples = draw("kv", n=4)
    first = list(run_samples(Reader(), samples))
    steps: list[int] = []
    reader = Reader()
    done = {key_of(outcome) for outcome in first[:-3]}  # the last sample, and half of another
    rest = list(run_samples(reader, samples, done=done, advance=steps.append))
    assert len(reader.read) == 2
    assert rest == first[-4:]
    assert sum(steps) == len(samples)


def test_logits_that_are_no_numbers_are_a_mistake() -> None:
    class Broken(Reader):
        def write(
            self,
            prompts: Sequence[list[int]],
            max_new_tokens: int,
            answers: Sequence[list[int]] | None = None,
        ) -> list[Written]:
            return [Written("", float("nan"))] * len(prompts)

    with pytest.raises(ValueError, match="not finite"):
        list(run_samples(Broken(), draw("kv", n=1)))
