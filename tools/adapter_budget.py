"""Trials: which encoding of an adapter keeps most of a fine-tuning in a number of bytes."""

import bisect
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tools.display import progress
from zoo import CausalLM
from zoo.adapters import changed_matrices, encode_model
from zoo.weights.encoding import Encoding, Entry, decode, encode_difference, plan, singular_vectors

# What adapter_config.json and the header of adapter.safetensors say of a tensor, of a part of one
# and of a checksum, at most, beside the name.
_ENTRY, _PART, _CHECKSUM = 150, 120, 30

_FACTORS = ("float16", "int8", "int4")


class Trial(NamedTuple):
    """What an encoding costs.

    `lost` is |D - D'| / |D|, of all matrices that changed together, where D is what differs from
    the base and D' what is left of it.
    """

    encoding: Encoding
    bytes: int
    lost: float


class Trials:
    """Encodings of one fine-tuned model; arguments as `zoo.save_adapter`."""

    def __init__(self, model: CausalLM, base: CausalLM) -> None:
        whole = encode_model(model, base, Encoding(kind="whole"), {})
        self._entries = {name: each.entry for name, each in whole.items()}
        of_base = {name: p.detach().cpu() for name, p in base.named_parameters()}
        self._matrices: dict[str, tuple[Tensor, Tensor]] = {
            model.hf_name(name): (model.get_parameter(name).detach().cpu(), of_base[name])
            for name in changed_matrices(model, base)
        }
        self._checksums = sum(len(base.hf_name(name)) + _CHECKSUM for name in of_base)

    def candidates(self, most_bytes: int) -> list[Encoding]:
        """Those that fit: low rank, of the highest rank that does, and the whole difference.

        Raises:
            ValueError: nothing fits.
        """
        found = [Encoding.parse(text) for text in ("whole", "int8", "int4")]
        found = [encoding for encoding in found if self.bytes(encoding) <= most_bytes]
        for stored in _FACTORS:
            highest = max((min(weight.shape) for weight, _ in self._matrices.values()), default=0)
            every = [Encoding.parse(f"low_rank:{i + 1}:{stored}") for i in range(highest)]
            fits = bisect.bisect_right(every, most_bytes, key=self.bytes)
            found += every[:fits][-1:]
        if not found:
            smallest = self.bytes(Encoding.parse("low_rank:1:int4"))
            raise ValueError(
                f"nothing fits into {most_bytes:,} bytes; low_rank:1:int4 takes {smallest:,}"
            )
        return found

    def bytes(self, encoding: Encoding) -> int:
        """Of an adapter's two files, at most, without making it."""
        total = self._checksums
        for name, entry in self._entries.items():
            if name in self._matrices:
                weight, _ = self._matrices[name]
                entry = plan(tuple(weight.shape), encoding, weight.dtype)
            total += _bytes(name, entry)
        return total

    def run(self, encodings: Sequence[Encoding]) -> list[Trial]:
        """Encodes every matrix in all of these ways, and decodes it again."""
        change, lost = 0.0, [0.0] * len(encodings)
        with progress("matrices", len(self._matrices)) as advance:
            for weight, base in self._matrices.values():
                vectors = singular_vectors(weight, base)
                change += float((weight.double() - base.double()).square().sum())
                for index, encoding in enumerate(encodings):
                    encoded = encode_difference(weight, base, encoding, vectors)
                    again = decode(encoded.entry, encoded.parts.__getitem__, base.clone)
                    lost[index] += float((weight.double() - again.double()).square().sum())
                advance(1)
        return [
            Trial(encoding, self.bytes(encoding), math.sqrt(error / change) if change else 0.0)
            for encoding, error in zip(encodings, lost, strict=True)
        ]


def _bytes(name: str, entry: Entry) -> int:
    parts = entry.parts()
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in parts.values())
    return size + _ENTRY + len(name) + sum(_PART + len(name + end) for end in parts)


def lost(model: CausalLM, loaded: CausalLM, base: CausalLM) -> dict[str, tuple[int, float]]:
    """What an adapter has lost, by kind of parameter ("q_proj.weight").

    Args:
        model: what was saved.
        loaded: what `zoo.load` makes of the adapter.
        base: without EVA.

    Returns:
        How many tensors changed, and |D - D'| / |D| of them together.
    """
    sums: dict[str, Tensor] = {}
    of_base, again = dict(base.named_parameters()), dict(loaded.named_parameters())
    for name, tensor in model.named_parameters():
        old = of_base.get(name)
        if old is None or ".attend." in name:
            continue
        wide, new = tensor.detach().double(), again[name].detach().double()
        change = (wide - old.detach().double()).square().sum()
        error = (wide - new).square().sum()
        if change > 0:
            kind = ".".join(name.split(".")[-2:])
            counted = torch.stack((torch.ones_like(change), change, error))
            sums[kind] = sums.get(kind, torch.zeros_like(counted)) + counted
    return {
        kind: (int(count), math.sqrt(error / change))
        for kind, (count, change, error) in ((k, v.tolist()) for k, v in sums.items())
    }
