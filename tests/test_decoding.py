"""The decoder steps without waiting for anybody, and chooses what a plain loop would."""

import pytest
import torch
from torch import Tensor

import zoo
from tests.test_cache import tiny
from tests.tiny import make_model, mixed
from zoo.decoding import Decoder, _choose, _compiled_choose, _State
from zoo.prefill import next_logits, piece_size, prefill
from zoo.sampling import Sampling, noise

KINDS = ("eva_attention", "full_attention", "window_attention")
SIZES = {"window_size": 32, "chunk_size": 16}


def decoder(model: zoo.CausalLM, ids: Tensor, lengths: list[int], **options) -> Decoder:
    """After the prefill of rows of these lengths."""
    device = ids.device
    cache = model.new_cache(len(ids), 160)
    logits = prefill(model, ids, torch.tensor(lengths, device=device), cache)
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=device)
    options.setdefault("sampling", Sampling())
    options.setdefault("room", [99] * len(ids))
    result = Decoder(model, cache, seen=seen, **options)
    result.start(logits)
    return result


def collect(steps: Decoder, count: int) -> list[list[int]]:
    """The tokens of each row."""
    taken: list[list[int]] = []
    while len(taken) < count:
        taken += steps.take()
    return [list(row) for row in zip(*taken[:count], strict=True)]


def plain(model: zoo.CausalLM, ids: list[int], count: int, device: str) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids], device=device))[0, -1].argmax())]
    return ids[-count:]


@torch.no_grad()
def test_it_chooses_what_a_plain_loop_would():
    model = make_model(mixed("llama"))
    ids = torch.arange(60).view(2, 30) % model.config.vocab_size
    found = collect(decoder(model, ids, [30, 11]), 12)
    rows = [ids[0].tolist(), ids[1, :11].tolist()]
    assert found == [plain(model, row, 12, "cpu") for row in rows]


@torch.no_grad()
def test_a_row_that_has_ended_stands_still():
    model = make_model(mixed("llama"))
    ids = torch.arange(90).view(3, 30) % model.config.vocab_size
    free = collect(decoder(model, ids, [30] * 3), 12)
    ending = next(token for token in free[1] if token not in free[2])
    steps = decoder(model, ids, [30] * 3, room=[3, 99, 99], eos_ids=(ending,))
    found = collect(steps, 5)
    steps.stop(2)
    found = [a + b for a, b in zip(found, collect(steps, 7), strict=True)]
    at = free[1].index(ending) + 1
    assert [found[0][:3], found[1][:at], found[2][:5]] == [free[0][:3], free[1][:at], free[2][:5]]
    assert steps._cache.length.tolist() == [30 + 2, 30 + at - 1, 30 + 4]


@torch.no_grad()
def test_steps_that_nobody_looked_at_are_passed_over():
    model = make_model(mixed("llama"))
    ids = torch.arange(30)[None] % model.config.vocab_size
    steps = decoder(model, ids, [30])
    steps.step()
    steps.step()
    expected = plain(model, ids[0].tolist(), 4, "cpu")
    assert [row[0] for row in (*steps.take(), *steps.take())] == [expected[0], expected[3]]


@pytest.mark.parametrize("batch_size", [1, 3, 64, 1000, 10**6])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_piece_has_a_bounded_size(batch_size, device):
    size = piece_size(batch_size, torch.device(device))
    assert size % 16 == 0
    assert 64 <= size <= 2048
    assert size == 64 or size * batch_size <= 2**13


