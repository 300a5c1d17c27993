"""`zoo perplexity`: of text files, in windows that are scored alone."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recipes import is_converted
from tools.display import print_json, progress
from tools.entry import command_line, run_command
from tools.measurement import implementation, model_case, tokenizer_for_rows
from tools.model_options import AttentionOptions, RuntimeOptions, SourceOptions, load_model
from tools.options import DEFAULT_MODEL, BatchSize, Json, ModelName, Out, with_options
from tools.results import append_result, check_outputs, device_name
from tools.text_files import name_with_checksum, read_text

if TYPE_CHECKING:
    from tools.scoring.perplexity import Perplexity
    from tools.scoring.tokens import Scorable


@with_options
def perplexity(
    source: SourceOptions,
    runtime: RuntimeOptions,
    attention: AttentionOptions,
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="FILE",
            help="UTF-8 text, or JSON lines; .xz, .gz and .zst work. Give it again for more.",
        ),
    ],
    name: ModelName = DEFAULT_MODEL,
    window: Annotated[
        int, typer.Option(metavar="TOKENS", help="Of the windows that the text is cut into.")
    ] = 2048,
    windows: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N.", show_default="all")
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Read the windows in pieces onto a cache of this dtype: float8_e4m3fn, or that "
            "of the weights.",
            show_default="no cache",
        ),
    ] = None,
    piece_size: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Of the pieces, which see themselves exactly: 1 is a step of decoding, and slow.",
            show_default="16",
        ),
    ] = None,
    batch_size: BatchSize = 1,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Append the loss of every window, for `zoo compare`."
        ),
    ] = None,
    json: Json = False,
    out: Out = None,
) -> None:
    """Measures the perplexity of texts, one by one.

    A text is tokenised as one string without bos and cut into windows, each scored without what
    came before it. The second half counts predictions from the middle of a window on.
    """
    if piece_size is not None and cache_dtype is None:
        raise ValueError("--piece-size is of the pieces that a cache reads: give --cache-dtype")
    check_outputs(out, samples)
    contents = [read_text(path) for path in text]
    model = load_model(name, source, attention, runtime)
    from tools.evaluation.record import Record
    from tools.scoring.cached import CachedModel
    from tools.scoring.perplexity import cut_windows, measure_perplexity
    from tools.scoring.windows import window_outcomes

    tokenizer = tokenizer_for_rows(name, model, window)
    texts = [cut_windows(tokenizer.encode(x, add_bos=False), window, windows) for x in contents]
    scored: Scorable = model
    cache: dict[str, object] = {}
    if cache_dtype is not None:
        piece_size = 16 if piece_size is None else piece_size
        scored = CachedModel(model, cache_dtype, piece_size)
        cache = {"cache_dtype": cache_dtype, "piece": piece_size}
    for path, content, rows in zip(text, contents, texts, strict=True):
        start = time.perf_counter()
        with progress(f"{path.name}, windows", len(rows)) as advance:
            result = measure_perplexity(scored, rows, batch_size=batch_size, advance=advance)
        seconds = time.perf_counter() - start
        found = {"perplexity": result.all, "perplexity_second_half": result.second_half}
        own = model_case(name, model)
        impl = implementation(model, runtime.impl, window)
        if samples is not None:
            on = {"impl": impl, "device": device_name(model.device)} | cache
            full = not is_converted(model.config.layer_types)
            cell = {"text": name_with_checksum(path, content), "window": window}
            with Record(samples, name, own | on, full=full) as record:
                for outcome in window_outcomes(result, rows, cell):
                    record.add(outcome)
        if json:
            print_json(
                own
                | {"text": path.name, "window": window, "windows": len(rows)}
                | cache
                | {metric: part.value for metric, part in found.items()}
                | {f"{metric}_error": part.standard_error for metric, part in found.items()}
                | {"tokens": result.all.tokens, "seconds": round(seconds, 3)}
            )
        else:
            if len(texts) > 1:
                print(path.name)
            print(f"perplexity {_shown(result.all)}")
            print(f"perplexity of the second half {_shown(result.second_half)}")
            print(f"{len(rows)} windows of {window} tokens in {seconds:.1f} s")
        if out is None:
            continue
        case = own | {"task": "perplexity", "text": path.name, "context": window}
        case |= {"windows": len(rows), "batch": batch_size} | cache
        for metric, part in found.items():
            append_result(
                out,
                bench="evaluate",
                case=case | {"tokens": part.tokens},
                impl=impl,
                metric=metric,
                value=part.value,
                unit="",
                spread=part.standard_error,
                device=model.device,
                command=command_line(),
            )


def _shown(part: "Perplexity") -> str:
    error = "" if part.standard_error is None else f" ± {part.standard_error:.3f}"
    return f"{part.value:.3f}{error} over {part.tokens:,} tokens"


if __name__ == "__main__":
    sys.exit(run_command(perplexity, "perplexity"))
