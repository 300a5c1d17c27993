"""Small files of the harness's tasks, tiny models, and one that knows what to prefer."""

import json
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import zoo
from tests.tiny import VOCAB_SIZE, make_model, make_tokenizer, mixed
from tests.tiny import hf_config as tiny_config

CONTEXT = 512
ROWS: dict[str, list[dict[str, object]]] = {
    "lambada_openai": [
        {"context": "The cache keeps what was asked. Nobody waits for the", "target": "cache"},
        {"context": "A token, an accent, a number; a café counts the", "target": "numbers"},
        {"context": "It listens, and after one comes another", "target": "request"},
    ],
    "hellaswag": [
        {
            "activity_label": activity,
            "ctx_a": "A man [laughs] reads a request.",
            "ctx_b": "he",
            "choices": [
                "answers it at once.",
                "eats [step] it.",
                "has accents.",
                "counts the sea.",
            ],
            "label": label,
        }
        for activity, label in (("Serving", 0), ("Waiting", 2), ("Counting", 3))
    ],
    "piqa": [
        {
            "question": "How to count tokens?",
            "choices": ["One by one.", "With a café."],
            "label": 0,
        },
        {
            "question": "How to wait?",
            "choices": ["By asking for the sea.", "Quietly."],
            "label": 1,
        },
    ],
    "winogrande": [
        {
            "sentence": "Anna asked Ruth as _ wanted to wait.",
            "choices": ["Anna", "Ruth"],
            "label": 0,
        },
        {
            "sentence": "The cup fell off the shelf as _ tilted.",
            "choices": ["cup", "shelf"],
            "label": 1,
        },
    ],
}
for name in ("arc_easy", "arc_challenge", "openbookqa"):
    ROWS[name] = [
        {"split": split, "question": question, "choices": choices, "label": label}
        for split, question, choices, label in (
            ("validation", "Is this scored?", ["no", "yes"], 0),
            ("test", "What keeps an answer?", ["a cache", "a loop", "the sea", "an accent"], 0),
            ("test", "Which one is a number?", ["café", "31", "an address"], 1),
        )
    ]
PAGE = " \n = A title = \n \n The server @-@ side cache keeps {} answers , one by one . \n"
WIKITEXT = "".join(PAGE.format(n) for n in ("many", "few", "all"))
HAY = " ".join(
    f"Sentence {n} speaks of {thing}, and of the {other} beside it."
    for n in range(40)
    for thing, other in (("rain", "cache"), ("a loop", "garden"), ("the sea", "harbour"))
)


ROWS_OF = {
    name: [row for row in rows if row.get("split", "test") == "test"]
    for name, rows in ROWS.items()
}


def write_data(folder: Path) -> Path:
    """Small files as those of a user's --data."""
    for name, rows in ROWS.items():
        with lzma.open(folder / f"{name}.jsonl.xz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    (folder / "wikitext2_raw_test.txt").write_text(WIKITEXT, encoding="utf-8")
    return folder


def tiny(full: bool = False) -> zoo.CausalLM:
    make = tiny_config if full else mixed
    model = make_model(make("llama", max_position_embeddings=CONTEXT))
    model.tokenizer = make_tokenizer()
    return model


class Read:
    """A cache that holds the tokens themselves."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def rollback(self, counts: Tensor) -> None:
        for row, count in zip(self.rows, counts.tolist(), strict=True):
            del row[len(row) - count :]


class Knows:
    """A model with another head: after the beginning of a text that it knows, it goes on with it.

    Everything else is equally likely. Logits are the hidden states.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        self.next: dict[tuple[int, ...], int] = {}
        for text in texts:
            for end in range(1, len(text)):
                self.next.setdefault(tuple(text[:end]), text[end])
        self.config = SimpleNamespace(max_position_embeddings=2048)
        self.tokenizer = make_tokenizer()
        self.device = torch.device("cpu")

    def new_cache(self, rows: int, size: int, *, max_rollback: int) -> "Read":
        return Read([[] for _ in range(rows)])

    def hidden_states(
        self,
        ids: Tensor,
        cache: "Read | None" = None,
        lengths: Tensor | None = None,
        blocks: None = None,
    ) -> Tensor:
        del blocks
        logits = torch.zeros(*ids.shape, VOCAB_SIZE)
        for row, tokens in enumerate(ids.tolist()):
            before = [] if cache is None else cache.rows[row]
            for end in range(1, len(tokens) + 1):
                token = self.next.get((*before, *tokens[:end]))
                if token is not None:
                    logits[row, end - 1, token] = 20.0
            if lengths is not None:
                before += tokens[: lengths[row]]
        return logits

    def lm_head(self, hidden: Tensor) -> Tensor:
        return hidden
