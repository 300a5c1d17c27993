"""What a measurement needs of a model, and what it depends on, for `append_result`'s rows."""

from typing import TYPE_CHECKING

from recipes import is_converted
from tools.model_options import layers_by_type

if TYPE_CHECKING:
    from flasheva import Impl
    from zoo import CausalLM, Tokenizer


def tokenizer_for_rows(name: str, model: "CausalLM", tokens: int) -> "Tokenizer":
    """The tokenizer of a model that can read rows of so many `tokens`.

    Raises:
        ValueError: the model has no tokenizer, or its context is shorter.
    """
    longest = model.config.max_position_embeddings
    if tokens > longest:
        raise ValueError(f"rows of {tokens} tokens exceed {name}'s context of {longest}")
    if model.tokenizer is None:
        raise ValueError("this measurement needs a tokenizer, which the model does not have")
    return model.tokenizer


def model_case(name: str, model: "CausalLM") -> dict[str, object]:
    """The model's part of a row's `case`: weights, dtype, the attention of each layer."""
    config = model.config
    case: dict[str, object] = {
        "model": name,
        "weights_source": model.weights_source,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
        "layers": layers_by_type(config.layer_types),
    }
    if is_converted(config.layer_types):
        case["eva"] = config.eva.to_dict()
    return case


def implementation(model: "CausalLM", impl: "Impl", tokens: int) -> str:
    """The row's `impl`: what computes rows of so many `tokens` in layers without full attention.

    "sdpa" for a model that has no such layers.
    """
    import torch

    from flasheva import resolve_impl

    config, weight = model.config, model.embed_tokens.weight
    if set(config.layer_types) == {"full_attention"}:
        return "sdpa"
    shape = (1, config.num_attention_heads, tokens, config.head_dim)
    q = torch.empty(1, dtype=weight.dtype, device=weight.device).expand(shape)
    with torch.inference_mode():
        return resolve_impl(q, config.eva, impl)
