"""Filling a model that was built on the meta device, with every tensor accounted for."""

from collections.abc import Sequence

import torch
from torch import nn

from layers import EvaAttention
from zoo.causal_lm import CausalLM
from zoo.weights.checkpoint import TensorSource

_INITIALIZER_RANGE = 0.02  # of all three families
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fill(
    model: CausalLM,
    tensors: TensorSource,
    saved_layer_types: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    source: str,
) -> list[int]:
    """Gives every parameter its tensor, or the initial value of a layer converted just now.

    Args:
        model: built on the meta device.
        tensors: the checkpoint's, under published names.
        saved_layer_types: those that the checkpoint was saved with.
        device, dtype: of the parameters.
        source: names the checkpoint in errors.

    Returns:
        The layers whose EVA parameters the checkpoint does not have.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, by name.
    """
    parameters = dict(model.named_parameters())
    names = {model.hf_name(name): name for name in parameters}
    keys = set(tensors.keys())
    missing, unexpected = names.keys() - keys, keys - names.keys()
    untrained = []
    for layer, kind in enumerate(model.config.layer_types):
        was_eva = saved_layer_types[layer] == "eva_attention"
        prefix = model.hf_name(f"layers.{layer}.attention.attend.")
        if kind == "eva_attention" and not was_eva:
            untrained.append(layer)
            missing = {name for name in missing if not name.startswith(prefix)}
        elif was_eva and kind != "eva_attention":
            unexpected = {name for name in unexpected if not name.startswith(prefix)}
    unexpected = {name for name in unexpected if not name.endswith(model.ignored_suffixes)}
    head, embedding = model.hf_name("lm_head.weight"), model.hf_name("embed_tokens.weight")
    twice = model.config.tie_word_embeddings and head in unexpected and embedding in keys
    # Some writers store a tied matrix twice; two different ones would not be tied.
    if twice and torch.equal(tensors.load(head), tensors.load(embedding)):
        unexpected.remove(head)
    for what, wrong in (("lacks", missing), ("has unexpected", unexpected)):
        if wrong:
            raise ValueError(f"{source} {what} {len(wrong)} tensor(s): {_some(wrong)}")
    for hf_name, name in names.items():
        shape = tuple(parameters[name].shape)
        if hf_name in keys and tensors.shape(hf_name) != shape:
            raise ValueError(
                f"{source}: {hf_name} has shape {list(tensors.shape(hf_name))}, "
                f"but the config asks for {list(shape)}"
            )
        if hf_name in keys and tensors.dtype(hf_name) not in _DTYPES:
            raise ValueError(
                f"{source}: {hf_name} is {tensors.dtype(hf_name)}; quantised weights are not read"
            )
    state = {
        name: tensors.load(hf_name).to(device=device, dtype=dtype)
        for hf_name, name in names.items()
        if hf_name in keys
    }
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    # The published and pooled maps start at random: the same on every load and every device.
    # Not torch.manual_seed, which seeds all GPUs too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        for layer in untrained:
            attend = model.get_submodule(f"layers.{layer}.attention.attend")
            assert isinstance(attend, EvaAttention)
            attend.to_empty(device="cpu").reset_parameters()
            attend.to(device, dtype)
    return untrained


@torch.no_grad()
def fill_random(model: CausalLM, device: torch.device, dtype: torch.dtype) -> None:
    """Initial weights as for training from scratch, from torch's current random state."""
    model.to_empty(device=device).to(dtype)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0, _INITIALIZER_RANGE)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.reset_parameters()
    for module in model.modules():
        if isinstance(module, EvaAttention):  # its Linears too, which were just overwritten
            module.reset_parameters()


def _some(names: set[str], limit: int = 4) -> str:
    listed = sorted(names)
    more = f", and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
