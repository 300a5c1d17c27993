"""Small runs of `zoo finetune`: a tiny model on disk, texts as tokens, recipes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import zoo
from tests.tiny import SHORT_WINDOW, hf_config, make_model, make_tokenizer
from tools.training.data.shards import tokenize

ROOT = Path(__file__).parents[1]

ALIGN = """
[[stages]]
name = "align"
loss = "attention_mse"
train = ["*.attention.*"]
steps = 6
lr = 1e-2
dtype = "float32"
batch_size = 4
context = 64
"""
DISTILL = """
[[stages]]
name = "distill"
loss = { logit_kl = 1.0, cross_entropy = 0.1 }
train = ["*"]
steps = 8
lr = 3e-3
warmup = 2
dtype = "float32"
batch_size = 4
context = 64
seed = 5
"""


def make_inputs(folder: Path, family: str = "llama", **fields: object) -> None:
    """Writes folder/base, a model, and folder/tokens, its texts."""
    full = hf_config(
        family, layer_types=["full_attention"] * 3, eva=SHORT_WINDOW.to_dict(), **fields
    )
    model = make_model(full)
    model.tokenizer = make_tokenizer()
    zoo.save(model, folder / "base")
    words = ["the", "server", "answers", "one", "request", "after", "another", "and", "keeps"]
    for name, step in (("a", 3), ("b", 5)):
        texts = (
            " ".join(words[(i * step + j * j) % len(words)] for j in range(20 + 7 * (i % 11)))
            for i in range(60)
        )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    sources = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    tokenize(sources, model.tokenizer, folder / "tokens", jobs=1)


def write_recipe(folder: Path, *stages: str, exact: Sequence[int] = (1,), eva: str = "") -> Path:
    """A recipe beside the base."""
    path = folder / "recipe.toml"
    head = f'base = "./base"\n[eva]\nwindow_size = 8\nchunk_size = 4\n{eva}\n'
    path.write_text(head + f"[layers]\nexact = {list(exact)}\n" + "".join(stages))
    return path


def command(folder: Path, out: str, *options: str) -> list[str]:
    """What follows the program's name."""
    paths = ["--tokens", str(folder / "tokens"), "--out", str(folder / out)]
    return [str(folder / "recipe.toml"), *paths, "--device", "cpu", *options]


def finetune(
    folder: Path, out: str, *options: str, processes: int = 1, timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Runs the command in processes of its own."""
    words = [sys.executable, "-m", "tools.finetune"]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        words = [sys.executable, *launcher, "--standalone", "-m", "tools.finetune"]
    return subprocess.run(
        [*words, *command(folder, out, *options)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def rows(folder: Path, out: str, stage: str) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of a stage."""
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [row for row in found if row["stage"] == stage]
