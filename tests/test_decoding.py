"""The decoder steps without waiting for anybody, and chooses what a plain loop would."""

import pytest
import torch
from torch import Tensor

import zoo
from tests.test_cache import tiny
from tests.tiny import make_model, mixed
from zoo.decoding import Decoder
from zoo.prefill import piece_size, prefill
from zoo.sampling import Sampling

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
    assert 16 <= size <= 2048
    assert size == 16 or size * batch_size <= 2**15


# On a GPU


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
