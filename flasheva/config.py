"""EvaConfig: the static choices of a FlashEVA attention layer.

Sources: FlashEVA (arXiv 2511.00576), EVA (arXiv 2302.04542) and, for the pooled maps, EvaByte.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self, get_args

Window = Literal["sliding", "block"]
SummaryMap = Literal["linear", "layernorm", "pooled"]


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """Which keys a query sees exactly, and how the chunks behind them are summarised.

    Defaults are for converting pretrained models; `EvaConfig.paper()` is the published form.

    Attributes:
        window_size: W, tokens; a multiple of `chunk_size`. A query sees up to W (block) or
            W + P - 1 (sliding) exact keys, itself included.
        chunk_size: P, tokens that share one summary.
        window: "sliding" (the exact window follows the query in steps of P) or "block" (it starts
            at the last multiple of W; the paper's main variant).
        sink_size: S, first tokens of a document that stay exact for ever; a multiple of P, may
            be 0. None, the default, means one chunk.
        summary_map: the maps f_q, f_k from chunk means to summaries: "linear" (identity at the
            start), "layernorm" (LayerNorm(Linear(.)), as published), "pooled" (query-free).
        summary_bias: add a learned bias per query head to the logits of summaries.
        summary_bias_init: its initial value, in units of log(chunk_size).
        training_noise: add N(0, 1) noise clipped to [-1, 1] to omega in training (not pooled).

    Raises:
        ValueError: a value out of range; the message says what was given and what would work.
    """

    window_size: int = 256
    chunk_size: int = 16
    window: Window = "sliding"
    sink_size: int = None  # type: ignore[assignment]  # resolved to an int in __post_init__
    summary_map: SummaryMap = "linear"
    summary_bias: bool = True
    summary_bias_init: float = 0.5
    training_noise: bool = False

    def __post_init__(self) -> None:
        for name in ("window_size", "chunk_size"):
            value = getattr(self, name)
            if not _is_int(value) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.window_size % self.chunk_size:
            raise ValueError(
                f"chunk_size must divide window_size, but {self.chunk_size} does not divide "
                f"{self.window_size}; window_size="
                f"{-(-self.window_size // self.chunk_size) * self.chunk_size} would work"
            )
        if self.sink_size is None:
            object.__setattr__(self, "sink_size", self.chunk_size)
        if not _is_int(self.sink_size) or self.sink_size < 0 or self.sink_size % self.chunk_size:
            raise ValueError(
                f"sink_size must be 0 or a multiple of chunk_size={self.chunk_size}, "
                f"not {self.sink_size!r}"
            )
        for name, kind in (("window", Window), ("summary_map", SummaryMap)):
            value = getattr(self, name)
            if value not in get_args(kind):
                choices = ", ".join(repr(choice) for choice in get_args(kind))
                raise ValueError(f"{name} must be one of {choices}, not {value!r}")
        for name in ("summary_bias", "training_noise"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, not {value!r}")
        if isinstance(self.summary_bias_init, bool) or not isinstance(
            self.summary_bias_init, int | float
        ):
            raise ValueError(f"summary_bias_init must be a number, not {self.summary_bias_init!r}")
        if self.training_noise and self.summary_map == "pooled":
            raise ValueError("training_noise has no effect on pooled maps; set it to false")

    @classmethod
    def paper(cls) -> Self:
        """FlashEVA as published: block window, no sinks, LayerNorm maps, noise, no bias."""
        return cls(
            window="block",
            sink_size=0,
            summary_map="layernorm",
            summary_bias=False,
            training_noise=True,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, object]) -> Self:
        """Builds a config from a TOML table or a JSON object.

        Raises:
            ValueError: an unknown key (the nearest known key is named) or an invalid value.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in fields:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
                raise ValueError(f"unknown EVA option {key!r}{hint}")
        return cls(**fields)  # type: ignore[arg-type]  # __post_init__ checks every type

    def to_dict(self) -> dict[str, object]:
        """The inverse of `from_dict`, JSON-serialisable."""
        return dataclasses.asdict(self)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
