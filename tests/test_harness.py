"""lm-evaluation-harness's tasks on local files: prompts, scores, near and far."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import zoo
from tests.command_line import python
from tests.harness_inputs import HAY, ROWS_OF, WIKITEXT, Knows, tiny, write_data
from tests.tiny import make_tokenizer
from tools.evaluation.harness import LOCAL_TASKS, LONG_TASKS, count_items, run_harness
from tools.evaluation.outcome import Outcome, scores

pytest.importorskip("lm_eval", reason="needs the eval extra")

from lm_eval import evaluate

from tools.evaluation.batches import BatchLimits
from tools.evaluation.harness.data import TASKS, pages
from tools.evaluation.harness.far import UnrelatedText
from tools.evaluation.harness.model import ZooLM
from tools.evaluation.harness.tasks import load_tasks
from tools.evaluation.shared import Shared

SHORT = [name for name in LOCAL_TASKS if name not in LONG_TASKS]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> zoo.CausalLM:
    return tiny()


def oracle(name: str, data: Path, *, wrong: bool, far: int = 0) -> zoo.CausalLM:
    """A model that prefers the right choice of every item of a task, or one that is wrong."""
    task = load_tasks([name], data)[name]
    encode, texts = make_tokenizer().encode, []
    passages = UnrelatedText(HAY, far, 0) if far else None
    for number, doc in enumerate(task.eval_docs):
        context = task.fewshot_context(doc, num_fewshot=0)
        made = task.construct_requests(doc=doc, ctx=context, metadata=(name, number, 1))
        if name == "lambada_openai":
            right, asked = 0, [(made.args[0], " loopback")] if wrong else [made.args]
        else:
            right = int(ROWS_OF[name][number]["label"])  # type: ignore[call-overload]
            asked = [instance.args for instance in made]
        context, continuation = asked[(right + wrong) % len(asked)]
        passage = ""
        if passages is not None:
            answers = TASKS[name].answers
            held = answers(doc) if answers else [text for _, text in asked]
            if name == "lambada_openai":
                held = [made.args[1]]
            passage = passages.passage(f"{name} {number}", held) + "\n\n"
        texts.append(encode(passage + context + continuation))
    return cast("zoo.CausalLM", Knows(texts))


def values(outcomes: Iterable[Outcome], metric: str) -> list[float]:
    return [outcome.value for outcome in outcomes if outcome.metric == metric]


@pytest.mark.parametrize("far", [0, 60])
@pytest.mark.parametrize("name", SHORT)
def test_who_prefers_the_right_choice_is_always_right(name: str, far: int, data: Path) -> None:
    for wrong, accuracy in ((False, 1.0), (True, 0.0)):
        knows = oracle(name, data, wrong=wrong, far=far)
        outcomes = list(run_harness(knows, "it", [name], data=data, far=far, hay=HAY))
        n = len(ROWS_OF[name])
        assert values(outcomes, "acc") == [accuracy] * n
        if name in ("hellaswag", "piqa", "arc_easy", "arc_challenge", "openbookqa"):
            assert values(outcomes, "acc_norm") == [accuracy] * n
        assert {outcome.cell["far"] for outcome in outcomes} == {far}


PROMPTS = {
    "lambada_openai": ("The cache keeps what was asked. Nobody waits for the", [" cache"]),
    "hellaswag": (
        "Serving: A man reads a request. He",
        [" answers it at once.", " eats it.", " has accents.", " counts the sea."],
    ),
    "piqa": ("Question: How to count tokens?\nAnswer:", [" One by one.", " With a café."]),
    "arc_easy": (
        "Question: What keeps an answer?\nAnswer:",
        [" a cache", " a loop", " the sea", " an accent"],
    ),
    "openbookqa": ("What keeps an answer?", [" a cache", " a loop", " the sea", " an accent"]),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_those_of_the_harness(name: str, data: Path) -> None:
    task = load_tasks([name], data)[name]
    task.build_all_requests(limit=1)
    context, continuations = PROMPTS[name]
    assert [instance.args for instance in task.instances] == [
        (context, continuation) for continuation in continuations
    ]


def test_winogrande_scores_the_end_of_the_sentence(data: Path) -> None:
    task = load_tasks(["winogrande"], data)["winogrande"]
    task.build_all_requests(limit=1)
    assert [instance.args for instance in task.instances] == [
        ("Anna asked Ruth as Anna", " wanted to wait."),
        ("Anna asked Ruth as Ruth", " wanted to wait."),
    ]


def test_the_harness_own_evaluation_gives_the_same_scores(model: zoo.CausalLM, data: Path) -> None:
    lm = ZooLM(model, batch_size=4)
    names = list(LOCAL_TASKS)
    theirs = evaluate(lm, {"tasks": load_tasks(names, data)}, bootstrap_iters=0)["results"]
    ours = scores(run_harness(lm, "tiny", names, data=data))
    assert len(ours) == 2 + 2 * 5 + 1 + 3
    for score in ours:
        assert score.value == pytest.approx(theirs[score.task][f"{score.metric},none"], rel=1e-6)


def test_wikitext_is_cut_at_its_headings(data: Path) -> None:
    found = list(pages(WIKITEXT + " = = Part = = \n more \n"))
    assert [page.count("keeps") for page in found] == [1, 1, 1]
    assert "Part" in found[-1]
    assert count_items(list(LOCAL_TASKS), data) == 3 + 3 + 2 + 2 + 2 + 2 + 2 + 3
    assert count_items(["hellaswag", "piqa"], data, limit=2) == 4


def test_what_is_done_is_not_computed_again(model: zoo.CausalLM, data: Path) -> None:
    first = list(run_harness(model, "tiny", ["piqa"], data=data, limit=1))
    done = {(x.task, x.item, x.metric) for x in first}
    steps: list[int] = []
    rest = list(run_harness(model, "tiny", ["piqa"], data=data, done=done, advance=steps.append))
    names = [x.item for x in first + rest]
    suffix = names[0].removeprefix("0")
    assert len(suffix) == 9
    assert names == [f"{number}{suffix}" for number in (0, 0, 1, 1)]
    assert sum(steps) == 2
    whole = list(run_harness(model, "tiny", ["piqa"], data=data))
    assert [(x.item, x.metric, x.value) for x in whole] == [
        (x.item, x.metric, x.value) for x in first + rest
    ]
    # Of an item that is half done only the missing half comes.
    half = run_harness(model, "tiny", ["piqa"], data=data, done=done - {("piqa", names[0], "acc")})
    assert [(x.item, x.metric) for x in half][:2] == [(names[0], "acc"), (names[2], "acc")]


def test_a_second_model_gets_the_same_requests(model: zoo.CausalLM, data: Path) -> None:
    shared = Shared()
    for far in (0, 60):
        alone = list(run_harness(model, "it", list(SHORT), data=data, far=far, hay=HAY))
        for _ in range(2):
            both = run_harness(
                model, "it", list(SHORT), data=data, far=far, hay=HAY, shared=shared
            )
            assert list(both) == alone


def test_batches_do_not_change_outcomes(model: zoo.CausalLM, data: Path) -> None:
    runs = [
        list(run_harness(model, "tiny", list(SHORT), data=data, limits=x, far=60, hay=HAY))
        for x in (BatchLimits(), BatchLimits(rows=32), BatchLimits(rows=32, tokens=400))
    ]
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert (one.task, one.item, one.metric) == (other.task, other.item, other.metric)
            exact = one.metric.startswith("acc")
            assert one.value == (other.value if exact else pytest.approx(other.value, rel=1e-5))


@pytest.mark.parametrize(
    ("tasks", "changes", "what"),
    [
        (["piqqa"], {}, "there is no task 'piqqa', but piqa"),
        (["piqa"], {"limit": 0}, "limit must be at least 1, not 0"),
        (["piqa"], {"far": -1}, "far must be at least 0, not -1"),
        (["wikitext"], {"far": 5}, "wikitext is a long text"),
        (["piqa"], {"far": 10**6}, "fewer than the 1000000 of a passage"),
        (["piqa"], {"far": 400, "hay": HAY}, "context of 512; ask for less"),
        (["piqa"], {"data": None, "far": 5}, "give the folder of wikitext2_raw_test"),
    ],
)
def test_mistakes_are_one_line(
    tasks: list[str], changes: dict[str, Any], what: str, model: zoo.CausalLM, data: Path
) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        list(run_harness(model, "tiny", tasks, **({"data": data} | changes)))
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(model: zoo.CausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"piqa needs piqa\.jsonl, or that with \.xz"):
        list(run_harness(model, "tiny", ["piqa"], data=tmp_path))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "piqa.jsonl").write_text('{"question": "?", "choices": ["a", "b"]}\n')
    with pytest.raises(ValueError, match=r"piqa\.jsonl, line 1: no row of piqa .*'label'"):
        list(run_harness(model, "tiny", ["piqa"], data=tmp_path))
    (tmp_path / "eval" / "arc_easy.jsonl.xz").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"is not a whole \.xz file"):
        list(run_harness(model, "tiny", ["arc_easy"], data=tmp_path))
    (tmp_path / "piqa.jsonl.gz").write_bytes(
        bytes.fromhex("1f8b0800000000000003") + b"damaged" * 9
    )
    with pytest.raises(ValueError, match=r"is not a whole \.gz file"):
        list(run_harness(model, "tiny", ["piqa"], data=tmp_path))


def test_a_passage_is_whole_sentences_without_the_answers() -> None:
    texts = UnrelatedText(HAY, 100, seed=3)
    passages = [texts.passage(str(item), ["CACHE", " the sea "]) for item in range(5)]
    assert len(set(passages)) > 3
    for passage in passages:
        assert 100 <= len(passage.split()) < 100 + 12
        assert passage.startswith("Sentence")
        assert passage.endswith(".")
        assert "cache" not in passage
        assert "the sea" not in passage
    assert "cache" in texts.passage("0", ["ache"])  # only whole words
    assert texts.passage("0", []) == UnrelatedText(HAY, 100, seed=3).passage("0", [])
    assert texts.passage("0", []) != UnrelatedText(HAY, 100, seed=4).passage("0", [])
    with pytest.raises(ValueError, match="choose a longer text"):
        texts.passage("0", ["Sentence"])


def test_lines_of_the_text_stay_lines() -> None:
    texts = UnrelatedText("One. Two!\n\nThree\nFour? Five.\n", 5, seed=0)
    assert texts.passage("x", []) in {
        "One. Two!\nThree\nFour? Five.",
        "Two!\nThree\nFour? Five.\nOne.",
        "Three\nFour? Five.\nOne. Two!",
        "Four? Five.\nOne. Two!\nThree",
        "Five.\nOne. Two!\nThree\nFour?",
    }


def test_what_stands_before_a_prompt_is_read(model: zoo.CausalLM, data: Path) -> None:
    runs = {
        (far, seed): list(
            run_harness(model, "tiny", ["lambada_openai"], data=data, far=far, seed=seed, hay=HAY)
        )
        for far, seed in ((0, 0), (0, 1), (60, 0), (60, 1))
    }
    found = {key: values(run, "perplexity") for key, run in runs.items()}
    assert found[0, 0] == found[0, 1]
    assert found[60, 0] != found[60, 1]
    assert found[60, 0] != found[0, 0]


def test_the_names_of_tasks_cost_no_import() -> None:
    heavy = "{'torch', 'lm_eval', 'datasets'} & set(sys.modules)"
    done = python("-c", f"import sys, tools.evaluation.harness; print({heavy})")
    assert done.out.strip() == "set()"
