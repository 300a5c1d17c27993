"""The engines that `zoo bench decode` and `zoo bench batch` compare, and their models."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from tools.benchmarks.common import chosen, words
from tools.benchmarks.names import DtypeName
from tools.options import ChunkSize, WindowSize

if TYPE_CHECKING:
    import torch

    from tools.benchmarks.decode import Job
    from zoo import CausalLM

EngineName = Literal["eva", "full", "transformers_static", "transformers_default"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One engine, one model, one size."""

    engine: str
    base: str
    job: "Job"
    exact: tuple[int, ...]
    eva: tuple[int, int]
    dtype: str
    prefill_chunk: int | None

    @property
    def impl(self) -> str:
        """As rows call it."""
        return {"eva": "zoo_eva", "full": "zoo_full"}.get(self.engine, self.engine)

    @property
    def static(self) -> bool:
        """Whether transformers has its static cache."""
        return self.engine == "transformers_static"

    @property
    def name(self) -> str:
        """As tables call it."""
        return f"{self.engine}, {len(self.exact)} full" if self.exact else self.engine

    @property
    def case(self) -> dict[str, object]:
        """Of a row."""
        job = self.job
        case: dict[str, object] = {
            "model": self.base,
            "batch": job.batch_size,
            "prompt": job.prompt,
            "new": job.new,
            "dtype": self.dtype,
        }
        if self.engine == "eva":
            layers = ",".join(map(str, self.exact)) or "none"
            case |= {"W": self.eva[0], "P": self.eva[1], "layers": layers}
        if self.engine in ("eva", "full"):
            case["compile"] = job.compile
        else:
            case["prefill_chunk"] = self.prefill_chunk or "none"
        return case


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engines, and how."""

    impl: Annotated[
        list[str] | None,
        typer.Option(
            "--impl",
            metavar="NAME",
            help=f"{words(EngineName)}: EVA in every layer, full attention in our engine, and "
            "transformers with a static cache, compiled, or its default one; may be repeated.",
            show_default="all",
        ),
    ] = None
    layers: Annotated[
        list[str] | None,
        typer.Option(
            help="Of eva: the layers with full attention, such as 7,17-18, or none; may be "
            "repeated.",
            show_default="none",
        ),
    ] = None
    window_size: WindowSize = 256
    chunk_size: ChunkSize = 16
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Of transformers: read prompts in pieces of this size, as ours always are.",
            show_default="whole prompts",
        ),
    ] = None
    dtype: Annotated[DtypeName, typer.Option(help="Of weights and caches.")] = "bfloat16"

    def check(self, bases: list[str]) -> None:
        """Raises ValueError for what cannot be, or belongs to an engine that is not asked for."""
        engines = self.engines
        for base in bases:
            check_base(base)
            for text in self.layers or ():
                layers_of(base, text)
        if self.layers and "eva" not in engines:
            raise ValueError("--layers is of the engine eva: ask for it, or leave --layers out")
        if self.prefill_chunk is not None:
            if self.prefill_chunk < 1:
                raise ValueError(f"--prefill-chunk must be at least 1, not {self.prefill_chunk}")
            if not any(engine.startswith("transformers") for engine in engines):
                raise ValueError("--prefill-chunk is of transformers' engines: ask for one")

    @property
    def engines(self) -> tuple[str, ...]:
        """Those asked for."""
        return chosen("--impl", self.impl, get_args(EngineName))

    def runs(self, base: str, job: "Job") -> Iterator[Run]:
        """Of each engine one; of eva one for each choice of layers."""
        for engine in self.engines:
            for text in self.layers or ["none"] if engine == "eva" else ["none"]:
                yield Run(
                    engine=engine,
                    base=base,
                    job=job,
                    exact=layers_of(base, text),
                    eva=(self.window_size, self.chunk_size),
                    dtype=self.dtype,
                    prefill_chunk=self.prefill_chunk,
                )


def check_base(name: str) -> None:
    """Raises ValueError unless the name is that of a base."""
    from zoo.registry import BASES

    if name not in BASES:
        raise ValueError(f"--model must be one of {', '.join(BASES)}, not {name!r}")


def _published(base: str) -> tuple[str, ...]:
    from zoo.description import describe

    return describe(base, weights="random").layer_types


def layers_of(base: str, text: str) -> tuple[int, ...]:
    """What `--layers` says: layers of the base with full attention."""
    from recipes import exact_layers, parse_layers, sliding_layers

    if text == "none":
        return ()
    published = _published(base)
    return exact_layers(parse_layers(text), len(published), sliding_layers(published))


def load_ours(run: Run, dtype: str, device: "torch.device") -> "CausalLM":
    """The model of our engines, always with the same random weights."""
    import torch

    import zoo
    from flasheva import EvaConfig
    from recipes import layer_types, sliding_layers

    published = _published(run.base)
    depth = len(published)
    exact = run.exact if run.engine == "eva" else range(depth)
    types = layer_types(exact, depth, "eva_attention", sliding_layers(published))
    torch.manual_seed(0)
    return zoo.load(
        run.base,
        weights="random",
        dtype=dtype,
        device=device,
        layer_types=types,
        eva=EvaConfig(window_size=run.eva[0], chunk_size=run.eva[1]),
    )


def load_transformers(base: str, length: int, dtype: str, device: "torch.device") -> Any:  # noqa: ANN401
    """transformers' own model of a base, with random weights and room for `length` tokens."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from zoo.config import to_hf
    from zoo.description import describe

    fields = to_hf(describe(base, weights="random"), {}, dtype)
    fields["max_position_embeddings"] = max(length, 2048)
    with torch.device(device):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**fields), dtype=getattr(torch, dtype)
        )
    return theirs.eval()