def state(B: int, at_once: int, eos: list[int]) -> _State:
    zeros = torch.zeros(B, dtype=torch.int64)
    return _State(
        tokens=zeros.clone(),
        going=torch.ones_like(zeros),
        room=torch.full_like(zeros, 4),
        seen=torch.zeros(B, 50, dtype=torch.bool),
        history=zeros.repeat(at_once, 1),
        slot=torch.zeros(1, dtype=torch.int64),
        eos=torch.tensor(eos, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        pytest.param(Sampling(temperature=0.8), marks=pytest.mark.slow),
        pytest.param(
            Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["greedy", "sampled", "filtered"],
)
@torch.inference_mode()
def test_compiled_choosing_is_eager_choosing(sampling):
    sizes = [(1, 1, [3]), (3, 8, [3, 4]), (5, 8, [3, 9]), (2, 8, [1, 2, 7])]
    rng = torch.Generator().manual_seed(0)
    for number, (B, at_once, eos) in enumerate(sizes):
        ours, theirs = state(B, at_once, eos), state(B, at_once, eos)
        compiled = _compiled_choose(ours, sampling)
        # By the third size of a kind every size has a graph.
        with torch._dynamo.config.patch(error_on_recompile=number == 3):
            for _ in range(9):
                logits = torch.randn(B, 50, generator=rng)
                random = noise(logits, sampling, rng)
                compiled(logits, random, ours, sampling)
                _choose(logits, random, theirs, sampling)
                assert all(map(torch.equal, ours, theirs))
        assert not ours.going.any()


# On a GPU


def fast_and_exact(kinds=KINDS, **sizes) -> tuple[zoo.CausalLM, zoo.CausalLM, zoo.CausalLM]:
    """The kernels and the reference in float32, and the reference in float64."""
    fast = tiny(kinds, torch.float32, impl="auto", **sizes).cuda()
    low = tiny(kinds, torch.float32, **sizes).cuda()
    exact = tiny(kinds, torch.float64, **sizes).cuda()
    for other in (low, exact):
        other.load_state_dict(fast.state_dict())
    return fast, low, exact


def assert_greedy(model: zoo.CausalLM, exact: zoo.CausalLM, ids: Tensor, count: int) -> None:
    """The last `count` of the ids [B, T] are the eager model's own choices at each place.

    Excepted: places where its two largest logits are closer than its own error.
    """
    logits, true = (x(ids)[:, -count - 1 : -1].double() for x in (model, exact))
    error = (logits - true).abs().max()
    top = logits.topk(2).values
    clear = top[..., 0] - top[..., 1] > 2 * error
    assert clear.double().mean() > 0.99
    same = logits.argmax(-1) == ids[:, -count:]
    assert bool((same | ~clear).all())


@pytest.mark.gpu
@torch.no_grad()
def test_compiled_and_captured_steps_make_the_eager_text():
    torch.backends.cuda.matmul.allow_tf32 = False
    fast, low, exact = fast_and_exact(**SIZES)
    prompt = torch.randint(97, (2, 75), generator=torch.Generator().manual_seed(0)).cuda()
    cache = fast.new_cache(2, 640)
    logits = prefill(fast, prompt, torch.full((2,), 75).cuda(), cache)
    seen = torch.zeros(logits.shape, dtype=torch.bool).cuda()
    steps = Decoder(fast, cache, compile=True, sampling=Sampling(), seen=seen, room=[999] * 2)
    steps.start(logits)
    text = torch.tensor(collect(steps, 512)).cuda()
    assert_greedy(low, exact, torch.cat([prompt, text], 1), 512)


@pytest.mark.gpu
@torch.no_grad()
def test_64_ragged_rows_are_64_texts():
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny(KINDS, torch.float32, impl="auto", **SIZES).cuda()
    rng = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 150, (64,), generator=rng).tolist()
    prompts = [torch.randint(97, (n,), generator=rng).tolist() for n in lengths]
    together = zoo.generate(model, prompts, max_new_tokens=40)
    alone = [zoo.generate(model, prompt, max_new_tokens=40)[0].ids for prompt in prompts]
    assert [row.ids for row in together] == alone


@pytest.mark.gpu
@torch.no_grad()
def test_10000_steps_err_as_one_pass_does():
    """Across 312 windows and 625 chunks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    T = 10_000
    fast, low, exact = fast_and_exact(("eva_attention", "window_attention"), **SIZES)
    ids = torch.randint(97, (1, T), generator=torch.Generator().manual_seed(0)).cuda()
    true, at_once = exact(ids)[0], low(ids)[0].double()
    cache, one = fast.new_cache(1, T), torch.ones(1, dtype=torch.int64).cuda()
    steps = torch.cat([next_logits(fast, ids[:, at : at + 1], cache, one) for at in range(T)])
    for part in range(0, T, 1000):
        part = slice(part, part + 1000)
        ours, theirs = ((x[part] - true[part]).norm() for x in (steps.double(), at_once))
        assert ours <= 2 * theirs, (part, float(ours), float(theirs))


@pytest.mark.gpu
def test_after_the_first_texts_nothing_recompiles():
    model = tiny(KINDS, torch.bfloat16, impl="auto", **SIZES).cuda()

    def text(rows: int, length: int) -> None:
        prompts = [[number] * length for number in range(1, rows + 1)]
        zoo.generate(model, prompts, max_new_tokens=30, compile=True)

    # Caches are whole pieces long, and those of 5 rows are shorter: a second size.
    for rows, length in ((1, 20), (2, 20), (3, 50), (5, 20)):
        text(rows, length)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, length in ((1, 99), (5, 33), (6, 40), (7, 200), (2, 20)):
            text(rows, length)


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", [(kind,) for kind in KINDS] + [KINDS], ids=str)
@torch.no_grad()
def test_a_captured_step_chooses_what_a_plain_loop_would(kinds):
    model = tiny(kinds, torch.float32, impl="auto", **SIZES).cuda()
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0)).cuda()
    lengths = [40, 9, 33]
    rows = [row[:n].tolist() for row, n in zip(ids, lengths, strict=True)]
    expected = [plain(model, row, 60, "cuda") for row in rows]
    for at_once in (1, 8):
        found = collect(decoder(model, ids, lengths, steps_at_once=at_once), 60)
        assert found == expected


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_does_not_wait_for_the_gpu():
    model = tiny(KINDS, torch.bfloat16, impl="auto", **SIZES).cuda()
    steps = decoder(model, torch.zeros(2, 20, dtype=torch.long).cuda(), [20, 3])
    steps.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            steps.step()
            steps._enqueue()
        steps._step()  # what was captured
        steps.stop(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@torch.no_grad()
def test_a_seed_repeats_a_captured_text():
    model = tiny(KINDS, torch.bfloat16, impl="auto", **SIZES).cuda()
    ids = torch.zeros(2, 20, dtype=torch.long).cuda()
    texts = [
        collect(decoder(model, ids, [20, 3], sampling=Sampling(temperature=1.0, seed=seed)), 50)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert len({*texts[0][0]}) > 5
