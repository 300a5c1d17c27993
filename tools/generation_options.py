"""GenerationOptions: how text is written, for the commands that write some."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tools.options import option

if TYPE_CHECKING:
    from zoo import Sampling

_PANEL = "Generation"


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """The arguments of `zoo.generate` and of `zoo.Sampling`, which check them."""

    max_new_tokens: Annotated[int, option(_PANEL, "At most so many per text.")] = 256
    temperature: Annotated[float, option(_PANEL, "0 takes the most likely token.")] = 0.0
    top_k: Annotated[int | None, option(_PANEL, "Draw from the k most likely tokens.")] = None
    top_p: Annotated[
        float | None,
        option(_PANEL, "Draw from the most likely tokens that together reach this probability."),
    ] = None
    min_p: Annotated[
        float | None,
        option(_PANEL, "Draw from tokens with this fraction of the best one's probability."),
    ] = None
    repetition_penalty: Annotated[
        float, option(_PANEL, "Above 1, tokens that were there already lose.")
    ] = 1.0
    stop: Annotated[
        list[str] | None, option(_PANEL, "A text ends before this string; may be repeated.")
    ] = None
    seed: Annotated[int | None, option(_PANEL, "Of the random numbers.")] = None
    max_seq_len: Annotated[
        int | None,
        option(_PANEL, "Tokens of prompt and text together.", default="the model's context"),
    ] = None
    cache_dtype: Annotated[
        str | None,
        option(
            _PANEL,
            "float8_e4m3fn stores keys, values and summaries in a byte each.",
            default="the dtype of the weights",
        ),
    ] = None
    compile: Annotated[
        bool, option(_PANEL, "Use torch.compile; pays off in long texts.", "--compile")
    ] = False

    def __post_init__(self) -> None:
        # zoo.generate checks these as well, but only once a model is loaded.
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if "" in (self.stop or ()):
            raise ValueError("a stop string must not be empty")

    def sampling(self) -> "Sampling":
        """How the next token is chosen.

        Raises:
            ValueError: an option out of range.
        """
        from zoo import Sampling

        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )
