"""A capture uses the GPU that it is for, and one that fails leaves nothing behind."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import zoo
from tests.test_cache import tiny
from zoo.graph_capture import capture_stream, capturing
from zoo.prefill import prefill

SIZES = {"window_size": 32, "chunk_size": 16}


@pytest.fixture
def fake_cuda(monkeypatch):
    """Streams that know their GPU, and the streams that were captured on."""
    used = []

    @contextmanager
    def graph(graph, *, pool, stream):
        used.append(stream.device)
        yield

    replaced = {
        "Stream": lambda device: SimpleNamespace(device=device),
        "current_stream": lambda device: None,
        "graph_pool_handle": lambda: (0, 1),
        "graph": graph,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    capture_stream.cache_clear()
    yield used
    capture_stream.cache_clear()


def test_each_gpu_has_a_stream_for_its_captures(fake_cuda):
    gpus = [torch.device("cuda", index) for index in (0, 1, 0)]
    for gpu in gpus:
        with capturing(None, gpu):
            pass
    assert fake_cuda == gpus


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_next_text_as_it_was(monkeypatch):
    model = tiny(dtype=torch.float32, impl="auto", **SIZES).cuda()
    before = torch.cuda.current_stream()
    expected = zoo.generate(model, [1, 2, 3], max_new_tokens=20)[0].ids

    def broken(*args):
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError
        return choose(*args)

    choose = zoo.decoding._choose
    with monkeypatch.context() as patch:
        patch.setattr(zoo.decoding, "_choose", broken)
        with pytest.raises((torch.OutOfMemoryError, RuntimeError)):
            zoo.generate(model, [1, 2, 3], max_new_tokens=20)
    assert torch.cuda.current_stream() == before
    torch.cuda.empty_cache()
    assert zoo.generate(model, [1, 2, 3], max_new_tokens=20)[0].ids == expected


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.inference_mode()
def test_two_gpus_write_the_same_text(monkeypatch):
    monkeypatch.setattr(zoo.captured_piece, "gpu_is_through", lambda event: True)
    model = tiny(dtype=torch.float32, impl="auto", **SIZES)
    found = []
    for gpu in ("cuda:0", "cuda:1"):
        model.to(gpu)
        ids = torch.arange(640, device=gpu)[None] % 97
        cache = model.new_cache(1, 704)
        logits = prefill(model, ids, torch.tensor([640], device=gpu), cache, tokens=1)
        text = zoo.generate(model, [1, 2, 3], max_new_tokens=20)[0].ids
        found.append((logits.cpu(), text))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
