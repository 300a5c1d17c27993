"""The command line: how it starts and ends, one line for a mistake, `zoo list` and `zoo info`."""

import inspect
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.models import OptionInfo

import zoo
from recipes import parse_layers
from tests.command_line import CONTEXT, ENVIRONMENT, ROOT, assert_mistake, python, run, save
from tests.tiny import hf_config, mixed
from tools import cli
from tools.list import SIZES
from zoo.families import build, preset, read_config
from zoo.registry import BASES

COMMANDS = (
    *("generate", "chat", "list", "info", "perplexity", "passkey"),
    *("evaluate", "compare", "export", "place", "ablate", "tokenize", "adapter", "finetune"),
    *("sample-corpus", "train-tokenizer", "plant-recall"),
)
HYBRID = "smollm2-135m-instruct-eva-hybrid"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a layer of each type."""
    return save(tmp_path_factory.mktemp("models") / "mixed", mixed("llama"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with full attention everywhere."""
    return save(tmp_path_factory.mktemp("models") / "full", hf_config("llama"))


# Starting


def test_help_lists_the_commands_and_needs_no_torch() -> None:
    code = "import sys, tools.cli as c; c.main(['--help']); sys.exit('torch' in sys.modules)"
    done = python("-c", code)
    assert (done.code, done.err) == (0, "")
    assert all(f"│ {command} " in done.out for command in (*COMMANDS, "bench"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_module_runs_with_the_options_of_its_command(command: str) -> None:
    module = f"tools.{command.replace('-', '_')}"
    alone, inside = python("-m", module, "--help"), run(command, "--help")
    assert alone.code == inside.code == 0
    assert options_of(alone.out) == options_of(inside.out) > {"--help"}


def options_of(text: str) -> set[str]:
    return {word for word in text.split() if word.startswith("--")}


def test_a_module_exits_like_its_command() -> None:
    arguments = ("--prompts-file", "no/such/file")
    alone, inside = python("-m", "tools.generate", *arguments), run("generate", *arguments)
    assert alone == inside == (2, "", "error: no/such/file: No such file or directory\n")


def test_without_arguments_zoo_explains_itself() -> None:
    assert run() == run("--help")


def test_the_version_is_that_of_the_distribution() -> None:
    assert run("--version").out.startswith("zoo ")


# Mistakes


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def break_folder(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return break_folder


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncated, "truncated or damaged"),
    "wrong_shape": (changed(lambda t: t.update({NORM: torch.ones(3)})), NORM),
    "missing": (changed(lambda t: t.pop(NORM)), NORM),
    "extra": (changed(lambda t: t.update({"model.other": torch.ones(3)})), "model.other"),
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "bad_config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize(("break_folder", "what"), BROKEN.values(), ids=BROKEN)
def test_a_broken_checkpoint_is_one_line(
    folder: Path, tmp_path: Path, break_folder: Callable[[Path], object], what: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    break_folder(broken)
    assert_mistake(run("generate", broken, "Numbers"), what)


# Arguments, and what the message must say. MODEL is the saved model; files are those of `inputs`.
MISTAKES: dict[str, tuple[str, str]] = {
    "unknown_command": ("genrate", "generate"),
    "unknown_option": ("generate MODEL a --temprature 1", "--temprature"),
    "bad_number": ("generate MODEL a --top-k many", "--top-k"),
    "bad_choice": ("generate MODEL a --impl fast", "'auto', 'triton', 'flex', 'reference'"),
    "out_of_range": ("generate MODEL a --top-p 2", "top_p"),
    "unknown_name": ("generate pythia-16m-eva a", "pythia-160m-eva"),
    "missing_folder": ("generate ./nowhere a", "./nowhere"),
    "missing_recipe": ("info nowhere.toml", "nowhere.toml"),
    "missing_weights": ("generate pythia-70m a --weights ./nowhere", "nowhere"),
    "unknown_device": ("generate MODEL a --device gpu", "gpu"),
    "unknown_dtype": ("generate MODEL a --dtype int8", "int8"),
    "missing_prompts": ("generate MODEL --prompts-file nowhere.txt", "nowhere.txt"),
    "empty_prompt": ("generate MODEL --prompt=", "empty"),
    "empty_stdin": ("generate MODEL", "empty"),
    "empty_prompts": ("generate MODEL --prompts-file empty.txt", "empty.txt"),
    "empty_line": ("generate MODEL --prompts-file gap.txt", "line 2"),
    "no_json": ("generate MODEL --prompts-file gap.jsonl", "line 1"),
    "latin1_prompts": ("generate MODEL --prompts-file latin1.txt", "UTF-8"),
    "prompt_too_long": ("generate MODEL --prompts-file long.txt", str(CONTEXT)),
    "no_new_tokens": ("generate MODEL a --max-new-tokens 0", "max_new_tokens"),
    "unknown_layer": ("generate MODEL a --layers 1,3", "no layer 3 in a model of 3 layers"),
    "bad_layers": ("generate MODEL a --layers 1;2", "1;2"),
    "bad_chunk": ("generate MODEL a --chunk-size 3", "chunk_size must divide window_size"),
    "bad_sinks": ("info MODEL --sink-size 3", "sink_size"),
    "no_eva_layer": ("generate FULL a --window-size 8", "--window-size has no effect"),
    "no_other_layer": ("info FULL --attention window_attention", "--attention has no effect"),
    "no_tokenizer": ("generate pythia-70m a --weights random", "tokenizer"),
    "context": ("info MODEL --context 257", "256"),
    "no_match": ("list nothing-like-this", "nothing-like-this"),
    "no_text_option": ("perplexity MODEL", "--text"),
    "missing_text": ("perplexity MODEL --text nowhere.txt --out OUT", "nowhere.txt"),
    "latin1_text": ("perplexity MODEL --text latin1.txt --out OUT", "UTF-8"),
    "damaged_text": ("perplexity MODEL --text damaged.xz --out OUT", "damaged.xz"),
    "no_text": ("perplexity MODEL --text empty.txt --out OUT", "holds no text"),
    "short_text": ("perplexity MODEL --text gap.txt --window 64 --out OUT", "0 windows of 64"),
    "long_window": ("perplexity MODEL --text long.txt --window 512 --out OUT", str(CONTEXT)),
    "no_batch": (
        "perplexity MODEL --text long.txt --window 64 --batch-size 0 --out OUT",
        "batch_size",
    ),
    "no_out_folder": ("passkey MODEL --length 256 --out nowhere/rows.jsonl", "nowhere"),
    "missing_hay": ("passkey MODEL --hay nowhere.txt --length 256 --out OUT", "nowhere.txt"),
    "unknown_wording": ("passkey MODEL --wording poem --out OUT", "magic, passkey"),
    "long_passkey": ("passkey MODEL --length 512 --out OUT", str(CONTEXT)),
    "short_passkey": ("passkey MODEL --length 20 --out OUT", "cannot hold"),
    "short_hay": ("passkey MODEL --hay gap.txt --length 256 --out OUT", "fewer than the 256"),
    "no_prompts": ("passkey MODEL --n 0 --length 256 --out OUT", "n must be at least 1"),
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a test, with files that are wrong in one way each."""
    for name, content in {
        "empty.txt": b"",
        "gap.txt": b"one\n\nthree\n",
        "gap.jsonl": b"{'prompt': 'one'}\n",
        "latin1.txt": "caf\xe9\n".encode("latin-1"),
        "long.txt": b"many words " * 200,
        "damaged.xz": b"\xfd7zXZ\x00 and then something else",
    }.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("line", "what"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(
    folder: Path, full: Path, inputs: Path, line: str, what: str
) -> None:
    names = {"MODEL": str(folder), "FULL": str(full), "OUT": "rows.jsonl"}
    before = contents(inputs)
    done = run(*(names.get(word, word) for word in line.split()))
    assert_mistake(done, what)
    assert contents(inputs) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_ctrl_c_ends_a_chat_with_130_and_no_word(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tools.chat", str(folder), "--max-new-tokens", "2"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job, which this test run may be, hands on that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as chat:
        assert chat.stdin is not None
        assert chat.stdout is not None
        assert chat.stderr is not None
        chat.stdin.write(b"Numbers\n")
        chat.stdin.flush()
        chat.stdout.readline()  # it has answered, and waits for the next line
        chat.send_signal(signal.SIGINT)
        assert chat.wait(timeout=60) == 130
        assert b"weights from" in (err := chat.stderr.read())
        assert len(err.splitlines()) == 1


def test_a_closed_pipe_ends_a_command_without_a_word() -> None:
    # More output than a pipe holds, to a reader that has gone.
    code = "import sys, tools.display as d; from tools.entry import run_command\n"
    code += "def f() -> None:\n    for i in range(9999): d.print_json({'i': i, 'x': 'x' * 99})\n"
    code += "sys.argv = ['f']; sys.exit(run_command(f, 'f'))"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        assert command.stderr is not None
        command.stdout.readline()
        command.stdout.close()
        assert command.wait(timeout=60) == 141
        assert command.stderr.read() == b""


def test_a_terminal_without_the_characters_of_a_text_shows_others() -> None:
    code = "import sys; from tools.entry import run_command\n"
    code += "sys.argv = ['f']; sys.exit(run_command(lambda: print('caf\\xe9'), 'f'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"caf?\n", b"")


# zoo list


def test_list_shows_every_name() -> None:
    rows = [json.loads(line) for line in run("list", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == zoo.list()
    shown = run("list").out.splitlines()[2:]
    assert [line.split()[0] for line in shown] == zoo.list()


def test_list_says_whose_weights_are_trained() -> None:
    rows = {row["name"]: row for row in map(json.loads, run("list", "--json").out.splitlines())}
    assert rows["smollm2-135m-instruct"]["weights"] == "published"
    assert rows["smollm2-135m-instruct-eva"]["weights"] == "untrained"
    assert rows["smollm2-135m-instruct-eva-hybrid"]["weights"] == "trained"


def test_list_takes_a_part_of_a_name_or_a_pattern() -> None:
    def names(pattern: str) -> list[str]:
        lines = run("list", pattern, "--json").out.splitlines()
        return [json.loads(line)["name"] for line in lines]

    assert names("a-70m") == ["pythia-70m", "pythia-70m-eva", "pythia-70m-eva-hybrid"]
    assert names("pythia-1?0m-*") == ["pythia-160m-eva", "pythia-160m-eva-hybrid"]


def test_the_sizes_in_the_list_are_those_of_the_models() -> None:
    families = {base.preset: base.family for base in BASES.values()}
    found = {}
    for name, family in families.items():
        with torch.device("meta"):
            model = build(read_config(preset(family, name)), "auto")
        found[name] = (len(model.layers), sum(p.numel() for p in model.parameters()))
    assert found == SIZES


# zoo info


@pytest.mark.parametrize("options", [{}, {"--layers": "0"}, {"--layers": "none"}], ids=str)
def test_info_counts_what_a_loaded_model_has(folder: Path, options: dict[str, str]) -> None:
    words = [word for option in options.items() for word in option]
    found = json.loads(run("info", folder, "--context", 100, "--json", *words).out)
    exact = parse_layers(options["--layers"]) if options else None
    model = zoo.load(
        folder,
        layer_types=None
        if exact is None
        else ["full_attention" if i in exact else "eva_attention" for i in range(3)],
    )
    cache = model.new_cache(1, 100)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["cache"]["bytes"] == cache.nbytes
    for kind, layer in zip(model.config.layer_types, cache.layers, strict=True):
        size = sum(tensor.nbytes for tensor in layer.tensors())
        assert found["cache"]["layer_bytes"][kind] == size
        assert found["cache"]["layer_bytes_per_token"][kind] == size / 100
    everywhere = zoo.load(folder, layer_types=["full_attention"] * 3)
    assert found["cache"]["bytes_with_full_attention"] == everywhere.new_cache(1, 100).nbytes
    plain = sum(p.numel() for p in everywhere.parameters())
    assert found["eva_parameters"] == found["parameters"] - plain


def test_info_of_a_registered_name_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    done = run("info", HYBRID)
    assert done.code == 0
    assert "134,731,562 parameters, 216,554 of them for EVA" in done.out
    assert "7,18,20,23" in done.out


def test_half_the_bytes_make_half_the_cache_of_full_attention() -> None:
    def size(dtype: str) -> int:
        cache = json.loads(run("info", "pythia-70m", "--json", "--dtype", dtype).out)["cache"]
        return int(cache["bytes"])

    assert size("float32") == 2 * size("bfloat16")


def test_no_option_is_lost_in_a_typer_that_takes_its_value_for_its_name() -> None:
    """typer 0.27 called an option --RULE whose value was shown as RULE."""
    groups = [group.typer_instance for group in cli.app.registered_groups]
    commands = [x for app in (cli.app, *groups) if app for x in app.registered_commands]
    assert {*COMMANDS} < {x.name for x in commands if x.name} | {"bench"}
    for command in commands:
        assert command.callback is not None
        for parameter in inspect.signature(command.callback).parameters.values():
            for option in getattr(parameter.annotation, "__metadata__", ()):
                if isinstance(option, OptionInfo) and not str(option.default).startswith("--"):
                    shown = (option.metavar or "").casefold()
                    assert shown != parameter.name, (command.name, parameter.name)
