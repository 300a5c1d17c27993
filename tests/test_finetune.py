"""`zoo finetune`: what trains, what a run leaves behind, and how it goes on after a kill."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import zoo
from tests.tiny import make_tokenizer
from tests.training_runs import (
    ALIGN,
    DISTILL,
    ROOT,
    command,
    finetune,
    make_inputs,
    rows,
    write_recipe,
)
from tools.cli import main
from tools.display import progress
from tools.training.guard import Diverged, Guard
from tools.training.models import Conversion
from tools.training.ranks import Ranks
from tools.training.run import RunOptions, Screen, run_stages
from tools.training.trainer import Loop

LOSSES = ("loss", "grad_norm")
LORA = 'lora = { rank = 2, alpha = 4.0, targets = ["*.q_proj"] }\n'
CPU = Ranks(0, 1, torch.device("cpu"))


class Killed(BaseException):
    """Stands for a kill between two steps."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    make_inputs(folder, tie_word_embeddings=True)
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    for name in ("base", "tokens"):
        (tmp_path / name).symlink_to(shared / name)
    return tmp_path


def run(folder: Path, out: str, *options: str) -> int:
    return main(["finetune", *command(folder, out, *options)])


def weights(folder: Path, out: str, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / out / stage / "model.safetensors")


def losses(folder: Path, out: str, stage: str) -> list[tuple[float, ...]]:
    return [tuple(row[key] for key in LOSSES) for row in rows(folder, out, stage)]


def assert_same(folder: Path, one: str, two: str, stage: str) -> None:
    """Bit for bit: losses, norms and weights."""
    assert losses(folder, one, stage) == losses(folder, two, stage)
    first, second = weights(folder, one, stage), weights(folder, two, stage)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_run_learns_and_leaves_models_that_load(folder, capsys):
    write_recipe(folder, ALIGN, DISTILL.replace("steps = 8", "steps = 30"))
    assert run(folder, "run") == 0
    assert capsys.readouterr().out.strip() == str(folder / "run" / "distill")
    found = [row["logit_kl"] for row in rows(folder, "run", "distill")]
    assert sum(found[-5:]) < 0.7 * sum(found[:5])
    model = zoo.load(folder / "run" / "distill")
    assert model.config.layer_types == ("eva_attention", "full_attention", "eva_attention")
    assert model.tokenizer is not None
    base, aligned = (
        load_file(folder / "base" / "model.safetensors"),
        weights(folder, "run", "align"),
    )
    changed = {name for name in base if not torch.equal(base[name], aligned[name])}
    assert changed
    assert all(".self_attn." in name for name in changed)
    assert not any("layers.1." in name for name in changed)  # exact: nothing to align
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert facts["command"].startswith("zoo finetune")
    assert facts["torch"] == torch.__version__
    assert not (folder / "run" / "checkpoints" / "distill").exists()


def test_micro_batches_and_recomputed_blocks_change_nothing(folder):
    write_recipe(folder, DISTILL)
    assert run(folder, "whole") == 0
    assert run(folder, "parts", "--rows", "1", "--checkpointing") == 0
    for one, two in zip(
        losses(folder, "whole", "distill"), losses(folder, "parts", "distill"), strict=True
    ):
        assert two == pytest.approx(one, rel=1e-4)  # float32, sums in another order


@pytest.mark.parametrize("noise", [False, True])
def test_a_killed_run_goes_on_bit_for_bit(folder, noise):
    write_recipe(folder, ALIGN, DISTILL, eva="training_noise = true" if noise else "")
    _run_until(folder, "whole", None)
    for line in ("align 5/6", "distill 2/8", "distill 7/8"):
        with pytest.raises(Killed):
            _run_until(folder, "killed", line)
    _run_until(folder, "killed", None)
    for stage in ("align", "distill"):
        assert_same(folder, "whole", "killed", stage)


@pytest.mark.parametrize("lora", [False, True])
def test_a_kill_while_the_model_is_written_repeats_no_step(folder, monkeypatch, lora):
    low = DISTILL.replace('train = ["*"]', 'train = ["*.attend.*"]').replace("float32", "bfloat16")
    write_recipe(folder, low + LORA if lora else DISTILL)
    _run_until(folder, "whole", None)
    _kill_while_it_is_written(folder, "killed", monkeypatch)
    said = _run_until(folder, "killed", None)
    assert said == ["stage distill: 8 steps, from step 8"]
    assert_same(folder, "whole", "killed", "distill")
    assert _files(folder / "killed") == _files(folder / "whole")


