"""matrix_flops: as many matrix products as PyTorch counts; peak_flops: by what they run in."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flasheva import EvaConfig
from recipes import Stage
from tests.tiny import hf_config, make_model
from tools.training.objective import Objective
from tools.training.parameters import prepare
from tools.training.speed import matrix_flops, peak_flops

EVA = EvaConfig(window_size=8, chunk_size=4)
KINDS = ["eva_attention", "full_attention", "eva_attention"]
B, T = 2, 64


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize(
    ("loss", "train"),
    [
        ("cross_entropy", "*"),
        ("logit_kl", "*"),
        ("attention_mse", "*.attention.*"),
        ("attention_mse", "*"),
        ("attention_mse logit_kl", "*"),
    ],
)
def test_products_with_matrices_are_those_that_run(family, loss, train):
    losses = tuple((name, 1.0) for name in loss.split())
    stage = Stage(name="a", loss=losses, train=(train,), steps=1, lr=1.0, batch_size=B, context=T)
    student, teacher = (
        make_model(hf_config(family, layer_types=kinds, eva=EVA.to_dict()))
        for kinds in (KINDS, ["full_attention"] * 3)
    )
    prepare(student, stage)
    objective = Objective(student, teacher.requires_grad_(False), stage)
    ids = torch.randint(0, 500, (B, T), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        total, _ = objective(ids, ids, torch.zeros(B, T, dtype=torch.int32))
        total.backward()
    found = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in found.items() if str(op) in ("aten.mm", "aten.addmm"))
    # Maps of summaries, a hundredth here, are left out.
    ours = matrix_flops(student, teacher, stage)
    assert ours == pytest.approx(products / (B * T), rel=0.02)


@pytest.mark.parametrize(
    ("name", "peaks"),
    [
        ("NVIDIA H200", (989e12, 494e12, 67e12)),
        ("NVIDIA H100 PCIe", (756e12, 378e12, 51e12)),
        ("NVIDIA Something New", (None, None, None)),
    ],
)
def test_the_peak_is_that_of_what_products_run_in(monkeypatch, name, peaks):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device, before = torch.device("cuda"), torch.get_float32_matmul_precision()
    bfloat16, tf32, float32 = peaks
    try:
        for precision, of_float32 in (("highest", float32), ("high", tf32), ("medium", tf32)):
            torch.set_float32_matmul_precision(precision)
            assert peak_flops(device, "bfloat16") == bfloat16
            assert peak_flops(device, "float32") == of_float32
            assert peak_flops(torch.device("cpu"), "float32") is None
    finally:
        torch.set_float32_matmul_precision(before)
