"""The files that tools read and write: texts, compressed or not, and rows of results."""

import gzip
import json
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.command_line import run, save
from tests.tiny import mixed
from tools.results import append_result, check_appendable, check_results
from tools.text_files import read_text

TEXT = "Straße, naïve\r\n\n" * 1000
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_is_the_same_however_it_is_compressed(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"text.txt{suffix}"
    file.write_bytes(COMPRESS[suffix](TEXT.encode()))
    assert read_text(file) == TEXT


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_texts_of_json_lines_are_parted_by_blank_lines(tmp_path: Path, suffix: str) -> None:
    rows = [json.dumps({"id": 1, "text": text}) for text in ("one", "two\n")]
    file = tmp_path / f"text.jsonl{suffix}"
    file.write_bytes(COMPRESS[suffix]("\n".join(rows).encode()))
    assert read_text(file) == "one\n\ntwo\n"


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"text{suffix}"
    file.write_bytes(COMPRESS[suffix](os.urandom(999).hex().encode())[:-9])
    with pytest.raises(ValueError, match=f"not a whole {suffix} file"):
        read_text(file)


def test_zstandard_files_have_frames_and_an_end(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    frames = zstandard.compress(TEXT.encode()) + zstandard.compress(b"and more")
    file = tmp_path / "text.zst"
    file.write_bytes(frames)
    assert read_text(file) == TEXT + "and more"
    for wrong in (frames[:-3], frames[:9], frames + b"garbage"):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"not a whole \.zst file"):
            read_text(file)


def test_without_zstandard_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "text.zst").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install zstandard"):
        read_text(tmp_path / "text.zst")


FIELDS = (
    *("bench", "case", "impl", "metric", "value", "unit", "spread"),
    *("device", "torch", "triton", "commit", "date", "command"),
)


def append(path: Path, value: float) -> None:
    append_result(
        path,
        bench="evaluate",
        case={"model": "x"},
        impl="reference",
        metric="perplexity",
        value=value,
        unit="",
        spread=None,
        device=torch.device("cpu"),
        command="zoo perplexity",
    )


def test_a_result_says_what_was_measured_and_how(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", mixed("llama"))
    out = tmp_path / "rows.jsonl"
    arguments = ("passkey", folder, "--length", 200, "--n", 2, "--seed", 5, "--out", out)
    assert run(*arguments).code == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["metric"] for row in rows] == ["accuracy", "log_likelihood"]
    for row in rows:
        assert tuple(row) == FIELDS
        assert (row["bench"], row["impl"]) == ("evaluate", "reference")
        assert row["torch"] == torch.__version__
        assert row["case"]["seed"] == 5
        assert row["case"]["layers"] == {
            "eva_attention": "0",
            "full_attention": "1",
            "window_attention": "2",
        }
        assert row["command"] == f"zoo passkey {folder} --length 200 --n 2 --seed 5 --out {out}"


def test_results_are_appended_to_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text('{"cut": sho')  # by a run that was killed
    append(out, 1.0)
    append(out, 2.0)
    cut, *rows = out.read_text(encoding="utf-8").splitlines()
    assert cut == '{"cut": sho'
    assert [json.loads(row)["value"] for row in rows] == [1.0, 2.0]


def test_what_is_no_number_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append(tmp_path / "rows.jsonl", float("nan"))
    assert not list(tmp_path.iterdir())


def test_rows_go_to_no_file_of_another_kind(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    for begin in (b"", b'{"ben'):
        out.write_bytes(begin)
        check_results(out)
        append(out, 1.0)
        check_results(out)
    for other in (b"{}\n", b'{\n  "model_type": "llama"\n}\n', b'{"model": "a"}\n', b"\xfd7zXZ"):
        out.write_bytes(other)
        with pytest.raises(ValueError, match="holds no rows of results"):
            check_results(out)
        assert out.read_bytes() == other


def test_a_file_that_cannot_be_written_is_refused_beforehand(tmp_path: Path) -> None:
    check_appendable(tmp_path / "new.jsonl")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="which is a folder"):
        check_appendable(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        check_appendable(tmp_path / "no" / "rows.jsonl")