@pytest.mark.slow
def test_several_processes_write_the_model_of_a_run_that_has_trained(folder, monkeypatch):
    write_recipe(folder, DISTILL)
    _run_until(folder, "whole", None)
    _kill_while_it_is_written(folder, "killed", monkeypatch)
    result = finetune(folder, "killed", "--parallel", "fsdp", processes=2)
    assert result.returncode == 0, result.stderr
    assert "from step 8" in result.stderr
    assert_same(folder, "whole", "killed", "distill")


def _kill_while_it_is_written(folder: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(model: zoo.CausalLM, folder: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "save", killed)
        with pytest.raises(Killed):
            _run_until(folder, out, None)
    assert not (folder / out / "distill").exists()


def _run_until(folder: Path, out: str, line: str | None) -> list[str]:
    """What is said. `line`: what a line begins with at which the run is killed."""
    said = []

    def say(text: str) -> None:
        said.append(text)
        if line is not None and text.startswith(line):
            raise Killed

    options = RunOptions(tokens=folder / "tokens", out=folder / out, loop=Loop(save_every=3))
    run_stages(
        Conversion.read(str(folder / "recipe.toml")), options, CPU, Screen(progress, say, "test")
    )
    return said


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(folder):
    write_recipe(folder, DISTILL.replace("steps = 8", "steps = 40"))
    assert finetune(folder, "whole", "--save-every", "7").returncode == 0
    for kill_at in (9, 23):
        words = [sys.executable, "-m", "tools.finetune"]
        process = subprocess.Popen(
            [*words, *command(folder, "killed", "--save-every", "7")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        metrics = folder / "killed" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < kill_at:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "killed" / "distill").exists()
    result = finetune(folder, "killed", "--save-every", "7")
    assert result.returncode == 0
    assert "from step 21" in result.stderr
    assert_same(folder, "whole", "killed", "distill")


@pytest.mark.slow
def test_a_kill_at_any_change_of_a_name_loses_nothing(folder):
    low = DISTILL.replace('"distill"', '"low"').replace('train = ["*"]', 'train = ["*.attend.*"]')
    write_recipe(folder, low.replace("steps = 8", "steps = 4") + LORA, DISTILL)
    assert run(folder, "whole", "--save-every", "3") == 0
    files = _files(folder / "whole")
    for count in range(1, 200):
        out = f"killed-{count}"
        child = os.fork()
        if not child:
            _die_at_a_rename(count)
            os._exit(run(folder, out, "--save-every", "3"))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not status:
            break  # there are no more
        assert status == 7
        assert run(folder, out, "--save-every", "3") == 0
        assert _files(folder / out) == files
        for stage in ("low", "distill"):
            assert_same(folder, "whole", out, stage)
    assert 15 < count < 100


def _die_at_a_rename(count: int) -> None:
    left = [count]

    def dying(rename):
        def instead(*paths):
            left[0] -= 1
            if not left[0]:
                os._exit(7)
            return rename(*paths)

        return instead

    os.rename, os.replace = dying(os.rename), dying(os.replace)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "parallel"), [("llama", "fsdp"), ("gpt_neox", "ddp")])
