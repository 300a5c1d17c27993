"""Generation: greedy text, ragged batches, ends of rows, stop strings, streaming, sampling."""

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import zoo
import zoo.prefill
from flasheva import EvaConfig
from tests.tiny import END, VOCAB_SIZE, make_model, make_tokenizer, mixed, tokenizer_json
from zoo.generation import Prompt
from zoo.prefill import piece_size
from zoo.sampling import Sampling, choose, keep, noise
from zoo.text.stopping import TextUntilStop

Prompts = Prompt | Iterable[Prompt]

# Three layers, one of each type; windows so short that every text crosses many boundaries.
MODELS = {
    "llama": mixed("llama"),
    "gpt_neox": mixed(
        "gpt_neox",
        EvaConfig(
            window="block", window_size=6, chunk_size=3, sink_size=0, summary_map="layernorm"
        ),
    ),
    "phi": mixed("phi", EvaConfig(window_size=4, chunk_size=2, sink_size=6, summary_map="pooled")),
}
RAGGED = [[(7 * i + n) % VOCAB_SIZE for i in range(n)] for n in (1, 40, 3, 4, 17, 8, 9)]


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request: pytest.FixtureRequest) -> zoo.CausalLM:
    return make_model(MODELS[request.param])


@pytest.fixture(scope="module")
def talker() -> zoo.CausalLM:
    """A model with a tokenizer."""
    model = make_model(MODELS["llama"], seed=4)
    model.tokenizer = make_tokenizer()
    return model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def greedy(model: zoo.CausalLM, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    return [row.ids for row in zoo.generate(model, prompts, max_new_tokens=steps)]


# Greedy


@torch.inference_mode()
def test_greedy_tokens_are_the_most_likely_ones_of_full_passes(model: zoo.CausalLM) -> None:
    seen: set[int] = set()
    for prompt in ([5], list(range(5)), list(range(100, 123))):
        ids = list(prompt)
        for _ in range(40):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert greedy(model, [prompt], 40) == [ids[len(prompt) :]]
        seen.update(ids)
    assert len(seen) > 40


def test_a_ragged_batch_gives_what_each_row_gives_alone(
    model: zoo.CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [greedy(model, [prompt], 25)[0] for prompt in RAGGED]
    for piece in (512, 8, 5, 1):  # prompts that are read at once, or piece by piece
        monkeypatch.setattr(zoo.prefill, "piece_size", lambda *_, size=piece: size)
        assert greedy(model, RAGGED, 25) == alone


def test_a_prompt_longer_than_a_piece_gives_what_one_pass_gives() -> None:
    model = make_model(MODELS["llama"] | {"max_position_embeddings": 2048})
    size = 2 * piece_size(3, torch.device("cpu")) + 3
    prompts = [[i * i % VOCAB_SIZE for i in range(n)] for n in (size, 7, size - 3)]
    with torch.inference_mode():
        first = [int(model(torch.tensor([ids]))[0, -1].argmax()) for ids in prompts]
    assert [ids[0] for ids in greedy(model, prompts, 2)] == first


# Ends


def test_a_row_that_ends_early_leaves_the_others_as_they_are(talker: zoo.CausalLM) -> None:
    long = greedy(talker, RAGGED, 40)
    ending = next(token for token in long[1] if token not in long[0])
    at = long[1].index(ending)
    model = make_model(MODELS["llama"], seed=4)
    model.tokenizer = zoo.Tokenizer(
        Backend.from_str(tokenizer_json()), special={"eos_token": END}, eos_ids=[ending]
    )
    rows = zoo.generate(model, RAGGED, max_new_tokens=40)
    assert len({len(row.ids) for row in rows}) > 1
    assert (rows[0].ids, rows[0].finish_reason) == (long[0], "length")
    assert (rows[1].ids, rows[1].finish_reason) == (long[1][: at + 1], "stop")
    for row, prompt, ids in zip(rows, RAGGED, long, strict=True):
        assert row == zoo.generate(model, prompt, max_new_tokens=40)[0]
        assert row.ids == ids[: len(row.ids)]
        assert (row.finish_reason == "stop") == (row.ids[-1] in model.tokenizer.eos_ids)


def test_each_row_stops_at_the_end_of_the_context(model: zoo.CausalLM) -> None:
    prompts = [RAGGED[0], RAGGED[4], RAGGED[5]]
    whole = greedy(model, prompts, 30)
    rows = zoo.generate(model, prompts, max_new_tokens=10, max_seq_len=20)
    assert [len(row.ids) for row in rows] == [10, 3, 10]
    assert [row.ids for row in rows] == [
        ids[: len(row.ids)] for ids, row in zip(whole, rows, strict=True)
    ]
    assert {row.finish_reason for row in rows} == {"length"}
    [full] = zoo.generate(model, [1] * 250)
    assert len(full.ids) == model.config.max_position_embeddings - 250


def test_results_stand_in_the_order_of_the_prompts(talker: zoo.CausalLM) -> None:
    prompts: list[Prompt] = ["The server", [1, 2, 3], "naïve café"]
    rows = zoo.generate(talker, prompts, max_new_tokens=6)
    assert talker.tokenizer is not None
    texts = [talker.tokenizer.encode(text) for text in ("The server", "naïve café")]
    assert [row.prompt_ids for row in rows] == [texts[0], [1, 2, 3], texts[1]]
    assert [row.text for row in rows] == [talker.tokenizer.decode(row.ids) for row in rows]
    assert zoo.generate(talker, "The server", max_new_tokens=6) == rows[:1]
    assert zoo.generate(talker, [1, 2, 3], max_new_tokens=6) == rows[1:2]


# Stop strings and streaming


def test_text_ends_before_a_stop_string_wherever_tokens_meet(talker: zoo.CausalLM) -> None:
    [whole] = zoo.generate(talker, "A cache", max_new_tokens=25)
    assert talker.tokenizer is not None
    pieces = [talker.tokenizer.decode([token]) for token in whole.ids]
    assert sum(len(piece) > 1 for piece in pieces) > 3
    for start in range(3, len(whole.text) - 6, 3):
        stop = whole.text[start : start + 6]  # longer than most tokens
        streamed = "".join(zoo.stream(talker, "A cache", max_new_tokens=25, stop=["zzz", stop]))
        assert streamed == whole.text[: whole.text.index(stop)]
    [row] = zoo.generate(talker, "A cache", max_new_tokens=25, stop=stop)
    assert row.text == streamed
    assert row.finish_reason == "stop"
    assert row.ids == whole.ids[: len(row.ids)]


def test_rows_of_a_batch_stop_each_for_itself(talker: zoo.CausalLM) -> None:
    prompts = ["A cache", "The server", "2048"]
    whole = zoo.generate(talker, prompts, max_new_tokens=20)
    stop = [whole[0].text[8:11], whole[2].text[4:7]]
    rows = zoo.generate(talker, prompts, max_new_tokens=20, stop=stop)
    assert len({row.finish_reason for row in rows}) == 2
    for row, prompt in zip(rows, prompts, strict=True):
        assert [row] == zoo.generate(talker, prompt, max_new_tokens=20, stop=stop)


@pytest.mark.parametrize("seed", range(3))
def test_streamed_pieces_make_up_the_text_of_generate(talker: zoo.CausalLM, seed: int) -> None:
    sampling = Sampling(temperature=1.5, seed=seed)
    pieces = list(zoo.stream(talker, "café", max_new_tokens=60, sampling=sampling))
    [row] = zoo.generate(talker, "café", max_new_tokens=60, sampling=sampling)
    assert "".join(pieces) == row.text
    assert len(pieces) > 10
    assert all(pieces)


class _Pieces:
    """A TextStream whose tokens are their own text."""

    def __init__(self, pieces: Sequence[str], rest: str = "") -> None:
        self.pieces, self.rest = pieces, rest

    def step(self, token: int) -> str:
        return self.pieces[token]

    def flush(self) -> str:
        return self.rest


_SHORT = st.text("abc", max_size=4)


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(_SHORT, max_size=8),
    rest=_SHORT,
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
)
@example(pieces=["aab", "ab"], rest="", stop=["abab"])  # the beginning found first leads nowhere
@example(pieces=["ab"], rest="c", stop=["abc"])  # complete only with what a flush brings
def test_text_until_stop_gives_out_what_is_certain_and_no_more(
    pieces: list[str], rest: str, stop: list[str]
) -> None:
    text = TextUntilStop(_Pieces(pieces, rest), stop)  # type: ignore[arg-type]
    arrived, given_out = "", ""
    for step, piece in enumerate([*pieces, rest]):
        arrived += piece
        given_out += text.step(step) if step < len(pieces) else text.flush()
        found = [arrived.index(s) for s in stop if s in arrived]
        assert text.stopped == bool(found)
        assert text.text == given_out
        if found:
            assert given_out == arrived[: min(found)]
            assert text.flush() == ""  # nothing comes behind a stop string
            return
        held = arrived.removeprefix(given_out)
        assert given_out + held == arrived
        assert held == "" or any(s.startswith(held) and s != held for s in stop)
    assert given_out == arrived


# Sampling


def test_a_seed_gives_the_same_text_again_and_leaves_torch_alone(model: zoo.CausalLM) -> None:
    def draw(seed: int | None) -> list[list[int]]:
        sampling = Sampling(temperature=1.0, seed=seed)
        rows = zoo.generate(model, [[1], [1]], max_new_tokens=20, sampling=sampling)
        return [row.ids for row in rows]

    before = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert first[0] != first[1]
    torch.manual_seed(99)
    assert draw(0) == first
    assert draw(1) != first
    assert draw(None) != draw(None)


def random_logits(batch: int = 16, vocab: int = 300) -> Tensor:
    return 3 * torch.randn(batch, vocab, generator=torch.Generator().manual_seed(0))


FILTERS = {
    "top_k-1": (Sampling(top_k=1), [TopKLogitsWarper(1)]),
    "top_k-40": (Sampling(top_k=40), [TopKLogitsWarper(40)]),
    "top_k-more-than-all": (Sampling(top_k=999), [TopKLogitsWarper(999)]),
    "top_p": (Sampling(top_p=0.8), [TopPLogitsWarper(0.8)]),
    "top_p-tiny": (Sampling(top_p=1e-3), [TopPLogitsWarper(1e-3)]),
    "top_p-all": (Sampling(top_p=1.0), []),
    "min_p": (Sampling(min_p=0.05), [MinPLogitsWarper(0.05)]),
    "min_p-one": (Sampling(min_p=1.0), [MinPLogitsWarper(1.0)]),
    "all": (
        Sampling(top_k=40, top_p=0.9, min_p=0.02),
        [TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_the_tokens_that_transformers_keeps(name: str) -> None:
    sampling, theirs = FILTERS[name]
    logits = random_logits()
    wanted = logits
    for warper in theirs:
        wanted = warper(None, wanted)
    assert torch.equal(keep(logits, sampling), wanted)


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_top_p_that_float32_rounds_to_0_keeps_the_best_token(top_k: int | None) -> None:
    logits = random_logits()
    kept = keep(logits, Sampling(top_k=top_k, top_p=1e-50)).isfinite()
    assert torch.equal(kept, logits == logits.amax(-1, keepdim=True))


def test_the_order_of_filters_matters_and_is_that_of_transformers() -> None:
    logits = random_logits()
    sampling, (top_k, top_p, min_p) = FILTERS["all"]
    assert not torch.equal(keep(logits, sampling), top_k(None, top_p(None, min_p(None, logits))))


def test_large_logits_are_told_apart_as_small_ones_are():
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    logits = (logits * 64).round() / 64  # exact in float32 with the shift
    for sampling in (Sampling(top_p=0.9), Sampling(top_k=50, top_p=0.9)):
        kept = keep(logits, sampling).isfinite()
        assert torch.equal(keep(logits + 2.0**16, sampling).isfinite(), kept)


def test_temperature_divides_before_the_filters() -> None:
    logits = random_logits(batch=1).expand(4000, -1)
    sampling = Sampling(temperature=2.0, top_p=0.5, seed=0)
    drawn = draw(logits, sampling)
    wanted = TopPLogitsWarper(0.5)(None, TemperatureLogitsWarper(2.0)(None, logits[:1]))
    assert set(drawn.tolist()) == set(wanted[0].isfinite().nonzero()[:, 0].tolist())


def draw(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    seen = torch.zeros_like(logits, dtype=torch.bool) if seen is None else seen
    random = noise(logits, sampling, sampling.generator(logits.device))
    return choose(logits, seen, sampling, random)


def test_a_repetition_penalty_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 20, generator=generator)  # of both signs
    ids = torch.randint(0, 20, (400, 12), generator=generator)
    seen = torch.zeros(400, 20, dtype=torch.bool).scatter_(1, ids, True)
    for penalty in (1.3, 0.7):
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits).argmax(-1)
        assert (wanted != logits.argmax(-1)).any()
        assert torch.equal(draw(logits, Sampling(repetition_penalty=penalty), seen), wanted)


def test_repetition_counts_the_prompt_and_the_text(model: zoo.CausalLM) -> None:
    sampling = Sampling(repetition_penalty=1e6)
    prompts = [list(range(20)), [3]]
    for row in zoo.generate(model, prompts, max_new_tokens=60, sampling=sampling):
        together = row.prompt_ids + row.ids
        assert len(set(together)) == len(together)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.5, seed=2),
        Sampling(temperature=2.0, top_k=4, seed=3),
        Sampling(temperature=1.0, top_p=0.7, seed=4),
        Sampling(temperature=1.0, min_p=0.3, seed=5),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_should(sampling: Sampling) -> None:
    logits = torch.tensor([0.3, -1.2, 1.1, 0.0, -3.0, 0.8, 0.79, -0.4])
    n = 40_000
    wanted = n * keep(logits[None] / sampling.temperature, sampling)[0].softmax(-1)
    counts = draw(logits.expand(n, -1), sampling).bincount(minlength=8)
    assert torch.equal(counts > 0, wanted > 0)
    possible = wanted > 0
    chi2 = ((counts - wanted)[possible] ** 2 / wanted[possible]).sum()
    assert chi2 < 26  # 7 degrees of freedom: one seed in 2,000 is worse


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 1e-60])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = 100 * random_logits()
    drawn = draw(logits, Sampling(temperature=temperature, seed=0))
    assert torch.equal(drawn, logits.argmax(-1))


