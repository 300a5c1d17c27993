"""FLOPs of a token in training, and the share of what a GPU could do (MFU, arXiv 2204.02311).

A product with a matrix of n numbers is 2 n FLOPs a token forward and 4 n backward (2 n where the
matrix does not train). Attention of a layer is 4 H D FLOPs for every pair of a query and what it
sees forward, and 10 H D backward. What is computed once more, under activation checkpointing or
inside kernels, does not count.
"""

import torch
from torch import nn

from recipes import Stage
from tools.benchmarks.roofline import causal_config, visible_pairs
from zoo import CausalLM

# Dense matrix products in bfloat16, FLOPs per second, from the makers' data sheets.
_PEAK = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def flops_per_token(student: CausalLM, teacher: CausalLM | None, stage: Stage) -> float:
    """Of a step, the teacher's pass included; rows are taken as one document each.

    Of an alignment, where the student's MLPs and head do not run, it counts attention only.
    """
    head = any(name != "attention_mse" for name in stage.weights)
    aligned = "attention_mse" in stage.weights
    total = 0.0
    for name, module in student.named_modules():
        if not isinstance(module, nn.Linear) or ".attend." in name:
            continue
        inside = ".attention." in name
        passes = (head or inside) + (head and aligned and inside)
        numbers = module.weight.numel()
        total += passes * numbers * (6 if module.weight.requires_grad else 4)
    total += (1 if head else 0) * _attention(student, stage.context, 14)
    total += (1 if aligned else 0) * _attention(student, stage.context, 14)
    if teacher is not None:
        passes = ("logit_kl" in stage.weights) + aligned
        numbers = sum(m.weight.numel() for m in teacher.modules() if isinstance(m, nn.Linear))
        total += passes * (2 * numbers + _attention(teacher, stage.context, 4))
    return total


def peak_flops(device: torch.device) -> float | None:
    """What a data sheet says of bfloat16 products, FLOPs per second; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAK.items() if part in name), None)


def _attention(model: CausalLM, context: int, flops: int) -> float:
    """FLOPs per token of all layers; `flops` per pair, head and dim."""
    config = model.config
    pairs = 0
    for kind in config.layer_types:
        full = kind == "full_attention"
        # Window layers see no summaries; these are few, and counted.
        pairs += visible_pairs(causal_config(context) if full else config.eva, context)
    return flops * config.num_attention_heads * config.head_dim * pairs / context
