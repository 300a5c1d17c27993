"""ZooLM: texts to tokens and log-likelihoods, windows, generated texts."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from tests.command_line import ROOT
from tests.harness_inputs import CONTEXT, Knows, tiny
from tests.tiny import VOCAB_SIZE, make_tokenizer

pytest.importorskip("lm_eval", reason="needs the eval extra")

from lm_eval.api.instance import Instance, OutputType
from lm_eval.api.registry import get_model

from tools.evaluation.batches import BatchLimits
from tools.evaluation.harness.model import ZooLM
from tools.evaluation.harness.scoring import Continuation, score_continuations


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model() -> zoo.CausalLM:
    return tiny()


@pytest.fixture(scope="module")
def lm(model: zoo.CausalLM) -> ZooLM:
    return ZooLM(model, batch_size=4)


def request(kind: OutputType, *arguments: object) -> Instance:
    return Instance(kind, {}, arguments, 0)


def direct(model: zoo.CausalLM, context: Sequence[int], tokens: Sequence[int]) -> float:
    """The definition: one row, all logits."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*context, *tokens]]))[0].double().log_softmax(-1)
    first = len(context) - 1
    return sum(logits[first + step, token].item() for step, token in enumerate(tokens))


def test_whitespace_goes_to_the_continuation(lm: ZooLM, model: zoo.CausalLM) -> None:
    encode = make_tokenizer().encode
    whole = encode("A cache waits")
    (moved,) = lm.loglikelihood([request("loglikelihood", "A cache ", "waits")], True)
    context = encode("A cache")
    assert whole[: len(context)] == context
    assert moved[0] == pytest.approx(direct(model, context, whole[len(context) :]), rel=1e-5)
    assert moved == lm.loglikelihood([request("loglikelihood", "A cache", " waits")], True)[0]


def test_context_and_continuation_are_tokenised_together(lm: ZooLM, model: zoo.CausalLM) -> None:
    encode = make_tokenizer().encode
    context, rest = encode("the serv"), "er listens on the loopback"
    whole = encode("the serv" + rest)
    assert whole != context + encode(rest)  # otherwise the test would show nothing
    (found,) = lm.loglikelihood([request("loglikelihood", "the serv", rest)], True)
    expected = direct(model, context, whole[len(context) :])
    assert found[0] == pytest.approx(expected, rel=1e-5)


def test_an_empty_context_is_the_end_token(lm: ZooLM, model: zoo.CausalLM) -> None:
    encode, end = make_tokenizer().encode, lm.prefix_token_id
    assert end == lm.eot_token_id
    (found,) = lm.loglikelihood([request("loglikelihood", "", "A cache")], True)
    assert found[0] == pytest.approx(direct(model, [end], encode("A cache")), rel=1e-5)


def test_a_prompt_that_spells_out_bos_gets_no_second_one() -> None:
    model = tiny()
    tokenizer = model.tokenizer
    assert tokenizer is not None
    tokenizer.bos_id = tokenizer.eos_id
    found: list[tuple[str, bool | None]] = []
    encode = tokenizer.encode

    def watched(text: str, *, add_bos: bool | None = None) -> list[int]:
        found.append((text, add_bos))
        return encode(text, add_bos=add_bos)

    tokenizer.encode = watched  # type: ignore[method-assign]
    lm = ZooLM(model)
    lm.tok_encode("<|endoftext|>A cache")
    lm.tok_encode("A cache")
    lm.tok_encode("A cache", add_special_tokens=False)
    assert [add for _, add in found] == [False, None, False]


def test_long_requests_lose_what_is_leftmost(model: zoo.CausalLM) -> None:
    lm = ZooLM(model, max_length=12)
    ids = make_tokenizer().encode(
        "A cache keeps what was asked before, so that the next reader may wait."
    )
    context, tokens = ids[:-3], ids[-3:]
    assert len(ids) > 13
    (found,) = lm._loglikelihood_tokens([(None, context, tokens)], disable_tqdm=True)
    assert found[0] == pytest.approx(direct(model, ids[-13:-3], tokens), rel=1e-5)
    assert found[0] != pytest.approx(direct(model, context, tokens), rel=1e-5)
    with pytest.raises(ValueError, match="continuation of 13 tokens exceeds the context of 12"):
        lm._loglikelihood_tokens([(None, context, ids[:13])], disable_tqdm=True)


def test_rolling_log_likelihood_is_the_sum_over_windows(model: zoo.CausalLM) -> None:
    text = "The server listens on the loopback address and answers one request after another."
    ids, (size, end) = make_tokenizer().encode(text), (8, 0)
    assert len(ids) % size
    expected = direct(model, [end], ids[:size])
    for first in range(size, len(ids), size):
        last = min(first + size, len(ids))
        # The context of a window: as much as the model reads, at least one token.
        start = min(first - 1, last - 1 - size)
        expected += direct(model, ids[start:first], ids[first:last])
    lm = ZooLM(model, max_length=size, batch_size=3)
    assert lm.eot_token_id == end
    asked = [request("loglikelihood_rolling", given) for given in (text, "", "A cache")]
    found = lm.loglikelihood_rolling(asked, True)
    assert found[0] == pytest.approx(expected, rel=1e-5)
    assert found[1] == 0
    assert found[2] == pytest.approx(direct(model, [end], make_tokenizer().encode("A cache")))


@pytest.mark.parametrize("full", [False, True], ids=["mixed", "full"])
def test_shared_contexts_and_rows_give_what_each_request_gives_alone(full: bool) -> None:
    model = tiny(full)
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB_SIZE, (size,), generator=generator).tolist())

    contexts = [draw(size) for size in (70, 33, 97)]
    requests = [Continuation(context, draw(n)) for context in contexts for n in (5, 1, 19)]
    requests += [Continuation(contexts[0], (*requests[0].tokens[:-1], last)) for last in (7, 8)]
    requests += [Continuation(contexts[1], draw(2)), requests[0], Continuation(draw(50), draw(3))]
    calls: list[int] = []

    def run(shared_context: int, batch_size: int) -> list[tuple[float, bool]]:
        return [
            (score.log_likelihood, score.greedy)
            for score in score_continuations(
                model,
                requests,
                max_length=CONTEXT,
                limits=BatchLimits(rows=batch_size),
                shared_context=shared_context,
                advance=calls.append,
            )
        ]

    expected = [direct(model, request.context, request.tokens) for request in requests]
    for shared_context in (1, 60, CONTEXT + 1):
        for batch_size in (1, 2, 32):
            calls.clear()
            found = run(shared_context, batch_size)
            assert [value for value, _ in found] == pytest.approx(expected, rel=1e-4)
            assert sum(calls) == len(requests)


def test_greedy_is_what_the_model_would_write(model: zoo.CausalLM) -> None:
    lm = ZooLM(model)
    ids = make_tokenizer().encode("A cache keeps")
    (written,) = zoo.generate(model, ids, max_new_tokens=4)
    other = [*written.ids[:-1], (written.ids[-1] + 1) % VOCAB_SIZE]
    found = lm._loglikelihood_tokens([(None, ids, written.ids), (None, ids, other)], True)
    assert [greedy for _, greedy in found] == [True, False]


def test_logits_that_are_not_finite_are_refused(model: zoo.CausalLM) -> None:
    knows = Knows([])
    knows.lm_head = lambda hidden: hidden * math.nan  # type: ignore[method-assign]
    broken: Any = knows
    with pytest.raises(ValueError, match="not finite"):
        ZooLM(broken).loglikelihood([request("loglikelihood", "A", " b")], True)


