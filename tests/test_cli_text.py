"""`zoo generate`, `zoo chat`, and the options that say which model runs."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

import pytest

import zoo
from flasheva import EvaConfig, Impl
from recipes import parse_layers
from tests.command_line import assert_mistake, run, save
from tests.tiny import make_tokenizer, mixed
from tools.model_options import AttentionOptions, RuntimeOptions, layers_by_type
from zoo.description import describe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a layer of each type."""
    return save(tmp_path_factory.mktemp("models") / "mixed", mixed("llama"))


# Options of all models


def test_the_options_are_those_of_the_library() -> None:
    (impl,) = get_args(RuntimeOptions.__annotations__["impl"])[:1]
    assert get_args(impl) == get_args(Impl)
    ours = {field.name for field in dataclasses.fields(AttentionOptions)}
    eva = {field.name for field in dataclasses.fields(EvaConfig)}
    assert ours - eva == {"layers", "attention", "window_type"}
    # What is left out is for training, or has no effect that another option has not.
    assert eva - ours == {"window", "summary_bias", "training_noise"}


def load_with(folder: Path, options: AttentionOptions) -> tuple[EvaConfig, tuple[str, ...]]:
    """EVA options and layer types of the model in `folder`."""
    config = describe(folder)
    types = options.layer_types(config)
    return options.eva(config, types), types


def test_layers_chooses_the_exact_ones(folder: Path) -> None:
    full, eva, window = "full_attention", "eva_attention", "window_attention"
    for options, types in (
        (AttentionOptions(), (eva, full, window)),
        (AttentionOptions(layers="0,2"), (full, eva, full)),
        (AttentionOptions(layers="none"), (eva, eva, eva)),
        (AttentionOptions(layers="0-1", attention="window_attention"), (full, full, window)),
        (AttentionOptions(attention="window_attention"), (window, full, window)),
    ):
        assert load_with(folder, options)[1] == types


def test_a_changed_field_leaves_the_others_as_the_checkpoint_has_them(folder: Path) -> None:
    saved = describe(folder).eva
    assert load_with(folder, AttentionOptions())[0] == saved
    options = AttentionOptions(window_size=16, window_type="block")
    replaced = dataclasses.replace(saved, window_size=16, window="block")
    assert load_with(folder, options)[0] == replaced


def test_sinks_of_one_chunk_stay_one_chunk(folder: Path) -> None:
    saved = describe(folder).eva
    assert saved.sink_size == saved.chunk_size == 4
    assert load_with(folder, AttentionOptions(chunk_size=2))[0].sink_size == 2
    assert load_with(folder, AttentionOptions(chunk_size=2, sink_size=4))[0].sink_size == 4


@pytest.mark.parametrize("text", ["0", "7,17-18,20", "0-29", "1,3,5"])
def test_layers_are_shown_as_they_are_typed(text: str) -> None:
    exact = parse_layers(text)
    types = ["full_attention" if layer in exact else "eva_attention" for layer in range(31)]
    assert layers_by_type(types)["full_attention"] == text


# zoo generate


