"""largest_batch: how many rows of a context really fit, for our engines and transformers'.

A batch fits if its prompts are read and a few tokens of each row made; ours through a captured
step, as in `zoo.generate`. Of ours two pieces of each prompt are read, onto a cache for all of it:
every further one needs the memory of the second, and reading thousands of rows takes minutes.
"""

from collections.abc import Callable
from typing import Any

import torch

from tools.benchmarks.decode import Job, generate_options, random_prompts
from tools.benchmarks.timing import free_memory
from zoo.causal_lm import CausalLM
from zoo.decoding import Decoder
from zoo.prefill import piece_size, prefill
from zoo.sampling import Sampling

NEW = 4  # tokens that are made


def largest_batch(fits: Callable[[int], bool], guess: int, step: float) -> tuple[int, int]:
    """A batch that fits and a larger one that does not, at most 3 % (or one row) apart.

    Args:
        fits: whether so many rows do.
        guess: tried first.
        step: factor, above 1, to the next batch while only one end is known.

    Returns:
        (0, 1) if not even one row fits.
    """
    low, high, rows = 0, 0, max(guess, 1)
    while True:
        if fits(rows):
            low = rows
        else:
            high = rows
        if high and high - low <= max(1, int(0.03 * low)):
            return low, high
        if not high:
            rows = max(low + 1, int(low * step))
        elif not low:
            rows = min(high - 1, int(high / step))
        else:
            rows = (low + high) // 2
        if rows == 0:
            return 0, 1


def fits_ours(model: CausalLM, context: int) -> Callable[[int], bool]:
    """Whether rows of `context` tokens fit beside the model."""
    device = model.device

    @torch.inference_mode()
    def run(rows: int) -> None:
        job = Job(batch_size=rows, prompt=context - NEW, new=NEW, compile=False)
        ids = random_prompts(job, model.config.vocab_size, device)
        cache = model.new_cache(rows, context)
        read = ids[:, : 2 * piece_size(rows, device)]
        lengths = torch.full_like(cache.length, read.shape[1])
        seen = torch.zeros(rows, model.config.vocab_size, dtype=torch.bool, device=device)
        decoder = Decoder(model, cache, sampling=Sampling(), seen=seen, room=[NEW] * rows)
        decoder.start(prefill(model, read, lengths, cache))
        for _ in range(NEW):
            decoder.take()

    return _without_running_out(run, device)


def fits_transformers(
    theirs: Any,  # noqa: ANN401
    context: int,
    *,
    static: bool,
    piece: int | None,
) -> Callable[[int], bool]:
    """Likewise of transformers' own model; arguments as `measure_transformers`.

    The step of a static cache is not compiled: that takes time for every batch, and memory that a
    compiled step does not need is that of one token.
    """
    options = generate_options(static=static, piece=piece)

    @torch.inference_mode()
    def run(rows: int) -> None:
        job = Job(batch_size=rows, prompt=context - NEW, new=NEW, compile=False)
        ids = random_prompts(job, theirs.config.vocab_size, theirs.device)
        theirs.generate(ids, max_new_tokens=NEW, disable_compile=True, **options)

    return _without_running_out(run, theirs.device)


def _without_running_out(
    run: Callable[[int], None], device: torch.device
) -> Callable[[int], bool]:
    def fits(rows: int) -> bool:
        try:
            run(rows)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            return False
        finally:
            free_memory(device)
        return True

    return fits


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what an error, or one before it, says.

    A capture that runs out of memory may end in another error.
    """
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None
