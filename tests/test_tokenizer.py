import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from zoo.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 12:30 and they're late, aren't we?",
    "def f(x):\n    return x[1:]  # naïve\n\n\tprint(f'{x!r}')",
    "你好世界。 Grüße aus Köln! 🙂🙃 1234567890 3.14",
]
TRICKY = [
    "",
    " ",
    "  two  spaces  ",
    "it's 12345, x²½ and ٣\r\n\n\ttab",
    "🙂👩‍👩‍👧 你好 naïve e\u0301",
    "def f(x):\n    return x[1:]",
    "<|im_start|>user\nhi<|im_end|>",
    "a<|im_end|> b<s>",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{% if message['role'] == 'robot' %}{{ raise_exception('No robots\nhere!') }}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MESSAGES = [
    {"role": "user", "content": " Is 1 < 2 & 'so'?\n"},
    {"role": "assistant", "content": "Yes."},
]
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]


def byte_level(*, bos: bool) -> Backend:
    """Like Llama 3 (bos in front) or Pythia (nothing in front)."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 2, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return backend


def byte_fallback() -> Backend:
    """Like Llama 2: spaces are letters, unknown characters are bytes."""
    names = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "a", "b", "é", "▁a", "ab", "▁▁"]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return backend


def write(folder: Path, backend: Backend, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    text = json.dumps({**defaults, "bos_token": "<s>", **config})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def read(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def composed() -> Backend:
    backend = byte_level(bos=False)
    backend.normalizer = normalizers.NFC()
    return backend


@pytest.mark.parametrize(
    ("backend", "tokenizer_class", "model_type"),
    [
        (byte_level(bos=True), "PreTrainedTokenizerFast", "llama"),
        (composed(), "GPTNeoXTokenizer", "gpt_neox"),
        (byte_level(bos=False), "CodeGenTokenizer", "phi"),
        (byte_fallback(), "PreTrainedTokenizerFast", "llama"),
    ],
    ids=["llama3", "pythia", "phi", "llama2"],
)
def test_ids_and_text_are_those_of_transformers(
    tmp_path: Path, backend: Backend, tokenizer_class: str, model_type: str
) -> None:
    config = {"tokenizer_class": tokenizer_class, "unk_token": "<|im_end|>", "pad_token": "<pad>"}
    folder = write(tmp_path, backend, **config)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = read(folder), AutoTokenizer.from_pretrained(folder)
    for text in TRICKY:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids, text
        for skip in (True, False):
            decoded = theirs.decode(ids, skip_special_tokens=skip)
            assert ours.decode(ids, skip_special_tokens=skip) == decoded
    assert ours.vocab_size == len(theirs)
    for name in ("bos", "eos", "pad"):
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_token_id")


def test_tokenizer_json_is_followed_where_transformers_rebuilds_it(tmp_path: Path) -> None:
    """TinyLlama's layout: in transformers 5, LlamaTokenizer keeps only vocabulary and merges."""
    backend = byte_fallback()
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    folder = write(tmp_path, backend, tokenizer_class="LlamaTokenizer", unk_token="<unk>")
    ours, theirs = read(folder), AutoTokenizer.from_pretrained(folder)
    for text in ["a", "two  spaces ", "ab é\n"]:
        assert ours.encode(text) == theirs(text).input_ids
    for text in [" a", "<|im_start|>a"]:
        published = Backend.from_file(str(folder / "tokenizer.json")).encode(text).ids
        assert ours.encode(text) == published != theirs(text).input_ids


@pytest.mark.parametrize("bos", [True, False])
def test_add_bos_puts_exactly_one_or_none(tmp_path: Path, bos: bool) -> None:
    tokenizer = read(write(tmp_path, byte_level(bos=bos)))
    plain = tokenizer.encode("the dog", add_bos=False)
    assert tokenizer.encode("the dog", add_bos=True) == [0, *plain]
    assert tokenizer.encode("the dog") == ([0] if bos else []) + plain
    assert 0 not in plain


