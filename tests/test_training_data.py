"""Training data: sources, shards that survive a kill, packing, and batches in a pure order."""

import codecs
import errno
import gzip
import json
import lzma
import random
import re
import resource
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.command_line import ENVIRONMENT, ROOT, assert_mistake, run
from tests.tiny import make_model, make_tokenizer, mixed
from tools.text_files import read_text
from tools.training.data.batches import Batches
from tools.training.data.manifest import TokenizerEntry
from tools.training.data.mixture import Mixture
from tools.training.data.packing import Layout, pack
from tools.training.data.readers import HubSource, read_documents
from tools.training.data.shards import Shards, open_shards, tokenize
from tools.training.data.sources import draw, name_sources
from tools.training.data.writing import Encoder
from zoo import Tokenizer

WORDS = (*("server", "request", "cache", "naïve", "café", "Straße", "2048"), ",", ".", "\n")
P, T = 4, 32
SHARD = 800  # characters


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def make_texts(n: int, seed: int = 0) -> list[str]:
    """Of 1 to 60 words, so that some are longer than a row."""
    draw = random.Random(seed)
    return [f"{i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 60))) for i in range(n)]


def write_json_lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two sources, one of them of two files."""
    at = tmp_path_factory.mktemp("texts")
    sources = [
        write_json_lines(at / "books-0.jsonl", make_texts(20, 1)),
        write_json_lines(at / "books-1.jsonl", make_texts(7, 2)),
        write_json_lines(at / "docs.jsonl", make_texts(13, 3)),
    ]
    tokenize(sources, tokenizer, at / "tokens", jobs=1, shard_characters=SHARD)
    return at / "tokens"


@pytest.fixture(scope="module")
def shards(folder: Path) -> Shards:
    return open_shards(folder)


# Readers


def compress(path: Path, content: bytes) -> Path:
    match path.suffix:
        case ".xz":
            content = lzma.compress(content)
        case ".gz":
            content = gzip.compress(content)
        case ".zst":
            content = with_window(content, 27)
    path.write_bytes(content)
    return path


def with_window(content: bytes, log: int) -> bytes:
    # Of a size that is not said beforehand, or the window would be no greater than that.
    parameters = zstandard.ZstdCompressionParameters(window_log=log)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return writer.compress(content) + writer.flush()


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_json_lines_and_texts_are_read_through_every_compression(
    tmp_path: Path, suffix: str
) -> None:
    texts = ["one\ntwo", "naïve \u2028 café", "three"]  # U+2028 is no end of a line here
    lines = [json.dumps({"body": text}, ensure_ascii=False) for text in texts]
    content = "\r\n".join([*lines, "", '{"body": " "}', ""]).encode()
    path = compress(tmp_path / f"a.jsonl{suffix}", content)
    read: list[int] = []
    assert [*read_documents(str(path), field="body", advance=read.append)] == texts
    assert sum(read) == path.stat().st_size
    path = compress(tmp_path / f"a.txt{suffix}", "\n<end>\n".join([*texts, " "]).encode())
    assert [*read_documents(str(path), marker="\n<end>\n")] == texts
    assert [*read_documents(str(path))] == ["\n<end>\n".join([*texts, " "])]


def test_lines_may_be_longer_than_a_block(tmp_path: Path) -> None:
    texts = ["a" * 3_000_000, "b", "c" * 1_048_576]
    assert [*read_documents(write_json_lines(tmp_path / "a.jsonl", texts))] == texts


@pytest.mark.parametrize("suffix", ["", ".xz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, suffix: str) -> None:
    """In front; further on it is a character like others."""
    mark = codecs.BOM_UTF8
    path = compress(tmp_path / f"a.txt{suffix}", mark + "one\ufeff\n<end>two".encode())
    assert [*read_documents(str(path))] == ["one\ufeff\n<end>two"]
    assert [*read_documents(str(path), marker="<end>")] == ["one\ufeff\n", "two"]
    assert read_text(path) == "one\ufeff\n<end>two"
    path = compress(tmp_path / f"a.jsonl{suffix}", mark + b'{"text": "one"}\n{"text": "two"}\n')
    assert [*read_documents(str(path))] == ["one", "two"]


BROKEN = {
    "json": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not valid JSON"),
    "number": ("a.jsonl", b"1" * 5000, "a.jsonl, line 1: not valid JSON"),
    "field": ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2: expected an object with a"),
    "bytes": ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2 is not UTF-8"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text has a lone surrogate"),
    "latin1": ("a.txt", b"caf\xe9", "a.txt is not UTF-8"),
    "empty": ("a.jsonl", b"\n", "a.jsonl holds no text"),
    "truncated": ("a.jsonl.xz", lzma.compress(b"{}")[:-3], "a.jsonl.xz is not a whole .xz file"),
    "no_zst": ("a.jsonl.zst", b'{"text": "a"}\n', "a.jsonl.zst is not a whole .zst file"),
    "half_zst": ("a.txt.zst", with_window(b"abc" * 999, 20)[:-2], "is not a whole .zst file"),
    "window": ("a.txt.zst", with_window(b"abc", 28), "a.txt.zst is not a whole .zst file"),
}


@pytest.mark.parametrize(("name", "content", "what"), BROKEN.values(), ids=BROKEN)
def test_broken_input_is_one_line_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, what: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        list(read_documents(str(path)))
    assert what in str(caught.value)


def test_data_sets_are_named_by_path_configuration_split_and_field() -> None:
    assert HubSource.parse("a/b.jsonl") is None
    assert HubSource.parse("hf:imdb:train") == HubSource("imdb", None, "train", None)
    assert HubSource.parse("hf:a/b:test[5:9]:body") == HubSource("a/b", None, "test[5:9]", "body")
    assert HubSource.parse("hf:a/b/c:train") == HubSource("a/b", "c", "train", None)
    assert HubSource.parse("hf:./a/b/c:train") == HubSource("./a/b/c", None, "train", None)
    for wrong in ("hf:a/b", "hf:", "hf:a:b:c:d"):
        with pytest.raises(ValueError, match="hf:NAME:SPLIT"):
            HubSource.parse(wrong)


def test_a_data_set_is_read_and_tokenised(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    texts = make_texts(5)
    write_json_lines(tmp_path / "set" / "train.jsonl", texts)
    source = f"hf:{tmp_path / 'set'}:train"
    assert [*read_documents(f"{source}[1:4]")] == texts[1:4]
    manifest = tokenize([source], tokenizer, tmp_path / "tokens", jobs=1)
    assert tokenize([source], tokenizer, tmp_path / "tokens", jobs=1) == manifest
    assert [(s["name"], s["documents"]) for s in manifest["sources"]] == [("set-train", 5)]
    with pytest.raises(ValueError, match=r"body"):
        list(read_documents(f"{source}:body"))
    with pytest.raises(ValueError, match=r"^hf:.*nowhere[^\n]*$"):
        list(read_documents(f"hf:{tmp_path / 'nowhere'}:train"))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"^[^\n]*pip install datasets$"):
        list(read_documents("hf:a/b:train"))


def test_numbered_files_are_one_source() -> None:
    given = ["x/a-000.jsonl.zst", "b=x/a-val.jsonl", "x/a-001.jsonl", "docs2.txt", "b=hf:o/n:test"]
    assert name_sources(given) == {
        "a": ["x/a-000.jsonl.zst", "x/a-001.jsonl"],
        "b": ["x/a-val.jsonl", "hf:o/n:test"],
        "docs2": ["docs2.txt"],
    }
    assert [*name_sources(["hf:o/n.x:train[:5]"])] == ["n_x-train_5_"]
    for wrong, what in ([], "no source"), (["a.txt", "b=./a.txt"], "twice"), ([".x"], "NAME="):
        with pytest.raises(ValueError, match=what):
            name_sources(wrong)


# Shards


EMPTY = {
    "zero": ("b.txt", b""),
    "blanks": ("b.txt", b"\n \t" * (1 << 20)),
    "mark": ("b.txt", codecs.BOM_UTF8 + b"\n"),
    "compressed": ("b.txt.gz", b"\n"),
    "lines": ("b.jsonl", b'\n{"text": " "}\n'),
}


@pytest.mark.parametrize(("name", "content"), EMPTY.values(), ids=EMPTY)
def test_an_empty_file_is_named_before_anything_is_written(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes
) -> None:
    first = write_json_lines(tmp_path / "a.jsonl", make_texts(3))
    empty = compress(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(empty))} holds no text$"):
        tokenize([first, str(empty)], tokenizer, tmp_path / "out", jobs=1)
    assert not (tmp_path / "out").exists()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_texts_come_back_from_shards(shards: Shards, tokenizer: Tokenizer) -> None:
    books, docs = shards.sources
    assert (books.name, docs.name) == ("books", "docs")
    assert len(shards.manifest["sources"][0]["shards"]) > 3
    for source, texts in (books, make_texts(20, 1) + make_texts(7, 2)), (docs, make_texts(13, 3)):
        ids = [source.read(d).tolist() for d in range(len(source))]
        assert [tokenizer.decode(row[:-1]) for row in ids] == texts
        assert {row[-1] for row in ids} == {tokenizer.eos_id}
        assert [len(row) for row in ids] == source.lengths.tolist()
    assert books.read(3, 2, 5).tolist() == books.read(3).tolist()[2:5]


def test_any_number_of_processes_writes_the_same_bytes(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    sources = [str(p) for p in sorted(folder.parent.glob("*.jsonl"))]
    tokenize(sources, tokenizer, tmp_path / "two", jobs=2, shard_characters=SHARD)
    assert contents(tmp_path / "two") == contents(folder)


HANGING = """
import sys, time
from pathlib import Path
from tests.tiny import make_tokenizer
from tools.training.data import shards, writing

save, calls = writing.save_array, []

def hang_at_the_third(path, array):
    calls.append(path)
    if len(calls) == 3:
        path.with_name(f".{path.name}.0123abcd.new").write_bytes(b"half")
        print("hanging", flush=True)
        time.sleep(600)
    save(path, array)

writing.save_array = hang_at_the_third
folder, size, *sources = sys.argv[1:]
shards.tokenize(sources, make_tokenizer(), Path(folder), jobs=1, shard_characters=int(size))
"""


def test_a_share_of_documents_is_the_same_however_they_are_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = make_texts(400)
    source = write_json_lines(tmp_path / "a.jsonl", texts)
    other = write_json_lines(tmp_path / "b.jsonl", make_texts(20, seed=1))
    kept = {}
    for share in (0.2, 0.5, 1.0):
        folder = tmp_path / str(share)
        tokenize([source, other], tokenizer, folder, keep={"a": share}, jobs=1)
        a, b = open_shards(folder).sources
        kept[share] = {tokenizer.decode(a.read(i)[:-1].tolist()) for i in range(len(a))}
        assert len(b) == 20
    assert kept[0.2] < kept[0.5] < kept[1.0] == set(texts)
    assert 50 < len(kept[0.2]) < 110
    # Another order, one by one.
    assert [t for t in reversed(texts) if [*draw([t], 0.2)]] == [*draw(reversed(texts), 0.2)]
    assert {*draw(texts, 0.2)} == kept[0.2]


def test_a_share_of_nothing_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_texts(3))
    for keep, message in (
        ({"b": 0.5}, "no source is named 'b'; there are a"),
        ({"a": 0.0}, r"the share of a to keep must be in \(0, 1\], not 0.0"),
        ({"a": 1e-9}, "no document of a is in the share to keep, 1e-09; name a greater one"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize([source], tokenizer, tmp_path / "out", keep=keep, jobs=1)
    tokenize([source], tokenizer, tmp_path / "whole", jobs=1)
    tokenize([source], tokenizer, tmp_path / "whole", keep={"a": 1}, jobs=1)  # the same
    with pytest.raises(ValueError, match="was made with field='text'"):
        tokenize([source], tokenizer, tmp_path / "whole", keep={"a": 0.9}, jobs=1)


def test_a_kill_in_the_middle_keeps_finished_shards_and_changes_no_byte(
    folder: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [str(p) for p in sorted(folder.parent.glob("*.jsonl"))]
    killed = tmp_path / "killed"
    arguments = [sys.executable, "-c", HANGING, str(killed), str(SHARD), *sources]
    with subprocess.Popen(
        arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    # The third has its tokens, but not what says that they are whole.
    assert len([*killed.glob("*.tokens")]) == 3
    finished = [path.name for path in killed.glob("[!.]*.lengths.npy")]
    total = sum(len(s["shards"]) for s in open_shards(folder).manifest["sources"])
    assert len(finished) == 2 < total - 1
    with pytest.raises(ValueError, match="is not complete"):
        open_shards(killed)
    written: list[str] = []
    write = Encoder.write

    def watch(self: Encoder, job):
        written.extend([job.path.stem] if job.texts else [])
        return write(self, job)

    monkeypatch.setattr(Encoder, "write", watch)
    tokenize(sources, tokenizer, killed, jobs=1, shard_characters=SHARD)
    assert len(written) == total - len(finished)
    assert contents(killed) == contents(folder)
    tokenize(sources, tokenizer, killed, jobs=1, shard_characters=SHARD)  # complete: nothing to do
    assert len(written) == total - len(finished)


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, folder: Path, tokenizer: Tokenizer
) -> None:
    a = write_json_lines(tmp_path / "a.jsonl", make_texts(3))
    b = write_json_lines(tmp_path / "b.jsonl", make_texts(3, 1))
    out = tmp_path / "out"
    tokenize([a, b], tokenizer, out, jobs=1)
    before = contents(out)
    other = make_tokenizer()
    other._backend.add_tokens(["loopback"])
    for sources, by, options, what in (
        ([a, b], other, {}, "another tokenizer"),
        ([a, b], tokenizer, {"end": "none"}, "bos or end"),
        ([a, b], tokenizer, {"shard_characters": 5}, "shard_characters=4000000"),
        ([a], tokenizer, {}, "b.jsonl (source b), which is not given"),
        ([b, a], tokenizer, {}, "another order"),
        ([a, b, str(folder / "manifest.json")], tokenizer, {}, "manifest.json is new"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]*; name a new folder$") as caught:
            tokenize(sources, by, out, jobs=1, **options)
        assert what in str(caught.value)
    write_json_lines(Path(b), make_texts(3, 2))
    with pytest.raises(ValueError, match=r"made from another b.jsonl"):
        tokenize([a, b], tokenizer, out, jobs=1)
    assert contents(out) == before
    with pytest.raises(ValueError, match=r"has files but no manifest.json"):
        tokenize([a], tokenizer, tmp_path, jobs=1)


def test_a_damaged_folder_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_texts(3))
    out = tmp_path / "out"
    tokenize([source], tokenizer, out, jobs=1)
    file = out / "a-0000-00000.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"a-0000-00000.tokens is damaged.*remove the folder"):
        open_shards(out)
    file.unlink()
    with pytest.raises(ValueError, match=r"^[^\n]*a-0000-00000.tokens is missing; remove"):
        open_shards(out)
    (out / "a.starts.npy").write_bytes(b"")
    for _ in range(2):  # empty, and not there
        with pytest.raises(ValueError, match=r"^[^\n]*a.starts.npy is missing or damaged; remove"):
            open_shards(out)
        (out / "a.starts.npy").unlink(missing_ok=True)
    (out / "manifest.json").write_text('{"schema": 1}')
    with pytest.raises(ValueError, match=r"has no complete, dtype"):
        open_shards(out)
    with pytest.raises(ValueError, match=r"has no manifest.json"):
        open_shards(tmp_path)


def test_what_ends_a_write_is_named_and_the_same_call_goes_on(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """A limit of the size of files stands for a full disk."""
    source = write_json_lines(tmp_path / "a.jsonl", make_texts(40))
    out = tmp_path / "out"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            tokenize([source], tokenizer, out, jobs=1, shard_characters=2 * SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert not [*out.glob(".*.new")]
    tokenize([source], tokenizer, out, jobs=1, shard_characters=2 * SHARD)
    tokenize([source], tokenizer, tmp_path / "whole", jobs=1, shard_characters=2 * SHARD)
    assert contents(out) == contents(tmp_path / "whole")


def test_documents_begin_and_end_as_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", ["cache"])
    plain = tokenizer.encode("cache", add_bos=False)
    for end, behind in ("none", []), ("eos", [tokenizer.eos_id]), (".", tokenizer.encode(".")):
        tokenize([source], tokenizer, tmp_path / end.replace(".", "dot"), jobs=1, end=end)
        found = open_shards(tmp_path / end.replace(".", "dot")).sources[0]
        assert found.read(0).tolist() == plain + behind
    with pytest.raises(ValueError, match="must be one token"):
        tokenize([source], tokenizer, tmp_path / "x", jobs=1, end="cache cache")
    with pytest.raises(ValueError, match="bos"):
        tokenize([source], tokenizer, tmp_path / "x", jobs=1, add_bos=True)
    assert not (tmp_path / "x").exists()


def test_a_great_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer._backend.add_tokens([f"<{i}>" for i in range(66_000)])
    source = write_json_lines(tmp_path / "a.jsonl", ["cache<65999>"])
    manifest = tokenize([source], tokenizer, tmp_path / "out", jobs=1)
    assert manifest["dtype"] == "uint32"
    ids = open_shards(tmp_path / "out").sources[0].read(0).tolist()
    assert ids[-2] == tokenizer.vocab_size - 1 > 65535


def test_two_processes_do_not_write_one_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", make_texts(3))

    def again(_: int) -> None:
        tokenize([source], tokenizer, tmp_path / "out", jobs=1)

    with pytest.raises(ValueError, match="another process is writing"):
        tokenize([source], tokenizer, tmp_path / "out", jobs=1, advance=again)


# Packing

documents_lists = st.lists(st.integers(1, 70), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths=documents_lists, chunk=st.sampled_from([1, 2, 4, 8]), chunks=st.integers(1, 5))
def test_packed_rows_hold_every_token_once_and_never_look_across_documents(
    lengths: list[int], chunk: int, chunks: int
) -> None:
    # A token says which document it is of, and where in it it stands.
    documents = [[100 * d + i + 1 for i in range(n)] for d, n in enumerate(lengths)]
    size = chunk * chunks
    batch = pack(documents, row_size=size, chunk_size=chunk, pad_id=0)
    ids, labels, starts = (tensor.tolist() for tensor in batch)
    assert [t.dtype for t in batch] == [torch.int64, torch.int64, torch.int32]
    # Nothing is missing, nothing is there twice, and the order is that of the documents.
    assert [t for row in ids for t in row if t] == [t for d in documents for t in d]
    for row, targets, begins in zip(ids, labels, starts, strict=True):
        for t, (token, label, start) in enumerate(zip(row, targets, begins, strict=True)):
            assert start % chunk == 0
            assert start <= t
            if not token:
                # What padding belongs to does not change within its chunk.
                assert label == -100
                assert t > 0
                assert start == begins[t - 1]
                continue
            d, i = divmod(token - 1, 100)
            assert label == (token + 1 if i + 1 < lengths[d] else -100)
            # From `start` on stand this document's tokens, the first or those behind a cut.
            first = row[start] - 1
            assert (first // 100, first % 100) == (d, i - (t - start))
            assert first % 100 == 0 or start == 0
    # Padding fills chunks, and the last row.
    wanted = sum(-(-n // chunk) * chunk for n in lengths)
    assert len(ids) == -(-wanted // size)
    layout = Layout(np.array(lengths), row_size=size, chunk_size=chunk)
    pads = sum(row.count(0) for row in ids)
    assert layout.padding == pytest.approx(pads / (len(ids) * size))


@settings(max_examples=30, deadline=None)
@given(lengths=documents_lists)
def test_without_borders_the_documents_are_one(lengths: list[int]) -> None:
    documents = [[100 * d + i + 1 for i in range(n)] for d, n in enumerate(lengths)]
    ids, labels, starts = pack(documents, row_size=16, chunk_size=4, pad_id=0, borders=False)
    one = [token for document in documents for token in document]
    n = len(one)
    assert ids.flatten().tolist() == one + [0] * (ids.numel() - n)
    assert labels.flatten().tolist() == one[1:] + [-100] * (ids.numel() - n + 1)
    assert not starts.any()


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of chunk_size \(4\) tokens, not 30"):
        pack([[1]], row_size=30, chunk_size=4)
    with pytest.raises(ValueError, match="no document with a token"):
        pack([[]], row_size=32, chunk_size=4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_packed_row_gives_the_logits_of_its_documents_alone(family: str) -> None:
    """With EVA, full and window layers; a cut document counts as one from its cut on."""
    model = make_model(mixed(family), dtype=torch.float64)
    draw = random.Random(0)
    documents = [[draw.randrange(500) for _ in range(n)] for n in (21, 3, 9, 50, 1, 17)]
    batch = pack(documents, row_size=48, chunk_size=4, pad_id=7)
    with torch.no_grad():
        logits = model(batch.ids, seq_start=batch.seq_start)
        layout = Layout(np.array([len(d) for d in documents]), row_size=48, chunk_size=4)
        for row in range(layout.rows):
            for at, document, start, stop in layout.pieces(row):
                alone = model(torch.tensor([documents[document][start:stop]]))
                torch.testing.assert_close(
                    logits[row : row + 1, at : at + stop - start], alone, atol=1e-11, rtol=0
                )


# Batches


def make_batches(shards: Shards, **options) -> Batches:
    sizes = {"row_size": T, "chunk_size": P, "batch_size": 6, "seed": 5}
    return Batches(shards, **(sizes | options))


def assert_same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


WEIGHTS = {"books": 0.3, "docs": 0.7}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_run_goes_on_with_the_very_next_batch(
    shards: Shards, folder: Path, weights, prefetch: int
) -> None:
    whole = make_batches(shards, weights=weights)
    wanted = [next(whole) for _ in range(60)]  # several passes
    run_ = make_batches(shards, weights=weights, prefetch=prefetch)
    for batch in wanted[:23]:
        assert_same(next(run_), batch)
    state = json.loads(json.dumps(run_.state_dict()))
    run_.close()
    # After a kill: another object, over shards that are opened anew.
    again = make_batches(open_shards(folder), weights=weights, prefetch=prefetch)
    next(again)
    again.load_state_dict(state)
    assert again.step == 23
    for batch in wanted[23:]:
        assert_same(next(again), batch)
    again.close()
    assert_same(whole.batch(7), wanted[7])


def test_a_run_does_not_go_on_with_something_else(shards: Shards) -> None:
    state = make_batches(shards).state_dict()
    make_batches(shards, rank=1, ranks=2, prefetch=1).load_state_dict(state)
    tokenizer: TokenizerEntry = {**shards.manifest["tokenizer"], "fingerprint": "another"}
    others = replace(shards, manifest={**shards.manifest, "tokenizer": tokenizer})
    with pytest.raises(ValueError, match="the run to go on with had other"):
        make_batches(others).load_state_dict(state)
    even = {"books": 1, "docs": 1}
    state_of_even = make_batches(shards, weights=even).state_dict()
    make_batches(shards, weights={"docs": 2.0, "books": 2.0}).load_state_dict(state_of_even)
    with pytest.raises(ValueError, match="the run to go on with had other"):
        make_batches(shards, weights=WEIGHTS).load_state_dict(state_of_even)
    for other in (
        {"seed": 6},
        {"batch_size": 12},
        {"row_size": 64},
        {"weights": WEIGHTS},
        {"borders": False},
        {"chunk_size": 8},
    ):
        with pytest.raises(ValueError, match="the run to go on with had other"):
            make_batches(shards, **other).load_state_dict(state)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_global_batch_is_the_same_for_any_number_of_ranks(shards: Shards, weights) -> None:
    alone = make_batches(shards, weights=weights)
    for ranks in (1, 2, 3):
        parts = [make_batches(shards, weights=weights, rank=r, ranks=ranks) for r in range(ranks)]
        for step in (0, 1, 17):
            for r, part in enumerate(parts):
                rows = [tensor[r::ranks] for tensor in alone.batch(step)]
                assert_same(part.batch(step), rows)


def tokens_of(ids: torch.Tensor, pad_id: int) -> Counter[int]:
    return Counter(ids[ids != pad_id].tolist())


@pytest.mark.parametrize("seed", [0, 3, None])
def test_a_pass_holds_every_token_once_and_passes_differ(shards: Shards, seed) -> None:
    batches = make_batches(shards, batch_size=1, seed=seed)
    size = batches.passes["all"]
    every = [source.read(d) for source in shards.sources for d in range(len(source))]
    pad_id = shards.manifest["tokenizer"]["pad_id"]  # also the end of every document here
    wanted = tokens_of(torch.from_numpy(np.concatenate(every)), pad_id)
    passes = []
    for number in range(2):
        rows = [batches.batch(number * size.rows + i) for i in range(size.rows)]
        passes.append(torch.cat([row.ids for row in rows]))
        assert tokens_of(passes[-1], pad_id) == wanted
        # All but the first token of each document are predicted, across the cuts of rows too.
        labels = torch.cat([row.labels for row in rows])
        assert int((labels != -100).sum()) == size.tokens - size.documents
        firsts = Counter(int(document[0]) for document in every)
        assert (
            Counter(labels[labels != -100].tolist())
            == Counter(np.concatenate(every).tolist()) - firsts
        )
    assert torch.equal(*passes) == (seed is None)
    assert 0 < size.padding < 0.2
    assert batches.passes_done(2 * size.rows) == {"all": 2.0}


def test_rows_of_one_long_document_are_shuffled_anew_in_every_pass(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = write_json_lines(tmp_path / "a.jsonl", [" ".join(make_texts(60))])
    tokenize([source], tokenizer, tmp_path / "out", jobs=1)
    batches = make_batches(open_shards(tmp_path / "out"), batch_size=1)
    n = batches.passes["all"].rows
    first, second = ([batches.batch(k * n + i).ids for i in range(n)] for k in range(2))
    assert n > 20
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert {str(row) for row in first} == {str(row) for row in second}


def test_documents_are_packed_anew_in_every_pass(shards: Shards) -> None:
    """Not only rows shuffled: other documents meet in a row, and others are cut."""
    batches = make_batches(shards, batch_size=1)
    n = batches.passes["all"].rows
    first, second = (
        {str(batches.batch(k * n + i).ids.tolist()) for i in range(n)} for k in range(2)
    )
    assert len(first & second) < n / 2


def test_another_seed_is_another_order(shards: Shards) -> None:
    one, other = (make_batches(shards, seed=seed).batch(0) for seed in (1, 2))
    assert not torch.equal(one.ids, other.ids)


@settings(max_examples=50, deadline=None)
@given(weights=st.lists(st.floats(0.002, 1.0), min_size=1, max_size=6), row=st.integers(0, 10**9))
def test_a_mixture_gives_each_source_its_share_and_its_rows_in_turn(
    weights: list[float], row: int
) -> None:
    named = {f"s{i}": weight for i, weight in enumerate(weights)}
    mixture = Mixture([*named], named)
    before, after = mixture.counts(row), mixture.counts(row + 1)
    source, index = mixture.locate(row)
    assert sum(before) == row
    assert [b - a for a, b in zip(before, after, strict=True)] == [
        int(i == source) for i in range(len(weights))
    ]
    assert index == before[source]
    for count, weight in zip(mixture.counts(1000), weights, strict=True):
        assert abs(count / 1000 - weight / sum(weights)) <= 0.0011
    # And not only in the long run: any 100 rows have their share to a row or two.
    some = [b - a for a, b in zip(before, mixture.counts(row + 100), strict=True)]
    for count, weight in zip(some, weights, strict=True):
        assert abs(count - 100 * weight / sum(weights)) <= 2.5


def test_weights_choose_sources(shards: Shards) -> None:
    only = make_batches(shards, weights={"books": 0, "docs": 2})
    assert [*only.passes] == ["docs"]
    assert Mixture(["a", "b"], {"a": 9, "b": 1}).counts(1000) == [900, 100]
    assert Mixture(["a", "b"], {"a": 1e6, "b": 1}).counts(1000) == [999, 1]
    # 307.5, three times 230.6, and 0.6, which is made 1.
    shares = {"a": 1.0, "b": 0.75, "c": 0.75, "d": 0.75, "e": 0.002}
    assert Mixture([*shares], shares).counts(1000) == [307, 231, 231, 230, 1]
    for weights, what in (
        ({"books": 1}, "must name the sources books, docs"),
        ({"books": 0, "docs": 0}, "not all 0"),
        ({"books": -1, "docs": 2}, "at least 0"),
    ):
        with pytest.raises(ValueError, match=what):
            make_batches(shards, weights=weights)
    for options in ({"batch_size": 5, "ranks": 2}, {"rank": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="batch_size must be a multiple"):
            make_batches(shards, **options)
    with pytest.raises(ValueError, match="seed must be"):
        make_batches(shards, seed=-1)


# The command


def test_zoo_tokenize_writes_what_open_shards_reads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(tmp_path / "tokenizer")
    write_json_lines(tmp_path / "a.jsonl", make_texts(6))
    command = ("tokenize", tmp_path / "a.jsonl", "--out", tmp_path / "out", "--jobs", 1)
    done = run(*command, "--tokenizer", tmp_path / "tokenizer", "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    (source,) = open_shards(tmp_path / "out").sources
    assert found["sources"] == {"a": {"documents": 6, "tokens": int(source.lengths.sum())}}
    again = run(*command, "--tokenizer", tmp_path / "tokenizer")
    assert f"{found['tokens']:,} tokens of 6 documents" in again.out
    assert_mistake(run(*command, "--tokenizer", "smollm3-135m"), "smollm2-135m")
    assert_mistake(run(*command, "--tokenizer", tmp_path / "out"), "has no tokenizer")
    assert_mistake(run("tokenize", tmp_path / "b.txt", *command[2:], "--tokenizer", "x"), "b.txt")
    assert_mistake(run(*command, "--tokenizer", "x", "--keep", "a"), "must be SOURCE=NUMBER")
    part = ("--tokenizer", tmp_path / "tokenizer", "--keep", "a=0.5")
    assert_mistake(run(*command, *part), "name a new folder")
    kept = run(*command[:2], *part, "--out", tmp_path / "part", "--json", "--jobs", 1)
    documents = json.loads(kept.out)["sources"]["a"]["documents"]
    assert documents == len([*draw(make_texts(6), 0.5)])
