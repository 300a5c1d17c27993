"""Ranks: the processes of a run, and how a model is spread over them.

`torchrun --nproc-per-node N -m tools.finetune ...` starts N; without it there is one, which needs
no process group. One process has one device.

Where a model is small beside its GPU, every process holds all of it and gradients are averaged
(DDP). Where it is large, parameters are sharded (FSDP2: some blocks at a time are whole), unless
the stage aligns attention: its loss calls the attention of a block and not the block, which a
shard would not notice.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from tools.training.memory import state_bytes
from zoo import CausalLM

Parallel = Literal["auto", "ddp", "fsdp"]

_UNIT = 1 << 25  # parameters that are gathered at a time, 134 MB of them


@dataclass(frozen=True)
class Ranks:
    """Which process this is.

    Attributes:
        rank: from 0.
        count: of all processes.
        device: of this one.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, on each of them; in place."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def least(self, value: int) -> int:
        """The smallest of all processes' values, on each of them."""
        if self.count > 1:
            found = torch.tensor(value, device=self.device)
            dist.all_reduce(found, dist.ReduceOp.MIN)
            value = int(found)
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def first_does(self, work: Callable[[], None]) -> None:
        """The first process works, the others wait for it.

        Raises:
            ValueError, OSError: what `work` raised. On the others a ValueError, so that they stop
                too and do not wait for ever.
        """
        failed: Exception | None = None
        if self.first:
            try:
                work()
            except (ValueError, OSError) as error:
                failed = error
        if self.count > 1:
            said = [None if failed is None else str(failed)]
            dist.broadcast_object_list(said, src=0, device=self.device)
            if said[0] is not None and not self.first:
                raise ValueError(f"process 0 stopped: {said[0]}")
        if failed is not None:
            raise failed


def launched() -> tuple[int, int]:
    """This process's rank and how many there are, by torchrun's environment; no group is made."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    return (int(os.environ.get("RANK", "0")) if count > 1 else 0), count


@contextmanager
def joined(device: str | None) -> Iterator[Ranks]:
    """The process group that torchrun describes in the environment, if it does.

    Args:
        device: such as "cpu"; None: CUDA if present. Each process takes the GPU of its local rank.

    Raises:
        ValueError: a device that is not there.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    _, count = launched()
    if count == 1:
        yield Ranks(0, 1, _usable(kind))
        return
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {count}, but LOCAL_RANK is not set; start with torchrun")
    local = int(os.environ["LOCAL_RANK"])
    if kind.startswith("cuda"):
        if kind != "cuda" or local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; start as many processes, with --device cuda"
            )
        kind = f"cuda:{local}"
        torch.cuda.set_device(local)
    own = _usable(kind)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), count, own)
    finally:
        dist.destroy_process_group()


def _usable(kind: str) -> torch.device:
    try:
        return torch.empty(0, device=kind).device
    except (RuntimeError, AssertionError):  # how depends on the kind of device
        raise ValueError(f"this torch cannot use device {kind!r}; try 'cpu' or 'cuda'") from None


def is_sharded(model: CausalLM, parallel: Parallel, ranks: Ranks) -> bool:
    """Whether `shard` is to spread a model over the processes.

    "auto" does so from where weights, gradients and both moments of AdamW would take a quarter of
    the memory of the process that has least. Below that, sharding saves little and costs the host
    tens of milliseconds a step (docs/conversion.md, "Several GPUs").

    Args:
        model: `requires_grad` says what trains.
        parallel: "ddp" and "fsdp" leave nothing to decide.
        ranks: the processes.
    """
    if ranks.count == 1 or parallel != "auto":
        return ranks.count > 1 and parallel == "fsdp"
    if ranks.device.type == "cuda":
        memory = torch.cuda.get_device_properties(ranks.device).total_memory
    else:  # the processes of a machine share it
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count))
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // beside
    held = sum(state_bytes(model).values())
    return held > ranks.least(memory) // 4  # all must come to the same


def shard(model: CausalLM) -> None:
    """Spreads the parameters over all processes, in place: FSDP2, a unit of blocks at a time.

    Call it when `requires_grad` is settled and before an optimizer is made. What is outside of
    blocks (embedding, norm, head) belongs to the model, is gathered for `hidden_states` and stays
    whole until the backward pass has ended, so that losses can read `lm_head.weight` behind it.
    """
    for unit in _units([*model.layers]):
        fully_shard(unit)
    fully_shard(model)
    register_fsdp_forward_method(model, "hidden_states")


def _units(blocks: list[nn.Module]) -> list[list[nn.Module]]:
    """Neighbours that are gathered together: as few as `_UNIT` asks for, and all but equal.

    Every unit costs the host milliseconds a step, for collectives and for views of parameters.
    """
    size = sum(p.numel() for block in blocks for p in block.parameters())
    count = min(len(blocks), math.ceil(size / _UNIT))
    edges = [len(blocks) * i // count for i in range(count + 1)]
    return [blocks[first:last] for first, last in itertools.pairwise(edges)]


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be sharded, whole on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by name, whole and on the CPU; all processes must call it."""
    return {name: whole(p.detach()).cpu() for name, p in model.named_parameters()}
