"""measure_ours, measure_transformers: prefill and decoding of a batch of prompts, timed.

All prompts have the same length and hold random tokens; decoding is greedy and nothing ends a row.

- Time to first token: from prompts on the device to the first tokens on the host.
- Decoding: the tokens after the first one; ours without looking at them, transformers' as
  `generate` gives them. The work is the same every step, so that the whole is divided by it.
- Roofline: least bytes of a step over copy bandwidth, over its time. Least bytes are the weights
  that a step multiplies with, once, and what its rows' caches show them, at mid-length.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flasheva.visibility import window_start
from layers import ModelCache
from zoo.causal_lm import CausalLM
from zoo.decoding import Decoder
from zoo.prefill import compiled_pieces, next_logits, piece_size, prefill
from zoo.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Job:
    """Sizes.

    Attributes:
        batch_size: rows.
        prompt, new: tokens of each row that are read, and made.
        compile: run steps and pieces through torch.compile.
    """

    batch_size: int
    prompt: int
    new: int
    compile: bool

    @property
    def length(self) -> int:
        return self.prompt + self.new


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a run took.

    Attributes:
        first: seconds to the first tokens.
        step: seconds of a later step.
        capture: seconds for capturing, with two steps before and one behind it; None on a CPU.
        peak_prefill, peak_decode: bytes, the most that was allocated; None on a CPU.
        cache: bytes of the cache, or None if nobody knows.
        least: bytes that a step must read, or None.
    """

    first: float
    step: float
    capture: float | None
    peak_prefill: int | None
    peak_decode: int | None
    cache: int | None
    least: int | None


def random_prompts(job: Job, vocab_size: int, device: torch.device) -> Tensor:
    """int64 [B, prompt], the same for everybody."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (job.batch_size, job.prompt), generator=rng).to(device)


@torch.inference_mode()
def measure_ours(model: CausalLM, job: Job) -> Measured:
    """Times our engine; what is compiled or tuned once is so before."""
    device = model.device
    run = compiled_pieces(model) if job.compile else next_logits
    ids = random_prompts(job, model.config.vocab_size, device)
    unit = piece_size(job.batch_size, device) if job.compile else 16
    cache = model.new_cache(job.batch_size, -(-job.length // unit) * unit)

    def once(steps: int) -> tuple[float, float, float, int | None]:
        seen = torch.zeros(
            job.batch_size, model.config.vocab_size, dtype=torch.bool, device=device
        )
        room = [job.new] * job.batch_size
        decoder = Decoder(
            *(model, cache.reset()),
            compile=job.compile,
            sampling=Sampling(),
            seen=seen,
            room=room,
        )
        lengths = torch.full_like(cache.length, job.prompt)
        synchronize(device)
        start = time.perf_counter()
        decoder.start(prefill(model, ids, lengths, cache, run, pad=job.compile))
        decoder.take()
        first = time.perf_counter()
        peak = peak_memory(device)
        reset_peak(device)
        decoder.step()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps - 2):
            decoder.step()
        synchronize(device)
        step = (time.perf_counter() - begin) / max(steps - 2, 1)
        return first - start, begin - first, step, peak

    once(3)
    reset_peak(device)
    first, capture, step, peak = once(job.new)
    return Measured(
        first=first,
        step=step,
        capture=capture if device.type == "cuda" else None,
        peak_prefill=peak,
        peak_decode=peak_memory(device),
        cache=cache.nbytes,
        least=least_bytes(model, cache, job),
    )


def least_bytes(model: CausalLM, cache: ModelCache, job: Job) -> int:
    """That a step must read, in the middle of the text."""
    weights = sum(p.nbytes for p in model.parameters())
    if model.lm_head.weight is not model.embed_tokens.weight:
        weights -= model.embed_tokens.weight.nbytes  # a step reads a few of its rows
    length = job.prompt + job.new // 2
    config = model.config
    row = 2 * config.num_key_value_heads * config.head_dim * model.embed_tokens.weight.itemsize
    start = int(window_start(config.eva, torch.tensor(length)))
    sinks = min(start, config.eva.sink_size)
    summaries = max(start - config.eva.sink_size, 0) // config.eva.chunk_size
    window = length - start + sinks
    entries = {
        "full_attention": length,
        "window_attention": window,
        "eva_attention": window + summaries,
        "sliding_attention": min(length, getattr(config, "sliding_window", length)),
    }
    return weights + job.batch_size * row * sum(entries[kind] for kind in config.layer_types)


@torch.inference_mode()
def measure_transformers(
    theirs: Any,  # noqa: ANN401
    job: Job,
    *,
    static: bool,
    piece: int | None,
) -> Measured:
    """Times `generate` of transformers' own model.

    Args:
        theirs: from engines.py.
        job: sizes.
        static: with a static cache, for which transformers compiles the step; else its default.
        piece: tokens of a row that the prefill reads at a time (`prefill_chunk_size`); None: all.
    """
    from transformers import LogitsProcessorList

    device = theirs.device
    ids = random_prompts(job, theirs.config.vocab_size, device)
    options = generate_options(static=static, piece=piece)
    peaks: list[int | None] = []

    def watch(ids: Tensor, scores: Tensor) -> Tensor:
        """Called with the logits of every token: the first ones end the prefill."""
        if not peaks:
            peaks.append(peak_memory(device))
            reset_peak(device)
        return scores

    def generate(new: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        # All runs share one size of a static cache, and so what was compiled for it.
        theirs.generate(
            ids,
            min_new_tokens=new,
            max_new_tokens=new,
            logits_processor=LogitsProcessorList([watch]),
            **options,
        )
        synchronize(device)
        return time.perf_counter() - start

    generate(job.new)
    peaks.clear()
    reset_peak(device)
    whole = generate(job.new)
    peak = peak_memory(device)
    first = generate(1)
    step = (whole - first) / (job.new - 1)
    return Measured(
        first=first,
        step=step,
        capture=None,
        peak_prefill=peaks[0],
        peak_decode=peak,
        cache=None,
        least=None,
    )


def generate_options(*, static: bool, piece: int | None) -> dict[str, object]:
    """Of transformers' `generate`: greedy, no end; see `measure_transformers`."""
    options: dict[str, object] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if static:
        options["cache_implementation"] = "static"
    if piece is not None:
        options["prefill_chunk_size"] = piece
    return options


@torch.inference_mode()
def check(model: CausalLM, exact: CausalLM, steps: int = 24) -> tuple[float, float]:
    """Errors of the logits of steps and of one pass, against one pass of `exact`.

    The rows are ragged and leave the exact window, where there is one.
    """
    device = model.device
    T = 2 * model.config.eva.window_size + 40
    rng = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (2, T), generator=rng).to(device)
    lengths = torch.tensor([T - steps, T - steps - 21], device=device)
    cache = model.new_cache(2, T)
    prefill(model, ids, lengths, cache)
    row, one = torch.arange(2, device=device), torch.ones_like(lengths)
    whole, right = model(ids), exact(ids)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(steps):
        at = cache.length.clone()
        logits = next_logits(model, ids[row, at][:, None], cache, one)
        found.append((logits, whole[row, at], right[row, at]))
    stepwise, at_once, true = (torch.stack(x).double() for x in zip(*found, strict=True))
    errors = [float((x - true).norm() / true.norm()) for x in (stepwise, at_once)]
    return errors[0], errors[1]


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forgets the most that was allocated so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int | None:
    """Bytes, since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
