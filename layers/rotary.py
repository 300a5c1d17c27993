"""Rotary position embeddings (RoFormer, arXiv 2104.09864), in the half-split form of GPT-NeoX.

Angles are computed from positions in every call: there is no table to outgrow, and no buffer that
`model.to(torch.bfloat16)` could round.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the low frequencies; field names as in config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """`rope_theta` is the base; only the first `partial_rotary_factor` of each head rotates."""

    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    scaling: Llama3Scaling | None = None

    def __post_init__(self) -> None:
        if not 0 < self.partial_rotary_factor <= 1:
            raise ValueError(
                f"partial_rotary_factor must be above 0 and at most 1, "
                f"not {self.partial_rotary_factor}"
            )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, object], *, partial_rotary_factor: float = 1.0
    ) -> "RopeConfig":
        """Reads `rope_parameters` (transformers 5) or the older fields of a config.json.

        Args:
            config: the whole config.json.
            partial_rotary_factor: the family's default where the file names none.

        Raises:
            ValueError: a kind of scaling that this project does not compute.
        """
        scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(scaling, Mapping):
            raise ValueError(f"rope parameters must be an object, not {scaling!r}")
        # New fields first, then older ones; null counts as absent.
        parts = (config, scaling)
        everything = {k: v for part in parts for k, v in part.items() if v is not None}

        def number(*names: str, default: float | None = None) -> float:
            value = next((everything[name] for name in names if name in everything), default)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"rope parameter {names[0]!r} must be a number, not {value!r}")
            return float(value)

        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ValueError(f"rope type must be 'default' or 'llama3', not {kind!r}")
        return cls(
            rope_theta=number("rope_theta", "rotary_emb_base", default=10000.0),
            partial_rotary_factor=number(
                "partial_rotary_factor", "rotary_pct", default=partial_rotary_factor
            ),
            scaling=None
            if kind == "default"
            else Llama3Scaling(
                factor=number("factor"),
                low_freq_factor=number("low_freq_factor"),
                high_freq_factor=number("high_freq_factor"),
                original_max_position_embeddings=int(number("original_max_position_embeddings")),
            ),
        )

    def to_hf(self) -> dict[str, object]:
        """The `rope_parameters` of a config.json, which `from_hf` reads back."""
        fields: dict[str, object] = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            # Also where it is 1: what names none gets another default in some families.
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        if self.scaling is not None:
            fields |= {"rope_type": "llama3", **self.scaling.__dict__}
        return fields


class RotaryAngles(NamedTuple):
    """cos, sin [B or 1, 1, T, D], and how many dims rotate.

    sin is negative in the first half of these; the dims behind them have cos 1 and sin 0.
    """

    cos: Tensor
    sin: Tensor
    dim: int


def rotary_angles(
    config: RopeConfig, positions: Tensor, head_dim: int, dtype: torch.dtype
) -> RotaryAngles:
    """cos and sin for positions, shared by all layers and heads.

    Args:
        config: base and scaling.
        positions: int [B or 1, T], counted from the start of each token's document.
        head_dim: D.
        dtype: of the result; computed in float32 at least.
    """
    dim = int(head_dim * config.partial_rotary_factor)
    wide = torch.promote_types(dtype, torch.float32)
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=wide) / dim
    frequency = 1.0 / config.rope_theta**exponent
    dim = 2 * len(frequency)  # of an odd number one more
    if config.scaling is not None:
        frequency = _llama3(frequency, config.scaling)
    angle = positions.to(wide).unsqueeze(-1) * frequency
    cos, sin = angle.cos(), angle.sin()
    rest = angle.new_zeros(*angle.shape[:-1], head_dim - dim)
    cos = torch.cat([cos, cos, rest + 1], dim=-1).unsqueeze(1)
    sin = torch.cat([-sin, sin, rest], dim=-1).unsqueeze(1)
    return RotaryAngles(cos.to(dtype), sin.to(dtype), dim)


def apply_rotary(x: Tensor, angles: RotaryAngles) -> Tensor:
    """Rotates the first `angles.dim` dims of x [B, H, T, D]; the rest passes through.

    One formula for all D dims: torch.compile makes one kernel of it, but several of a result that
    is put together from parts.
    """
    half = angles.dim // 2
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return x * angles.cos + torch.cat([second, first, rest], dim=-1) * angles.sin


def _llama3(frequency: Tensor, scaling: Llama3Scaling) -> Tensor:
    # Wavelengths beyond the original context are stretched by `factor`, short ones are kept, and
    # those between are interpolated.
    wavelength = 2 * math.pi / frequency
    original, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
