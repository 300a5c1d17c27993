"""Scoring of placements on tiny models: what is shared is the same, and objectives are right."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from recipes.placement import LayerSet
from tests.tiny import FAMILIES, SHORT_WINDOW, VOCAB_SIZE, hf_config, make_model
from tools.evaluation.generating import ModelWriter
from tools.evaluation.record import Record
from tools.evaluation.samples import Sample
from tools.placement.branches import FULL, Branches
from tools.placement.forced import score_together
from tools.placement.gates import GateStep, by_gate, learn_gates, penalty
from tools.placement.objectives import Batch, Divergence, Head, Perplexity, Retrieval
from tools.placement.scoring import Scored, SweepScorer
from tools.placement.sweep import blocks_run, sweep
from tools.scoring.perplexity import measure_perplexity
from tools.scoring.tokens import score_tokens
from zoo import CausalLM

DEPTH = 5
T = 44
PLACEMENTS: list[LayerSet] = [(), (0,), (3,), (0, 3), (2, 4), (0, 3), (0, 1, 2, 3, 4), (4,)]


def config_of(family: str, kinds: Sequence[str]) -> dict[str, object]:
    return hf_config(
        family,
        num_hidden_layers=len(kinds),
        layer_types=list(kinds),
        eva=SHORT_WINDOW.to_dict(),
    )


def make_branches(
    family: str = "llama", kind: str = "eva_attention", dtype: torch.dtype = torch.float32
) -> Branches:
    return Branches(make_model(config_of(family, [kind] * DEPTH), dtype=dtype))


def loaded_with(branches: Branches, family: str, exact: LayerSet) -> CausalLM:
    """The same weights in a model that was built with these layers exact."""
    types = [
        FULL if i in exact else kind for i, kind in enumerate(branches.model.config.layer_types)
    ]
    dtype = branches.model.embed_tokens.weight.dtype
    model = make_model(config_of(family, types), dtype=dtype)
    weights = branches.model.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def ids_of(rows: int = 3, tokens: int = T, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (rows, tokens), generator=torch.Generator().manual_seed(seed))


# What is shared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"]
)
def test_a_sweep_gives_what_each_model_by_itself_gives(
    family: str, dtype: torch.dtype, tolerance: float
) -> None:
    branches, ids = make_branches(family, dtype=dtype), ids_of()
    for rows in (3, 7, 100):
        swept = dict(sweep(branches, ids, PLACEMENTS, rows=rows))
        assert list(swept) == list(range(len(PLACEMENTS)))
        for index, exact in enumerate(PLACEMENTS):
            with torch.inference_mode():
                alone = loaded_with(branches, family, exact).hidden_states(ids)
            error = (swept[index] - alone).norm() / alone.norm()
            assert error < tolerance, (exact, rows)


def test_the_tolerance_tells_placements_apart() -> None:
    found = dict(sweep(make_branches(), ids_of(), PLACEMENTS, rows=8))
    for a, b in itertools.combinations(range(len(PLACEMENTS)), 2):
        if PLACEMENTS[a] != PLACEMENTS[b]:
            assert (found[a] - found[b]).norm() / found[a].norm() > 1e-3


def test_a_sweep_runs_as_many_blocks_as_it_says() -> None:
    branches, ran = make_branches(), 0

    def count(_: object, inputs: tuple[Tensor, ...]) -> None:
        nonlocal ran
        ran += len(inputs[0])

    for block in branches.model.layers:
        block.register_forward_pre_hook(count)
    ids = ids_of(rows=2)
    for placements in (PLACEMENTS, [(layer,) for layer in range(DEPTH)]):
        ran = 0
        list(sweep(branches, ids, placements, rows=5))
        assert ran == 2 * blocks_run(placements, DEPTH)


def test_a_round_of_single_changes_needs_about_half_the_blocks() -> None:
    depth = 30
    singles = [(layer,) for layer in range(depth)]
    # At depth d: d + 1 changed ones, and the unchanged one as long as another is to come of it.
    assert blocks_run(singles, depth) == depth * (depth + 1) // 2 + depth - 1
    assert 1.8 < depth * depth / blocks_run(singles, depth) < 2


@pytest.mark.parametrize("kind", ["eva_attention", "window_attention"])
def test_a_placed_model_is_the_loaded_one_with_its_caches(kind: str) -> None:
    branches, ids = make_branches(kind=kind), ids_of()
    with branches.placed((1, 4)) as model, torch.inference_mode():
        assert model.config.layer_types == (kind, FULL, kind, kind, FULL)
        cache = model.new_cache(3, T)
        pieces = [model(piece, cache) for piece in ids.split(9, dim=1)]
        other = loaded_with(branches, "llama", (1, 4))
        assert cache.nbytes == other.new_cache(3, T).nbytes
        torch.testing.assert_close(torch.cat(pieces, 1), other(ids), rtol=1e-4, atol=1e-4)
    assert set(branches.model.config.layer_types) == {kind}
    with torch.inference_mode():
        bare = loaded_with(branches, "llama", ())
        torch.testing.assert_close(branches.model(ids), bare(ids))


def test_a_model_with_an_exact_layer_is_refused() -> None:
    model = make_model(config_of("llama", ["eva_attention", FULL]))
    with pytest.raises(ValueError, match="has no exact layer"):
        Branches(model)


def test_sharing_changes_no_score() -> None:
    windows = ids_of(rows=5)
    together, alone = (
        SweepScorer(make_branches(), Divergence(windows), batch_size=2, rows=rows, share=share)
        for rows, share in ((8, True), (2, False))
    )
    steps: list[int] = []
    first = list(together(PLACEMENTS, steps.append))
    second = list(alone(PLACEMENTS, steps.append))
    assert sum(steps) == 2 * together.steps(len(PLACEMENTS))
    assert [x.layers for x in first] == PLACEMENTS
    for a, b in zip(first, second, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-5, abs=1e-7)
    assert together.blocks < together.blocks_alone < alone.blocks_alone
    assert alone.blocks >= 3 * DEPTH * len(PLACEMENTS)


# Objectives


def samples() -> list[Sample]:
    """Prompts of two lengths and answers of two sizes."""
    found = []
    for number, (size, answer) in enumerate([(30, 3), (41, 2), (30, 4), (41, 2), (30, 1)]):
        ids = ids_of(1, size + answer, seed=number)[0].tolist()
        found.append(
            Sample(
                task="needle",
                cell={"context": size, "wording": "w", "depth": number / 5},
                item=f"{number}",
                prompt_ids=ids[:size],
                answer_ids=ids[size:],
                answers=("x",),
                max_new_tokens=5,
                match="whole",
            )
        )
    return found


def scores_of(branches: Branches, objective, placements: Sequence[LayerSet]) -> list[Scored]:
    scorer = SweepScorer(branches, objective, batch_size=2, rows=8)
    return list(scorer(placements, lambda steps: None))


def test_retrieval_is_the_log_likelihood_of_answers() -> None:
    branches, asked = make_branches(), samples()
    (scored,) = scores_of(branches, Retrieval(asked), [(1, 3)])
    writer = ModelWriter(loaded_with(branches, "llama", (1, 3)))
    written = [writer.write([x.prompt_ids], 1, [x.answer_ids])[0] for x in asked]
    each = [row.log_likelihood for row in written if row.log_likelihood is not None]
    assert len(each) == 5
    assert scored.score == pytest.approx(sum(each) / 5, rel=1e-5)
    assert (scored.n, set(scored.cells)) == (
        5,
        {"needle, context 30, wording w", "needle, context 41, wording w"},
    )
    short = scored.cells["needle, context 30, wording w"]
    assert short["score"] == pytest.approx((each[0] + each[2] + each[4]) / 3, rel=1e-5)
    deviation = math.sqrt(sum((x - sum(each) / 5) ** 2 for x in each) / 4 / 5)
    assert scored.error == pytest.approx(deviation, rel=1e-4)


def test_an_answer_is_right_when_all_its_tokens_are() -> None:
    branches = make_branches()
    asked = samples()
    # The model's own continuation is right; with its last token changed it is not.
    with branches.placed((2,)) as model:
        prompt = asked[0].prompt_ids
        row = list(prompt)
        for _ in range(3):
            with torch.inference_mode():
                row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
    right = row[len(prompt) :]
    wrong = [*right[:-1], (right[-1] + 1) % VOCAB_SIZE]
    for answer, accuracy in ((right, 1.0), (wrong, 0.0)):
        sample = Sample(**{**vars(asked[0]), "answer_ids": answer})
        (scored,) = scores_of(branches, Retrieval([sample]), [(2,)])
        (cell,) = scored.cells.values()
        assert cell["accuracy"] == accuracy


def test_answers_are_scored_together_and_once(tmp_path: Path) -> None:
    branches, written = make_branches(), []
    # What each placement writes itself is right under it; some of it under another one, too.
    for number, exact in enumerate(PLACEMENTS[:5] * 2):
        with branches.placed(exact) as model, torch.inference_mode():
            row = ids_of(1, 30, seed=number)[0].tolist()
            for _ in range(2):
                row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        values = {"prompt_ids": row[:30], "answer_ids": row[30:], "item": f"{number}"}
        written.append(Sample(**{**vars(samples()[0]), **values}))
    asked = list(dict.fromkeys(PLACEMENTS))

    def score() -> dict[LayerSet, list[float]]:
        records = [(x, Record(tmp_path / f"{x}.jsonl", "m", {"layers": x})) for x in asked]
        score_together(branches, written, records, 3, steps.append)
        return {
            layers: [x.value for x in sorted(record, key=lambda x: int(x.item))]
            for layers, record in records
        }

    steps: list[int] = []
    found = score()
    for layers in asked:
        model = loaded_with(branches, "llama", layers)
        rows = torch.tensor([[*x.prompt_ids, *x.answer_ids] for x in written])
        assert found[layers] == score_tokens(model, rows, first=30).greedy.all(1).tolist()
        assert sum(found[layers]) >= (2 if layers in PLACEMENTS[:5] else 0)
    assert 0 < sum(sum(x) for x in found.values()) < len(asked) * len(written)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "(3,).jsonl").unlink()
    assert score() == found  # the others were not computed again
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert sum(steps) == 2 * len(asked) * len(written)


def test_perplexity_is_that_of_zoo_perplexity() -> None:
    branches, windows = make_branches(), ids_of(rows=5)
    (scored,) = scores_of(branches, Perplexity(windows), [(0, 2)])
    value = measure_perplexity(loaded_with(branches, "llama", (0, 2)), windows).all.value
    assert math.exp(-scored.score) == pytest.approx(value, rel=1e-5)


def test_divergence_is_that_from_the_exact_model() -> None:
    branches, windows = make_branches(dtype=torch.float64), ids_of(rows=3)
    every = branches.layers
    far, near, none = scores_of(branches, Divergence(windows), [(), (1, 2), every])
    assert none.score == pytest.approx(0, abs=1e-12)
    assert far.score < 0
    with torch.inference_mode():
        p, q = (
            loaded_with(branches, "llama", exact)(windows)[:, :-1].log_softmax(-1)
            for exact in (every, (1, 2))
        )
    assert near.score == pytest.approx(-(p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-9)


def test_a_score_that_is_no_number_is_refused() -> None:
    branches = make_branches()
    with torch.no_grad():
        branches.model.embed_tokens.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="not finite"):
        scores_of(branches, Perplexity(ids_of()), [()])


# Gates


class Towards:
    """A score that is highest, 0, where the hidden states are those of one placement."""

    name = "towards"
    needs_all = False

    def __init__(self, branches: Branches, exact: LayerSet) -> None:
        self._ids = ids_of(rows=6)
        with branches.placed(exact) as model, torch.no_grad():
            self._target = model.hidden_states(self._ids)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for ids in self._ids.split(batch_size):
            yield Batch(ids, 1, torch.ones_like(ids[:, 1:], dtype=torch.bool), ["x"] * len(ids))

    def values(
        self, head: Head, batch: Batch, hidden: Tensor, exact: Tensor | None
    ) -> Mapping[str, Tensor]:
        (row,) = (self._ids == batch.ids[0]).all(1).nonzero()[0].tolist()
        target = self._target[row : row + len(batch.ids)]
        return {"score": -(hidden - target).square().mean((1, 2))}


def trained(branches: Branches, objective, steps: int = 30, **options) -> list[GateStep]:
    return list(learn_gates(branches, objective, budget=2, steps=steps, batch_size=3, **options))


@pytest.mark.slow
def test_gates_find_the_layers_that_the_score_asks_for() -> None:
    branches = make_branches()
    for exact in ((0, 3), (1, 4)):
        last = trained(branches, Towards(branches, exact))[-1]
        assert {layer for layer, _ in by_gate(branches.layers, last.gates)[:2]} == set(exact)
        assert sum(last.gates) < 2.2  # they began at 2.5


def test_gates_leave_the_model_as_it_was() -> None:
    branches = make_branches()
    before = {name: p.clone() for name, p in branches.model.named_parameters()}
    trained(branches, Divergence(ids_of()), steps=2)
    for name, parameter in branches.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
    bare = loaded_with(branches, "llama", ())
    with torch.inference_mode():
        torch.testing.assert_close(branches.model(ids_of()), bare(ids_of()))


def test_gates_that_were_stopped_end_as_those_that_were_not() -> None:
    branches = make_branches()
    whole = trained(branches, Perplexity(ids_of(rows=7)), steps=6)
    rest = trained(branches, Perplexity(ids_of(rows=7)), steps=6, done=whole[2])
    assert rest == whole[3:]


def test_the_gradient_of_gates_is_that_of_differences() -> None:
    branches = make_branches(dtype=torch.float64)
    windows = ids_of(rows=2)

    def step(logits: list[float]) -> GateStep:
        zeros = [0.0] * DEPTH
        # Adam without a past moves by the sign of the gradient; its moment has the gradient.
        done = GateStep(0, 0.0, 1.0, logits, zeros, zeros)
        (found,) = learn_gates(
            branches, Perplexity(windows), budget=2, steps=1, batch_size=2, done=done
        )
        return found

    at = [0.3, -0.2, 0.1, 0.0, -0.4]

    def loss(logits: list[float]) -> float:
        gates = torch.tensor(logits, dtype=torch.float64).sigmoid()
        return -step(logits).score + penalty(gates, 2).item()

    gradient = [moment / 0.1 for moment in step(at).first]  # 1 - beta
    for layer in range(DEPTH):
        up, down = list(at), list(at)
        up[layer] += 1e-5
        down[layer] -= 1e-5
        assert gradient[layer] == pytest.approx((loss(up) - loss(down)) / 2e-5, rel=1e-4, abs=1e-8)


def test_the_penalty_grows_over_the_steps() -> None:
    branches = make_branches(dtype=torch.float64)

    def gradient(steps: int) -> Tensor:
        """Of the first of so many steps: Adam's moment has it."""
        found = learn_gates(
            branches, Perplexity(ids_of(rows=2)), budget=2, steps=steps, batch_size=2
        )
        step = next(found)
        return torch.tensor(step.first, dtype=torch.float64) / 0.1  # 1 - beta

    logits = torch.zeros(DEPTH, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(penalty(logits.sigmoid(), 2), logits)
    assert whole.abs().min() > 0.01
    torch.testing.assert_close(gradient(1) - gradient(4), 0.75 * whole)


def test_the_penalty_is_for_gates_that_are_too_many() -> None:
    gates = torch.tensor([1.0, 0.5, 0.5, 0.0])
    assert penalty(gates, 2) == penalty(gates, 3) == 0
    assert penalty(gates, 1) == 1