def texts(folder: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    model = zoo.load(folder)
    return [result.text for result in zoo.generate(model, prompts, max_new_tokens=tokens)]


def test_one_prompt_is_printed_as_the_library_writes_it(folder: Path) -> None:
    done = run("generate", folder, "Numbers such as", "--max-new-tokens", 8)
    assert done.out == texts(folder, ["Numbers such as"], 8)[0] + "\n"
    assert done.err.endswith(f"{folder}: weights from folder {folder}\n")


def test_prompts_come_from_arguments_options_and_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("third\r\nfourth [and] more\n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "third"}\n{"prompt": "fourth\\nlast"}\n')
    common = ("generate", folder, "first", "--prompt", "second", "--json", "--max-new-tokens", 4)
    rows = [
        [
            json.loads(line)
            for line in run(*common, "--prompts-file", tmp_path / name).out.split("\n")
            if line
        ]
        for name in ("lines.txt", "lines.jsonl")
    ]
    assert [row["prompt"] for row in rows[0]] == ["first", "second", "third", "fourth [and] more"]
    assert [row["prompt"] for row in rows[1]] == ["first", "second", "third", "fourth\nlast"]
    assert [row["text"] for row in rows[0]] == texts(folder, [row["prompt"] for row in rows[0]], 4)


def test_stdin_is_one_prompt(folder: Path) -> None:
    arguments = ("generate", folder, "--max-new-tokens", 4)
    prompt = "A café,\nand words"
    assert run(*arguments, stdin=f"{prompt}\n".encode()).out == run(*arguments, prompt).out


def test_a_json_line_says_what_was_done(folder: Path) -> None:
    row = json.loads(run("generate", folder, "one two", "--json", "--max-new-tokens", 5).out)
    tokenizer = make_tokenizer()
    assert row.pop("seconds") > 0
    assert row == {
        "prompt": "one two",
        "text": texts(folder, ["one two"], 5)[0],
        "prompt_tokens": len(tokenizer.encode("one two")),
        "new_tokens": 5,
        "finish_reason": "length",
        "model": str(folder),
        "weights_source": f"folder {folder}",
    }


def test_several_texts_have_rules_between_them(folder: Path) -> None:
    done = run("generate", folder, "one", "two", "--max-new-tokens", 4)
    first, second = texts(folder, ["one", "two"], 4)
    parts = [part for part in done.out.split("─") if part]
    assert parts == [" 1 of 2 ", f"\n{first}\n", " 2 of 2 ", f"\n{second}\n"]


def test_chat_puts_a_prompt_into_the_models_template(folder: Path) -> None:
    arguments = ("--max-new-tokens", 4)
    done = run("generate", folder, "Hello", "--chat", *arguments)
    assert done.out == run("generate", folder, "[user] Hello\n[assistant] ", *arguments).out


def test_the_options_of_sampling_arrive(folder: Path) -> None:
    words = "--temperature 0.8 --top-k 20 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.2"
    sampling = zoo.Sampling(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2, seed=3
    )
    (result,) = zoo.generate(
        zoo.load(folder), "one", max_new_tokens=20, sampling=sampling, stop=["e"], max_seq_len=16
    )
    rest = ("--seed", 3, "--stop", "e", "--max-seq-len", 16, "--max-new-tokens", 20)
    assert run("generate", folder, "one", *words.split(), *rest).out == result.text + "\n"


def test_layers_changes_what_is_generated(folder: Path) -> None:
    prompt = "The server listens on the loopback address and answers one request"
    arguments = ("generate", folder, prompt, "--max-new-tokens", 12)
    model = zoo.load(folder, layer_types=["full_attention"] * 3)
    (result,) = zoo.generate(model, prompt, max_new_tokens=12)
    assert run(*arguments, "--layers", "0-2").out == result.text + "\n" != run(*arguments).out


NAME_HINT = "(the first argument is NAME; give the text with --prompt)"


@pytest.mark.parametrize(
    "text", ["The sky is", "Hello", "cats and/or dogs", "...and then", "word " * 200]
)
def test_a_text_in_the_place_of_the_name_is_recognised(text: str) -> None:
    done = run("generate", text, stdin=b"never read")
    assert_mistake(done, NAME_HINT)
    assert done.err.endswith(f"{NAME_HINT}\n")


def test_a_wrong_name_with_a_text_behind_it_is_a_wrong_name() -> None:
    assert NAME_HINT not in run("generate", "pythia-16m", "The sky is").err
    assert_mistake(run("generate", "The sky is", "blue"), NAME_HINT)


@pytest.mark.parametrize(
    ("options", "what"),
    [(("--max-new-tokens", 0), "max_new_tokens must be"), (("--stop", ""), "must not be empty")],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_options_are_checked_before_a_model_is_loaded(
    folder: Path, command: str, options: tuple[object, ...], what: str
) -> None:
    done = run(command, folder, *options, stdin=b"one\n")
    assert_mistake(done, what)
    assert "weights from" not in done.err


def test_draft_tokens_need_a_draft(folder: Path) -> None:
    done = run("generate", folder, "one", "--draft-tokens", 3)
    assert_mistake(done, "--draft-tokens 3 needs --draft NAME")
    assert "weights from" not in done.err
    done = run("generate", folder, "one", "--draft", folder, "--draft-tokens", 0)
    assert_mistake(done, "--draft-tokens must be at least 1, not 0")
    assert "weights from" not in done.err
    words = ("generate", folder, "one", "--max-new-tokens", 3, "--draft", folder)
    assert run(*words, "--draft-tokens", 3).out == run(*words).out != ""


# zoo chat


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is given, which then answers with "yes"."""
    heard: list[str] = []

    def stream(model: zoo.CausalLM, prompt: list[int], **options: object) -> Iterator[str]:
        assert model.tokenizer is not None
        heard.append(model.tokenizer.decode(prompt))
        yield from ("y", "es")

    monkeypatch.setattr(zoo, "stream", stream)
    return heard


def test_a_chat_remembers_what_was_said(folder: Path, heard: list[str]) -> None:
    done = run("chat", folder, "--system", "Be brief.", stdin=b"one\n\n  two \n")
    assert (done.code, done.out) == (0, "yes\nyes\n")
    opening = "[system] Be brief.\n[user] one\n[assistant] "
    assert heard == [opening, f"{opening}yes\n[user] two\n[assistant] "]


def test_a_chat_can_be_reset_and_left(folder: Path, heard: list[str]) -> None:
    done = run("chat", folder, stdin=b"one\n/reset\ntwo\n/what\n/exit\nthree\n")
    assert (done.code, done.out) == (0, "yes\nyes\n")
    assert heard == ["[user] one\n[assistant] ", "[user] two\n[assistant] "]
    assert "unknown command /what; there are /reset and /exit\n" in done.err


def test_a_chat_streams_the_models_own_words(folder: Path) -> None:
    done = run("chat", folder, "--max-new-tokens", 6, stdin=b"one\n")
    assert done.out == texts(folder, ["[user] one\n[assistant] "], 6)[0] + "\n"


def test_a_model_without_a_chat_template_does_not_chat(folder: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink()
    assert_mistake(run("chat", plain, stdin=b"one\n"), "chat template")
    assert_mistake(run("generate", plain, "one", "--chat"), "chat template")