# Mistakes


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt is empty"),
        ([], "there is no prompt; give at least one"),
        (iter(()), "there is no prompt; give at least one"),
        ([[]], "prompt is empty"),
        (None, "prompts must be a text, a list of token ids or a list of these, not None"),
        (5, "a list of these, not 5"),
        (b"abc", "a list of these, not b'abc'"),
        ({"input_ids": [1]}, "a list of these, not {'input_ids': [1]}"),
        (True, "a list of these, not True"),
        ([1.5], "prompt has 1.5 where a token id, an integer, should be"),
        ([None], "prompt has None where a token id"),
        ([1, True], "prompt has True where a token id"),
        (np.array([1.0]), "prompt has 1.0 where a token id"),
        (torch.tensor([True]), "prompt has True where a token id"),
        (["a", None], "prompt 1 must be a text or a list of token ids, not None"),
        ([[1], 2], "prompt 1 must be a text or a list of token ids, not 2"),
        ([[1], ["a"]], "prompt 1 has 'a' where a token id"),
        ([[[1]]], "prompt has [1] where a token id"),
        ([[np.True_]], "True_ where a token id"),
        ([[torch.tensor(1.5)]], "prompt has tensor(1.5000) where a token id"),
        ([[np.zeros((2, 2))]], "prompt has array([["),
        (["a", ""], "prompt 1 is empty"),
        ([[1, 2], [3, VOCAB_SIZE]], f"prompt 1 has token {VOCAB_SIZE}, outside the vocabulary"),
        ([-1], "prompt has token -1, outside the vocabulary of 512"),
        ([1] * 256, "prompt has 256 tokens and leaves no room in a context of 256"),
        ([[1], [1] * 300], "prompt 1 has 300 tokens and leaves no room in a context of 256"),
        ("x" * 2000, "leaves no room in a context of 256"),
    ],
)
def test_a_wrong_prompt_is_refused_in_one_line(
    talker: zoo.CausalLM, prompts: Prompts, message: str
) -> None:
    refused(talker, prompts, message)