def test_two_processes_have_the_losses_of_one(tmp_path, family, parallel):
    make_inputs(tmp_path, family)
    write_recipe(tmp_path, ALIGN, DISTILL)
    (tmp_path / "text.txt").write_text("the server answers one request after another " * 60)
    checks = ["--check-every", "4", "--check-text", str(tmp_path / "text.txt")]
    checks += ["--check-context", "64", "--check-windows", "4"]
    assert finetune(tmp_path, "one", *checks).returncode == 0
    options = ("--rows", "1", "--parallel", parallel)  # two parts each
    result = finetune(tmp_path, "two", *checks, *options, processes=2)
    assert result.returncode == 0, result.stderr
    assert "stage align: 2 processes, gradients averaged (DDP)" in result.stderr
    how = "parameters sharded (FSDP2)" if parallel == "fsdp" else "gradients averaged (DDP)"
    assert f"stage distill: 2 processes, {how}" in result.stderr
    for stage in ("align", "distill"):
        for one, two in zip(
            losses(tmp_path, "one", stage), losses(tmp_path, "two", stage), strict=True
        ):
            assert two == pytest.approx(one, rel=1e-4)
        for one, two in zip(
            rows(tmp_path, "one", stage)[3::4], rows(tmp_path, "two", stage)[3::4], strict=True
        ):
            assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-4)
        # Not weights: a bias of keys has no gradient but for rounding, which Adam makes steps of.
        ids = torch.arange(200).view(2, 100)
        with torch.inference_mode():
            one, two = (zoo.load(tmp_path / out / stage)(ids) for out in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(folder):
    write_recipe(folder, DISTILL.replace("steps = 8", "steps = 9"))
    assert finetune(folder, "whole").returncode == 0
    with pytest.raises(Killed):
        _run_until(folder, "other", "distill 5/9")
    result = finetune(folder, "other", "--parallel", "fsdp", processes=2)
    assert result.returncode == 0, result.stderr
    assert "from step 3" in result.stderr
    for one, two in zip(
        losses(folder, "whole", "distill"), losses(folder, "other", "distill"), strict=True
    ):
        assert two == pytest.approx(one, rel=1e-4)


def test_adapters_train_and_are_merged(folder):
    lora = 'lora = { rank = 2, alpha = 4.0, targets = ["*.q_proj", "*.down_proj"] }\n'
    stage = DISTILL.replace("steps = 8", "steps = 40").replace("lr = 3e-3", "lr = 1e-2")
    write_recipe(folder, stage.replace('train = ["*"]', 'train = ["*.attend.*"]') + lora)
    assert run(folder, "run") == 0
    found = [row["loss"] for row in rows(folder, "run", "distill")]
    assert sum(found[-10:]) < 0.9 * sum(found[:10])
    base, now = load_file(folder / "base" / "model.safetensors"), weights(folder, "run", "distill")
    changed = {name for name in base if not torch.equal(base[name], now[name])}
    assert changed
    assert all(name.endswith(("q_proj.weight", "down_proj.weight")) for name in changed)
    small = folder / "run" / "distill-adapter"
    size = sum(file.stat().st_size for file in small.glob("*.safetensors"))
    assert size < 0.3 * (folder / "run" / "distill" / "model.safetensors").stat().st_size
    whole, over_base = zoo.load(folder / "run" / "distill"), zoo.load(small)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, over_base.get_parameter(name)), name


def test_a_stage_that_trains_matrices_makes_no_adapter(folder):
    write_recipe(folder, ALIGN)
    assert run(folder, "run") == 0
    assert not (folder / "run" / "align-adapter").exists()


