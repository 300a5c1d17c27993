"""Pieces of a prompt that are replayed from a graph are those that a plain loop reads."""

import pytest
import torch

from tests.test_cache import tiny
from zoo import captured_piece
from zoo.prefill import compiled_pieces, next_logits, prefill

KINDS = ("eva_attention", "window_attention", "full_attention")
SIZES = {"window_size": 32, "chunk_size": 16, "head_dim": 32}
PIECE = 64  # the least


def read(model, ids, lengths, *, compile: bool):
    """Logits behind the prompts, and behind a further piece."""
    cache = model.new_cache(len(ids), 11 * PIECE)
    run = compiled_pieces(model) if compile else next_logits
    logits = prefill(model, ids, lengths, cache, run, pad=compile, tokens=1)
    assert torch.equal(cache.length, lengths)
    return logits, model(ids[:, :PIECE], cache)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@torch.inference_mode()
def test_pieces_from_a_graph_are_those_of_a_plain_loop(monkeypatch, compile):
    model = tiny(KINDS, torch.bfloat16, impl="auto", **SIZES).cuda()
    ids = torch.randint(97, (5, 10 * PIECE), generator=torch.Generator().manual_seed(0)).cuda()
    # Rows end in pieces before the captured one and behind it.
    lengths = torch.tensor([10 * PIECE, 1, 70, 200, 500]).cuda()
    captures = []
    capture = captured_piece.PieceReader._capture

    def count(self, *args):
        captures.append(1)
        return capture(self, *args)

    monkeypatch.setattr(captured_piece.PieceReader, "_capture", count)
    found = {}
    for through in (False, True):
        monkeypatch.setattr(captured_piece, "gpu_is_through", lambda event, x=through: x)
        found[through] = read(model, ids, lengths, compile=compile)
        assert len(captures) == through
    for captured, plain in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(captured, plain, rtol=0, atol=0)


@pytest.mark.gpu
@torch.inference_mode()
def test_a_prompt_of_few_pieces_is_not_captured(monkeypatch):
    model = tiny(KINDS, torch.bfloat16, impl="auto", **SIZES).cuda()
    monkeypatch.setattr(captured_piece, "gpu_is_through", lambda event: True)
    monkeypatch.setattr(captured_piece.PieceReader, "_capture", None)
    ids = torch.zeros(1, 6 * PIECE, dtype=torch.long).cuda()
    read(model, ids, torch.tensor([6 * PIECE]).cuda(), compile=False)