def test_arrays_and_iterators_are_prompts(model: zoo.CausalLM) -> None:
    one, two = [3, 1, 4], [1, 5, 9]
    wanted = greedy(model, [one], 3)
    alike: list[Prompts] = [
        np.array(one),
        torch.tensor(one),
        [np.int32(i) for i in one],
        iter(one),
    ]
    for prompt in alike:
        assert [row.ids for row in zoo.generate(model, prompt, max_new_tokens=3)] == wanted
    wanted = greedy(model, [one, two], 3)
    batches: list[Prompts] = [
        np.array([one, two]),
        [torch.tensor(one), torch.tensor(two)],
        (map(np.int64, prompt) for prompt in (one, two)),
    ]
    for prompts in batches:
        rows = zoo.generate(model, prompts, max_new_tokens=3)
        assert [row.ids for row in rows] == wanted
        assert [row.prompt_ids for row in rows] == [one, two]
        assert {type(token) for row in rows for token in row.prompt_ids} == {int}


def test_a_stream_takes_one_prompt(talker: zoo.CausalLM) -> None:
    ids = [3, 1, 4]
    (row,) = zoo.generate(talker, ids, max_new_tokens=5)
    alike: list[Prompt] = [np.array(ids), iter(ids)]
    for prompt in alike:
        assert "".join(zoo.stream(talker, prompt, max_new_tokens=5)) == row.text
    for wrong, message in ((["a", "b"], "'a' where a token id"), (5, "not 5"), ([], "is empty")):
        with pytest.raises(ValueError, match=message):
            zoo.stream(talker, wrong)  # type: ignore[arg-type]


