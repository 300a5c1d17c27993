"""gpu_memory: what this process can still have on a GPU."""

from typing import NamedTuple

import torch


class GpuMemory(NamedTuple):
    """Bytes.

    Attributes:
        new: that the GPU still has for this process, within the share that it may take.
        kept: that PyTorch has and does not use: parts of it may be too small.
    """

    new: int
    kept: int


def gpu_memory(device: torch.device) -> GpuMemory:
    """Of a CUDA device."""
    free, whole = torch.cuda.mem_get_info(device)
    allowed = int(whole * torch.cuda.get_per_process_memory_fraction(device))
    reserved = torch.cuda.memory_reserved(device)
    return GpuMemory(
        new=min(free, allowed - reserved), kept=reserved - torch.cuda.memory_allocated(device)
    )
