"""measure_tiles: one kernel of flasheva/triton with one tile after another, by itself.

How the tiles of flasheva/triton/tiles.py were found. A tile's answers are compared with those of
the tile that is in use before it is timed. Dims: as inputs.py.

flasheva/triton is imported in functions: this module must import where there is no Triton.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from flasheva import EvaConfig
from tools.benchmarks.correctness import relative_error
from tools.benchmarks.inputs import Inputs
from tools.benchmarks.timing import Timing, free_memory, measure_replay, measure_time

if TYPE_CHECKING:
    from flasheva.triton.call import Call
    from flasheva.triton.forward import Summaries
    from flasheva.triton.tiles import SummaryTile, Tile

Kernel = Literal["forward", "queries", "keys", "summaries", "summary_forward", "summary_backward"]
# Relative, four roundings of bfloat16: sums in another order round otherwise.
_TOLERANCE = 2**-7


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one tile.

    Attributes:
        tile: what was tried.
        timing: None unless its answers were right.
        reason: why there is none, one line.
    """

    tile: "Tile | SummaryTile"
    timing: Timing | None = None
    reason: str = ""


def parse_tile(kernel: Kernel, text: str) -> "Tile | SummaryTile":
    """Reads "BLOCK_M,BLOCK_N,WARPS,STAGES[,REGISTERS]", or "CHUNKS,TOKENS,WARPS" of summaries.

    Raises:
        ValueError: other than so many positive numbers.
    """
    from flasheva.triton.tiles import SummaryTile, Tile

    words = text.split(",")
    summary = kernel.startswith("summary_")
    lengths = (3,) if summary else (4, 5)
    if len(words) not in lengths or not all(w.isdecimal() and int(w) for w in words):
        example = "16,4,4" if summary else "64,32,4,3 or 64,32,4,3,96"
        raise ValueError(f"a tile of {kernel} is written such as {example}, not {text!r}")
    numbers = [int(word) for word in words]
    return SummaryTile(*numbers) if summary else Tile(*numbers)


def measure_tiles(
    config: EvaConfig,
    x: Inputs,
    kernel: Kernel,
    tiles: Sequence["Tile | SummaryTile"],
    repetitions: int | None,
) -> Iterator[Trial]:
    """Tries the tile in use, then `tiles`; on a GPU with CUDA graphs and a cold L2 cache.

    Args:
        config: the rule.
        x: tensors of the call.
        kernel: which one.
        tiles: what to try.
        repetitions: as `measure_time`.
    """
    runs = _Runs(config, x)
    in_use = runs.tile(kernel)
    expected = runs.prepared(kernel, in_use)()
    for tile in (in_use, *tiles):
        run = runs.prepared(kernel, tile)
        try:
            wrong = _compare(run(), expected)
            measure = measure_replay if x.q.is_cuda else measure_time
            timing = None if wrong else measure(run, x.q.device, repetitions)
            yield Trial(tile=tile, timing=timing, reason=wrong or "")
        # A tile may need more shared memory than there is; that must not end the search.
        except Exception as error:
            yield Trial(
                tile=tile, reason=" ".join(f"{type(error).__name__}: {error}".split())[:200]
            )
        free_memory(x.q.device)


def _compare(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    for name, value in expected.items():
        error = relative_error(found[name], value)
        if not error <= _TOLERANCE:  # NaN must not pass
            return f"{name} differs from that of the tile in use by {error:.2g}"
    return None


class _Runs:
    """All that the kernels of one call read, computed once with the tiles in use."""

    def __init__(self, config: EvaConfig, x: Inputs) -> None:
        from flasheva.triton import backward
        from flasheva.triton.call import Maps, call_of

        q_map, k_map = x.maps
        weights = [q_map.weight, q_map.bias, k_map.weight, k_map.bias]
        rule = (config.window_size, config.chunk_size, config.sink_size, config.window)
        self.call = call_of(x.q, x.k, None, *rule)
        self.x = x
        self.maps = Maps.of("linear", weights)
        k_rfa, v_rfa, self.norms, q_mean, k_mean, omega = self._summaries(self.call)
        self.inputs = backward.Inputs(
            do=x.do,
            q=x.q,
            k=x.k,
            v=x.v,
            bias=x.bias,
            seq_start=None,
            lse=(empty := x.q.new_empty(0)),
            delta=empty,
            k_rfa=k_rfa,
            v_rfa=v_rfa,
            q_mean=q_mean,
            k_mean=k_mean,
            omega=omega,
            maps=self.maps,
            kind="linear",
        )
        out, lse = self._attend(self.call)
        delta = backward.output_dot(self.call, out, x.do)
        self.inputs = replace(self.inputs, lse=lse, delta=delta)
        self.grads = backward.summary_gradients(self.call, self.inputs)
        self.to = backward.through_summaries(self.call, self.inputs, *self.grads)

    def tile(self, kernel: Kernel) -> "Tile | SummaryTile":
        """The one in use."""
        if kernel == "summary_forward" or kernel == "summary_backward":
            return self.call.summary_tile("linear")
        return self.call.tile(kernel)

    def prepared(
        self, kernel: Kernel, tile: "Tile | SummaryTile"
    ) -> Callable[[], Mapping[str, Tensor]]:
        """A launch of the kernel that gives its results by name."""
        from flasheva.triton import backward
        from flasheva.triton.tiles import SummaryTile

        key = "summary" if isinstance(tile, SummaryTile) else kernel
        c = replace(self.call, chosen={key: tile})
        x, to = self.inputs, self.to
        run: dict[Kernel, Callable[[], tuple[Tensor, ...]]] = {
            "forward": lambda: self._attend(c),
            "queries": lambda: backward.query_gradients(c, x, to)[:1],
            "keys": lambda: backward.key_gradients(c, x, *self.grads, to),
            "summaries": lambda: backward.summary_gradients(c, x),
            "summary_forward": lambda: self._summaries(c)[:2],
            "summary_backward": lambda: backward.through_summaries(c, x, *self.grads)[4:8],
        }
        return lambda: {f"result {i}": y for i, y in enumerate(run[kernel]())}

    def _summaries(self, c: "Call") -> "Summaries":
        from flasheva.triton import forward

        return forward.summaries(
            c, self.x.q, self.x.k, self.x.v, "linear", self.maps, None, save=True
        )

    def _attend(self, c: "Call") -> tuple[Tensor, Tensor]:
        from flasheva.triton import forward

        x = self.x
        k_rfa, v_rfa = self.inputs.k_rfa, self.inputs.v_rfa
        tokens, summaries = (x.q, x.k, x.v), (k_rfa, v_rfa, self.norms)
        return forward.attend(c, *tokens, *summaries, x.bias, None, None, 0, save=True)


KERNELS: tuple[Kernel, ...] = get_args(Kernel)