def test_texts_end_before_their_stop_strings(model: zoo.CausalLM) -> None:
    tokenizer = make_tokenizer()
    prompts = ["A cache keeps", "Numbers such as 31 count", "The server"]
    plain = {
        prompt: zoo.generate(model, tokenizer.encode(prompt), max_new_tokens=24)[0].text
        for prompt in prompts
    }
    asked = [
        request("generate_until", prompt, {"until": stop, "max_gen_toks": 24})
        for prompt in prompts
        for stop in ([], plain[prompts[0]][5:7], [plain[prompts[0]][5:7], ""])
    ]
    for batch_size in (1, 4):
        found = ZooLM(model, batch_size=batch_size).generate_until(asked, True)
        for instance, text in zip(asked, found, strict=True):
            prompt, options = instance.args
            expected = plain[prompt]
            for stop in (
                [options["until"]] if isinstance(options["until"], str) else options["until"]
            ):
                expected = expected.split(stop)[0] if stop else expected
            assert text == expected
    assert len(set(found)) > 3


def test_generation_options_are_the_harness_ones(model: zoo.CausalLM) -> None:
    lm = ZooLM(model, max_length=64)
    long = "A cache keeps what was asked before. " * 30
    ids = make_tokenizer().encode(long)
    (found,) = lm.generate_until([request("generate_until", long, {"max_new_tokens": 16})], True)
    assert found == zoo.generate(model, ids[-48:], max_new_tokens=16)[0].text
    torch.manual_seed(1)
    drawn = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_gen_toks": 16}
    asked = [request("generate_until", long, drawn)]
    assert lm.generate_until(asked, True) != lm.generate_until(asked, True)
    for options, what in (
        ({"num_beams": 4, "max_gen_toks": 8}, "does not have: num_beams"),
        ({"max_gen_toks": 64}, "64 new tokens leave no room in a context of 64"),
    ):
        with pytest.raises(ValueError, match=what):
            lm.generate_until([request("generate_until", "A", options)], True)


def test_the_harness_finds_the_model_by_name(tmp_path: Path) -> None:
    model = tiny()
    zoo.save(model, tmp_path / "saved")
    assert get_model("zoo") is ZooLM
    found = ZooLM.create_from_arg_string(
        f"name={tmp_path / 'saved'}", {"batch_size": "2", "max_batch_size": None, "device": "cpu"}
    )
    asked = [request("loglikelihood", "A cache", " keeps")]
    assert found.loglikelihood(asked, True) == ZooLM(model).loglikelihood(asked, True)
    with pytest.raises(ValueError, match="batch_size must be a number of at least 1, not 'auto'"):
        ZooLM(model, batch_size="auto")
    with pytest.raises(ValueError, match="max_length must be between 1 and 512, not 513"):
        ZooLM(model, max_length=513)


@pytest.mark.slow  # the harness looks for 14,000 tasks first
def test_the_command_line_of_the_harness_knows_the_model(tmp_path: Path) -> None:
    zoo.save(tiny(), tmp_path / "saved")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"asked": "A cache", "told": " keeps"}) + "\n")
    task = {
        "task": "told",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{asked}}",
        "doc_to_target": "{{told}}",
        "metric_list": [{"metric": "perplexity"}],
    }
    (tmp_path / "told.yaml").write_text(json.dumps(task))
    command = [
        "-m",
        "tools.evaluation.harness",
        "--model",
        "zoo",
        "--tasks",
        "told",
        "--device",
        "cpu",
        "--batch_size",
        "2",
    ]
    paths = ("--model_args", f"name={tmp_path / 'saved'}", "--include_path", str(tmp_path))
    done = subprocess.run(
        [sys.executable, *command, *paths, "--output_path", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    (log_likelihood, _), *_ = ZooLM(tiny()).loglikelihood(
        [request("loglikelihood", "A cache", " keeps")], True
    )
    found = json.loads(file.read_text())["results"]["told"]["perplexity,none"]
    assert found == pytest.approx(math.exp(-log_likelihood), rel=1e-4)