def test_compile_is_one_of_three(talker: zoo.CausalLM) -> None:
    for run in (zoo.generate, zoo.stream):
        with pytest.raises(
            ValueError, match="compile must be False, True or 'prefill', not 'all'"
        ):
            run(talker, [3, 1, 4], compile="all")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="compile must be False, True or 'prefill', not 1"):
            run(talker, [3, 1, 4], compile=1)  # type: ignore[arg-type]


def test_what_is_compiled_has_no_hooks(talker: zoo.CausalLM) -> None:
    """Another model's blocks, without any, may have been compiled before."""
    hook = talker.layers[1].register_forward_hook(lambda module, given, out: -out)
    try:
        for run in (zoo.generate, zoo.stream):
            with pytest.raises(ValueError, match=r"does not go with hooks, which layers\.1 has"):
                run(talker, [3, 1, 4], compile="prefill")
    finally:
        hook.remove()


def test_text_needs_a_tokenizer(model: zoo.CausalLM) -> None:
    refused(model, "text", "this model has no tokenizer; give prompts as lists of token ids")
    both: list[Prompt] = [[1], "text"]
    refused(model, both, "no tokenizer")
    refused(model, [1], "stop strings need a tokenizer", stop=["x"])


def test_wrong_options_are_refused_in_one_line(talker: zoo.CausalLM) -> None:
    refused(talker, "a", "max_new_tokens must be an int of at least 1, not 0", max_new_tokens=0)
    refused(talker, "abc", "leaves no room in a context of 2", max_seq_len=2)
    refused(talker, "abc", "max_seq_len must be an int of at least 1, not 0", max_seq_len=0)
    above = "max_seq_len 257 is above the model's context of 256"
    refused(talker, "abc", above, max_seq_len=257)
    refused(talker, "a", "stop string must not be empty", stop=["x", ""])
    refused(talker, "a", "stop string must not be empty", stop="")


