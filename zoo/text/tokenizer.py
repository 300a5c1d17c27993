"""Tokenizer: text to ids and back, special tokens and chat template, over `tokenizers`.

It reads what models are published with (`tokenizer.json`, or SentencePiece's `tokenizer.model`)
and writes what transformers' AutoTokenizer reads. The ids are those of the published file, which
are AutoTokenizer's too, except where version 5 rebuilds a tokenizer from its class: LlamaTokenizer
then treats a leading space and text after special tokens otherwise, and GPT2Tokenizer forgets
SmolLM2's rule that digits stand alone.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Self

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from zoo.text import chat_template as chat
from zoo.text.spm import read_spm
from zoo.text.text_stream import TextStream, TokenKind, token_kind
from zoo.weights.atomic import write_text
from zoo.weights.weight_files import CONFIG_FILE, read_json

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """The tokenizer of one model.

    Attributes:
        bos_id: begin of sequence, or None.
        eos_id: end of sequence, or None.
        eos_ids: every id that ends generation, `eos_id` first; may be empty.
        pad_id: padding, or None.
        chat_template: Jinja source, or None for a model that does not chat.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        special: Mapping[str, str],
        eos_ids: Iterable[int] = (),
        chat_template: str | None = None,
    ) -> None:
        """Wrap a backend, which is changed: it learns the special tokens that it lacks.

        Args:
            backend: as read from tokenizer.json; its post-processor decides about bos.
            special: the text of `bos_token`, `eos_token`, `unk_token`, `pad_token`. Those that
                are not in the vocabulary are dropped: no model has an embedding for them.
            eos_ids: further ids that end generation.
            chat_template: Jinja source.
        """
        backend.no_truncation()
        backend.no_padding()
        known = {k: v for k, v in special.items() if backend.token_to_id(v) is not None}
        added = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens(
            [
                AddedToken(text, special=True, normalized=False)
                for text in dict.fromkeys(known.values())
                if text not in added
            ]
        )
        self._backend, self._special = backend, known
        self._skipped = frozenset(
            i for i, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.bos_id, self.eos_id, self.pad_id = map(
            self._special_id, ("bos_token", "eos_token", "pad_token")
        )
        own = () if self.eos_id is None else (self.eos_id,)
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys((*own, *eos_ids)))
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's embedding may have more rows, never fewer."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether both give the same ids, texts and chats."""
        return self is other or self._description == other._description

    @functools.cached_property
    def _description(self) -> tuple[object, ...]:
        special = tuple(sorted(self._special.items()))
        return (self._backend.to_str(), special, self.eos_ids, self.chat_template)

    def encode(self, text: str, *, add_bos: bool | None = None) -> list[int]:
        """Ids of `text`; special tokens spelled out in it become their ids.

        Args:
            text: any text, may be empty.
            add_bos: True and False put exactly one or no bos in front, whatever the text says;
                None does what the model was published with. Pass False for a rendered chat,
                whose template has spelled out its bos.

        Raises:
            ValueError: add_bos=True without a bos token, or text with lone surrogates.
        """
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos=True needs a bos token and this tokenizer has none")
        try:
            ids = self._backend.encode(text, add_special_tokens=add_bos is None).ids
        except TypeError:  # what the library raises for half of a surrogate pair
            raise ValueError("the text is not valid Unicode: it has a lone surrogate") from None
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_batch(
        self, texts: Sequence[str], *, add_bos: bool | None = None
    ) -> list[list[int]]:
        """What `encode` gives of each text, on all cores."""
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos=True needs a bos token and this tokenizer has none")
        try:
            found = self._backend.encode_batch(list(texts), add_special_tokens=add_bos is None)
        except TypeError:  # as in `encode`
            raise ValueError("a text is not valid Unicode: it has a lone surrogate") from None
        start = [self.bos_id] if add_bos and self.bos_id is not None else []
        return [[*start, *encoding.ids] for encoding in found]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; ids outside the vocabulary have none."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """An incremental decoder for one sequence: `step(id) -> str`, then `flush() -> str`."""
        decode = partial(self._backend.decode, skip_special_tokens=skip_special_tokens)

        def kind(token: int) -> TokenKind:
            skipped = skip_special_tokens and token in self._skipped
            return token_kind(self._backend.id_to_token(token), skipped=skipped)

        return TextStream(decode, kind)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool
    ) -> str:
        """The conversation as text; `encode(text, add_bos=False)` gives its ids.

        Raises:
            ValueError: no chat template, or it refuses these messages.
        """
        if self.chat_template is None:
            raise ValueError(
                "this model has no chat template; use plain prompts, or an instruct model such as "
                "smollm2-135m-instruct"
            )
        return chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special=self._special,
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """The tokenizer of a model folder, None if it has none; ValueError if it is broken."""
        config = _optional_json(folder / "tokenizer_config.json")
        special = _special_tokens(_optional_json(folder / "special_tokens_map.json"))
        special |= _special_tokens(config)
        if (folder / "tokenizer.json").is_file():
            backend = _read_backend(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").is_file():
            legacy = config.get("legacy") is not False
            backend, found = read_spm(folder / "tokenizer.model", legacy=legacy)
            special = found | special
            if config.get("add_bos_token") is not False:
                prepend_bos(backend, special.get("bos_token"))
        else:
            return None
        _add_tokens(backend, config)
        model = _optional_json(folder / CONFIG_FILE)
        model |= _optional_json(folder / "generation_config.json")
        for name in _SPECIAL:
            first, *_ = (*_ids(model.get(f"{name}_id")), None)
            text = None if first is None else backend.id_to_token(first)
            if text is not None and name not in config:  # null there means: has none
                special.setdefault(name, text)
        return cls(
            backend,
            special=special,
            eos_ids=_ids(model.get("eos_token_id")),
            chat_template=_read_chat_template(folder, config),
        )

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, generation_config.json, the template.

        transformers' AutoTokenizer reads the folder and gives the same ids.
        """
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self._backend.to_str(pretty=True))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self._special,
        }
        write_text(folder / "tokenizer_config.json", _dump(config))
        ids = {"bos_token_id": self.bos_id, "eos_token_id": [*self.eos_ids] or None}
        ids["pad_token_id"] = self.pad_id
        write_text(
            folder / "generation_config.json",
            _dump({k: v for k, v in ids.items() if v is not None}),
        )
        if self.chat_template is not None:
            write_text(folder / "chat_template.jinja", self.chat_template)

    def _special_id(self, name: str) -> int | None:
        text = self._special.get(name)
        return None if text is None else self._backend.token_to_id(text)


