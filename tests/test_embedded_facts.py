"""The embedded model finds facts of a story that are told beyond its window (docs/embedded.md).

Nothing of a prompt was trained on but the wordings: stories are held out, facts are drawn. An
answer is right when each of its tokens is the most likely one, behind those before it.
"""

import functools
import socket
from pathlib import Path

import pytest
import torch

import zoo
from tools.evaluation.recall import RECALL
from tools.evaluation.recall.facts import distances
from tools.evaluation.recall.fillers import text_filler
from tools.evaluation.recall.request import DEPTH_BINS, Request
from tools.evaluation.samples import Sample, grade
from tools.placement.objectives import Retrieval

STORIES = Path(__file__).parent / "data" / "held_out_stories.jsonl.xz"
CONTEXT, PROMPTS = 256, 60  # seconds on a CPU; 15 prompts in each of four parts of distance


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@functools.cache
def load(name: str, weights: str = "auto") -> zoo.CausalLM:
    return zoo.load(name, weights=weights, dtype="float32")


@functools.cache
def samples(context: int = CONTEXT, n: int = PROMPTS) -> list[Sample]:
    tokenizer = load("tiny").tokenizer
    assert tokenizer is not None
    request = Request(
        tokenizer=tokenizer,
        contexts=(context,),
        n=n,
        seed=0,
        split="search",
        repeated=(),
        prose=(text_filler(STORIES),),
    )
    return list(RECALL["facts"].draw(request))


@torch.inference_mode()
def found(model: zoo.CausalLM, prompts: list[Sample]) -> float:
    """The part of the answers that are right, in one forward pass each."""
    objective = Retrieval(prompts)
    right = [
        objective.values(model.lm_head, batch, model.hidden_states(batch.ids), None)["accuracy"]
        for batch in objective.batches(8)
    ]
    return float(torch.cat(right).mean())


def exact(*layers: int) -> zoo.CausalLM:
    """The base with nothing trained: these layers exact, EVA in the others."""
    types = ["full_attention" if i in layers else "eva_attention" for i in range(8)]
    eva = zoo.describe("tiny-eva").eva
    return zoo.load("tiny", eva=eva, layer_types=types, dtype="float32")


def test_prompts_reach_beyond_the_window_and_their_answers_do_not() -> None:
    eva = zoo.describe("tiny-eva-hybrid").eva
    window = eva.window_size + eva.chunk_size
    assert distances(CONTEXT)[0] >= window
    tokenizer = load("tiny").tokenizer
    assert tokenizer is not None
    assert len({tuple(sample.prompt_ids) for sample in samples()}) == PROMPTS
    for sample in samples():
        assert sample.answers[0] in tokenizer.decode(sample.prompt_ids)
        assert sample.answers[0] not in tokenizer.decode(sample.prompt_ids[-window:])


@pytest.mark.parametrize("name", ["tiny", "tiny-eva-hybrid"])
def test_full_attention_and_the_hybrid_find_facts_beyond_the_window(name: str) -> None:
    assert found(load(name), samples()) >= 0.95


def test_without_an_exact_layer_it_finds_many_and_not_all() -> None:
    assert 0.5 <= found(load("tiny-eva"), samples()) <= 0.9


@pytest.mark.slow
def test_what_finds_them_is_the_base_and_its_last_layer() -> None:
    """So the claims above can fail: with other weights, or other exact layers, they do.

    Bounds for exact layers are two prompts of 16 away from what is found.
    """
    few = samples()[:16]
    assert found(load("tiny", "random"), few) == 0
    assert found(load("tiny-eva", "published"), few) <= 0.2  # what its training brings
    assert found(exact(7), few) >= 0.75
    assert found(exact(*range(7)), few) <= 0.5  # all but the last
    assert found(exact(2, 6), few) <= 0.625  # evenly placed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("tiny", 0.95, 1), ("tiny-eva-hybrid", 0.95, 1), ("tiny-eva", 0.45, 0.85)],
)
def test_the_same_over_the_whole_context(name: str, least: float, most: float) -> None:
    """Of 200 such prompts `tiny-eva` finds 0.67; bounds are some three standard errors of 40."""
    assert least <= found(load(name), samples(1024, 40)) <= most


def test_the_hybrid_writes_the_answer_through_its_cache() -> None:
    """One prompt of each part of distance, read in pieces that end within chunks."""
    few = samples()[:DEPTH_BINS]
    for sample, result in zip(
        few,
        zoo.generate(
            load("tiny-eva-hybrid"),
            [sample.prompt_ids for sample in few],
            max_new_tokens=few[0].max_new_tokens,
            prefill_tokens=len(few) * 50,
        ),
        strict=True,
    ):
        assert grade(result.text, sample.answers, sample.match) == 1


@torch.inference_mode()
def test_pieces_steps_and_packed_rows_of_the_hybrid_are_the_row_itself() -> None:
    """In float64, where only the order of sums is left to differ."""
    model = zoo.load("tiny-eva-hybrid", dtype="float64")
    ids = torch.tensor([samples()[0].prompt_ids[:200]])
    whole = model(ids)
    cache = model.new_cache(1, 200)
    pieces = [model(piece, cache) for piece in ids.split([90, 13, 1, 1, 95], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
    other = torch.tensor([samples()[1].prompt_ids[:96]])
    starts = torch.tensor([[0] * 96 + [96] * 200])
    packed = model(torch.cat([other, ids], 1), seq_start=starts)
    torch.testing.assert_close(packed[:, 96:], whole, rtol=0, atol=1e-9)


@torch.inference_mode()
@pytest.mark.slow
def test_the_training_of_a_conversion_brings_it_nearer_to_the_base() -> None:
    """KL of the next token, on stories that are held out."""
    ids = torch.tensor([sample.prompt_ids[:240] for sample in samples()[:8]])

    def log_probabilities(model: zoo.CausalLM) -> torch.Tensor:
        return model(ids).float().log_softmax(-1)

    base = log_probabilities(load("tiny"))
    for name in ("tiny-eva", "tiny-eva-hybrid"):
        trained, untrained = (
            float((base.exp() * (base - log_probabilities(load(name, weights)))).sum(-1).mean())
            for weights in ("auto", "published")
        )
        assert trained < untrained / 2