def test_add_bos_without_a_bos_token_and_lone_surrogates_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(bos=False), bos_token=None)
    (folder / "config.json").write_text('{"bos_token_id": 0}')  # as in Qwen 2, which has no bos
    tokenizer = read(folder)
    assert tokenizer.bos_id is None
    with pytest.raises(ValueError, match="this tokenizer has none"):
        tokenizer.encode("a", add_bos=True)
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode("a\ud800b")


BACKENDS = {"byte_level": byte_level(bos=True), "byte_fallback": byte_fallback()}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_streamed_pieces_are_whole_characters_and_concatenate_to_the_text(
    name: str, skip: bool, data: st.DataObject
) -> None:
    tokenizer = Tokenizer(BACKENDS[name], special={"bos_token": "<s>"})
    size = tokenizer.vocab_size
    words = st.sampled_from([*TRICKY, "é", "🙂", " a", "ab"]).map(
        lambda text: tokenizer.encode(text, add_bos=False)
    )
    noise = st.lists(st.integers(0, size + 5), max_size=4)  # with ids that no token has
    ids = [i for part in data.draw(st.lists(words | noise, max_size=6)) for i in part]
    stream = tokenizer.stream(skip_special_tokens=skip)
    pieces = [stream.step(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids, skip_special_tokens=skip)
    assert not any(piece.endswith("\N{REPLACEMENT CHARACTER}") for piece in pieces)


def test_stream_gives_text_as_soon_as_it_is_certain(tmp_path: Path) -> None:
    tokenizer = read(write(tmp_path, byte_level(bos=False)))
    stream = tokenizer.stream()
    assert "".join(stream.step(i) for i in tokenizer.encode("the fox 🙂")) == "the fox 🙂"
    assert stream.flush() == ""
    first = tokenizer.encode("🙃")[0]  # the emoji alone is more than one token
    assert (stream.step(first), stream.flush()) == ("", "\N{REPLACEMENT CHARACTER}")


def test_chats_render_as_in_transformers_and_encode_without_a_second_bos(tmp_path: Path) -> None:
    folder = write(tmp_path, byte_level(bos=True), chat_template=TEMPLATE)
    ours, theirs = read(folder), AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        text = ours.render_chat(MESSAGES, add_generation_prompt=prompt)
        expected = theirs.apply_chat_template(
            MESSAGES, add_generation_prompt=prompt, tokenize=False
        )
        assert text == expected
        ids = ours.encode(text, add_bos=False)
        encoded = theirs.apply_chat_template(MESSAGES, add_generation_prompt=prompt)
        assert ids == encoded["input_ids"]
        assert ids.count(0) == 1
        assert ids[1] == 1  # "<|im_start|>" is one token
    assert text.startswith("<s><|im_start|>user\nIs 1 < 2 & 'so'?<|im_end|>\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE, "No robots here!"),
        ("{{ messages", "unexpected end of template"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_one_line(
    tmp_path: Path, template: str, message: str
) -> None:
    tokenizer = read(write(tmp_path, byte_level(bos=False), chat_template=template))
    with pytest.raises(ValueError, match=message) as caught:
        tokenizer.render_chat([{"role": "robot", "content": "hi"}], add_generation_prompt=True)
    assert "\n" not in str(caught.value)


def test_without_a_template_there_is_no_chat(tmp_path: Path) -> None:
    tokenizer = read(write(tmp_path, byte_level(bos=False)))
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render_chat(MESSAGES, add_generation_prompt=True)


def test_named_templates_and_the_template_file_are_found(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]
    folder = write(tmp_path, byte_level(bos=False), chat_template=named)
    assert read(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d') and {'a': '<'} | tojson }}")
    assert read(folder).render_chat(MESSAGES, add_generation_prompt=False) == '{"a": "<"}'


@pytest.mark.parametrize("bos", [True, False])
def test_saved_tokenizers_read_back_equal_here_and_in_transformers(
    tmp_path: Path, bos: bool
) -> None:
    before = read(write(tmp_path / "a", byte_level(bos=bos), chat_template=TEMPLATE))
    before.save(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text('{"model_type": "llama"}')
    after, theirs = read(tmp_path / "b"), AutoTokenizer.from_pretrained(tmp_path / "b")
    for text in TRICKY:
        assert before.encode(text) == after.encode(text) == theirs(text).input_ids
    for name in ("bos_id", "eos_id", "eos_ids", "pad_id", "vocab_size", "chat_template"):
        assert getattr(after, name) == getattr(before, name)
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "<|im_end|>")
    assert theirs.chat_template == TEMPLATE


def test_every_id_that_ends_generation_is_known_and_saved(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", byte_level(bos=False), pad_token={"content": "<pad>"})
    (folder / "config.json").write_text('{"eos_token_id": 9}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 2], "pad_token_id": 1}')
    tokenizer = read(folder)
    assert tokenizer.eos_id == 2
    assert tokenizer.eos_ids == (2, 3)
    assert tokenizer.pad_id == 3
    tokenizer.save(tmp_path / "b")
    assert read(tmp_path / "b").eos_ids == (2, 3)


def test_special_tokens_that_only_the_config_knows_come_from_its_ids(tmp_path: Path) -> None:
    byte_level(bos=False).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2}')
    tokenizer = read(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (2,), None)


def test_tokens_listed_only_beside_tokenizer_json_are_added(tmp_path: Path) -> None:
    backend = byte_level(bos=False)
    size = backend.get_vocab_size()
    added = {
        str(size + 1): {"content": "<tool>", "special": True},
        str(size): {"content": "<think>", "special": False},
    }
    tokenizer = read(write(tmp_path, backend, added_tokens_decoder=added))
    assert tokenizer.encode("<think><tool>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<think>"


def test_truncation_and_padding_in_tokenizer_json_do_not_apply(tmp_path: Path) -> None:
    backend = byte_level(bos=False)
    long = CORPUS[0] * 3
    expected = backend.encode(long).ids
    backend.enable_truncation(8)
    backend.enable_padding(length=16)
    tokenizer = read(write(tmp_path, backend))
    assert tokenizer.encode(long) == expected
    assert tokenizer.encode("") == []


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}'),
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer.model", b"not sentencepiece"),
    ],
)
def test_broken_files_are_one_line(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file) as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def train_sentencepiece(
    folder: Path, model_type: str = "bpe", normalization: str = "identity"
) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        model_type=model_type,
        normalization_rule_name=normalization,
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_sentencepiece_models_give_the_ids_and_text_of_sentencepiece(tmp_path: Path) -> None:
    processor = train_sentencepiece(tmp_path)
    tokenizer = read(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (processor.bos_id(), processor.eos_id())
    random.seed(0)
    jumbles = ["".join(random.sample(text, len(text))) for text in CORPUS for _ in range(20)]
    for text in [text for text in TRICKY if "<s>" not in text] + CORPUS + jumbles:
        ids = processor.EncodeAsIds(text)
        assert tokenizer.encode(text, add_bos=False) == ids
        assert tokenizer.encode(text) == [processor.bos_id(), *ids]
        assert tokenizer.decode(ids) == processor.DecodeIds(ids) == text
    assert tokenizer.encode("</s>", add_bos=False) == [processor.eos_id()]


def test_sentencepiece_models_can_be_saved_for_transformers(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "legacy": false}')
    tokenizer = read(tmp_path)
    tokenizer.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TRICKY:
        assert (
            tokenizer.encode(text)
            == theirs(text).input_ids
            == read(tmp_path / "saved").encode(text)
        )


@pytest.mark.parametrize(
    ("model_type", "normalization"), [("unigram", "identity"), ("bpe", "nfkc_cf")]
)
def test_sentencepiece_models_of_other_kinds_are_refused(
    tmp_path: Path, model_type: str, normalization: str
) -> None:
    train_sentencepiece(tmp_path, model_type, normalization)
    with pytest.raises(ValueError, match="not a BPE model of Llama's kind"):
        Tokenizer.from_folder(tmp_path)
