"""FLOPs of a token in training, and the share of what a GPU could do (MFU, arXiv 2204.02311).

A product with a matrix of n numbers is 2 n FLOPs a token forward and 4 n backward (2 n where the
matrix does not train). Attention of a layer is 4 H D FLOPs for every pair of a query and what it
sees forward, and 10 H D backward. What is computed once more, under activation checkpointing or
inside kernels, does not count. Layers that slide in the published model are taken for windows of
EVA's size.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from recipes import Stage, StageDtype
from tools.benchmarks.roofline import causal_config, visible_pairs
from tools.training.alignment import aligned_layers
from zoo import CausalLM


class _Peak(NamedTuple):
    """Dense matrix products of a kind, FLOPs per second."""

    bfloat16: float
    tf32: float
    float32: float


# From the makers' data sheets.
_PEAK = {
    "A100": _Peak(312e12, 156e12, 19.5e12),
    "H100 PCIe": _Peak(756e12, 378e12, 51e12),
    "H100": _Peak(989e12, 494e12, 67e12),
    "H200": _Peak(989e12, 494e12, 67e12),
    "L40S": _Peak(362e12, 183e12, 91.6e12),
    "RTX 4090": _Peak(165e12, 82.6e12, 82.6e12),
}


def flops_per_token(student: CausalLM, teacher: CausalLM | None, stage: Stage) -> float:
    """Of a step, the teacher's passes included; rows are taken as one document each."""
    return matrix_flops(student, teacher, stage) + attention_flops(student, teacher, stage)


def matrix_flops(student: CausalLM, teacher: CausalLM | None, stage: Stage) -> float:
    """The part of products with matrices."""
    total = 0.0
    if stage.weights.keys() - {"attention_mse"}:
        total += sum(n * (6 if trains else 4) for _, n, trains in _matrices(student))
    if teacher is None:
        return total
    run = _run(student, teacher, stage)
    for name, numbers, _ in _matrices(teacher):
        runs = name.startswith("layers.") and int(name.split(".")[1]) in run
        if runs or "logit_kl" in stage.weights:
            total += 2 * numbers
    if "attention_mse" not in stage.weights:
        return total
    layers = aligned_layers(student, teacher)
    for name, numbers, trains in _matrices(student):
        layer, _, inside = name.removeprefix("layers.").partition(".attention.")
        if inside and int(layer) in layers:
            # The norm in front reads the teacher's hidden state, which needs no gradient.
            norm = student.get_submodule(f"layers.{layer}.input_layernorm")
            reached = any(parameter.requires_grad for parameter in norm.parameters())
            gradient = reached or inside in ("o_proj", "dense")
            total += numbers * (2 + 2 * gradient + 2 * trains)
    return total


def attention_flops(student: CausalLM, teacher: CausalLM | None, stage: Stage) -> float:
    """The part of attention's logits and weighted sums."""
    total = 0.0
    everything = range(student.config.num_hidden_layers)
    if stage.weights.keys() - {"attention_mse"}:
        total += _attention(student, everything, stage.context, 14)
    if teacher is None:
        return total
    total += _attention(teacher, _run(student, teacher, stage), stage.context, 4)
    if "attention_mse" in stage.weights:
        total += _attention(student, aligned_layers(student, teacher), stage.context, 14)
    return total


def peak_flops(device: torch.device, dtype: StageDtype) -> float | None:
    """What a data sheet says of products as a stage of `dtype` computes them, FLOPs per second.

    Of float32 that is TF32 where PyTorch may use it now. None if it is not known.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in _PEAK.items() if part in name), None)
    if peak is None or dtype == "bfloat16":
        return None if peak is None else peak.bfloat16
    # Not `allow_tf32`, which may be read only where nothing has set this.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return peak.tf32 if tf32 else peak.float32


def _run(student: CausalLM, teacher: CausalLM, stage: Stage) -> range:
    """The layers that the teacher runs: once, whatever is compared with it."""
    if "logit_kl" in stage.weights:
        return range(teacher.config.num_hidden_layers)
    if "attention_mse" in stage.weights:
        return range(max(aligned_layers(student, teacher), default=-1) + 1)
    return range(0)


def _matrices(model: CausalLM) -> Iterator[tuple[str, int, bool]]:
    """Name, numbers and whether it trains, of every matrix that all tokens go through."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".attend." not in name:
            yield name, module.weight.numel(), module.weight.requires_grad


def _attention(model: CausalLM, layers: Iterable[int], context: int, flops: int) -> float:
    """FLOPs per token of layers; `flops` per pair, head and dim."""
    config = model.config
    pairs = 0
    for layer in layers:
        full = config.layer_types[layer] == "full_attention"
        # Window layers see no summaries; these are few, and counted.
        pairs += visible_pairs(causal_config(context) if full else config.eva, context)
    return flops * config.num_attention_heads * config.head_dim * pairs / context