def test_a_bfloat16_stage_keeps_float32_weights(folder):
    write_recipe(folder, DISTILL)
    assert run(folder, "wide") == 0
    write_recipe(folder, DISTILL.replace("float32", "bfloat16"))
    assert run(folder, "low") == 0
    found = weights(folder, "low", "distill")
    assert all(x.dtype == torch.float32 for x in found.values())
    changed = found["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(changed, changed.bfloat16().float())
    wide, low = (losses(folder, out, "distill")[0] for out in ("wide", "low"))
    assert low != wide
    assert low == pytest.approx(wide, rel=0.05)  # 3 layers, each some 2^-8 off


def test_random_weights_train_from_scratch_with_the_tokenizer_of_the_tokens(folder):
    stage = DISTILL.replace("{ logit_kl = 1.0, cross_entropy = 0.1 }", '"cross_entropy"')
    path = write_recipe(folder, stage.replace("train = [", "clip = 0.0\ntrain = ["))
    path.write_text(path.read_text().replace("./base", "tiny"))
    options = ["--weights", "random", "--tokenizer", str(folder / "base")]
    assert run(folder, "run", *options) == 0
    found = [row["cross_entropy"] for row in rows(folder, "run", "distill")]
    assert found[0] == pytest.approx(math.log(4096), rel=0.01)
    assert found[-1] < 0.95 * found[0]
    model = zoo.load(folder / "run" / "distill")
    assert model.tokenizer is not None
    assert model.tokenizer.encode("server") == make_tokenizer().encode("server")


def test_random_weights_teach_nothing(folder, capsys):
    path = write_recipe(folder, DISTILL)
    path.write_text(path.read_text().replace("./base", "tiny"))
    assert run(folder, "run", "--weights", "random") == 2
    assert "random weights are not" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_before_the_weights_change(folder, capsys):
    write_recipe(folder, DISTILL.replace("lr = 3e-3", "lr = 1e30"))
    assert run(folder, "run", "--save-every", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: stage 'distill' stopped before step")
    bad = load_file(folder / "run" / "bad-batch" / "distill.safetensors")
    assert bad["ids"].shape == (4, 64)
    assert bad.keys() == {"ids", "labels", "seq_start"}
    assert not (folder / "run" / "distill").exists()


def test_the_guard_knows_a_spike_from_a_large_norm():
    guard = Guard(10.0, [1.0] * 15)
    guard.check(2.0, 50.0)  # too early to say
    guard.check(2.0, 9.9)
    with pytest.raises(Diverged, match="11, more than 10 times the usual 1"):
        guard.check(2.0, 11.0)
    for loss, norm in ((float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(Diverged):
            Guard(0.0).check(loss, norm)
    Guard(0.0, [1.0] * 64).check(1.0, 1e9)
    with pytest.raises(Diverged, match="the usual 0"):  # no gradient so far
        Guard(10.0, [0.0] * 64).check(1.0, 1.0)


def test_checks_are_measured_and_written(folder):
    write_recipe(folder, DISTILL)
    text = folder / "text.txt"
    text.write_text("the server answers one request after another " * 200)
    options = ["--check-every", "4", "--check-text", str(text), "--check-context", "128"]
    assert run(folder, "run", *options, "--check-windows", "2", "--tensorboard") == 0
    found = {row["step"]: row.get("perplexity") for row in rows(folder, "run", "distill")}
    assert [step for step, value in found.items() if value is not None] == [3, 7]
    assert run(folder, "plain") == 0
    assert losses(folder, "run", "distill") == losses(folder, "plain", "distill")
    assert any((folder / "run" / "tensorboard" / "distill").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "3"], "rows must divide the 4"),
        (["--share", "a=x"], "--share must be SOURCE=NUMBER"),
        (["--share", "c=1"], "c"),
        (["--check-every", "2"], "--check-text, --check-hay or both"),
        (["--weights", "random"], "random"),
        (["--speed", "9"], "--speed is for --dry-run"),
        (["--device", "gpu"], "cannot use device 'gpu'"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, options, message):
    write_recipe(folder, DISTILL)
    assert run(folder, "run", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_folder_of_another_run_is_refused(folder, capsys):
    write_recipe(folder, DISTILL)
    assert run(folder, "run") == 0
    write_recipe(folder, DISTILL, exact=(0,))
    assert run(folder, "run") == 2
    assert "another recipe" in capsys.readouterr().err
    (folder / "mine").mkdir()
    (folder / "mine" / "note.txt").write_text("mine")
    assert run(folder, "mine") == 2
    assert (folder / "mine" / "note.txt").read_text() == "mine"


def test_other_weights_of_the_same_name_are_refused(folder, capsys):
    """By `--weights`, and where a folder's weights have changed."""
    write_recipe(folder, DISTILL)
    for name in ("one", "two"):
        shutil.copytree(folder / "base", folder / name)
    model = zoo.load(folder / "base")
    with torch.no_grad():
        model.get_parameter("layers.2.mlp.down_proj.weight").mul_(1.01)
    zoo.save(model, folder / "two")
    one = ("--weights", str(folder / "one"))
    assert run(folder, "run", *one) == 0
    assert run(folder, "run", *one) == 0
    capsys.readouterr()
    two = str(folder / "two")
    assert run(folder, "run", "--weights", two) == 2
    error = capsys.readouterr().err.strip()
    assert f"another --weights ({one[1]}, now {two}); go on" in error
    shutil.copytree(two, folder / "one", dirs_exist_ok=True)
    assert run(folder, "run", *one) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"is of a run with other weights of {folder / 'base'} (folder {one[1]}" in error
    facts = json.loads((folder / "run" / "run.json").read_text())
    assert f"checksum {facts['base_checksum']}; now folder" in error


@pytest.mark.parametrize(
    ("old", "new", "options", "message"),
    [
        ('train = ["*"]', 'train = ["x"]', (), "'x' in train fits no parameter"),
        ("context = 64", "context = 512", (), "exceeds the model's 256"),
        ("batch_size = 4", "batch_size = 2", ("--rows", "4"), "rows must divide the 2"),
        ('"distill"', '"bad-batch"', (), "cannot be called 'bad-batch'"),
    ],
)
def test_what_would_stop_a_later_stage_stops_the_first(folder, capsys, old, new, options, message):
    write_recipe(folder, ALIGN, DISTILL.replace(old, new))
    for more in ((), ("--dry-run",)):
        assert run(folder, "run", *options, *more) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (folder / "run").exists()


def test_another_tokenizer_is_refused_not_ignored(folder, capsys):
    write_recipe(folder, DISTILL)
    (folder / "other").mkdir()
    for file in (folder / "base").glob("*.json"):
        (folder / "other" / file.name).write_text(file.read_text().replace("endoftext", "end"))
    assert run(folder, "run", "--tokenizer", str(folder / "other")) == 2
    assert "this model has another one" in capsys.readouterr().err
    assert run(folder, "run", "--tokenizer", str(folder / "base")) == 0


def test_a_second_process_is_kept_out_of_the_folder(folder, capsys):
    write_recipe(folder, DISTILL)
    statuses = []

    def say(line: str) -> None:
        if line.startswith("distill 2/8"):
            statuses.append(run(folder, "run"))

    options = RunOptions(tokens=folder / "tokens", out=folder / "run", loop=Loop())
    conversion = Conversion.read(str(folder / "recipe.toml"))
    run_stages(conversion, options, CPU, Screen(progress, say, "test"))
    assert statuses == [2]
    assert "another process is writing" in capsys.readouterr().err
    assert len(rows(folder, "run", "distill")) == 8


@pytest.mark.parametrize("lost", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(folder, capsys, lost):
    write_recipe(folder, DISTILL)
    _run_until(folder, "whole", None)
    with pytest.raises(Killed):
        _run_until(folder, "damaged", "distill 7/8")
    leftover = folder / "damaged" / ".distill.01234567.new"
    leftover.mkdir()
    newest = folder / "damaged" / "checkpoints" / "distill" / "step-00000006"
    (newest / lost).write_bytes((newest / lost).read_bytes()[:200])
    capsys.readouterr()
    assert run(folder, "damaged") == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"error: cannot go on from {newest}: ")
    shutil.rmtree(newest)
    assert run(folder, "damaged") == 0
    assert "from step 3" in capsys.readouterr().err
    assert_same(folder, "whole", "damaged", "distill")
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("every", "message"), [("3", "cannot write the checkpoint"), ("0", "cannot write")]
)
def test_a_full_disk_is_one_line_and_loses_nothing(folder, capsys, every, message):
    write_recipe(folder, DISTILL)
    _run_until(folder, "whole", None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # less than the weights
    try:
        assert run(folder, "full", "--save-every", every) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list((folder / "full").rglob("*.new"))
    assert run(folder, "full", "--save-every", every) == 0
    assert_same(folder, "whole", "full", "distill")


@pytest.mark.slow
def test_what_stops_the_first_process_stops_all(folder):
    write_recipe(folder, DISTILL)
    (folder / "mine").mkdir()
    (folder / "mine" / "note.txt").write_text("mine")
    result = finetune(folder, "mine", processes=2)
    assert result.returncode == 1  # torchrun's own
    assert "error: will not write to" in result.stderr
    assert "error: process 0 stopped: will not write to" in result.stderr
    assert "RuntimeError" not in result.stderr


def test_a_dry_run_prints_the_plan_and_writes_nothing(folder, capsys):
    write_recipe(folder, ALIGN, DISTILL)
    assert run(folder, "run", "--dry-run", "--speed", "1000") == 0
    printed = capsys.readouterr().out
    for part in ("stage align", "stage distill", "8 steps of 4 x 64", "memory", "passes over all"):
        assert part in printed
    assert not (folder / "run").exists()


def test_a_dry_run_of_several_processes_is_printed_by_the_first(folder, capsys, monkeypatch):
    write_recipe(folder, DISTILL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, options, status in (("0", [], 0), ("1", [], 0), ("0", ["--rows", "4"], 2)):
        monkeypatch.setenv("RANK", rank)
        assert run(folder, "run", "--dry-run", *options) == status
        said = capsys.readouterr()
        if rank == "1":
            assert said.out + said.err == ""
        elif status:
            assert "rows must divide the 2 of a process, not be 4" in said.err
        else:
            assert "with 2 rows at a time" in said.out
