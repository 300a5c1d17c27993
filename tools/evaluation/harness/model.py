"""ZooLM: a model of the zoo as lm-evaluation-harness wants it, registered there as "zoo".

How texts become tokens follows the harness's own Hugging Face model: a context and what continues
it are tokenised together and parted where the context alone ends, whitespace at the end of the
context goes to the continuation, and what does not fit is cut from the left. How log-likelihoods
are computed is in scoring.py.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

import zoo
from flasheva import Impl
from tools.evaluation.batches import BatchLimits
from tools.evaluation.harness.scoring import Continuation, score_continuations

# Texts, and the tokens of the context and of what continues it.
Encoded = tuple[tuple[str, str] | None, Sequence[int], Sequence[int]]

_MAX_NEW_TOKENS = 256  # the harness's default
# Generation options that ask for nothing beyond what `zoo.generate` does anyway.
_NO_EFFECT: dict[str, object] = {"num_beams": 1, "use_cache": True}


@register_model("zoo")
class ZooLM(TemplateLM):  # type: ignore[misc]
    """A model of the zoo for every task of the harness.

    Args:
        name: what `zoo.load` takes, or a model that it gave.
        batch_size: rows that are computed at once.
        device, dtype, impl: as in `zoo.load`; only for a name.
        max_length: tokens that the model reads at most; None: its context.
        compile: `torch.compile` for what reads the prompts of generated text.
        max_batch_size: the harness passes it; without meaning here.
        batch_tokens, prefill_tokens: see `BatchLimits`.

    Raises:
        ValueError: no tokenizer, neither bos nor eos in it, or a size out of range.
    """

    def __init__(
        self,
        name: "str | zoo.CausalLM",
        *,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        impl: Impl = "auto",
        max_length: int | None = None,
        compile: bool = False,
        max_batch_size: int | None = None,
        batch_tokens: int | None = None,
        prefill_tokens: int | None = None,
    ) -> None:
        super().__init__()
        del max_batch_size
        if isinstance(name, str):
            name = zoo.load(name, device=device, dtype=dtype, impl=impl)
        self.model = name
        if self.model.tokenizer is None:
            raise ValueError("the harness needs a tokenizer, which the model does not have")
        self.tokenizer = self.model.tokenizer
        if self.tokenizer.bos_id is None and self.tokenizer.eos_id is None:
            raise ValueError("the harness needs a bos or eos token, and the tokenizer has neither")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of at least 1, not {batch_size!r}")
        longest = self.model.config.max_position_embeddings
        if max_length is not None and not 1 <= max_length <= longest:
            raise ValueError(f"max_length must be between 1 and {longest}, not {max_length}")
        self.batch_size = int(batch_size)
        self.limits = BatchLimits(
            rows=self.batch_size, tokens=batch_tokens, prefill_tokens=prefill_tokens
        )
        self.max_length = max_length or longest
        self.compile = compile
        self.max_gen_toks = _MAX_NEW_TOKENS
        self._device = self.model.device
        # A context is followed by several continuations, and long ones take time to tokenise.
        self._encode = functools.lru_cache(maxsize=8)(self._encode_text)

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        chosen = eos if bos is None else bos
        assert chosen is not None
        return chosen

    @property
    def tokenizer_name(self) -> str:
        return self.model.weights_source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        return list(self._encode(string, add_special_tokens))

    def _encode_text(self, text: str, add_special_tokens: bool | None) -> list[int]:
        """With a bos where the model was published with one, but never a second one."""
        if add_special_tokens is None and self._starts_with_bos(text):
            add_special_tokens = False
        return self.tokenizer.encode(text, add_bos=None if add_special_tokens is None else False)

    def _starts_with_bos(self, text: str) -> bool:
        prefix = self.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
        return has_bos_prefix(text, prefix)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        encoded = self.encode_pairs([request.args for request in requests])
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Contexts and continuations as tokens, as the harness parts them, but on all cores."""
        parted = []
        for context, continuation in pairs:
            bare = context.rstrip()
            spaces = context[len(bare) :]
            # Of nothing but spaces the harness makes an empty context too.
            parted.append((bare, spaces + continuation))
        texts = [part for context, rest in parted if context for part in (context, context + rest)]
        known = dict(zip(texts, self.encode_all(texts), strict=True))
        contexts = {context: tuple(known[context]) for context, _ in parted if context}
        found: list[Encoded] = []
        for texts_of, (context, rest) in zip(pairs, parted, strict=True):
            if context:
                head = contexts[context]
                found.append((texts_of, head, tuple(known[context + rest][len(head) :])))
                continue
            tokens = tuple(self.tok_encode(rest, add_special_tokens=False))
            start = (self.prefix_token_id,)
            both = (start, tokens) if tokens[:1] != start else (tokens[:1], tokens[1:])
            found.append((texts_of, *both))
        return found

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """What `tok_encode` gives of each."""
        unlike = {self._starts_with_bos(text) for text in texts}
        if len(unlike) > 1:
            return [self.tok_encode(text) for text in texts]
        bos = False if True in unlike else None
        return self.tokenizer.encode_batch(texts, add_bos=bos)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        rows = [Continuation(tuple(context), tuple(tokens)) for _, context, tokens in requests]
        with tqdm(total=len(rows), desc="log-likelihoods", disable=disable_tqdm) as bar:

            def advance(steps: int) -> None:
                bar.update(steps)

            scores = score_continuations(
                self.model,
                rows,
                max_length=self.max_length,
                limits=self.limits,
                advance=advance,
            )
        found = [(score.log_likelihood, score.greedy) for score in scores]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows: list[Encoded] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            rolling = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, tokens in map(utils.make_disjoint_window, rolling):
                windows.append((None, context, tokens))
                owners.append(number)
        totals = [0.0] * len(texts)
        scored = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, scored, strict=True):
            totals[owner] += log_likelihood
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            options = sorted(request.args[1].items(), key=lambda item: item[0])
            groups.setdefault(repr(options), []).append(number)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generated texts", disable=disable_tqdm) as bar:
            for group in groups.values():
                contexts = {number: self.tok_encode(requests[number].args[0]) for number in group}
                sizes = {number: len(context) for number, context in contexts.items()}
                for batch in self.limits.batches(group, sizes.__getitem__):
                    options = requests[batch[0]].args[1]
                    written = self._generate([contexts[number] for number in batch], options)
                    for number, text in zip(batch, written, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    def _generate(self, contexts: list[list[int]], given: Mapping[str, object]) -> list[str]:
        options = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        eos = self.tokenizer.eos_id
        end = None if eos is None else self.tokenizer.decode([eos], skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until"), eos=end)
        new = cast("int", options.pop("max_gen_toks"))
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"{new} new tokens leave no room in a context of {self.max_length}; "
                "ask for fewer (max_gen_toks)"
            )
        rows = [context[-room:] or [self.prefix_token_id] for context in contexts]
        written = zoo.generate(
            self.model,
            rows,
            max_new_tokens=new,
            sampling=_sampling(options),
            stop=[text for text in until if text],
            compile="prefill" if self.compile else False,
            prefill_tokens=self.limits.prefill_tokens,
        )
        return [postprocess_generated_text(row.text, until, None) for row in written]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.render_chat(
            chat_history, add_generation_prompt=add_generation_prompt
        )


def _sampling(options: dict[str, object]) -> zoo.Sampling:
    """From the options that the harness hands to Hugging Face's `generate`."""
    options = {k: v for k, v in options.items() if k not in _NO_EFFECT or v != _NO_EFFECT[k]}
    drawn = options.pop("do_sample", False)
    known = {k: options.pop(k) for k in ("top_k", "top_p", "min_p") if k in options}
    if known.get("top_k") == 0:  # there it means all tokens
        del known["top_k"]
    temperature = options.pop("temperature", 1.0)
    penalty = options.pop("repetition_penalty", 1.0)
    if options:
        raise ValueError(
            f"generation options that the zoo does not have: {', '.join(sorted(options))}; it has "
            "do_sample, temperature, top_k, top_p, min_p, repetition_penalty, until, max_gen_toks"
        )
    if not drawn:
        return zoo.Sampling(repetition_penalty=cast("float", penalty))
    return zoo.Sampling(
        temperature=cast("float", temperature),
        repetition_penalty=cast("float", penalty),
        seed=int(torch.randint(2**62, ())),  # the harness seeds torch
        **cast("dict[str, int]", known),
    )
