"""Losses of fine-tuning over models that FSDP2 has sharded: the weights that they read are there.

One process is enough: its weights are DTensors too, and an operator refuses them beside others.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from recipes import LossName, Stage
from tests.tiny import SHORT_WINDOW, hf_config, make_model, mixed
from tools.training import ranks
from tools.training.alignment import Alignment
from tools.training.losses import Teacher, head_losses
from tools.training.objective import Objective
from zoo import CausalLM

BOTH: dict[LossName, float] = {"logit_kl": 0.7, "cross_entropy": 0.3}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def pair() -> tuple[CausalLM, CausalLM]:
    student, teacher = (
        make_model(values, dtype=torch.float64)
        for values in (
            mixed("llama", tie_word_embeddings=True),
            hf_config("llama", tie_word_embeddings=True),
        )
    )
    return student, teacher.requires_grad_(False)


class Distill(nn.Module):
    """Both models and their losses: what `fully_shard` is to take as the root."""

    def __init__(self, student: CausalLM, teacher: CausalLM) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = Teacher(self.teacher.hidden_states(ids), self.teacher.lm_head)
        hidden, labels = self.student.hidden_states(ids), ids.roll(-1, 1)
        found = head_losses(hidden, self.student.lm_head, labels, weights=BOTH, teacher=teacher)
        return found.objective.mean


class Align(Distill):
    """The same for alignment."""

    def forward(self, ids: Tensor) -> Tensor:
        with Alignment(self.student, self.teacher) as alignment:
            return alignment.loss(ids).mean


@pytest.mark.parametrize("kind", [Distill, Align])
def test_a_sharded_model_has_the_gradients_of_a_whole_one(
    kind: type[Distill], mesh: DeviceMesh
) -> None:
    ids = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(0))
    plain, sharded = kind(*pair()), kind(*pair())
    for block in sharded.student.layers:
        if kind is Align:  # which calls these two, and not the block
            fully_shard([block.input_layernorm, block.attention], mesh=mesh)  # type: ignore[list-item]
        fully_shard(block, mesh=mesh)
    for block in sharded.teacher.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for _ in range(2):  # weights are gathered, and let go, once more
        for module in (plain, sharded):
            module.zero_grad()
            module(ids).backward()
        for (name, one), other in zip(
            plain.student.named_parameters(), sharded.student.parameters(), strict=True
        ):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None and other.grad is not None:
                whole = other.grad.full_tensor()  # type: ignore[attr-defined]
                torch.testing.assert_close(whole, one.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("unit", [1, 13_000, 1 << 25])
def test_units_of_several_blocks_have_the_gradients_of_a_whole_model(
    unit: int, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_UNIT", unit)
    ids = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(0))
    (plain, teacher), (sharded, _) = pair(), pair()
    units = ranks._units([*sharded.layers])
    assert [block for each in units for block in each] == [*sharded.layers]
    size = sum(p.numel() for p in sharded.layers.parameters())
    assert len(units) == min(len(sharded.layers), math.ceil(size / unit))
    assert max(map(len, units)) - min(map(len, units)) <= 1
    ranks.shard(sharded)
    for _ in range(2):
        for model in (plain, sharded):
            model.zero_grad()
            Distill(model, teacher)(ids).backward()
        for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None), name
            if one.grad is not None:
                found = ranks.whole(other.grad)  # type: ignore[arg-type]
                torch.testing.assert_close(found, one.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("unit", [1, 1 << 25])
def test_parts_of_a_sharded_run_are_compiled_once_for_all_layers(
    unit: int, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_UNIT", unit)
    ids = torch.randint(100, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = ids, ids.roll(-1, 1), torch.zeros_like(ids)
    stage = Stage(name="s", loss=tuple(BOTH.items()), train=("*",), steps=1, lr=1.0)
    counts = []
    for layers in (5, 12):  # graphs of one function may be 8
        types = ["eva_attention", "full_attention", *["eva_attention"] * (layers - 2)]
        fields = {"num_hidden_layers": layers, "eva": SHORT_WINDOW.to_dict()}
        full = hf_config("llama", layer_types=["full_attention"] * layers, **fields)
        teacher = make_model(full, dtype=torch.float64).requires_grad_(False)
        gradients, counter = [], CompileCounter()
        for compiled in (False, True):
            values = hf_config("llama", layer_types=types, **fields)
            student = make_model(values, seed=1, dtype=torch.float64)
            objective = Objective(student, teacher, stage)
            if compiled:
                ranks.shard(student)
                objective.compile_parts(counter, sharded=True)
            objective(*batch)[0].backward()
            gradients.append(
                {
                    n: ranks.whole(p.grad)
                    for n, p in student.named_parameters()
                    if p.grad is not None
                }
            )
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-13)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_all_processes_have_the_least_of_their_values(tmp_path: Path) -> None:
    spawn(_least, (f"file://{tmp_path}/store",), nprocs=2)


def _least(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store, rank=rank, world_size=2)
    mine = (3 << 40) + rank  # bytes, more than an int32 has
    assert ranks.Ranks(rank, 2, torch.device("cpu")).least(mine) == 3 << 40
    dist.destroy_process_group()


def test_only_models_that_are_large_beside_the_memory_are_sharded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(mixed("llama"))
    model.embed_tokens.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = 4 * sum(p.numel() for p in model.parameters()) + 12 * trained
    two = ranks.Ranks(0, 2, torch.device("cpu"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    other = 8 * held  # of the other process's machine
    monkeypatch.setattr(ranks.Ranks, "least", lambda self, value: min(value, other // 2))
    for pages, large in ((8 * held, False), (8 * held - 8, True)):  # of a byte, for both processes
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": pages, "SC_PAGE_SIZE": 1}.get)
        assert ranks.is_sharded(model, "auto", two) == large
        assert ranks.is_sharded(model, "fsdp", two)
        assert not ranks.is_sharded(model, "ddp", two)
        for parallel in ("auto", "ddp", "fsdp"):
            assert not ranks.is_sharded(model, parallel, ranks.Ranks(0, 1, torch.device("cpu")))
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 800 * held, "SC_PAGE_SIZE": 1}.get)
    assert not ranks.is_sharded(model, "auto", two)
    other -= 8
    assert ranks.is_sharded(model, "auto", two)  # as in the other process