def prepend_bos(backend: Backend, bos: str | None) -> None:
    """Make the backend put `bos` before every text, unless it is None or not a known token."""
    token = None if bos is None else backend.token_to_id(bos)
    if bos is not None and token is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, token)]
        )


def _read_backend(path: Path) -> Backend:
    try:
        return Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a readable tokenizer: {reason}") from None


def _optional_json(path: Path) -> dict[str, object]:
    return read_json(path) if path.is_file() else {}


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """bos_token and so on, each a string or an AddedToken object with its `content`."""
    tokens = {name: config.get(name) for name in _SPECIAL}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in tokens.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _add_tokens(backend: Backend, config: Mapping[str, object]) -> None:
    """Tokens that tokenizer_config.json lists and tokenizer.json lacks, in the order of ids."""
    listed = config.get("added_tokens_decoder")
    entries = listed.items() if isinstance(listed, dict) else ()
    for _, entry in sorted(entries, key=lambda item: int(item[0])):
        text = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(text, str) and backend.token_to_id(text) is None:
            special = entry.get("special") is True
            backend.add_tokens([AddedToken(text, special=special, normalized=False)])


def _ids(value: object) -> list[int]:
    """An id or a list of ids as configs have them; null and -1 mean none."""
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _read_chat_template(folder: Path, config: Mapping[str, object]) -> str | None:
    """chat_template.jinja, or the entry of tokenizer_config.json: text, or named texts."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    value = config.get("chat_template")
    for entry in value if isinstance(value, list) else ():
        if isinstance(entry, dict) and entry.get("name") == "default":
            value = entry.get("template")
    return value if isinstance(value, str) else None


def _dump(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
