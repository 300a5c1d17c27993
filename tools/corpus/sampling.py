"""sample: fills a file with texts that a model writes, batch by batch.

Batch b holds the prompts b * B to (b + 1) * B - 1 and draws from a stream of random numbers of its
own, which (seed, b) gives: so a run that goes on writes what it would have written (on the same
device: another one rounds otherwise).
"""

import hashlib
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import zoo
from tools.corpus.examples import EXAMPLES, speaks_of_example
from tools.corpus.filters import Filters, tidy
from tools.corpus.prompts import CorpusPrompt, draw_prompt
from tools.corpus.store import CorpusFile, Counts, check_target
from tools.results import device_name

_PATIENCE = 1000  # texts of which none is kept, before a run gives up


@dataclass(frozen=True, kw_only=True)
class SamplingPlan:
    """What is written.

    Attributes:
        seed: of prompts and random numbers.
        batch_size: texts that are written at once.
        max_new_tokens: of a text.
        sampling: how tokens are chosen; its seed is not used.
        compile: run through torch.compile.
        cache_dtype: see `zoo.generate`.
    """

    seed: int
    batch_size: int
    max_new_tokens: int
    sampling: zoo.Sampling
    compile: bool = False
    cache_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, not {self.seed}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")


def check_file(name: str, path: Path, plan: SamplingPlan) -> None:
    """Refuses, before a model is loaded, what `sample` would of the file.

    Raises:
        OSError: a file cannot be read.
        ValueError: another ending than .jsonl or .jsonl.zst, a missing package, a file that
            cannot be written, or one that another plan or model has begun.
    """
    check_target(path, _planned(name, plan))


def sample(
    model: zoo.CausalLM,
    name: str,
    path: Path,
    plan: SamplingPlan,
    *,
    tokens: int,
    command: str = "",
    advance: Callable[[int], None] = lambda tokens: None,
) -> Counts:
    """Writes batches until the file holds so many `tokens` (of the model's tokenizer).

    Args:
        model: with a chat template.
        name: of the model, which the file records.
        path: of the file; a file of the same plan is gone on with.
        plan: what is written.
        tokens: that the kept texts have together, at least; the last batch is whole.
        command: that the file records.
        advance: told how many more tokens are in the file.

    Returns:
        Counts of all runs together.

    Raises:
        OSError: the file cannot be written.
        ValueError: the model has no chat template, the file is of another plan, or none of many
            texts is kept.
    """
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        raise ValueError(f"{name} has no chat template; a corpus needs an instruct model")
    made_with = {
        **_planned(name, plan),
        "weights_source": model.weights_source,
        "dtype": str(model.embed_tokens.weight.dtype).removeprefix("torch."),
    }
    run = {
        "command": command,
        "device": device_name(model.device),
        "torch": importlib.metadata.version("torch"),
    }
    file = CorpusFile.open(path, made_with, run)
    filters = Filters()
    for example in (x for examples in EXAMPLES.values() for x in examples):
        filters.remember(tidy(example.text))
    for text in file.texts():
        filters.remember(text)
    counts = file.state["counts"]
    advance(min(counts["tokens"], tokens))
    while counts["tokens"] < tokens:
        batch = file.state["batches"]
        if not counts["kept"] and batch * plan.batch_size >= _PATIENCE:
            worst = max(counts["dropped"], key=lambda reason: counts["dropped"][reason])
            raise ValueError(
                f"none of {batch * plan.batch_size} texts was kept, most because of {worst!r}; "
                "choose another model or other options for sampling"
            )
        start = time.perf_counter()
        documents, counts = _one_batch(model, plan, batch, filters, counts)
        counts["seconds"] = round(counts["seconds"] + time.perf_counter() - start, 3)
        before = file.state["counts"]["tokens"]
        file.append(documents, counts)
        advance(counts["tokens"] - before)
    return counts


def _planned(name: str, plan: SamplingPlan) -> dict[str, object]:
    """What the file records of a run, but for what only the model knows."""
    return {"model": name, "prompts": fingerprint(), **asdict(plan)}


def fingerprint() -> str:
    """A checksum of the prompts: 1,000 of them tell whether lists or forms have changed."""
    texts = "".join(repr(draw_prompt(0, index)) for index in range(1000))
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


def prompt_ids(tokenizer: zoo.Tokenizer, prompt: CorpusPrompt) -> list[int]:
    """The chat up to where the model goes on: behind the opening of its answer."""
    rendered = tokenizer.render_chat(prompt.messages, add_generation_prompt=True)
    return tokenizer.encode(rendered + prompt.opening, add_bos=False)


def batch_seed(seed: int, batch: int) -> int:
    """Of the random numbers of a batch: 0 to 2**63 - 1."""
    digest = hashlib.sha256(f"{seed} {batch}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _one_batch(
    model: zoo.CausalLM, plan: SamplingPlan, batch: int, filters: Filters, counts: Counts
) -> tuple[list[dict[str, object]], Counts]:
    """The kept documents of a batch, and the counts with it."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    first = batch * plan.batch_size
    prompts = [draw_prompt(plan.seed, first + i) for i in range(plan.batch_size)]
    rows = zoo.generate(
        model,
        [prompt_ids(tokenizer, prompt) for prompt in prompts],
        max_new_tokens=plan.max_new_tokens,
        sampling=replace(plan.sampling, seed=batch_seed(plan.seed, batch)),
        compile=plan.compile,
        cache_dtype=plan.cache_dtype,
    )
    dropped = dict(counts["dropped"])
    documents: list[dict[str, object]] = []
    for index, prompt, row in zip(range(first, first + len(rows)), prompts, rows, strict=True):
        text = tidy(prompt.opening + row.text)
        reason = "example" if speaks_of_example(text) else filters.reject(text)
        if reason is not None:
            dropped[reason] = dropped.get(reason, 0) + 1
            continue
        documents.append(
            {
                "id": f"{plan.seed}-{index}",
                "text": text,
                "form": prompt.form,
                "prompt": prompt.request,
            }
        )
    texts = [str(document["text"]) for document in documents]
    sizes = [len(ids) for ids in tokenizer.encode_batch(texts, add_bos=False)] if texts else []
    return documents, Counts(
        kept=counts["kept"] + len(documents),
        tokens=counts["tokens"] + sum(sizes),
        dropped=dropped,
        written=counts["written"] + sum(len(row.ids) for row in rows),
        seconds=counts["seconds"],
    )
