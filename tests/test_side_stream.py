"""What runs beside attention gives the numbers of what runs behind it, and is begun before it."""

import re
from unittest import mock

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import zoo
from layers import MLP, GatedMLP, ModelCache, beside, side_stream
from tests.tiny import make_model, mixed
from zoo.prefill import compiled_step, next_logits

PARALLEL = ("gpt_neox", "phi")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
ops_everywhere = mock.patch.object(
    side_stream, "_is_step", lambda mlp, x: x.shape[1] == 1 and side_stream._is_plain(mlp)
)


def a_step(family: str, device: str) -> tuple[zoo.CausalLM, torch.Tensor, ModelCache]:
    model = make_model(mixed(family)).to(device)
    ids = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(0)).to(device)
    cache = model.new_cache(3, 64)
    model(ids[:, :-1], cache)
    return model, ids, cache


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("family", PARALLEL)
@torch.no_grad()
def test_a_step_gives_the_numbers_of_one_pass(family, device):
    model, ids, cache = a_step(family, device)
    with ops_everywhere, mock.patch.object(side_stream, "_join", wraps=side_stream._join) as join:
        out = model(ids[:, -1:], cache)
    assert join.call_count == 3
    whole = model(ids)
    assert (out - whole[:, -1:]).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("family", PARALLEL)
@torch.no_grad()
def test_compiled_it_is_begun_before_attention_and_joined_behind_it(family, device):
    model, ids, cache = a_step(family, device)
    one = torch.ones_like(cache.length)
    torch._dynamo.reset()
    with ops_everywhere:
        out, code = run_and_get_code(compiled_step(model, cache), model, ids[:, -1:], cache, one)
    whole = model(ids)
    assert (out - whole[:, -1]).abs().max() <= 1e-5 * whole.abs().max()
    calls = re.findall(r"layers\.(\w+)\.default\(|mm\(\w+, reinterpret_tensor", "".join(code))
    wide = [call for call in calls if call] + [""]
    assert wide == ["mlp_beside", "join"] * 3 + [""]
    # `join` keeps alive what `mlp_beside` reads: of Phi that is also what it claims to write.
    read = re.findall(r"layers\.mlp_beside\.default\(\w+, (\w+),", "".join(code))
    kept = re.findall(r"layers\.join\.default\(\w+, (\w+),", "".join(code))
    assert len(read) == 3
    assert read == kept
    # Between them, the projections before and behind attention at least.
    for begin in (i for i, call in enumerate(calls) if call == "mlp_beside"):
        assert calls[begin + 1 : calls.index("join", begin)].count("") >= 2


def test_only_a_step_on_a_gpu_runs_beside():
    mlp = MLP(8, 16, "gelu")
    x = torch.ones(2, 1, 8)
    with torch.no_grad():
        assert beside(mlp, x, x).begun is None
        torch.testing.assert_close(beside(mlp, x, x).join(x), mlp(x), rtol=0, atol=0)


class Adapted(nn.Linear):
    """As adapters do it."""


def test_what_the_op_would_skip_does_not_run_beside():
    assert side_stream._is_plain(MLP(8, 16, "gelu"))
    assert not side_stream._is_plain(GatedMLP(8, 16, "silu", bias=True))
    adapted = MLP(8, 16, "gelu")
    adapted.down_proj = Adapted(16, 8)
    assert not side_stream._is_plain(adapted)
    for name in ("", "up_proj", "down_proj"):
        for register in ("register_forward_hook", "register_forward_pre_hook"):
            mlp = MLP(8, 16, "gelu")
            handle = getattr(mlp.get_submodule(name), register)(lambda *_: None)
            assert not side_stream._is_plain(mlp)
            handle.remove()
            assert side_stream._is_plain(mlp)


@pytest.mark.gpu
def test_what_must_not_run_beside():
    mlp = MLP(8, 16, "gelu").cuda()
    x = torch.ones(2, 1, 8).cuda()
    assert beside(mlp, x, x).begun is None  # it would have no gradient
    with torch.no_grad():
        begun = beside(mlp, x, x)
        assert begun.begun is not None
        torch.testing.assert_close(begun.join(x), mlp(x))
        assert beside(mlp, *[torch.ones(2, 2, 8).cuda()] * 2).begun is None
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert beside(mlp, x, x).begun is None
        mlp.up_proj = Adapted(8, 16).cuda()
        assert beside(mlp, x, x).begun is None


@pytest.mark.gpu
@torch.no_grad()
def test_memory_is_not_used_again_while_another_stream_reads_it():
    mlp = MLP(64, 64, "gelu").cuda()
    x, other = torch.ones(2, 1, 64).cuda(), torch.zeros(2, 1, 64).cuda()
    expected = mlp(x)
    beside(mlp, x, x).join(x)  # warm
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        out = beside(mlp, x, x).join(x)
        torch.cuda._sleep(10**8)
        found = out + 0
        del out
    with torch.cuda.stream(torch.cuda.Stream()):
        beside(mlp, other, other).join(other)
    torch.cuda.synchronize()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ahead_is_x", [False, True])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_opcheck(device, ahead_is_x):
    x, up, down = torch.randn(2, 1, 8), torch.randn(16, 8), torch.randn(8, 16)
    tensors = [t.to(device) for t in (x, up, torch.randn(16), down, torch.randn(8))]
    ahead = tensors[0] if ahead_is_x else tensors[0] + 1
    torch.library.opcheck(side_stream._begin, (ahead, *tensors, "silu"))
    y = side_stream._begin(ahead, *tensors, "silu")
    torch.library.opcheck(side_stream._join, (y, tensors[0], torch.zeros_like(y)))


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_a_captured_text_is_that_of_the_plain_model(compile):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = make_model(mixed("gpt_neox")).cuda()
    prompts = [[5, 6, 7] * 9, [8, 9]]
    found = zoo.generate(model, prompts, max_new_tokens=60, compile=compile)
    with mock.patch.object(side_stream, "_is_step", return_value=False):
        for row, prompt in zip(found, prompts, strict=True):
            ids = list(prompt)
            cache = model.new_cache(1, 128)
            with torch.inference_mode():
                part = torch.tensor([prompt]).cuda()
                for _ in range(60):
                    count = torch.tensor([part.shape[1]]).cuda()
                    part = next_logits(model, part, cache, count).argmax(-1, keepdim=True)
                    ids.append(int(part))
            assert row.ids == ids[len(prompt) :]