@pytest.mark.parametrize("value", [2.5, 4.0, True, "4", np.True_], ids=repr)
@pytest.mark.parametrize("name", ["max_new_tokens", "max_seq_len", "prefill_tokens"])
def test_a_number_of_tokens_is_an_integer(talker: zoo.CausalLM, name: str, value: object) -> None:
    message = re.escape(f"{name} must be an int of at least 1, not {value!r}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        zoo.generate(talker, [1], **{name: value})  # type: ignore[arg-type]
    if name != "prefill_tokens":
        with pytest.raises(ValueError, match=f"^{message}$"):
            zoo.stream(talker, [1], **{name: value})  # type: ignore[arg-type]


def test_integers_of_numpy_and_torch_are_numbers(talker: zoo.CausalLM) -> None:
    for make in (np.int64, np.uint8, torch.tensor):
        sizes = {"max_new_tokens": make(5), "max_seq_len": make(9), "prefill_tokens": make(64)}
        rows = zoo.generate(talker, RAGGED[:1], **sizes)  # type: ignore[arg-type]
        assert [row.ids for row in rows] == greedy(talker, RAGGED[:1], 5)
    sampling = Sampling(top_k=np.int64(3), seed=np.uint8(4))  # type: ignore[arg-type]
    assert sampling == Sampling(top_k=3, seed=4)
    assert (type(sampling.top_k), type(sampling.seed)) == (int, int)


def test_floats_of_numpy_and_torch_are_compiled_as_plain_ones() -> None:
    given = {"temperature": 0.75, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5}
    logits = random_logits()
    seen, random = torch.zeros_like(logits, dtype=torch.bool), torch.ones_like(logits)
    plain = Sampling(**given)  # type: ignore[arg-type]
    wanted = choose(logits, seen, plain, random)
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    for make in (np.float32, np.float64, torch.tensor):
        made = {name: make(value) for name, value in given.items()}
        sampling = Sampling(**made)  # type: ignore[arg-type]
        assert sampling == plain
        assert {type(getattr(sampling, name)) for name in given} == {float}
        assert torch.equal(compiled(logits, seen, sampling, random), wanted)


def refused(
    model: zoo.CausalLM,
    prompts: Prompts,
    message: str,
    *,
    max_new_tokens: int = 4,
    max_seq_len: int | None = None,
    stop: Sequence[str] = (),
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        zoo.generate(
            model, prompts, max_new_tokens=max_new_tokens, max_seq_len=max_seq_len, stop=stop
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", "0.9"),
        ("repetition_penalty", None),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_k", True),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_sampling_options_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} must be .*, not {re.escape(repr(value))}$"):
        Sampling(**{field: value})  # type: ignore[arg-type]


# Compiled; test_compile.py compares the text of Inductor


# In a process of its own, so that nothing is compiled yet. The eager backend traces as Inductor.
_COMPILE = """
import functools
import torch
torch.compile = functools.partial(torch.compile, backend="eager")
import zoo
from flasheva import EvaConfig
from tests.tiny import hf_config, make_model
torch.set_num_threads(1)
for number, (family, sizes) in enumerate(
    [("llama", (3, 600)), ("gpt_neox", (3,)), ("phi", (3,)), ("llama", (3,))]
):
    eva = EvaConfig(window_size=4 * number + 4, chunk_size=4).to_dict()
    one_layer = {"num_hidden_layers": 1, "layer_types": ["eva_attention"], "eva": eva}
    model = make_model(hf_config(family, max_position_embeddings=1024, **one_layer))
    for size in sizes:
        prompt = [7 * i % 500 for i in range(size)]
        eager = zoo.generate(model, prompt, max_new_tokens=3)
        assert zoo.generate(model, prompt, max_new_tokens=3, compile=True) == eager
"""


@pytest.mark.slow
def test_one_process_compiles_for_caches_of_several_sizes_and_for_several_models() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
